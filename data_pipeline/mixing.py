"""Which sample comes at which place of the endless stream of batches: a function of (seed, place) alone.

A bucket is an endless sequence of samples of one shape, taken by the batch. It is woven of streams, one for each
dataset, each of which goes through its samples again and again, every pass in another order. In epoch e the bucket
has given away floor((e + 1) r / B) batches in all, where r is its samples an epoch and B the batch size. So nothing
is dropped and nothing repeated to fill a batch: what is left of a bucket at the end of an epoch opens its first batch
in the next. All this is closed arithmetic of whole numbers, and so a run resumes at any batch without going through
those before.
"""

import bisect
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from data_pipeline.buckets import Shape

Place = tuple[int, int, int, Shape]  # (position in the global stream, dataset, sample in it, shape to train in)


def epoch_order(n: int, seed: int, epoch: int, stream: str = "") -> np.ndarray:
    """The order of `n` samples in `epoch` (0, 1, ...): a permutation [n] int64, a function of all four."""
    return np.argsort(_random_bits(n, seed, epoch, stream), kind="stable")


def _random_bits(n: int, seed: int, epoch: int, stream: str) -> np.ndarray:
    """[n] uint64: the raw stream of PCG64, which numpy promises never to change (Generator.permutation may)."""
    words = [seed, epoch, zlib.crc32(f"epoch order{stream}".encode())]
    return np.asarray(np.random.PCG64(np.random.SeedSequence(words)).random_raw(n))


def weave(place: int, weights: Sequence[int]) -> tuple[int, int]:
    """-> (which sequence comes at this place, its how-many-eth element that is), for whole positive weights.

    Of the first k places the first sequence has exactly floor(k w / W); the others share out the rest by the same
    rule. So every share is exact to within one element for each sequence before it, at any place.
    """
    total = sum(weights)
    for which, weight in enumerate(weights[:-1]):
        before = place * weight // total
        if (place + 1) * weight // total > before:
            return which, before
        place, total = place - before, total - weight
    return len(weights) - 1, place


@dataclass
class Stream:
    """The samples of one dataset in one bucket, again and again.

    samples [n] int64: their numbers in the dataset. rate: samples an epoch. window: with w > 0 the shards are put
    in random order and samples mixed among w shards at a time; `shards` [n] says which one each is in.
    """

    dataset: int
    samples: np.ndarray
    rate: Fraction
    window: int = 0
    shards: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _pass: int = field(default=-1, init=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False)

    def sample(self, k: int, seed: int, name: str) -> int:
        """The k-th of the endless stream."""
        n = len(self.samples)
        if k // n != self._pass:
            self._pass = k // n
            self._order = self.samples[self._ordered(seed, name)]
        return int(self._order[k % n])

    def _ordered(self, seed: int, name: str) -> np.ndarray:
        n = len(self.samples)
        if not self.window:
            return epoch_order(n, seed, self._pass, name)
        # All buckets of a dataset go through its shards in one order, so that they need the same ones at a time.
        turns = np.empty(int(self.shards.max()) + 1, np.int64)
        order = epoch_order(len(turns), seed, self._pass, f" of shards {self.dataset}")
        turns[order] = np.arange(len(turns))
        return np.lexsort((_random_bits(n, seed, self._pass, name), turns[self.shards] // self.window))


@dataclass
class Bucket:
    """One shape, and the streams that fill it."""

    shape: Shape
    streams: list[Stream]

    def __post_init__(self) -> None:
        self.rate = sum((s.rate for s in self.streams), Fraction(0))
        scale = math.lcm(*(s.rate.denominator for s in self.streams))
        self.weights = [int(s.rate * scale) for s in self.streams]


class Order:
    """The places of all global batches of `batch_size`, each of one bucket; an epoch is the sum of all rates."""

    def __init__(self, buckets: list[Bucket], batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.samples = sum((b.rate for b in buckets), Fraction(0))
        self._single = len(buckets) == 1 and len(buckets[0].streams) == 1
        self._first = 0  # of the batches of the epoch at hand, whose buckets and ordinals are in the plan
        self._plan: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty(0, np.int64))

    def batch(self, start: int, part: slice) -> Iterator[Place]:
        """The places of the global batch at position `start`, of which `part` is wanted.

        With several buckets start is a multiple of the batch size; with one any will do. Raises ValueError.
        """
        bucket, first = self.buckets[0], start
        if len(self.buckets) > 1:
            if start % self.batch_size:
                raise ValueError(
                    f"start={start} must be a multiple of batch_size={self.batch_size}, as each batch is of one bucket"
                )
            number, ordinal = self._find(start // self.batch_size)
            bucket, first = self.buckets[number], ordinal * self.batch_size
        for i in range(*part.indices(self.batch_size)):
            which, k = weave(first + i, bucket.weights)
            stream = bucket.streams[which]
            name = "" if self._single else f" {stream.dataset} {bucket.shape[0]}x{bucket.shape[1]}"
            yield start + i, stream.dataset, stream.sample(k, self.seed, name), bucket.shape

    def batches_before(self, epoch: int) -> list[int]:
        """How many batches each bucket has given when `epoch` begins."""
        return [math.floor(epoch * bucket.rate / self.batch_size) for bucket in self.buckets]

    def _find(self, batch: int) -> tuple[int, int]:
        """(bucket, its how-many-eth batch) of a global batch."""
        if not self._first <= batch < self._first + len(self._plan[0]):
            self._enter(self._epoch_of(batch))
        at = batch - self._first
        return int(self._plan[0][at]), int(self._plan[1][at])

    def _epoch_of(self, batch: int) -> int:
        # In the epoch called last this batch is past for sure, for each bucket holds back less than one batch.
        last = (batch + len(self.buckets) + 1) * self.batch_size // self.samples + 1
        return bisect.bisect_right(range(last + 1), batch, key=lambda e: sum(self.batches_before(e))) - 1

    def _enter(self, epoch: int) -> None:
        before, after = self.batches_before(epoch), self.batches_before(epoch + 1)
        numbers = np.repeat(np.arange(len(before)), np.subtract(after, before))
        ordinals = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        numbers = numbers[epoch_order(len(numbers), self.seed, epoch, " of buckets")]
        # Each bucket's batches stay in their own order: only which bucket's turn it is was shuffled.
        ordinals = ordinals[np.argsort(np.argsort(numbers, kind="stable"), kind="stable")]
        self._first, self._plan = sum(before), (numbers, ordinals)

"""Shards -> batches, for ever: the order is a function of (seed, position) and of nothing else."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_pipeline.batch import Batch, sample_rng
from data_pipeline.captions import CHOICES
from data_pipeline.shards import ShardDataset
from data_pipeline.transforms import transform

Place = tuple[int, int]  # (position in the global stream, index in the dataset)


@dataclass
class DataConfig:
    """path: a shard folder. size: pixels a side; None takes the size the shards were built with.

    flip: mirror half of the pictures. caption: "first" or "random". workers: processes that decode.
    """

    path: str
    size: int | None = None
    flip: bool = False
    caption: str = "first"
    workers: int = 0


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in `epoch` (0, 1, ...): a permutation [n] int64, a function of the three.

    Sorts the raw 64-bit stream of PCG64, which numpy promises never to change (Generator.permutation may).
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, zlib.crc32(b"epoch order")])).random_raw(n)
    return np.argsort(bits, kind="stable")


class Loader:
    """Iterates batches for ever. Global position p is sample epoch_order(n, seed, p // n)[p % n].

    batch_size: samples of one step over all ranks; rank r of `world` gets the r-th contiguous slice of each.
    start: samples consumed before, to resume. Epochs follow each other without a gap, so a batch may hold the
    end of one and the start of the next. The number of workers changes nothing but speed. Raises ValueError.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {world} processes")
        if not 0 <= rank < world or start < 0 or seed < 0 or config.workers < 0:
            raise ValueError(
                f"rank={rank} of world={world}, start={start}, seed={seed}, workers={config.workers}: "
                "none may be negative, and rank must be less than world"
            )
        if len(dataset) < batch_size:
            raise ValueError(
                f"{dataset.path} has {len(dataset)} samples, fewer than one batch of {batch_size}; "
                f"set batch_size to {len(dataset)} or less, or add samples"
            )
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world
        self.samples = len(dataset)
        self._decoded = _Decoded(dataset, config, seed)

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            self._decoded,
            batch_sampler=self._places(),
            collate_fn=collate,
            num_workers=self.config.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: else starting workers would draw from the global one
        )
        yield from loader

    def _places(self) -> Iterator[list[Place]]:
        share = self.batch_size // self.world
        epoch, order = -1, np.empty(0, np.int64)
        batch = self.start
        while True:
            places = []
            first = batch + self.rank * share
            for position in range(first, first + share):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = epoch_order(self.samples, self.seed, epoch)
                places.append((position, int(order[position % self.samples])))
            yield places
            batch += self.batch_size


def fixed_batch(dataset: ShardDataset, config: DataConfig, count: int) -> Batch:
    """The first `count` samples in stored order, not flipped, main captions: for validation, previews."""
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count={count}: {dataset.path} has {len(dataset)} samples")
    plain = DataConfig(config.path, config.size)
    decoded = _Decoded(dataset, plain, seed=0)
    return collate([decoded[i, i] for i in range(count)])


def collate(samples: list[Batch]) -> Batch:
    """Batches of one size -> one batch, in order."""
    return Batch(
        image=torch.cat([s.image for s in samples]),
        captions=[c for s in samples for c in s.captions],
        positions=torch.cat([s.positions for s in samples]),
        keys=[k for s in samples for k in s.keys],
    )


class _Decoded(TorchDataset[Batch]):
    """The shards as batches of one, looked up by (position, index)."""

    def __init__(self, dataset: ShardDataset, config: DataConfig, seed: int) -> None:
        size = config.size or dataset.info.size
        if size is None:
            raise ValueError(f"the pictures in {dataset.path} differ in size; set size=N (pixels a side)")
        if config.caption not in CHOICES:
            raise ValueError(f"caption={config.caption!r}: allowed are {', '.join(CHOICES)}")
        self.dataset = dataset
        self.size = size
        self.config = config
        self.seed = seed

    def __getitem__(self, place: Place) -> Batch:
        position, index = place
        sample = self.dataset[index]
        rng = sample_rng(self.seed, position, "transform")
        image, caption = transform(sample, rng, size=self.size, flip=self.config.flip, caption=self.config.caption)
        return Batch(image[None], [caption], torch.tensor([position]), [sample.key])

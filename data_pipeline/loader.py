"""Shards -> batches, for ever: which, and in what form, is a function of (seed, position) and of nothing else."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from data_pipeline.batch import Batch
from data_pipeline.buckets import Shape
from data_pipeline.config import DataConfig
from data_pipeline.mixing import Order, Place, epoch_order
from data_pipeline.precompute import Cache
from data_pipeline.reader import ShardReader
from data_pipeline.samples import Samples, open_folder

__all__ = ["DataConfig", "Loader", "collate", "epoch_order", "fixed_batch", "open_data"]


def open_data(config: DataConfig) -> list[ShardReader]:
    """The shard folders of a config. Raises ValueError when one is not complete."""
    return [open_folder(path, config) for path in config.paths]


class Loader:
    """Iterates batches for ever; see mixing.py for the order.

    Of one folder and one shape, global position p is sample epoch_order(n, seed, p // n)[p % n]: epochs follow each
    other without a gap, so a batch may hold the end of one and the start of the next.
    batch_size: samples of one step over all ranks; rank r of `world` gets the r-th contiguous slice of each.
    start: samples consumed before, to resume. The number of workers changes nothing but speed. Raises ValueError.
    """

    def __init__(
        self,
        data: ShardReader | Sequence[ShardReader],
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
        self.config = config
        self.batch_size = batch_size
        self.start = start
        share = batch_size // world
        self.part = slice(rank * share, (rank + 1) * share)
        self._samples = Samples(_readers(data), config, seed)
        self.order = Order(self._samples.buckets(), batch_size, seed)
        if self.order.samples < batch_size:
            named, samples = ", ".join(r.path for r in self._samples.readers), int(self.order.samples)
            raise ValueError(
                f"{named} has {samples} samples, fewer than one batch of {batch_size}; "
                f"set batch_size to {samples} or less, or add samples, or repeat them with data.repeats"
            )
        next(self.order.batch(start, self.part))  # refuses a start between batches

    @property
    def shapes(self) -> list[Shape]:
        """(width, height) of the pictures, px: one for each bucket in use."""
        return [bucket.shape for bucket in self.order.buckets]

    @property
    def caches(self) -> list[Cache]:
        """What latents come from, one for each folder, or none."""
        return self._samples.caches

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            self._samples,
            batch_sampler=self._places(),
            collate_fn=collate,
            num_workers=self.config.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: else starting workers would draw from the global one
        )
        yield from loader

    def _places(self) -> Iterator[list[Place]]:
        batch = self.start
        while True:
            yield list(self.order.batch(batch, self.part))
            batch += self.batch_size


def fixed_batch(data: ShardReader | Sequence[ShardReader], config: DataConfig, count: int) -> Batch:
    """The first `count` samples in stored order, for validation and previews.

    Centred squares, not flipped, main captions, in the first template, read from the pictures themselves.
    """
    readers = _readers(data)
    total = sum(len(reader) for reader in readers)
    if not 1 <= count <= total:
        named = ", ".join(reader.path for reader in readers)
        raise ValueError(f"count={count}: {named} has {total} samples")
    templates = tuple(config.templates[:1])
    plain = DataConfig(config.path, config.size, templates=templates, condition=config.condition, mask=config.mask)
    samples = Samples(readers, plain, seed=0)
    size = samples.size
    places = ((d, i) for d, reader in enumerate(readers) for i in range(len(reader)))
    chosen = [(position, d, i, (size, size)) for position, (d, i) in zip(range(count), places, strict=False)]
    return collate([samples[place] for place in chosen])


def collate(samples: list[Batch]) -> Batch:
    """Batches of one size -> one batch, in order."""
    return Batch.cat(samples)


def _readers(data: ShardReader | Sequence[ShardReader]) -> list[ShardReader]:
    return [data] if isinstance(data, ShardReader) else list(data)

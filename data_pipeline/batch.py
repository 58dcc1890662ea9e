"""A batch of captioned pictures, and the random numbers of one sample."""

import itertools
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """image [B, 3, H, W] float32 in [-1, 1]; captions and keys: B each.

    positions [B] int64: the place of each sample in the run's global stream. All randomness of a sample
    derives from (seed, position), so it does not depend on batch size, rank or worker.
    """

    image: Tensor
    captions: list[str]
    positions: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def split(self, parts: int) -> "list[Batch]":
        """`parts` batches in order, their lengths differing by one at most. Raises ValueError."""
        if not 1 <= parts <= len(self):
            raise ValueError(f"cannot split a batch of {len(self)} into {parts} parts")
        edges = [len(self) * part // parts for part in range(parts + 1)]
        spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return [Batch(self.image[s], self.captions[s], self.positions[s], self.keys[s]) for s in spans]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            image=self.image.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader looks for this method."""
        return replace(self, image=self.image.pin_memory(), positions=self.positions.pin_memory())


def sample_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose ("transform", "noise"); a function of the three."""
    return np.random.default_rng(np.random.SeedSequence([seed, position, zlib.crc32(purpose.encode())]))

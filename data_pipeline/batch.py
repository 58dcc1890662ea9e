"""A batch of captioned pictures, and the random numbers of one sample."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """image [B, 3, H, W] float32 in [-1, 1]; captions and keys: B each.

    positions [B] int64, on the host: the place of each sample in the run's global stream. All randomness of a sample
    derives from (seed, position), so it does not depend on batch size, rank or worker.
    weights [B] float32: how much each sample counts in the loss; None: all 1.
    prior [B] bool, on the host: whether the sample shows what a model knows already that is fine-tuned; None: none.
    sizes [B, 6] int64: original height and width, crop top and left, target height and width, px (Podell et al. 2023,
    sec. 2.2); None: pictures that were never larger, nor cropped.
    moments [B, 2 C, h, w]: mean and log-variance of the latents, as stored before; the pictures are then not read, and
    `image` is [B, 3, 0, 0].
    text: what a text encoder made of the captions, by its name in the conditioning: context [B, L, D], mask [B, L],
    pooled [B, P]; of an empty caption it is all zeros. Empty unless it was stored before.
    condition [B, 3, H, W] float32 in [0, 1]: the paired picture, cut and mirrored as the picture is; None: none.
    mask [B, 1, H, W] float32 in [0, 1]: how much each pixel counts in the loss, cut likewise; None: all 1.
    """

    image: Tensor
    captions: list[str]
    positions: Tensor
    keys: list[str]
    weights: Tensor | None = None
    prior: Tensor | None = None
    sizes: Tensor | None = None
    moments: Tensor | None = None
    text: dict[str, Tensor] = field(default_factory=dict)
    condition: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def split(self, parts: int) -> "list[Batch]":
        """`parts` batches in order, their lengths differing by one at most. Raises ValueError."""
        if not 1 <= parts <= len(self):
            raise ValueError(f"cannot split a batch of {len(self)} into {parts} parts")
        edges = [len(self) * part // parts for part in range(parts + 1)]
        return [self._rows(slice(a, b)) for a, b in itertools.pairwise(edges)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`, but for positions and prior, which the host goes by."""
        stay = {id(self.positions), id(self.prior)}
        return self._map(lambda t: t if id(t) in stay else t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader looks for this method."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def cat(parts: "list[Batch]") -> "Batch":
        """Join batches of one size that hold the same things. Raises ValueError naming what only some hold."""

        def join(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            first = values[0]
            if len({value is None for value in values}) > 1:
                raise ValueError(f"cannot join batches of which only some have {name}")
            if first is None:
                return None
            if isinstance(first, Tensor):
                return torch.cat(values)
            if isinstance(first, dict):
                return {name: torch.cat([value[name] for value in values]) for name in first}
            return [row for rows in values for row in rows]

        return Batch(**{f.name: join(f.name) for f in fields(Batch)})

    def _rows(self, rows: slice) -> "Batch":
        tensors = self._map(lambda tensor: tensor[rows])
        return replace(tensors, captions=self.captions[rows], keys=self.keys[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{f.name: apply(getattr(self, f.name)) for f in fields(Batch)})


def sample_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose ("transform", "noise"); a function of the three."""
    return np.random.default_rng(np.random.SeedSequence([seed, position, zlib.crc32(purpose.encode())]))

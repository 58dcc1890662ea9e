"""Random numbers as a function of (seed, place in the run, purpose): nothing to save, resume is exact."""

import hashlib

import torch
from torch import Tensor

from ldm.nn.transfer import to_device


def generator(*words: int | str) -> torch.Generator:
    """A CPU generator seeded by the words, the same for the same words on every machine."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_torch(*words: int | str) -> None:
    """Seed torch's global generators by the words: for initial weights, and for dropout inside a network."""
    torch.manual_seed(generator(*words).initial_seed())


class SampleRandomness:
    """The random numbers of a batch, each sample's from its own generator.

    positions [B], on the host: places in the run's global stream. Batch size, rank and worker do not matter.
    device: where the numbers go; with the positions unless given.
    """

    def __init__(self, seed: int, positions: Tensor, device: torch.device | None = None) -> None:
        self.seed = seed
        self.positions = positions.tolist()
        self.device = positions.device if device is None else device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape]."""
        rows = [torch.randn(shape, generator=generator(self.seed, p, purpose)) for p in self.positions]
        return to_device(torch.stack(rows), self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1): [B]."""
        return to_device(torch.tensor(self.fractions(purpose)), self.device)

    def fractions(self, purpose: str) -> list[float]:
        """The same numbers on the host."""
        return [float(torch.rand((), generator=generator(self.seed, p, purpose))) for p in self.positions]

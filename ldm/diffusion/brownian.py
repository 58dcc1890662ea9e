"""A Brownian path of each image's own: noise for stochastic samplers that does not depend on where they step."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.noise import ImageNoise

OCTAVES = 64
"""The clock 1 / ratio^2 is covered from 2^-64 to 2^64, ratios from 2^-32 to 2^32; beyond, as at the end."""
DEPTH = 24
"""Within an octave it is cut in 2^24."""


class BrownianNoise(ImageNoise):
    """Noise in which image i depends on seeds[i] and the two ratios alone: not on the batch, nor on the steps taken.

    Calling it draws fresh noise as ImageNoise does, byte for byte. `between` is a virtual Brownian tree (Li et al.
    2020, sec. 4): nothing is stored, each node is drawn from a seed of its own. Its clock is 1 / ratio^2, that of
    the stochastic equation in x / alpha (Lu et al. 2022b, eq. 18), one tree per octave because the clock has no end.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__(seeds, shape)
        self.seeds = tuple(seeds)

    def between(self, a: float, b: float) -> Tensor:
        """Standard normal noise for the step from one ratio to another: [len(seeds), *shape], float32, on the CPU.

        The increments of steps that do not overlap are independent, and those of two half steps add up to that of
        the whole, each by the square root of its share of the clock. Raises ValueError for an empty step.
        """
        start, end = sorted((_place(a), _place(b)))
        if start == end:
            raise ValueError(f"a step from ratio {a:g} to {b:g} is too short for the Brownian path")
        span = _clock(end) - _clock(start)
        return torch.stack([self._increment(seed, start, end) for seed in self.seeds]).div(math.sqrt(span)).float()

    def _increment(self, seed: int, start: int, end: int) -> Tensor:
        total = torch.zeros(self.shape, dtype=torch.float64)
        for octave in range(start >> DEPTH, (end - 1 >> DEPTH) + 1):
            first = octave << DEPTH
            low, high = max(start - first, 0), min(end - first, 1 << DEPTH)
            length = math.sqrt(2.0 ** (octave - OCTAVES))  # octave k lasts from 2^k to 2^(k + 1) on the clock
            total += length * (self._value(seed, octave, high) - self._value(seed, octave, low))
        return total

    def _value(self, seed: int, octave: int, place: int) -> Tensor:
        """The path of an octave, 0 at its start, after place / 2^DEPTH of it."""
        if place == 0:
            return torch.zeros(self.shape, dtype=torch.float64)
        low, left = 0, torch.zeros(self.shape, dtype=torch.float64)
        size, right = 1 << DEPTH, self._draw(seed, octave, 0)
        while place != low + size:
            size //= 2
            spread = math.sqrt(size / 2 / (1 << DEPTH))  # of a bridge's middle: half its half length
            middle = (left + right) / 2 + spread * self._draw(seed, octave, low + size)
            if place >= low + size:
                low, left = low + size, middle
                if place == low:
                    return left
            else:
                right = middle
        return right

    def _draw(self, seed: int, octave: int, node: int) -> Tensor:
        digest = hashlib.blake2b(f"{seed} {octave} {node}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return torch.randn(self.shape, dtype=torch.float64, generator=generator)


def _place(ratio: float) -> int:
    """A ratio's place on the clock, counted in cuts of the octaves; rises as the ratio falls."""
    low, high = 2.0**-OCTAVES, 2.0**OCTAVES
    clock = min(max(1 / ratio**2 if ratio > 0 else high, low), high)
    octave = min(math.floor(math.log2(clock)), OCTAVES - 1)
    return (octave + OCTAVES << DEPTH) + round((clock / 2.0**octave - 1) * (1 << DEPTH))


def _clock(place: int) -> float:
    octave, part = place >> DEPTH, place & ((1 << DEPTH) - 1)
    return float(2.0 ** (octave - OCTAVES) * (1 + part / (1 << DEPTH)))

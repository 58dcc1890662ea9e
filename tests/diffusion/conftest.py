"""Gaussian data, for which everything about diffusion is known exactly."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel


@dataclass(frozen=True)
class Gaussian:
    """Data N(mu, s^2), every value on its own."""

    mu: float = 0.3
    s: float = 0.7

    def spread(self, level: NoiseLevel) -> Tensor:
        """Standard deviation of x_t."""
        return (level.alpha**2 * self.s**2 + level.sigma**2).sqrt()

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t]."""
        level = level.like(x)
        gain = level.alpha * self.s**2 / self.spread(level) ** 2
        return self.mu + gain * (x - level.alpha * self.mu)

    def end(self, x: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """Where the probability-flow ODE takes x from one level to another."""
        return end.alpha * self.mu + self.spread(end) / self.spread(start) * (x - start.alpha * self.mu)


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def x() -> Tensor:
    """Starting noise [4, 1, 4, 4]."""
    return torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

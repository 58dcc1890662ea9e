"""Restart: a deterministic sampler that goes back up once, with fresh noise, to undo its own errors."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import At, Noise, Step, accurate, need_at, need_noise, pairs, ratio
from ldm.diffusion.samplers.onestep import heun_step
from ldm.diffusion.spacings import karras
from ldm.types import Denoise

RESTART_LOW, RESTART_HIGH = 0.1, 2.0
"""The ratios between which it restarts: the interval of Xu et al. 2023, table 3, that the web interfaces took over."""


@accurate
def restart(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Restart sampling (Xu et al. 2023, algorithm 1) on `heun`: from ratio 0.1 back up to 2 and down again.

    Below 20 steps not at all, below 36 once in 9 steps, else twice in a quarter of the steps, all part of the one
    Step that arrives at 0.1; for this needs `at` and `noise`.
    """
    at, noise = need_at("restart", at), need_noise("restart", noise)
    steps = len(levels.t) - 1
    times, inner = (0, 0) if steps < 20 else (1, 9) if steps < 36 else (2, steps // 4)
    again = _nearest(levels)
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        x = heun_step(denoise, x, x0, level, below)
        if index + 1 == again and ratio(below) < RESTART_HIGH:
            for _ in range(times):
                x = _round(denoise, x, below, inner, noise, at)
        yield Step(index, x, x0)


def _nearest(levels: NoiseLevel) -> int:
    """The place of the level whose ratio is nearest, in logarithm, to the one to restart from."""
    return int(((levels.sigma / levels.alpha).log() - math.log(RESTART_LOW)).abs().argmin())


def _round(denoise: Denoise, x: Tensor, low: NoiseLevel, steps: int, noise: Noise, at: At) -> Tensor:
    """Up from `low` by adding noise, and down to it again."""
    path = at(karras(steps + 1, ratio(low), RESTART_HIGH))
    levels = NoiseLevel(*(torch.cat([a[:-1], b[None]]) for a, b in zip(_parts(path), _parts(low), strict=True)))
    high = levels[0]
    added = float(high.alpha) * math.sqrt(RESTART_HIGH**2 - ratio(low) ** 2)
    x = high.alpha / low.alpha * x + added * noise().to(x)  # never the path's: it is the same each time
    for _, level, below in pairs(levels):
        x = heun_step(denoise, x, denoise(x, level), level, below)
    return x


def _parts(level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor]:
    return level.t, level.alpha, level.sigma

"""DPM adaptive: a sampler that chooses its own steps, and for each image others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import (
    MOSTLY_NOISE,
    At,
    Noise,
    Step,
    accurate,
    half_log_snr,
    mostly_noise,
    need_at,
    pairs,
    ratio,
    towards,
)
from ldm.diffusion.samplers.onestep import ratio_of_time
from ldm.types import Denoise

ALMOST_CLEAN = 0.01
"""The ratio from which the step to clean is one of first order, if the schedule goes as low."""
FIRST_STRIDE, SHORTEST_STRIDE, LONGEST_STRIDE = 0.05, 1e-4, 1.0
"""In half the log-SNR: the first to try (Lu et al. 2022a, app. C.4); where to give up; and, beyond the paper, the
longest, for over more than 1 the two orders may agree by chance, far from the truth."""
CAUTION, SHRINK, GROW = 0.9, 0.2, 5.0
"""Of the stride that should just do, the share to take; and the most that one try may change it, down and up."""

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(y = x / alpha [B, C, H, W], ratio [B]) -> (eps, the estimate of x0)."""


@dataclass(frozen=True)
class Tolerance:
    """The local error allowed of each value: max(absolute, relative * |x|), as the root mean square over an image."""

    relative: float
    absolute: float


@accurate
def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """DPM-Solver-23 with steps as long as the tolerance allows (Lu et al. 2022a, sec. 3.4 and app. C); third order.

    Each image has steps of its own, so that it is the same alone and in any batch: `denoise` is asked at levels [B].
    To the next given level, where it arrives exactly, it takes as many steps as it needs, of three evaluations each;
    who is there waits for the others. With few levels the tolerance alone decides. Not measured are the first-order
    steps at the ends: down to 100 times as much noise as signal, and to clean, from ratio 0.01 or the lowest level of
    a chain that ends before. Needs `at`. Each try reads its errors from the device.

    rtol, atol: the local error allowed, relative and absolute; the paper's, which are for pictures in [-1, 1].
    Raises ValueError for tolerances out of range, RuntimeError where no step is short enough for them.
    """
    at = need_at("dpm_adaptive", at)
    if not (rtol >= 0 and atol > 0):
        raise ValueError(f"rtol must not be below 0 and atol must be above 0, got {rtol} and {atol}")
    strides = torch.full((len(x),), FIRST_STRIDE, dtype=torch.float64)
    for index, level, below in pairs(levels):
        x0, above = x, level
        if mostly_noise(level):
            level = below if mostly_noise(below) else _level(at, MOSTLY_NOISE)
            x0 = denoise(x, above)
            x = towards(x, x0, above, level)
        bottom = below if below.sigma > 0 else _lowest(at, level)
        if ratio(level) > ratio(bottom):
            x, x0, strides = _stretch(denoise, x, (level, bottom), strides, Tolerance(rtol, atol), at)
        if below.sigma == 0:
            x0 = denoise(x, bottom)
            x = towards(x, x0, bottom, below)
        yield Step(index, x, x0)


def _lowest(at: At, level: NoiseLevel) -> NoiseLevel:
    """The level from which to step to clean: `level` itself where it is low enough."""
    # a chain has one t for all ratios from its lowest down; where there is no such end, this is ALMOST_CLEAN itself
    lowest = ratio_of_time(at, float(_level(at, ALMOST_CLEAN).t), level)
    return level if ratio(level) <= lowest else _level(at, lowest)


def _level(at: At, ratio: float) -> NoiseLevel:
    return at(torch.tensor(ratio, dtype=torch.float64))


def _stretch(
    denoise: Denoise, x: Tensor, ends: tuple[NoiseLevel, NoiseLevel], strides: Tensor, tolerance: Tolerance, at: At
) -> tuple[Tensor, Tensor, Tensor]:
    """From one level to another, strides [B] of half the log-SNR to begin with: -> (x, x0, strides to go on with)."""
    start, end = half_log_snr(ends[0]), half_log_snr(ends[1])

    def slope(y: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
        level = at(ratios)
        x0 = denoise(level.like(y).alpha * y, level)
        return (y - x0) / _column(ratios, y), x0

    places = torch.full_like(strides, start)
    y = x0 = x / float(ends[0].alpha)
    while (places < end).any():  # it ends: no stride that is taken is below the shortest
        left = end - places
        steps = torch.minimum(strides, left)
        reached = torch.where(strides < left, places + steps, end)
        low, high, estimate = _both_orders(slope, y, (-places).exp(), steps)
        alpha, alpha_reached = (at((-place).exp()).like(y).alpha for place in (places, reached))
        errors = _errors(alpha_reached * low, alpha_reached * high, alpha * y, tolerance)
        going = left > 0
        taken = going & (errors <= 1)
        # never by a power: torch may round it by an image's place in the batch
        change = (CAUTION * (errors.clamp(min=1e-12).log() / -3).exp()).clamp(SHRINK, GROW)
        wanted = (steps * change).clamp(max=LONGEST_STRIDE)
        # a step cut short by the level says nothing against the longer stride before it
        wanted = torch.where(taken & (steps < strides), torch.maximum(wanted, strides), wanted)
        strides = torch.where(going, wanted, strides)
        _check(going & ~errors.isfinite(), ends, "its estimates of x0 are not finite")
        _check(going & (strides < SHORTEST_STRIDE), ends, f"no step is short enough for {tolerance}")
        moved = _column(taken, y)
        y, x0 = torch.where(moved, high, y), torch.where(moved, estimate, x0)
        places = torch.where(taken, reached, places)
    return float(ends[1].alpha) * y, x0, strides


def _both_orders(slope: Slope, y: Tensor, ratios: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DPM-Solver-2 with r1 = 1/3 and DPM-Solver-3 with r1 = 1/3, r2 = 2/3: -> (y, y, the estimate of x0 at the start).

    Lu et al. 2022a, app. C.2 and algorithm 2, divided by alpha; steps [B] of half the log-SNR, 0 for one that stays.
    """

    def change(share: float) -> Tensor:
        return ratios * torch.expm1(-share * steps)

    def bend(share: float) -> Tensor:
        """What eps adds to y, beyond `change`, by rising evenly by 1 over that share."""
        h = (share * steps).clamp(min=torch.finfo(steps.dtype).tiny)
        return ratios * (torch.expm1(-h) / h + torch.exp(-h))

    eps, x0 = slope(y, ratios)
    first, _ = slope(y + _column(change(1 / 3), y) * eps, ratios + change(1 / 3))
    guess = y + _column(change(2 / 3), y) * eps + _column(2 * bend(2 / 3), y) * (first - eps)
    second, _ = slope(guess, ratios + change(2 / 3))
    moved = y + _column(change(1), y) * eps
    low = moved + _column(3 / 2 * change(1), y) * (first - eps)
    return low, moved + _column(3 / 2 * bend(1), y) * (second - eps), x0


def _errors(low: Tensor, high: Tensor, before: Tensor, tolerance: Tolerance) -> Tensor:
    """The error of each image in units of what is allowed: [B], float64, on the CPU."""
    allowed = (tolerance.relative * torch.maximum(low.abs(), before.abs())).clamp(min=tolerance.absolute)
    # row by row: a sum over several may be split up in another way than that over one
    rows = [row.square().mean().sqrt() for row in (low - high) / allowed]
    return torch.stack(rows).double().cpu()


def _check(failed: Tensor, ends: tuple[NoiseLevel, NoiseLevel], reason: str) -> None:
    if failed.any():
        image, (start, end) = int(failed.nonzero()[0]), map(ratio, ends)
        raise RuntimeError(
            f"dpm_adaptive: image {image} is stuck between sigma / alpha {start:g} and {end:g}: {reason}"
        )


def _column(values: Tensor, y: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] where y is; numbers in its type."""
    values = values.to(y) if values.is_floating_point() else values.to(y.device)
    return values.view(-1, *[1] * (y.ndim - 1))

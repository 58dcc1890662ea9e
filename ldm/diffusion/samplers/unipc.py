"""UniPC: a multistep predictor whose every step is corrected by the next evaluation, which is needed anyway."""

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import (
    At,
    Noise,
    Step,
    accurate,
    half_log_snr,
    mixed,
    pairs,
    towards,
    weights_of,
)
from ldm.types import Denoise

Past = list[tuple[float, Tensor]]
"""(half log-SNR, estimate of x0) of the steps before, newest first."""


def unipc(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """UniPC-2 with corrector (Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1, x0 prediction)."""
    return _unipc(denoise, x, levels, order=2)


def unipc_3(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """UniPC-3 with corrector (Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1, x0 prediction)."""
    return _unipc(denoise, x, levels, order=3)


@accurate
def _unipc(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, order: int) -> Iterator[Step]:
    steps = len(levels.t) - 1
    clean = bool(levels.sigma[-1] == 0)
    before: tuple[Tensor, NoiseLevel, Past] | None = None  # x, level and history of the step to correct
    past: Past = []
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        if before is not None:
            x = towards(before[0], _mean(before[2], half_log_snr(level), x0), before[1], level)
        here = half_log_snr(level)
        if math.isfinite(here):
            past = [(here, x0), *past][:order]
        left = steps - index if clean else order  # the last step to clean is of order 1, the one before of order 2
        used = past[: min(order, left)]
        before = (x, level, used) if used else None  # nothing to correct by after a step from pure noise
        x = towards(x, _mean(used, half_log_snr(below)) if used else x0, level, below)
        yield Step(index, x, x0)


def _mean(past: Past, to: float, x0_there: Tensor | None = None) -> Tensor:
    """The mean of x0 over the step (Zhao et al. 2023, eq. 3 and 8), by the estimate at its end too if there is one."""
    (here, x0), *older = past
    step = to - here
    places = [(place - here) / step for place, _ in older]
    values = [value for _, value in older]
    if x0_there is not None:
        places, values = [*places, 1.0], [*values, x0_there]
    if not places:
        return x0
    # with one unknown the paper takes 1/2, whatever h (its sec. 3.3 and appendix)
    shares = [0.5] if len(places) == 1 else weights_of(places, _targets(len(places), step))
    rates = [share / place for share, place in zip(shares, places, strict=True)]
    return mixed([1 - sum(rates), *rates], [x0, *values])


def _targets(count: int, step: float) -> list[float]:
    """k! phi_{k+1}(-h) / phi_1(-h) for k = 1 ... count: eq. 5 with B(h) = e^h - 1."""
    first = phi = math.expm1(-step)
    found = []
    for k in range(1, count + 1):
        phi = phi / -step - 1 / math.factorial(k)
        found.append(math.factorial(k) * phi / first)
    return found

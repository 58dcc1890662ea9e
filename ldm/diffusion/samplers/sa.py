"""SA-Solver: a stochastic Adams method that predicts each step and corrects it with the same noise."""

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import (
    At,
    Noise,
    Step,
    accurate,
    fresh,
    half_log_snr,
    mixed,
    need_noise,
    pairs,
    towards,
)
from ldm.diffusion.samplers.multistep import mean_of_polynomial
from ldm.types import Denoise

Past = list[tuple[float, Tensor]]
"""(half log-SNR, estimate of x0), newest first."""


@accurate
def sa_solver(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    tau: float = 1.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """SA-Solver (Xue et al. 2023, algorithm 1): 2-step predictor, 2-step corrector, x0 prediction; needs `noise`.

    tau is the share of noise, the same all the way: 0 is the ODE, 1 the reverse SDE.
    """
    noise = need_noise("sa_solver", noise)
    past: Past = []
    redo: tuple[Tensor, NoiseLevel, Past, Tensor | None] | None = None  # x, level, history and noise of the last step
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        here = half_log_snr(level)
        if redo is not None:
            before, above, known, added = redo
            x = _moved(before, above, level, [*known, (here, x0)], known[0][0], tau, added)
        past = [(here, x0), *past][:2] if math.isfinite(here) else []
        added = fresh(noise, level, below, x) if below.sigma > 0 and tau > 0 else None
        redo = (x, level, past, added) if past else None
        known = past[:1] if below.sigma == 0 else past
        x = _moved(x, level, below, known or [(here, x0)], here, tau, added)
        yield Step(index, x, x0)


def _moved(
    x: Tensor, level: NoiseLevel, below: NoiseLevel, known: Past, here: float, tau: float, added: Tensor | None
) -> Tensor:
    """The exact step (Xue et al. 2023, eq. 10) for x0 the polynomial through what is known, and the noise given."""
    step = half_log_snr(below) - here
    shares = [1.0]
    if len(known) > 1:
        shares = mean_of_polynomial([(place - here) / step for place, _ in known], (1 + tau**2) * step)
    kept = math.exp(-(tau**2) * step) if tau else 1.0
    x = towards(x, mixed(shares, [v for _, v in known]), level, NoiseLevel(below.t, below.alpha, below.sigma * kept))
    return x if added is None else x + float(below.sigma) * math.sqrt(max(1 - kept**2, 0.0)) * added

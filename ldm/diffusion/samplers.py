"""Samplers: generators that walk a trajectory of noise levels from noise to image, one step each `next`.

The caller owns the loop, and so progress, previews, streaming and cancelling. A sampler knows nothing of
networks: `denoise(x, level)` gives it the estimate of x0, whatever prediction and guidance are behind it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.names import known
from ldm.types import Denoise

Noise = Callable[[], Tensor]
"""Fresh standard normal noise in the shape of x, each image's from its own seed."""


@dataclass(frozen=True)
class Step:
    """One step taken: its number from 0, x after it, and the estimate of x0 it went by (for previews)."""

    index: int
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    """x [B, C, H, W] at levels[0] -> one Step per level below; the last Step's x is the result.

    Samplers without randomness leave `noise` alone.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None
    ) -> Iterator[Step]: ...


def ddim(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12): remix the estimates of x0 and eps, with some of the eps drawn anew.

    eta 0 is Euler's method for the ODE, first order; eta 1 is ancestral (DDPM). eta > 0 needs `noise`.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta:g} draws fresh noise each step, but no source of noise was given")
    for index, level, below in _pairs(levels):
        x0 = denoise(x, level)
        eps = _eps(x, x0, level)
        # eq. 16 without the division by alpha, so it also holds at alpha = 0 and for flows: the noise that
        # `below` has and `level` cannot have inherited from it
        kept = level.alpha * below.sigma / (below.alpha * level.sigma)
        fresh = eta * below.sigma * (1 - kept.square()).clamp(min=0).sqrt()
        x = below.alpha * x0 + (below.sigma.square() - fresh.square()).sqrt() * eps
        if noise is not None and fresh > 0:
            x = x + fresh * noise().to(x)
        yield Step(index, x, x0)


def ddpm(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None) -> Iterator[Step]:
    """Ancestral sampling with the smaller posterior variance (Ho et al. 2020, eq. 7); needs `noise`."""
    return ddim(denoise, x, levels, eta=1.0, noise=noise)


def euler(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE dx = x0 dalpha + eps dsigma; first order.

    Because x = alpha * x0 + sigma * eps, x + x0 dalpha + eps dsigma is exactly the DDIM step; on a flow
    schedule it is x + velocity * dtime.
    """
    return ddim(denoise, x, levels)


def heun(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None) -> Iterator[Step]:
    """Heun's method for dx = x0 dalpha + eps dsigma; second order, two evaluations a step but for the last.

    The trapezoid rule of Karras et al. 2022, algorithm 1, in coordinates that are finite at alpha = 0.
    """
    for index, level, below in _pairs(levels):
        x0 = denoise(x, level)
        eps = _eps(x, x0, level)
        guess = below.alpha * x0 + below.sigma * eps
        if below.sigma > 0:  # the clean level has no eps to average with
            x0_below = denoise(guess, below)
            eps_below = _eps(guess, x0_below, below)
            slope_x0, slope_eps = (x0 + x0_below) / 2, (eps + eps_below) / 2
            guess = x + (below.alpha - level.alpha) * slope_x0 + (below.sigma - level.sigma) * slope_eps
        x = guess
        yield Step(index, x, x0)


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None) -> Iterator[Step]:
    """Pseudo linear multistep (PLMS, Liu et al. 2022): DDIM steps by eps extrapolated from the last 4.

    Starts with one pseudo improved Euler step, as Stable Diffusion does: N steps take N + 1 evaluations. Second
    order, as in the paper: the weights are those of equal strides, and in sigma / alpha the levels have none.
    """
    past: list[Tensor] = []  # eps of the steps before, newest first
    for index, level, below in _pairs(levels):
        x0 = mixed_x0 = denoise(x, level)
        eps = _eps(x, x0, level)
        if not past and below.sigma > 0:
            guess = below.alpha * x0 + below.sigma * eps
            x0_below = denoise(guess, below)
            mixed = (eps + _eps(guess, x0_below, below)) / 2
            mixed_x0 = (x0 + x0_below) / 2
        else:
            weights = ADAMS_BASHFORTH[len(past)]
            mixed = torch.stack([w * e for w, e in zip(weights, [eps, *past], strict=True)]).sum(0)
        if level.alpha > 1e-3:
            mixed_x0 = (x - level.sigma * mixed) / level.alpha
        else:  # (almost) pure noise: x / alpha says nothing, eps is x itself, and what there is to mix is x0
            mixed = eps
        x = below.alpha * mixed_x0 + below.sigma * mixed
        past = [eps, *past][:3]
        yield Step(index, x, x0)


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "plms": plms, "euler": euler, "heun": heun}


def sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of that name; eta in [0, 1] is for ddim. Raises ValueError with what is allowed."""
    known("sampler", name, SAMPLERS)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if eta == 0:
        return SAMPLERS[name]
    if name != "ddim":
        raise ValueError(f"eta is for sampler 'ddim' alone; with {name!r} it must be 0, got {eta}")
    return partial(ddim, eta=eta)


def _pairs(levels: NoiseLevel) -> Iterator[tuple[int, NoiseLevel, NoiseLevel]]:
    for index in range(len(levels.t) - 1):
        yield index, levels[index], levels[index + 1]


def _eps(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    return (x - level.alpha * x0) / level.sigma

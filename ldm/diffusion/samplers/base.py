"""What all samplers share: the contract, and the moves between two noise levels.

A sampler works in x = alpha * x0 + sigma * eps. What a paper writes for x / alpha is here multiplied by alpha: the
ratio sigma / alpha is infinite at pure noise (a flow's start, zero terminal SNR) and half the log-SNR,
log(alpha / sigma), at both ends; each sampler takes its first-order step where its own formula has no value.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.types import Denoise

Noise = Callable[[], Tensor]
"""Fresh standard normal noise in the shape of x, each image's from its own seed.

If it also has `between(a, b)`, that is the increment of each image's own Brownian path between two ratios, of
unit variance, and the samplers of stochastic equations use it instead (`ldm.diffusion.brownian`)."""
At = Callable[[Tensor], NoiseLevel]
"""The level of a ratio sigma / alpha: `NoiseSchedule.at_ratio`."""

MOSTLY_NOISE = 100.0
"""The ratio above which a method in ratios takes one first-order step: its polynomial would span (almost) infinity."""


@dataclass(frozen=True)
class Step:
    """One step taken: its number from 0, x after it, and the estimate of x0 it went by (for previews)."""

    index: int
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    """x [B, C, H, W] at levels[0] -> one Step per level below; the last Step's x is the result.

    Samplers without randomness leave `noise` alone; those that stay on the given levels leave `at` alone.
    """

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
    ) -> Iterator[Step]: ...


Body = TypeVar("Body", bound=Callable[..., Iterator[Step]])


def accurate(body: Body) -> Body:
    """The sampler with its sums in at least float32; the denoiser and the caller still see the type of x."""

    @wraps(body)
    def take(denoise: Denoise, x: Tensor, levels: NoiseLevel, **options: Any) -> Iterator[Step]:
        given, work = x.dtype, torch.promote_types(x.dtype, torch.float32)

        def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
            return denoise(x.to(given), level).to(work)

        def with_variance(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
            x0, v = denoise.with_variance(x.to(given), level)  # type: ignore[attr-defined]
            return x0.to(work), v.to(work)

        if hasattr(denoise, "with_variance"):
            estimate.with_variance = with_variance  # type: ignore[attr-defined]
        steps = body(estimate, x.to(work), levels, **options)
        if given == work:
            return steps
        return (Step(step.index, step.x.to(given), step.x0.to(given)) for step in steps)

    return cast(Body, take)


def need_noise(name: str, noise: Noise | None) -> Noise:
    """The source of noise. Raises ValueError if there is none."""
    if noise is None:
        raise ValueError(f"{name} draws fresh noise each step, but no source of noise was given")
    return noise


def need_at(name: str, at: At | None) -> At:
    """The way from a ratio to its level. Raises ValueError if there is none."""
    if at is None:
        raise ValueError(f"{name} evaluates between the levels, but was not given `at`, the level of a ratio")
    return at


def pairs(levels: NoiseLevel) -> Iterator[tuple[int, NoiseLevel, NoiseLevel]]:
    """(number of the step, its level, the level below) along a trajectory."""
    rows = zip(levels.t.unbind(), levels.alpha.unbind(), levels.sigma.unbind(), strict=True)
    for index, (level, below) in enumerate(itertools.pairwise(NoiseLevel(*row) for row in rows)):
        yield index, level, below


def ratio(level: NoiseLevel) -> float:
    """sigma / alpha, the noise level of Karras et al. 2022; infinite at pure noise."""
    alpha = float(level.alpha)
    return float(level.sigma) / alpha if alpha else math.inf


def half_log_snr(level: NoiseLevel) -> float:
    """log(alpha / sigma), the lambda of Lu et al. 2022; minus infinity at pure noise, infinity at clean."""
    at = ratio(level)
    return -math.log(at) if at else math.inf


def mostly_noise(level: NoiseLevel) -> bool:
    """Whether a polynomial in the ratio would be of no use from here."""
    return ratio(level) > MOSTLY_NOISE


def eps_of(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The eps that x and the estimate of x0 leave, sigma > 0."""
    return torch.sub(x, x0, alpha=float(level.alpha)) / float(level.sigma)


def towards(x: Tensor, x0: Tensor, level: NoiseLevel, below: NoiseLevel) -> Tensor:
    """The exact solution of the ODE while x0 stays as it is (Lu et al. 2022b, eq. 9, order 1; Song et al. 2021).

    Equals below.alpha * x0 + below.sigma * eps, and holds from alpha = 0 and to sigma = 0.
    """
    kept = float(below.sigma) / float(level.sigma)
    return torch.add(kept * x, x0, alpha=float(below.alpha) - float(level.alpha) * kept)


def along(x: Tensor, eps: Tensor, level: NoiseLevel, below: NoiseLevel) -> Tensor:
    """The exact solution of the ODE while eps stays as it is: x / alpha moves by eps * (change of ratio); alpha > 0."""
    kept = float(below.alpha) / float(level.alpha)
    return torch.add(kept * x, eps, alpha=float(below.sigma) - kept * float(level.sigma))


def split(level: NoiseLevel, below: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """An ancestral step in two: the level to go down to, in the scale of `below`, and the noise to add then.

    The variances sum to sigma^2 of `below`; eta 1 is the posterior of Ho et al. 2020, eq. 7, with x / alpha for x.
    """
    if eta == 0:
        return below, 0.0
    kept = ratio(below) / ratio(level)
    up = eta * math.sqrt(max(1 - kept**2, 0.0))
    # not as 1 - up^2, which cancels where little is kept
    down = NoiseLevel(below.t, below.alpha, below.sigma * math.sqrt(1 - eta**2 + (eta * kept) ** 2))
    return down, float(below.sigma) * up


def fresh(noise: Noise, level: NoiseLevel, below: NoiseLevel, x: Tensor) -> Tensor:
    """Standard normal noise for the step from one level to another, in the type and place of x."""
    between = getattr(noise, "between", None)
    drawn: Tensor = noise() if between is None else between(ratio(level), ratio(below))
    return drawn.to(x)


def weights_of(nodes: list[float], moments: list[float]) -> list[float]:
    """Weights w with sum w_j nodes_j^k = moments_k: the quadrature that is exact for polynomials."""
    powers = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    solved: list[float] = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
    return solved


def mixed(weights: list[float] | tuple[float, ...], values: list[Tensor]) -> Tensor:
    """The sum of the values, each with its weight."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total

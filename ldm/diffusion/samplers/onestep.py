"""Samplers that look at the present step alone: DDIM and its kin, Heun, DPM-Solver-2."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import (
    At,
    Noise,
    Step,
    accurate,
    along,
    eps_of,
    fresh,
    mostly_noise,
    need_at,
    need_noise,
    pairs,
    ratio,
    split,
    towards,
)
from ldm.names import known
from ldm.types import Denoise

VARIANCES = ("small", "large", "learned")

Move = Callable[[Tensor, Tensor, NoiseLevel, NoiseLevel], Tensor]
"""(x, estimate of x0 there, level, level to go down to) -> x after a deterministic step."""


@accurate
def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12 and 16): remix the estimates of x0 and eps, with some of the eps drawn anew.

    eta 0 is Euler's method for the ODE, first order; eta 1 is ancestral (DDPM). eta > 0 needs `noise`.
    """
    if eta > 0:
        need_noise(f"eta {eta:g}", noise)
    return _ancestral(denoise, x, levels, towards, eta, noise)


@accurate
def ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    variance: str | None = None,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """Ancestral sampling: the posterior mean of Ho et al. 2020, eq. 7, and noise around it; needs `noise`.

    variance: of that noise, between the two levels of a step, however far apart.
        small: beta_tilde, the posterior's of eq. 7, exact where the data is a point.
        large: exact where the data is standard normal; beta on a chain (sec. 3.2).
        learned: large^w * small^(1 - w), w = (v + 1) / 2, of a denoiser that also has
            `with_variance(x, level) -> (x0, v)`, all [B, C, H, W] (Nichol & Dhariwal 2021, eq. 15).
        None: learned if the denoiser has it, else small.
    Nothing is drawn at a step to clean. Raises ValueError for another word, or a denoiser without what it needs.
    """
    noise, told = need_noise("ddpm", noise), getattr(denoise, "with_variance", None)
    if variance is None:
        variance = "small" if told is None else "learned"
    known("variance of ddpm", variance, VARIANCES)
    if variance == "learned" and told is None:
        raise ValueError("variance 'learned' needs a network that predicts it; this one allows 'small' and 'large'")
    for index, level, below in pairs(levels):
        w: Tensor | float = 1.0 if variance == "large" else 0.0
        if variance == "learned" and told is not None:
            x0, v = told(x, level)
            w = (v + 1) / 2
        else:
            x0 = denoise(x, level)
        down, small = split(level, below, 1.0)
        x = towards(x, x0, level, down)
        if small > 0:
            # sqrt(large / small), both of the same step: (alpha^2 + sigma^2) / sigma^2 below over that here
            wider = math.sqrt((1 + ratio(below) ** -2) / (1 + ratio(level) ** -2))
            x = x + small * wider**w * fresh(noise, level, below, x)
        yield Step(index, x, x0)


def euler(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE dx = x0 dalpha + eps dsigma; first order.

    Because x = alpha * x0 + sigma * eps, x + x0 dalpha + eps dsigma is exactly the DDIM step; on a flow
    schedule it is x + velocity * dtime, and for x / alpha it is Euler's step in the ratio (Karras et al. 2022).
    """
    return ddim(denoise, x, levels)


def euler_a(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Euler ancestral: Euler's step to less noise than `below` has, the rest drawn anew; needs `noise`.

    In (alpha, sigma) this is Ho et al. 2020, eq. 7, again: the same sampler as `ddpm`.
    """
    return ddim(denoise, x, levels, eta=1.0, noise=noise)


@accurate
def heun(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Heun's method in the ratio (Karras et al. 2022, algorithm 1); second order, two evaluations but for the last."""
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        x = heun_step(denoise, x, x0, level, below)
        yield Step(index, x, x0)


def heun_step(denoise: Denoise, x: Tensor, x0: Tensor, level: NoiseLevel, below: NoiseLevel) -> Tensor:
    """One step of `heun`, from the estimate of x0 at its start."""
    guess = towards(x, x0, level, below)
    if below.sigma == 0 or mostly_noise(level):  # the clean level has no eps to average with
        return guess
    eps = eps_of(x, x0, level)
    eps_below = eps_of(guess, denoise(guess, below), below)
    return along(x, (eps + eps_below) / 2, level, below)


@accurate
def flow_heun(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Heun's method for dx = x0 dalpha + eps dsigma; second order, two evaluations a step but for the last.

    The trapezoid rule of Karras et al. 2022, algorithm 1, in coordinates that are finite at alpha = 0.
    """
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        eps = eps_of(x, x0, level)
        guess = below.alpha * x0 + below.sigma * eps
        if below.sigma > 0:  # the clean level has no eps to average with
            x0_below = denoise(guess, below)
            eps_below = eps_of(guess, x0_below, below)
            slope_x0, slope_eps = (x0 + x0_below) / 2, (eps + eps_below) / 2
            guess = x + (below.alpha - level.alpha) * slope_x0 + (below.sigma - level.sigma) * slope_eps
        x = guess
        yield Step(index, x, x0)


@accurate
def dpm2(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1) as Karras et al. 2022 sample: eps at the middle in log ratio.

    Second order; two evaluations a step but for the last. Needs `at`; eta > 0 is ancestral and needs `noise`.
    """
    at = need_at("dpm2_a" if eta else "dpm2", at)
    if eta > 0:
        need_noise("dpm2_a", noise)

    def move(x: Tensor, x0: Tensor, level: NoiseLevel, down: NoiseLevel) -> Tensor:
        if down.sigma == 0 or mostly_noise(level):
            return towards(x, x0, level, down)
        middle = _middle(at, level, down)
        guess = towards(x, x0, level, middle)
        return along(x, eps_of(guess, denoise(guess, middle), middle), level, down)

    return _ancestral(denoise, x, levels, move, eta, noise)


def dpm2_a(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DPM-Solver-2 to less noise than `below` has, the rest drawn anew; needs `at` and `noise`."""
    return dpm2(denoise, x, levels, eta=1.0, noise=noise, at=at)


@accurate
def dpmpp_2s(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1, r = 1/2): x0 at the middle in log-SNR; second order.

    Two evaluations a step but for the last. Needs `at`; eta > 0 is ancestral and needs `noise`.
    """
    at = need_at("dpmpp_2s_a" if eta else "dpmpp_2s", at)
    if eta > 0:
        need_noise("dpmpp_2s_a", noise)

    def move(x: Tensor, x0: Tensor, level: NoiseLevel, down: NoiseLevel) -> Tensor:
        if down.sigma == 0 or level.alpha == 0:
            return towards(x, x0, level, down)
        middle = _middle(at, level, down)
        return towards(x, denoise(towards(x, x0, level, middle), middle), level, down)

    return _ancestral(denoise, x, levels, move, eta, noise)


def dpmpp_2s_a(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2S) to less noise than `below` has, the rest drawn anew; needs `at` and `noise`."""
    return dpmpp_2s(denoise, x, levels, eta=1.0, noise=noise, at=at)


@accurate
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """DPM-Solver++ for the SDE, single step (Lu et al. 2022b, sec. 5, r = 1/2): x0 at a noised middle.

    Two evaluations a step but for the last. Needs `at` and `noise`.
    """
    at, noise = need_at("dpmpp_sde", at), need_noise("dpmpp_sde", noise)
    for index, level, below in pairs(levels):
        x0 = slope = denoise(x, level)
        down, up = split(level, below, eta)
        if below.sigma == 0 or level.alpha == 0:
            drawn = fresh(noise, level, below, x) if up > 0 else None
        else:
            middle = _middle(at, level, below)
            half, drawn = _two_draws(noise, level, middle, below, x)
            middle_down, middle_up = split(level, middle, eta)
            slope = denoise(towards(x, x0, level, middle_down) + middle_up * half, middle)
        x = towards(x, slope, level, down)
        if drawn is not None:
            x = x + up * drawn
        yield Step(index, x, x0)


@accurate
def lcm(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): the estimate, noised anew; needs `noise`.

    The last step returns the estimate itself, as there, also where the last level still holds some noise.
    """
    noise = need_noise("lcm", noise)
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        x = x0
        if index < len(levels.t) - 2:
            x = below.alpha * x0 + below.sigma * fresh(noise, level, below, x0)
        yield Step(index, x, x0)


@accurate
def tcd(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    gamma: float = 0.3,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """Strategic stochastic sampling (Zheng et al. 2024, algorithm 4): to t' = (1 - gamma) t of `below`, then noise.

    gamma 0 is DDIM, gamma 1 is `lcm`. Needs `at` and `noise`.
    """
    at, noise = need_at("tcd", at), need_noise("tcd", noise)
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        s = min(ratio_of_time(at, math.floor((1 - gamma) * float(below.t)), below), ratio(below))
        up = math.sqrt(max(ratio(below) ** 2 - s**2, 0.0))
        x = towards(x, x0, level, NoiseLevel(below.t, below.alpha, below.alpha * s))
        if up > 0:
            x = x + float(below.alpha) * up * fresh(noise, level, below, x)
        yield Step(index, x, x0)


def _ancestral(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, move: Move, eta: float, noise: Noise | None
) -> Iterator[Step]:
    """A deterministic step to less noise than `below` has, the rest drawn anew; eta 0 draws none."""
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        down, up = split(level, below, eta)
        x = move(x, x0, level, down)
        if noise is not None and up > 0:
            x = x + up * fresh(noise, level, below, x)
        yield Step(index, x, x0)


def ratio_of_time(at: At, t: float, below: NoiseLevel) -> float:
    """The highest ratio of that t, its logarithm narrowed down by grids: `at` only leads the other way."""
    if float(below.t) <= t:
        return ratio(below)
    high = math.log(ratio(below))
    low = high - 30.0
    for _ in range(7):
        grid = torch.linspace(low, high, 129, dtype=torch.float64)
        above = int((at(grid[:-1].exp()).t <= t).sum())
        low, high = float(grid[max(above - 1, 0)]), float(grid[above])
    return math.exp(high)


def _middle(at: At, level: NoiseLevel, below: NoiseLevel) -> NoiseLevel:
    """The level halfway in the logarithm of the ratio."""
    return at((level.sigma / level.alpha * below.sigma / below.alpha).sqrt())


def _two_draws(
    noise: Noise, level: NoiseLevel, middle: NoiseLevel, below: NoiseLevel, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise from `level` to `middle` and from `level` to `below`, of one path: its clock is 1 / ratio^2."""
    first = fresh(noise, level, middle, x)
    if hasattr(noise, "between"):
        return first, fresh(noise, level, below, x)
    start, halfway, end = (ratio(place) ** -2 for place in (level, middle, below))
    share = (halfway - start) / (end - start)
    return first, math.sqrt(share) * first + math.sqrt(1 - share) * fresh(noise, middle, below, x)

"""Samplers that extrapolate from the steps before: one evaluation a step, whatever the order.

Two families. Adams-Bashforth in the ratio mixes eps: `plms`, `ipndm`, `lms`, `deis` differ in the weights alone.
Exponential integrators in half the log-SNR mix x0: `dpmpp_2m`, `dpmpp_3m` and their stochastic kin.
"""

import math
from collections.abc import Callable, Iterator

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
    half_log_snr,
    mixed,
    mostly_noise,
    need_noise,
    pairs,
    ratio,
    towards,
    weights_of,
)
from ldm.names import known
from ldm.types import Denoise

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of equal strides, newest first."""

Weights = Callable[[list[float], float], list[float]]
"""(ratios of the present and past eps, newest first; ratio to go to) -> the weights of their mean, sum 1."""


@accurate
def plms(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Pseudo linear multistep (PLMS, Liu et al. 2022): DDIM steps by eps extrapolated from the last 4.

    Starts with one pseudo improved Euler step, as Stable Diffusion does: N steps take N + 1 evaluations. Second
    order, as in the paper: the weights are those of equal strides, and in sigma / alpha the levels have none.
    """
    past: list[Tensor] = []  # eps of the steps before, newest first
    for index, level, below in pairs(levels):
        x0 = mixed_x0 = denoise(x, level)
        eps = eps_of(x, x0, level)
        if not past and below.sigma > 0:
            guess = below.alpha * x0 + below.sigma * eps
            x0_below = denoise(guess, below)
            mixed_eps = (eps + eps_of(guess, x0_below, below)) / 2
            mixed_x0 = (x0 + x0_below) / 2
        else:
            mixed_eps = mixed(ADAMS_BASHFORTH[len(past)], [eps, *past])
        if level.alpha > 1e-3:
            mixed_x0 = (x - level.sigma * mixed_eps) / level.alpha
        else:  # (almost) pure noise: x / alpha says nothing, eps is x itself, and what there is to mix is x0
            mixed_eps = eps
        x = below.alpha * mixed_x0 + below.sigma * mixed_eps
        past = [eps, *past][:3]
        yield Step(index, x, x0)


@accurate
def ipndm(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Improved PNDM (Zhang & Chen 2023, app. H): the weights of equal strides, lower orders to start with.

    Second order, as `plms`; the weights are right to order 4 where the ratios are in equal strides.
    """
    return _adams(denoise, x, levels, lambda ratios, to: list(ADAMS_BASHFORTH[len(ratios) - 1]), 4)


@accurate
def lms(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """Linear multistep in the ratio: the polynomial through the last 4 eps, integrated exactly; order 4.

    Adams-Bashforth for uneven strides (Hairer, Norsett & Wanner 1993, sec. III.5), the `lms` of k-diffusion.
    """
    return _adams(denoise, x, levels, _linear_weights, 4)


@accurate
def deis(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DEIS, tAB in log rho (Zhang & Chen 2023, eq. 15): eps as a polynomial of log ratio, exact integrals; order 3.

    The last step, to a clean level, is of first order: the logarithm of its ratio has no end.
    """
    return _adams(denoise, x, levels, _log_weights, 3)


def _adams(denoise: Denoise, x: Tensor, levels: NoiseLevel, weights: Weights, order: int) -> Iterator[Step]:
    past: list[tuple[float, Tensor]] = []  # (ratio, eps), newest first
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        if mostly_noise(level):
            x = towards(x, x0, level, below)
        else:
            past = [(ratio(level), eps_of(x, x0, level)), *past][:order]
            shares = weights([at for at, _ in past], ratio(below))
            x = along(x, mixed(shares, [eps for _, eps in past]), level, below)
        yield Step(index, x, x0)


@accurate
def dpm_fast(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DPM-Solver-fast (Lu et al. 2022a, sec. 3.4): steps of order 3 over three levels each; one evaluation a level.

    The levels between are the nodes of such a step; with equal strides in log ratio, as in the paper, the whole is of
    order 3. What is left at the end is of lower order, and the step to a clean level of order 1.
    """
    start: tuple[Tensor, NoiseLevel] = x, levels[0]
    nodes: list[tuple[float, Tensor]] = []  # (ratio, eps) since the start of the step
    for index, level, below in pairs(levels):
        x0 = denoise(x, level)
        if len(nodes) == 3 or below.sigma == 0:
            nodes = []
        if not nodes:
            start = x, level
        if mostly_noise(level):
            x = towards(x, x0, level, below)
        else:
            nodes.append((ratio(level), eps_of(x, x0, level)))
            shares = _log_weights([at for at, _ in nodes], ratio(below))
            x = along(start[0], mixed(shares, [eps for _, eps in nodes]), start[1], below)
        yield Step(index, x, x0)


def _linear_weights(ratios: list[float], to: float) -> list[float]:
    nodes = [(r - ratios[0]) / (to - ratios[0]) for r in ratios]
    return weights_of(nodes, [1 / (k + 1) for k in range(len(ratios))])


def _log_weights(ratios: list[float], to: float) -> list[float]:
    if to == 0:
        return [1.0] + [0.0] * (len(ratios) - 1)
    span = math.log(to / ratios[0])
    nodes = [math.log(r / ratios[0]) / span for r in ratios]
    return weights_of(nodes, [_moment(k, span) / math.expm1(span) for k in range(len(ratios))])


def _moment(k: int, span: float) -> float:
    """The integral of (y / span)^k e^y over y = 0 ... span."""
    if abs(span) < 2:  # parts would cancel
        return sum(span ** (n + 1) / math.factorial(n) / (k + n + 1) for n in range(30))
    value = math.expm1(span)
    for power in range(1, k + 1):
        value = math.exp(span) - power / span * value
    return value


@accurate
def dpmpp_2m(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): x0 extrapolated to the middle of the step; second order."""
    return _exponential(denoise, x, levels, _midpoint)


@accurate
def dpmpp_3m(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """DPM-Solver++ of order 3, multistep (Lu et al. 2022b, eq. 9): the parabola through the last 3 estimates of x0."""
    return _exponential(denoise, x, levels, _parabola)


@accurate
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 1.0,
    kind: str = "midpoint",
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, eq. 18); needs `noise`.

    kind: whether the slope of x0 is taken at the "midpoint" of the step or integrated over it ("heun").
    """
    known("kind of dpmpp_2m_sde", kind, ("midpoint", "heun"))
    noise = need_noise("dpmpp_2m_sde", noise)
    return _exponential(denoise, x, levels, _midpoint if kind == "midpoint" else _line, eta, noise)


def dpmpp_2m_sde_heun(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
) -> Iterator[Step]:
    """`dpmpp_2m_sde` with the slope of x0 integrated over the step; needs `noise`."""
    return dpmpp_2m_sde(denoise, x, levels, kind="heun", noise=noise)


@accurate
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    at: At | None = None,
) -> Iterator[Step]:
    """SDE-DPM-Solver++ by the parabola through the last 3 estimates of x0 (Lu et al. 2022b, sec. 5); needs `noise`."""
    return _exponential(denoise, x, levels, _parabola, eta, need_noise("dpmpp_3m_sde", noise))


Mean = Callable[[list[float], float], list[float]]
"""(half log-SNR of the present and past x0, less the present one's, in units of the step; the decay over the
step) -> the weights of x0's mean over the step."""


def _exponential(
    denoise: Denoise, x: Tensor, levels: NoiseLevel, mean: Mean, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """x / alpha decays by e^(-(1 + eta) h) towards a mean of x0, h the change of half the log-SNR.

    The exact solution (Lu et al. 2022b, eq. 8; eq. 18 for eta 1) once x0 is a polynomial of the half log-SNR.
    """
    past: list[tuple[float, Tensor]] = []  # (half log-SNR, x0), newest first
    for index, level, below in pairs(levels):
        x0 = estimate = denoise(x, level)
        here = half_log_snr(level)
        step = half_log_snr(below) - here
        if math.isfinite(here):
            past = [(here, x0), *past][:3]
        if math.isfinite(step):
            shares = mean([(place - here) / step for place, _ in past], (1 + eta) * step)
            estimate = mixed(shares, [value for _, value in past][: len(shares)])
        kept = math.exp(-eta * step) if eta else 1.0
        target = NoiseLevel(below.t, below.alpha, below.sigma * kept)
        x = towards(x, estimate, level, target)
        up = float(below.sigma) * math.sqrt(max(1 - kept**2, 0.0))
        if noise is not None and up > 0:
            x = x + up * fresh(noise, level, below, x)
        yield Step(index, x, x0)


def _midpoint(places: list[float], decay: float) -> list[float]:
    if len(places) == 1:
        return [1.0]
    share = -0.5 / places[1]
    return [1 + share, -share]


def _line(places: list[float], decay: float) -> list[float]:
    return mean_of_polynomial(places[:2], decay)


def _parabola(places: list[float], decay: float) -> list[float]:
    return mean_of_polynomial(places[:3], decay)


def mean_of_polynomial(places: list[float], decay: float) -> list[float]:
    """Weights of the mean of the polynomial through the places, the end of the step (1) weighing most."""
    return weights_of(places, [_late_moment(k, decay) for k in range(len(places))])


def _late_moment(k: int, decay: float) -> float:
    """The mean of u^k over u = 0 ... 1 with weight e^(decay u)."""
    return _moment(k, decay) / math.expm1(decay)

"""The exact likelihood that a model gives to pictures, by its probability-flow ODE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import At, eps_of, ratio
from ldm.types import Denoise


@dataclass(frozen=True)
class Likelihood:
    """nats [B]: the logarithm of each picture's density, over all its values together, float64.

    error [B]: the standard error of `nats` by its probes; 0 where the divergence is exact, NaN of a single probe.
    """

    nats: Tensor
    error: Tensor


def log_likelihood(
    denoise: Denoise, x0: Tensor, levels: NoiseLevel, *, at: At, probes: int = 0, seeds: Sequence[int] = ()
) -> Likelihood:
    """log p(x0) of pictures or latents x0 [B, C, H, W] (Song et al. 2021, eq. 39; Chen et al. 2018, eq. 8).

    p is the density of x / alpha at the last of the `levels` with sigma > 0, of what a sampler of the ODE makes of
    unit noise at levels[0]: x0 is taken to be there without noise added, as Song et al. do. That is the model's
    density blurred by noise of the ratio sigma / alpha there, so let the levels end low (spacing linspace).
    The ODE and the divergence along it are integrated by Runge-Kutta's method of order 4, four evaluations a step,
    in x / alpha over the ratio where that is below 1 and in x / sigma over its inverse elsewhere, which is finite at
    alpha = 0. `at` gives the levels between: `NoiseSchedule.at_ratio`.
    probes 0: the divergence is exact, by a backward pass of each value of a picture, for at most some thousands.
    probes > 0: it is estimated without bias by that many backward passes, with signs drawn from each image's own
    seed and kept along the whole way (Hutchinson 1990; Grathwohl et al. 2019, eq. 8).
    Memory is that of a forward pass with its graph; no image depends on the others. The caller may be in
    torch.no_grad. Raises ValueError for fewer than two levels with sigma > 0, or seeds that do not fit.
    """
    count = int((levels.sigma > 0).sum())
    if count < 2:
        raise ValueError(f"a likelihood needs at least 2 levels with noise, got {count}")
    if probes < 0 or (probes and len(seeds) != len(x0)):
        raise ValueError(f"probes need a seed for each of {len(x0)} images, got {probes} probes and {len(seeds)} seeds")
    given = x0.dtype

    def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
        return denoise(x.to(given), level).to(x)

    x = levels.alpha[count - 1] * x0.detach().to(torch.promote_types(given, torch.float32))
    directions = _signs(probes, seeds, x) if probes else _unit_vectors(x)
    size = x[0].numel()
    total = size * float(levels.alpha[count - 1].log())  # log p of x / alpha, less log p of x
    change = torch.zeros(1, dtype=torch.float64)
    for index in range(count - 1, 0, -1):
        x, turned, scaled = _climb(estimate, x, (levels[index], levels[index - 1]), at, directions)
        change, total = change + turned, total + size * scaled
    prior = -(x.double().square().flatten(1).sum(1).cpu() + size * math.log(2 * math.pi)) / 2
    each = prior + total + (change if probes else change.sum(0, keepdim=True))  # [probes or 1, B]
    if probes > 1:
        return Likelihood(each.mean(0), each.std(0) / math.sqrt(probes))
    return Likelihood(each[0], torch.full_like(prior, math.nan if probes else 0.0))


def bits_per_dim(nats: Tensor, size: int, step: float = 1.0) -> Tensor:
    """The code length of pictures of `size` values in bits a value, from the log-density of `log_likelihood`.

    step: the distance of neighbouring values, 2 / 255 for bytes shown as -1 ... 1, if uniform noise of that width
    was added to the picture first (Theis et al. 2016, sec. 3.1); 1 is the density alone.
    """
    return -(nats / size + math.log(step)) / math.log(2)


def _climb(
    denoise: Denoise, x: Tensor, step: tuple[NoiseLevel, NoiseLevel], at: At, directions: Tensor
) -> tuple[Tensor, Tensor, float]:
    """From one level up to the next: x there, the integral of the divergence [P, B], and the logarithm of the scale.

    The density of x below is that of x above times exp(integral) times exp(logarithm) once for each value.
    """
    below, level = step
    quiet = ratio(below) * ratio(level) < 1
    if quiet:  # y = x / alpha, dy / dratio = eps
        scale_below, scale, start, end = below.alpha, level.alpha, ratio(below), ratio(level)
        middle = at(torch.tensor((start + end) / 2, dtype=torch.float64))
    else:  # w = x / sigma, dw / d(1 / ratio) = x0
        scale_below, scale, start, end = below.sigma, level.sigma, 1 / ratio(below), 1 / ratio(level)
        middle = at(torch.tensor(2 / (start + end), dtype=torch.float64))
    stride = end - start
    place = x / scale_below
    slope1, turn1 = _slope(denoise, place, below, quiet, directions)
    slope2, turn2 = _slope(denoise, place + stride / 2 * slope1, middle, quiet, directions)
    slope3, turn3 = _slope(denoise, place + stride / 2 * slope2, middle, quiet, directions)
    slope4, turn4 = _slope(denoise, place + stride * slope3, level, quiet, directions)
    place = place + stride / 6 * (slope1 + 2 * slope2 + 2 * slope3 + slope4)
    turned = stride / 6 * (turn1 + 2 * turn2 + 2 * turn3 + turn4)
    return scale * place, turned, float((scale / scale_below).log())


def _slope(
    denoise: Denoise, place: Tensor, level: NoiseLevel, quiet: bool, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """The slope of y or w at a place, and v^T (d slope / d place) v of each direction v: [P, B]."""
    with torch.enable_grad():
        place = place.detach().requires_grad_()
        x = (level.alpha if quiet else level.sigma) * place
        x0 = denoise(x, level)
        slope = eps_of(x, x0, level) if quiet else x0
        turns = []
        for number, direction in enumerate(directions):
            more = number < len(directions) - 1
            (row,) = torch.autograd.grad(slope, place, direction.expand_as(slope), retain_graph=more)
            turns.append((row * direction).flatten(1).double().sum(1))
    return slope.detach(), torch.stack(turns).cpu()


def _unit_vectors(x: Tensor) -> Tensor:
    """[D, 1, C, H, W]: over these the sum of v^T J v is the trace."""
    size = x[0].numel()
    return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])


def _signs(probes: int, seeds: Sequence[int], x: Tensor) -> Tensor:
    """[probes, B, C, H, W] of -1 and 1, image i from seeds[i] alone: the mean of v^T J v is the trace."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randint(0, 2, (probes, *x.shape[1:]), generator=generator))
    return 2 * torch.stack(drawn, dim=1).to(x) - 1

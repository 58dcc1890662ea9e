"""Inverse problems without training: repainting a part, resampling it until it fits, and linear measurements."""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion
from ldm.diffusion.samplers.base import At, Noise, Sampler, Step, need_noise
from ldm.diffusion.steering import Score
from ldm.types import Denoise

Operator = Callable[[Tensor], Tensor]
"""What was measured of a picture [B, C, H, W], differentiable: [B, ...]."""


def completed(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """The estimate of x0 with the known part in its place: mask * x0 + (1 - mask) * known.

    known [B or 1, C, H, W]; mask [B or 1, 1, H, W] in 0..1: 1 is drawn, 0 is known, between them is a blend.
    What is known keeps the noise that it has, (x - alpha * known) / sigma, in every sampler; a learned variance is
    the smallest there. Raises ValueError for a mask that does not fit, and later for a picture of another size than x.
    """
    _check_mask(known, mask)
    told = getattr(denoise, "with_variance", None)

    def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
        _check_known(known, x)
        x0 = denoise(x, level)
        return torch.lerp(known.to(x0), x0, mask.to(x0))

    def with_variance(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        _check_known(known, x)
        x0, v = told(x, level)  # type: ignore[misc]
        return torch.lerp(known.to(x0), x0, mask.to(x0)), torch.lerp(-torch.ones_like(v), v, mask.to(v))

    if told is not None:
        estimate.with_variance = with_variance  # type: ignore[attr-defined]
    return estimate


def repainted(take: Sampler, known: Tensor, mask: Tensor) -> Sampler:
    """The sampler with `completed` estimates, whose last x has every value with mask 0 exactly as in `known`.

    Also where the trajectory ends with noise. For the shapes and the ValueErrors see `completed`.
    """
    _check_mask(known, mask)

    def repaint(
        denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
    ) -> Iterator[Step]:
        _check_known(known, x)
        last = len(levels.t) - 2
        kept, there = mask.to(x) == 0, known.to(x)
        steps = take(completed(denoise, known, mask), x, levels, noise=noise, at=at)
        return (
            Step(step.index, torch.where(kept, there, step.x), step.x0) if step.index == last else step
            for step in steps
        )

    return repaint


def resampled(take: Sampler, jump: int, times: int) -> Sampler:
    """RePaint: every stretch of `jump` levels is gone down `times` times (Lugmayr et al. 2022, algorithm 1, app. B).

    Between two of them fresh noise leads back up, so that what is drawn comes to agree with what is known. Each time
    is a run of `take` of its own: a method with a memory starts anew. One Step a level still, those of the last
    time; the others before it give none. `times` as many evaluations as `take`. Needs `noise`, and draws all of it
    by `noise()`: a Brownian path would say the same each time. times 1 is `take` itself.
    Raises ValueError unless both are at least 1.
    """
    if jump < 1 or times < 1:
        raise ValueError(f"resampling needs a jump of at least 1 level and at least 1 time, got {jump} and {times}")
    if times == 1:
        return take

    def resample(
        denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: Noise | None = None, at: At | None = None
    ) -> Iterator[Step]:
        draw = need_noise("resampling", noise)

        def fresh() -> Tensor:  # the same source without its Brownian path
            return draw()

        count = len(levels.t) - 1
        for start in range(0, count, jump):
            end = min(start + jump, count)
            # the whole way down from here, left early: a sampler may do otherwise in what it takes for its last step
            rest = NoiseLevel(levels.t[start:], levels.alpha[start:], levels.sigma[start:])
            for _ in range(times - 1):
                for step in islice(take(denoise, x, rest, noise=fresh, at=at), end - start):
                    x = step.x
                x = _noised(x, levels[end], levels[start], fresh)
            for step in islice(take(denoise, x, rest, noise=fresh, at=at), end - start):
                x = step.x
                yield Step(start + step.index, x, step.x0)

    return resample


def measured(operator: Operator, y: Tensor, noise_std: float, space: Diffusion) -> Score:
    """log N(y; A x0, noise_std^2 + gain * r^2), the score of a measurement y = A x0 + noise, for `estimate_guided`.

    r^2 = sigma^2 / (alpha^2 + sigma^2) is the variance that x leaves of data of unit variance (Song et al. 2023,
    PiGDM), for which this is exact if the rows of A are orthogonal and of one length, as those of `downscale`. Else
    it is an approximation: for A A^T stands `gain`, its mean diagonal, estimated without bias by one fixed probe of
    signs. An operator that is not linear, such as one after a decoder, is linearised at x0.
    y [B or 1, ...] as the operator gives it. Raises ValueError for noise_std < 0, and later for a y that does not fit.
    """
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise ValueError(f"noise_std must be a finite number of at least 0, got {noise_std}")

    def score(x0: Tensor, t: Tensor) -> Tensor:
        seen = operator(x0)
        if seen.shape[1:] != y.shape[1:] or len(y) not in (1, len(seen)):
            raise ValueError(f"the measurement is {[*y.shape]}, but the operator gives {[*seen.shape]}")
        probe = torch.randint(0, 2, seen.shape[1:], generator=torch.Generator().manual_seed(0)).to(seen) * 2 - 1
        (row,) = torch.autograd.grad(seen, x0, probe.expand_as(seen), retain_graph=True)
        gain = row.flatten(1).square().sum(1) / probe.numel()
        level = space.schedule.at(t)
        left = level.sigma.square() / (level.alpha.square() + level.sigma.square())
        variance = (noise_std**2 + gain * left.to(x0)).clamp(min=torch.finfo(x0.dtype).tiny)
        return -(y.to(seen) - seen).square().flatten(1).sum(1) / (2 * variance)

    return score


def downscale(factor: int) -> Operator:
    """The mean of each square of factor x factor px. Raises ValueError for a factor below 1 or that does not divide."""
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")

    def operator(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(f"a picture of {width}x{height} px cannot be scaled down by {factor}")
        return F.avg_pool2d(image, factor)

    return operator


def blur(radius: float) -> Operator:
    """A Gaussian blur of standard deviation `radius` px, cut at 4 of them; beyond its edge a picture goes on as there.

    Raises ValueError unless radius > 0.
    """
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be above 0 px, got {radius}")
    reach = math.ceil(4 * radius)

    def operator(image: Tensor) -> Tensor:
        places = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = (-places.square() / (2 * radius**2)).exp()
        kernel = (kernel / kernel.sum()).to(image)
        channels = image.shape[1]
        image = F.pad(image, (reach, reach, reach, reach), mode="replicate")
        image = F.conv2d(image, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(image, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)

    return operator


def _noised(x: Tensor, level: NoiseLevel, above: NoiseLevel, noise: Noise) -> Tensor:
    """x as forward diffusion takes it from one level to a noisier one."""
    kept = above.alpha / level.alpha
    added = (above.sigma.square() - (kept * level.sigma).square()).clamp(min=0).sqrt()
    return kept * x + added * noise().to(x)


def _check_mask(known: Tensor, mask: Tensor) -> None:
    batches = len(known) == len(mask) or 1 in (len(known), len(mask))
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != known.shape[2:] or not batches:
        raise ValueError(f"the mask must be [B or 1, 1, H, W] of the known [{[*known.shape]}], got {[*mask.shape]}")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"the mask must be in 0..1, got {mask.min():g}..{mask.max():g}")


def _check_known(known: Tensor, x: Tensor) -> None:
    if known.shape[1:] != x.shape[1:] or len(known) not in (1, len(x)):
        raise ValueError(f"the known picture is {[*known.shape]}, but what is drawn is {[*x.shape]}")

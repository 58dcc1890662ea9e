"""Guidance as a denoiser around a denoiser: to everything else it is just another network.

Of a network that learned its variance as well, [B, 2 C, H, W], the first half is guided and the second passed on.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.types import Conditioning, Denoiser

Scale = float | Callable[[Tensor], Tensor]
"""How far to go from the negative through the wanted: a number, or by t [B] -> [B], as `plus_plus` has it."""
Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, output of the negative, output wanted) -> the guided output."""


class Space(Protocol):
    """From the network's output to its estimate of x0 and back, at any t [B]: a `Diffusion`."""

    def x0_of(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor: ...

    def output_of(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor: ...


def guided(
    denoiser: Denoiser,
    negative: Conditioning | Denoiser,
    scale: Scale,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    mix: Mix | None = None,
    perturbed: tuple[Denoiser, float] | None = None,
) -> Denoiser:
    """Guidance away from a negative: negative + scale * (wanted - negative).

    negative: a conditioning, 1 row or as many as the batch, with the fields of that of the prompt: classifier-free
        guidance (Ho & Salimans 2022, eq. 6, scale = 1 + w), both halves in one forward, in the order [negative,
        wanted]. Or a weaker network that is told the prompt as well: autoguidance (Karras et al. 2024, eq. 4).
    scale: 1 needs no negative.
    rescale in [0, 1]: how far to pull the spread of each output back to that of the wanted one
        (Lin et al. 2024, section 3.4); it depends on the prediction type, so it acts on raw outputs.
    interval: guide only where `t`, as the network is told it, lies in [low, high] (Kynkäänniemi et al. 2024).
    mix: another way to join the two, such as `adaptive_projected`; the scale is then its own affair.
    perturbed: the same network with some of its attention or its layers off, told the prompt, and a scale s: adds
        s * (wanted - its output) (Ahn et al. 2024, eq. 17), at one more evaluation.
    Raises ValueError for values outside.
    """
    check_guidance(scale, rescale, interval)
    low, high = (-math.inf, math.inf) if interval is None else interval
    if scale == 1 and mix is None and perturbed is None:
        return denoiser

    def both(x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        if not isinstance(negative, Conditioning):
            return negative(x, t, cond), denoiser(x, t, cond)
        if scale == 1 and mix is None:
            wanted = denoiser(x, t, cond)
            return wanted, wanted
        rows = negative.map(lambda v: v.expand(len(x), *v.shape[1:]))
        first, second = denoiser(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([rows, cond])).chunk(2)
        return first, second

    def guide(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        inside = (t >= low) & (t <= high)
        if interval is not None and not inside.any():
            return denoiser(x, t, cond)
        channels = x.shape[1]
        pair = both(x, t, cond)
        without, told = pair[0][:, :channels], pair[1][:, :channels]
        output = without + _at(scale, t, x) * (told - without) if mix is None else mix(x, t, without, told)
        if perturbed is not None:
            output = output + perturbed[1] * (told - perturbed[0](x, t, cond)[:, :channels])
        if rescale:
            output = output * (1 - rescale + rescale * _spread(told) / _spread(output))
        output = torch.where(inside.view(-1, *[1] * (x.ndim - 1)), output, told)
        return torch.cat([output, pair[1][:, channels:]], dim=1)

    return guide


def plus_plus(levels: NoiseLevel, strength: float) -> Callable[[Tensor], Tensor]:
    """The scale of CFG++ (Chung et al. 2024, algorithm 2) for a trajectory [N + 1]: t [B] -> [B].

    CFG++ goes on from the guided estimate of x0 with the noise of the unconditional one. On a first-order step from one
    ratio to another that is classifier-free guidance of scale strength * ratio / (ratio - ratio below), and so it is a
    scale for every sampler; between two levels that of the upper one. strength in [0, 1]: 1 goes all the way to the
    estimate with the prompt. Raises ValueError outside.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the guidance of CFG++ must be in 0..1, got {strength}")
    left = levels.alpha[:-1] * levels.sigma[1:] / (levels.sigma[:-1] * levels.alpha[1:])  # ratio below / ratio
    scales = strength / (1 - left)
    return lambda t: scales[levels.steps_of(t)].to(t)


def adaptive_projected(
    space: Space, scale: Scale, *, parallel: float = 0.0, momentum: float = -0.5, norm: float = 15.0
) -> Mix:
    """Adaptive projected guidance, against the oversaturation of high scales (Sadat et al. 2024, algorithm 1).

    The difference that the prompt makes to x0, with `momentum` of those before it and at most `norm` long (0 = any
    length), is split at the estimate: what is parallel to it counts `parallel` times, what is orthogonal counts
    fully. parallel 1, momentum 0 and norm 0 are classifier-free guidance. Keep one for each trajectory: it remembers.
    """
    running: list[Tensor] = []

    def mix(x: Tensor, t: Tensor, without: Tensor, wanted: Tensor) -> Tensor:
        estimate = space.x0_of(wanted, x, t)
        difference = estimate - space.x0_of(without, x, t)
        if momentum and running:
            difference = difference + momentum * running.pop()
        running[:] = [difference.detach()]
        axes = tuple(range(1, x.ndim))
        if norm:
            length = difference.square().sum(axes, keepdim=True).sqrt()
            difference = difference * (norm / length.clamp(min=norm))
        along = estimate / estimate.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
        share = (difference * along).sum(axes, keepdim=True) * along
        further = (_at(scale, t, x) - 1) * (difference - share + parallel * share)
        return space.output_of(estimate + further, x, t)

    return mix


def thresholded(denoiser: Denoiser, space: Space, share: float, limit: float = 1.0) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, sec. 2.3): each image's estimate of x0 stays within its own range.

    The quantile `share` of its absolute values, at least `limit`, is scaled down to `limit`, and what lies beyond is
    cut. limit 1 is for pictures in [-1, 1]; latents of unit variance reach to about 4.
    Raises ValueError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"threshold must be a share in 0..1 of the values to keep, got {share}")

    def within(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        said = denoiser(x, t, cond)
        x0 = space.x0_of(said, x, t)
        reach = torch.quantile(x0.flatten(1).abs().float(), share, dim=1).clamp(min=limit)
        reach = reach.to(x0).view(-1, *[1] * (x0.ndim - 1))
        output = space.output_of(x0.clamp(-reach, reach) * (limit / reach), x, t)
        return torch.cat([output, said[:, x.shape[1] :]], dim=1)

    return within


def check_guidance(scale: Scale, rescale: float, interval: tuple[float, float] | None) -> None:
    """Raise ValueError unless `scale` is finite, `rescale` is in 0..1 and `interval` has its lower end first."""
    if not callable(scale) and not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be in 0..1, got {rescale}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"guidance interval must be (low, high) with low <= high, got {interval}")


def _at(scale: Scale, t: Tensor, x: Tensor) -> Tensor | float:
    return scale(t).to(x).view(-1, *[1] * (x.ndim - 1)) if callable(scale) else scale


def _spread(output: Tensor) -> Tensor:
    # never zero: an untrained network may say nothing but zeros
    spread = output.std(dim=tuple(range(1, output.ndim)), keepdim=True)
    return spread.clamp(min=torch.finfo(spread.dtype).tiny)

"""Guidance as a denoiser around a denoiser: to everything else it is just another network."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ldm.types import Conditioning, Denoiser

Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, output without the prompt, output with it) -> the guided output."""


class Space(Protocol):
    """From the network's output to its estimate of x0 and back, at any t [B]: a `Diffusion`."""

    def x0_of(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor: ...

    def output_of(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor: ...


def guided(
    denoiser: Denoiser,
    uncond: Conditioning,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    mix: Mix | None = None,
    weak: Denoiser | None = None,
) -> Denoiser:
    """Classifier-free guidance, uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, scale = 1 + w).

    Both halves run in one forward, in the order [uncond, cond]; scale 1 needs no uncond: it is `denoiser`.
    uncond: 1 row or as many as the batch, with the same fields as the conditioning.
    rescale in [0, 1]: how far to pull the spread of each output back to the conditional one's
        (Lin et al. 2024, section 3.4); it depends on the prediction type, so it acts on raw outputs.
    interval: guide only where `t`, as the network is told it, lies in [low, high] (Kynkäänniemi et al. 2024).
    mix: another way to join the two, such as `adaptive_projected`.
    weak: a weaker network that speaks in the place of the unconditional one, told the prompt as well
        (autoguidance, Karras et al. 2024, eq. 4); `uncond` is not used then.
    Raises ValueError for values outside.
    """
    check_guidance(scale, rescale, interval)
    low, high = (-math.inf, math.inf) if interval is None else interval
    if scale == 1:
        return denoiser

    def both(x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        if weak is not None:
            return weak(x, t, cond), denoiser(x, t, cond)
        rows = uncond.map(lambda v: v.expand(len(x), *v.shape[1:]))
        first, second = denoiser(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([rows, cond])).chunk(2)
        return first, second

    def guide(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        inside = (t >= low) & (t <= high)
        if interval is not None and not inside.any():
            return denoiser(x, t, cond)
        without, wanted = both(x, t, cond)
        output = without + scale * (wanted - without) if mix is None else mix(x, t, without, wanted)
        if rescale:
            output = output * (1 - rescale + rescale * _spread(wanted) / _spread(output))
        return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), output, wanted)

    return guide


def adaptive_projected(
    space: Space, scale: float, *, parallel: float = 0.0, momentum: float = -0.5, norm: float = 15.0
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
        running[:] = [difference]
        axes = tuple(range(1, x.ndim))
        if norm:
            length = difference.square().sum(axes, keepdim=True).sqrt()
            difference = difference * (norm / length.clamp(min=norm))
        along = estimate / estimate.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
        share = (difference * along).sum(axes, keepdim=True) * along
        return space.output_of(estimate + (scale - 1) * (difference - share + parallel * share), x, t)

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
        x0 = space.x0_of(denoiser(x, t, cond), x, t)
        reach = torch.quantile(x0.flatten(1).abs().float(), share, dim=1).clamp(min=limit)
        reach = reach.to(x0).view(-1, *[1] * (x0.ndim - 1))
        return space.output_of(x0.clamp(-reach, reach) * (limit / reach), x, t)

    return within


def check_guidance(scale: float, rescale: float, interval: tuple[float, float] | None) -> None:
    """Raise ValueError unless `scale` is finite, `rescale` is in 0..1 and `interval` has its lower end first."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be in 0..1, got {rescale}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"guidance interval must be (low, high) with low <= high, got {interval}")


def _spread(output: Tensor) -> Tensor:
    # never zero: an untrained network may say nothing but zeros
    spread = output.std(dim=tuple(range(1, output.ndim)), keepdim=True)
    return spread.clamp(min=torch.finfo(spread.dtype).tiny)

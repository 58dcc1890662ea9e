"""Guidance as a denoiser around a denoiser: to everything else it is just another network."""

import math

import torch
from torch import Tensor

from ldm.types import Conditioning, Denoiser


def guided(
    denoiser: Denoiser,
    uncond: Conditioning,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Classifier-free guidance, uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, scale = 1 + w).

    Both halves run in one forward, in the order [uncond, cond]; scale 1 needs no uncond: it is `denoiser`.
    uncond: 1 row or as many as the batch, with the same fields as the conditioning.
    rescale in [0, 1]: how far to pull the spread of each output back to the conditional one's
        (Lin et al. 2024, section 3.4); it depends on the prediction type, so it acts on raw outputs.
    interval: guide only where `t`, as the network is told it, lies in [low, high] (Kynkäänniemi et al. 2024).
    Raises ValueError for values outside.
    """
    check_guidance(scale, rescale)
    low, high = (-math.inf, math.inf) if interval is None else interval
    if not low <= high:
        raise ValueError(f"guidance interval must be (low, high) with low <= high, got {interval}")
    if scale == 1:
        return denoiser

    def guide(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        inside = (t >= low) & (t <= high)
        if interval is not None and not inside.any():
            return denoiser(x, t, cond)
        rows = uncond.map(lambda v: v.expand(len(x), *v.shape[1:]))
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([rows, cond]))
        without, wanted = both.chunk(2)
        output = without + scale * (wanted - without)
        if rescale:
            output = output * (1 - rescale + rescale * _spread(wanted) / _spread(output))
        return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), output, wanted)

    return guide


def check_guidance(scale: float, rescale: float) -> None:
    """Raise ValueError unless `scale` is finite and `rescale` is in 0..1."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be in 0..1, got {rescale}")


def _spread(output: Tensor) -> Tensor:
    # never zero: an untrained network may say nothing but zeros
    spread = output.std(dim=tuple(range(1, output.ndim)), keepdim=True)
    return spread.clamp(min=torch.finfo(spread.dtype).tiny)

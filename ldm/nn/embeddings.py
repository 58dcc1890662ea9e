"""Embeddings of numbers that are not pixels."""

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, width: int, shift: float = 0.0) -> Tensor:
    """cos(t w_i), then sin(t w_i), with w_i = 10000^(-i / (width / 2 - shift)) (Ho et al. 2020, app. B).

    t [B], any real (0..1000 by convention) -> [B, width], float32; `width` must be even. `shift` is 0 in every
    published model but diffusers' DiT, where it is 1.
    """
    if width % 2:
        raise ValueError(f"a timestep embedding has an even width, not {width}")
    half = width // 2
    # In float32 and in this order of operations, since at t = 1000 the last bit of a frequency shows.
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * exponents.exp()  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(height: int, width: int, channels: int) -> Tensor:
    """Sinusoids of the row in the first half of the channels, of the column in the second.

    -> [channels, height, width] in [-1, 1]; `channels` must be a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a position embedding has a multiple of 4 channels, not {channels}")
    rows = timestep_embedding(torch.arange(height), channels // 2).T[:, :, None].expand(-1, height, width)
    columns = timestep_embedding(torch.arange(width), channels // 2).T[:, None, :].expand(-1, height, width)
    return torch.cat([rows, columns])

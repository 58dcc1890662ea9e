"""Embeddings of numbers that are not pixels."""

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timestep, cosines first (Ho et al. 2020, after Vaswani et al. 2017, sec. 3.5).

    t [B], any real (0..999 by convention) -> [B, width]; `width` must be even.
    """
    if width % 2:
        raise ValueError(f"a timestep embedding has an even width, not {width}")
    half = torch.arange(width // 2, device=t.device, dtype=torch.float32)
    rates = torch.exp(-math.log(max_period) / (width // 2) * half)
    angles = t.float()[:, None] * rates  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(height: int, width: int, channels: int) -> Tensor:
    """Sinusoids of the row in the first half of the channels, of the column in the second (as in DiT).

    -> [channels, height, width] in [-1, 1]; `channels` must be a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a position embedding has a multiple of 4 channels, not {channels}")
    rows = timestep_embedding(torch.arange(height), channels // 2).T[:, :, None].expand(-1, height, width)
    columns = timestep_embedding(torch.arange(width), channels // 2).T[:, None, :].expand(-1, height, width)
    return torch.cat([rows, columns])

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

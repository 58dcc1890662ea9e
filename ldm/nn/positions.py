"""Fixed two-dimensional position embeddings of diffusion transformers (Peebles and Xie 2023, sec. 3.2)."""

import torch
from torch import Tensor


def grid(size: int, base: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Coordinates of `size` patches along one axis -> [size].

    They count 0, 1, 2, ...; with a `base` they are spread over 0..base instead, whatever the size, so that a model
    trained at base x base patches meets coordinates in the range that it knows.
    """
    coordinates = torch.arange(size, dtype=torch.float32, device=device)
    return coordinates / (size / base) if base else coordinates


def sincos(coordinates: Tensor, width: int) -> Tensor:
    """sin(x w_i), then cos(x w_i), with w_i = 10000^(-i / (width / 2)) (Vaswani et al. 2017, sec. 3.5).

    coordinates [N] -> [N, width], float32.
    """
    # Published weights come with embeddings computed in float64 and rounded once, at the end.
    exact = torch.float32 if coordinates.device.type == "mps" else torch.float64
    half = torch.arange(width // 2, dtype=exact, device=coordinates.device)
    angles = coordinates.to(exact)[:, None] * (1 / 10_000 ** (half / (width / 2)))  # [N, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """The column's embedding in the first half of the channels, the row's in the second, row by row.

    rows [H], columns [W] -> [H W, width], float32; `width` must be a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D position embedding has a multiple of 4 channels, not {width}")
    across = sincos(columns, width // 2)[None].expand(len(rows), -1, -1)  # [H, W, width / 2]
    down = sincos(rows, width // 2)[:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)

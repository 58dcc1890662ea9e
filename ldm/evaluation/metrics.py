"""How far one picture is from another."""

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures [B, C, H, W] in [-1, 1], each with its pair: [B] in dB.

    The data range is 2; equal pictures give infinity. Raises ValueError for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.double() - b.double()).square().flatten(1).mean(1)  # [B]
    return 10 * (4 / error).log10()

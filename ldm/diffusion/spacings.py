"""Where sampling steps, as ratios sigma / alpha from noisy to clean; and the quantiles that some of it needs.

A ratio is the noise level of those who keep alpha at 1 (Karras et al. 2022). None of these includes the clean end.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Spacing = Callable[[int, float, float], Tensor]
"""(steps, lowest ratio, highest ratio) -> ratios [steps], float64, falling from the highest to the lowest."""


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Equal strides in ratio^(1 / rho) (Karras et al. 2022, eq. 5)."""
    root = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64)
    return root**rho


def exponential(steps: int, low: float, high: float) -> Tensor:
    """Equal strides in the logarithm of the ratio, half the log-SNR (Lu et al. 2022, sec. 3.3)."""
    return polyexponential(steps, low, high, rho=1.0)


def polyexponential(steps: int, low: float, high: float, rho: float = 1.5) -> Tensor:
    """Strides in the logarithm of the ratio that follow a power: more steps at low noise as rho grows."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return (ramp * (math.log(high) - math.log(low)) + math.log(low)).exp()


def kl_optimal(steps: int, low: float, high: float) -> Tensor:
    """Equal strides in arctan of the ratio, the least KL for Gaussian data (Sabour et al. 2024, theorem 3.1)."""
    return torch.linspace(math.atan(high), math.atan(low), steps, dtype=torch.float64).tan()


AYS_TABLES = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "video": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""The ratios of ten steps that Sabour et al. 2024 publish for Stable Diffusion 1.5, SDXL and Stable Video Diffusion."""


def align_your_steps(steps: int, low: float, high: float, model: str = "sd") -> Tensor:
    """The published table, interpolated in the logarithm as its authors do; it has its own ends."""
    table = torch.tensor(AYS_TABLES[model], dtype=torch.float64).log()
    place = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64)[:-1]
    below = place.floor().long()  # never the last
    return torch.lerp(table[below], table[below + 1], place - below).exp()


def align_your_steps_sdxl(steps: int, low: float, high: float) -> Tensor:
    """The table for SDXL."""
    return align_your_steps(steps, low, high, "sdxl")


def align_your_steps_video(steps: int, low: float, high: float) -> Tensor:
    """The table for Stable Video Diffusion."""
    return align_your_steps(steps, low, high, "video")


RATIO_SPACINGS: dict[str, Spacing] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "kl_optimal": kl_optimal,
    "ays": align_your_steps,
    "ays_sdxl": align_your_steps_sdxl,
    "ays_video": align_your_steps_video,
}


def beta_times(steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Times in (0, 1] at equal strides of a Beta(a, b) distribution, falling (Lee et al. 2024): [steps], float64."""
    # With time = sin^2 the density is finite at both ends, so that a plain sum integrates it.
    angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    density = angle.sin() ** (2 * a - 1) * angle.cos() ** (2 * b - 1)
    share = torch.cumulative_trapezoid(density, angle)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    wanted = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return interpolate(wanted, share, angle).sin() ** 2


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys), xs rising, at x; constant beyond its ends."""
    high = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    low = high - 1
    share = ((x - xs[low]) / (xs[high] - xs[low])).clamp(0, 1)
    return torch.lerp(ys[low], ys[high], share)

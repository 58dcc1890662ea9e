"""What training asks of a level: how often it is drawn, how much its error counts, and what an error is."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Times whose logit is normal: the inverse of that distribution's CDF (Esser et al. 2024, eq. 19)."""
    return (mean + std * torch.special.ndtri(u.double())).sigmoid()


def mode(u: Tensor, scale: float) -> Tensor:
    """Heavy-tailed times, around the middle for scale > 0, at both ends for scale < 0 (Esser et al. 2024, eq. 20).

    scale in [-1, 2 / (pi - 2)], where it is monotonic.
    """
    u = u.double()
    return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """Times whose log-SNR is distributed as that of the cosine schedule (Esser et al. 2024, eq. 21)."""
    return 1 - 1 / ((math.pi / 2 * u.double()).tan() + 1)


def min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, sec. 3.4)."""
    return torch.minimum(signal, gamma * noise)


def soft_min_snr(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """1 / (1 / SNR + 1 / gamma), a minimum without a corner (Crowson et al. 2024, sec. 4.2)."""
    return signal * gamma * noise / (signal + gamma * noise).clamp(min=1e-20)


def p2(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """1 / (1 + SNR)^gamma on the error of eps (Choi et al. 2022, eq. 9, k = 1)."""
    return signal * (noise / (noise + signal)) ** gamma


def edm(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """SNR + 1, for data of unit variance (Karras et al. 2022, table 1); gamma is not used."""
    return signal + noise


def debiased(signal: Tensor, noise: Tensor, gamma: float) -> Tensor:
    """1 / sqrt(SNR) on the error of eps (Yu et al. 2024, eq. 11); gamma is not used."""
    return (signal * noise).sqrt()


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "edm": edm,
    "debiased": debiased,
}
"""alpha^2, sigma^2, gamma -> sigma^2 times the weight of the squared error of x0, finite at both ends."""


def squared_or_huber(error: Tensor, huber: float) -> Tensor:
    """error^2, or with huber = c > 0 the pseudo-Huber loss 2 c (sqrt(error^2 + c^2) - c): the same for small errors.

    Large errors count in proportion, so that outliers among the pictures matter less (Khrapov et al. 2024, eq. 5).
    """
    squared = error.square()
    if not huber:
        return squared
    # not as it is written above, which loses the small errors to rounding
    return 2 * huber * squared / ((squared + huber**2).sqrt() + huber)

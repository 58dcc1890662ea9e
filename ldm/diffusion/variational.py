"""The variational bound of a discrete chain, term by term, in bits per dimension (Ho et al. 2020, eq. 5)."""

import math

import torch
from torch import Tensor

from ldm.diffusion.noise import DiscreteSchedule


def step_bits(schedule: DiscreteSchedule, index: Tensor, x0: Tensor, estimate: Tensor, v: Tensor | None) -> Tensor:
    """What the reverse step from each level costs: KL(q(x below | x, x0) || p(x below | x)), bits per dimension [B].

    index [B]: levels 0..T-1; x0 and the network's `estimate` of it [B, C, H, W]. v, of the same shape, -1..1: where
    the network puts the logarithm of its variance between the smallest and the largest that make sense (Nichol &
    Dhariwal 2021, eq. 15); None is the largest, the best for data of unit variance (Ho et al. 2020, sec. 3.2). The step
    from level 0 ends at the data, which is continuous: its cost is the negative log-density, and its smallest variance,
    which would be 0, that of the next level.
    """
    table = schedule.alpha_bar.to(x0.device)
    first = (index == 0).view(-1, *[1] * (x0.ndim - 1))
    here, below = table[index], torch.where(index > 0, table[index - 1], 1.0)
    large = 1 - here / below  # beta: of the forward step
    small = large * (1 - below) / (1 - here)  # of q(x below | x, x0), Ho et al. 2020, eq. 7
    second = (1 - table[1] / table[0]) * (1 - table[0]) / (1 - table[1])
    share = below.sqrt() * large / (1 - here)  # of x0 in the mean, eq. 7

    def spread(values: Tensor) -> Tensor:
        return values.to(x0).view(first.shape)

    low, high = spread(torch.where(index > 0, small, second).log()), spread(large.log())
    log_variance = high if v is None else low + (v + 1) / 2 * (high - low)
    error = (spread(share) * (x0 - estimate)).square()
    divergence = (log_variance - low + (low.exp() + error) / log_variance.exp() - 1) / 2
    density = (math.log(2 * math.pi) + log_variance + error / log_variance.exp()) / 2
    return torch.where(first, density, divergence).flatten(1).mean(1) / math.log(2)


def prior_bits(schedule: DiscreteSchedule, x0: Tensor) -> Tensor:
    """What is left of x0 at the noisiest level: KL(q(x_T | x0) || N(0, 1)), bits per dimension [B]."""
    signal = schedule.alpha_bar[-1].item()
    divergence = (signal * x0.square() - signal - math.log1p(-signal)) / 2
    return divergence.flatten(1).mean(1) / math.log(2)

"""Which noise a picture is trained with: any, or one that lies near it.

Near pairs make straighter paths, and a network that need not average over crossing ones learns faster. The noise of
all pictures together stays (almost) standard normal; that of one picture no longer does, so that with captions the
noise tells something about them (Cheng & Schwing 2025).
"""

from collections.abc import Callable

import torch
from torch import Tensor

COUPLINGS = ("independent", "optimal_transport", "nearest")


def optimal_transport(x0: Tensor, noise: Tensor) -> Tensor:
    """The noise [B, C, H, W], its rows dealt to x0 so that the squared distances sum to the least.

    Minibatch optimal transport (Pooladian et al. 2023, eq. 15), immiscible diffusion (Li et al. 2024, algorithm 1). The
    rows are those of one process's micro-batch, so a sample's noise depends on who is trained beside it.
    """
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(torch.cdist(x0.flatten(1).float(), noise.flatten(1).float()).square().cpu())
    return noise[torch.as_tensor(chosen, device=noise.device)]


def nearest(x0: Tensor, draw: Callable[[int], Tensor], candidates: int) -> Tensor:
    """Of `candidates` draws for each picture the one nearest to it: draw(k) [B, C, H, W] -> [B, C, H, W].

    The variant of immiscible diffusion that does not look at other samples (Li et al. 2025).
    """
    best = draw(0)
    distance = (x0 - best).flatten(1).square().sum(1)
    for k in range(1, candidates):
        noise = draw(k)
        there = (x0 - noise).flatten(1).square().sum(1)
        closer = there < distance
        best = torch.where(closer.view(-1, *[1] * (x0.ndim - 1)), noise, best)
        distance = torch.where(closer, there, distance)
    return best

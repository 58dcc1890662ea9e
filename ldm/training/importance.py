"""Noise levels drawn as often as their losses are large: less noise in the gradient of the variational bound."""

import torch
from torch import Tensor, nn

from ldm.training.gathering import over_ranks

BUCKETS = 100
"""The schedule in so many equal shares of its time."""
WARM_UP = 10
"""Losses of each bucket before any is drawn more often."""
FLOOR = 0.001
"""The share that is drawn uniformly, so that no bucket is forgotten."""
DECAY = 0.9
"""What one new loss leaves of the running mean of its bucket."""


class LossSecondMoment(nn.Module):
    """Draws in proportion to sqrt(E[loss^2]), which is the least variance (Nichol & Dhariwal 2021, eq. 18).

    Knows the losses of all processes alike. What was learned in a step counts from the next one on, so micro-batches
    make no difference; its buffers are all its state.
    """

    moment: Tensor
    seen: Tensor
    new: Tensor
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moment", torch.zeros(BUCKETS, dtype=torch.float64))  # running mean of loss^2
        self.register_buffer("seen", torch.zeros(BUCKETS, dtype=torch.float64))  # losses so far
        self.register_buffer("new", torch.zeros(2, BUCKETS, dtype=torch.float64))  # this step's sums: loss^2, count
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def draw(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """u [B], uniform in [0, 1) -> (levels' quantiles [B], the weights [B] that keep the loss what it is)."""
        self._take_in(self.step != step)
        self.step.fill_(step)
        root = self.moment.sqrt()
        share = (1 - FLOOR) * root / root.sum().clamp(min=1e-300) + FLOOR / BUCKETS
        share = share / share.sum()
        ends = share.cumsum(0)
        place = u.double()
        bucket = torch.searchsorted(ends, place, right=True).clamp(max=BUCKETS - 1)
        inside = ((place - (ends - share)[bucket]) / share[bucket]).clamp(0, 1 - 1e-9)
        known = self.seen.min() >= WARM_UP  # on the device, as all of this
        quantile = torch.where(known, (bucket + inside) / BUCKETS, place)
        weight = torch.where(known, (1 / (BUCKETS * share[bucket])).to(u), 1.0)
        return quantile, weight

    @torch.no_grad()
    def learn(self, quantiles: Tensor, loss: Tensor) -> None:
        """Remember the losses [B] at those quantiles, before the weights of `draw`; every process must call it.

        Those that are not finite are left out.
        """
        bucket = (quantiles.double() * BUCKETS).long().clamp(0, BUCKETS - 1)
        finite = loss.isfinite()
        squares = torch.where(finite, loss.detach().double(), 0.0).square()
        new = torch.zeros_like(self.new)
        new[0].index_add_(0, bucket, squares)
        new[1].index_add_(0, bucket, finite.double())
        self.new += over_ranks(new, "sum")

    def _take_in(self, over: Tensor) -> None:
        """Count in the step that was learned from last, if it is `over`."""
        sums, counts = self.new * over
        left = torch.where(self.seen > 0, DECAY**counts, 0.0)
        mean = sums / counts.clamp(min=1)
        self.moment.copy_(torch.where(counts > 0, left * self.moment + (1 - left) * mean, self.moment))
        self.seen += counts
        self.new *= ~over

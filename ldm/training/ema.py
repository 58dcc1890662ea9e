"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of the parameters of `module`, by name, in float32 beside them.

    decay 0 keeps an exact copy. Early in a run the decay is min(decay, (1 + n) / (10 + n)) after n
    updates, so the first weights are forgotten quickly (Rombach et al. 2022 train with it).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be in [0, 1), not {decay}")
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the current weights; `updates` is the number of optimizer steps done before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        live = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    def load(self, average: dict[str, Tensor]) -> None:
        """Take up averages that were saved."""
        for name, value in self.average.items():
            value.copy_(average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module carries the averages; afterwards its own weights, bit for bit."""
        own = {n: p.detach().clone() for n, p in self.parameters.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

"""Moving averages of the trained weights, one or several at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ldm.training.sharding import local, scattered


class EMA:
    """Averages of the parameters of `module`, by name, in float32 beside them.

    decay 0 keeps an exact copy. Early in a run the decay is min(decay, (1 + n) / (10 + n)) after n
    updates, so the first weights are forgotten quickly (Rombach et al. 2022 train with it).

    `average` holds the average of `decay` under the parameters' names. Further ones, of `decays` and of the power
    functions whose relative widths are `sigmas` (Karras et al. 2024, sec. 3.1), stand in it as "decay=0.9999/name" and
    "sigma=0.05/name". Raises ValueError for a decay outside [0, 1), or a sigma that no power function has.
    """

    def __init__(
        self, module: nn.Module, decay: float, decays: Sequence[float] = (), sigmas: Sequence[float] = ()
    ) -> None:
        if wrong := [d for d in (decay, *decays) if not 0 <= d < 1]:
            raise ValueError(f"ema must be in [0, 1), not {wrong[0]}")
        self.decay, self.sigmas = decay, tuple(sigmas)
        self.profiles: dict[str, Callable[[int], float]] = {"": partial(_exponential, decay)}
        self.profiles |= {decay_prefix(d): partial(_exponential, d) for d in decays}
        self.profiles |= {sigma_prefix(s): partial(_power, gamma(s)) for s in sigmas}
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {
            prefix + n: p.detach().float().clone() for prefix in self.profiles for n, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, updates: int, skipped: Tensor | None = None) -> None:
        """Move towards the current weights; `updates` is the number of optimizer steps done before this one.

        skipped: a bool on the device; where it is true nothing moves.
        """
        live = [local(p).float() for p in self.parameters.values()]
        for prefix, profile in self.profiles.items():
            averages, way = [local(a) for a in self.under(prefix).values()], 1 - profile(updates)
            if skipped is None:
                torch._foreach_lerp_(averages, live, way)
            else:
                torch._foreach_lerp_(averages, live, [torch.where(skipped, 0.0, way)] * len(live))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The average of one profile, by parameter name: "" or what `decay_prefix` or `sigma_prefix` says."""
        return {n: self.average[prefix + n] for n in self.parameters}

    def load(self, average: dict[str, Tensor]) -> None:
        """Take up averages that were saved."""
        for name, value in self.average.items():
            value.copy_(scattered(average[name], value))

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


def decay_prefix(decay: float) -> str:
    """What stands before a parameter's name in the average of that decay."""
    return f"decay={decay}/"


def sigma_prefix(sigma_rel: float) -> str:
    """What stands before a parameter's name in the average of the power function of that relative width."""
    return f"sigma={sigma_rel}/"


def gamma(sigma_rel: float) -> float:
    """The exponent of the power function of relative width sigma_rel (Karras et al. 2024, alg. 2).

    The width is the standard deviation of (gamma + 1) tau^gamma over [0, 1]; the root of the paper's cubic. Raises
    ValueError outside (0, 0.2887), where 12^-1/2 = 0.2887 is that of the mean over the whole run, gamma = 0.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"the relative width of an average must be above 0 and below 0.2887, not {sigma_rel}")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def _exponential(decay: float, updates: int) -> float:
    return min(decay, (1 + updates) / (10 + updates))


def _power(exponent: float, updates: int) -> float:
    """Eq. 127 of Karras et al. 2024 (app. C): after t updates weight k counts k^(g+1) - (k-1)^(g+1), over t^(g+1)."""
    return float((1 - 1 / (updates + 1)) ** (exponent + 1))

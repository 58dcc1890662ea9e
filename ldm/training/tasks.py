"""What a task is: models and their losses, passed to the one loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data_pipeline.batch import Batch

Metrics = dict[str, Tensor]
"""Detached scalars by name."""


@dataclass(frozen=True)
class TaskConfig:
    """Which task; the class that `kind` names adds its own keys."""

    kind: str = "???"


class Task(nn.Module):
    """Models as submodules, and what to do with a batch.

    trained: names of the submodules that learn; each gets its own optimizer, EMA and DDP wrapper, and
    is therefore only ever called through `forward`. Everything else is frozen.
    remembered: names of submodules whose buffers belong to the progress of a run, the same on every process.
    whole: whether the loss is that of the batch as a whole, so that its micro-batches' mean is another.
    seed: all randomness of a sample derives from it and the sample's position.
    """

    trained: tuple[str, ...]
    remembered: tuple[str, ...] = ()
    whole: bool = False
    seed: int

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        """Yield (trained submodule, scalar loss, metrics): each yield means "step its optimizer with this".

        All step after the last one. A second yield may use local variables of the first: an adversarial task
        reconstructs once.
        """
        raise NotImplementedError

    def validate(self, batch: Batch) -> Metrics:
        """Means over a batch, with fixed randomness, so that numbers compare across steps and runs."""
        raise NotImplementedError

    def preview(self, batch: Batch) -> Tensor | None:
        """Pictures [N, 3, H, W] in [-1, 1] that show how far the model is, or None if it makes none."""
        raise NotImplementedError

    def components(self) -> dict[str, nn.Module]:
        """What a checkpoint's model is made of: modules with a `config`, by name."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """JSON-able facts that belong to the model: diffusion, null prompt, picture size."""
        raise NotImplementedError


def bare(module: nn.Module) -> Any:
    """The module inside a DDP wrapper, or itself, also where it is sharded: for its own methods and its config."""
    return getattr(module, "module", module)


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, with no gradients."""
    return module.eval().requires_grad_(False)

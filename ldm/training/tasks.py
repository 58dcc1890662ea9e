"""What a task is: models and their losses, passed to the one loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.load import save_model
from ldm.checkpoints.model import weights_sha256

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
    partial: whether what is trained also holds weights of a base that stay as they are, and that no checkpoint holds.
    columns: pictures in a row of the preview; 0: as many as suit it.
    seed: all randomness of a sample derives from it and the sample's position.
    """

    trained: tuple[str, ...]
    remembered: tuple[str, ...] = ()
    whole: bool = False
    partial: bool = False
    columns: int = 0
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

    def save(self, folder: Path, settings: dict[str, Any], name: str) -> None:
        """Write the model into `folder`, with the settings of `settings()` and of the run."""
        save_model(folder, self.components(), settings, name)

    def foundations(self) -> dict[str, str]:
        """What the task stands on and does not change: hashes of weights, by what they are."""
        own = {id(m) for name in self.trained for m in getattr(self, name).modules()}
        stays = {name: module for name, module in self.components().items() if id(module) not in own}
        return {f"the frozen {name}": weights_sha256(module) for name, module in stays.items()}

    def kept(self, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint keeps of a trained submodule, to go on from it: the tensors themselves, by name."""
        if self.partial:
            return {name: p for name, p in module.named_parameters() if p.requires_grad}
        return module.state_dict()


def bare(module: nn.Module) -> Any:
    """The module inside a DDP wrapper, or itself, also where it is sharded: for its own methods and its config."""
    return getattr(module, "module", module)


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, with no gradients."""
    return module.eval().requires_grad_(False)

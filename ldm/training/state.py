"""All that a run must remember, and how it goes to disk and comes back."""

import logging
import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.checkpoints.files import (
    all_finite,
    commit,
    newest_valid,
    read_json,
    read_tensors,
    remove,
    save_tensors,
    steps,
    write_json,
)
from ldm.checkpoints.load import save_model
from ldm.checkpoints.model import load_tensors
from ldm.training.ema import EMA
from ldm.training.ranks import Ranks
from ldm.training.sharding import scattered, scattered_state, unsharded, whole
from ldm.training.tasks import Task

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress, and per trained submodule its optimizer and its average.

    Not of the run but of its processes: accumulate, micro-batches a step, more when memory is out; shapes of batches
    that are known to fit; stopped, whether it was asked to; marks, how many places the loop has come by, the same in
    all processes; doing, the latest of them.
    """

    task: Task
    optimizers: dict[str, Any]
    emas: dict[str, EMA]
    accelerator: Accelerator
    step: int = 0
    samples: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    accumulate: int = 1
    shapes: set[tuple[torch.Size, ...]] = field(default_factory=set)
    stopped: bool = False
    marks: int = 0
    doing: str = "starting"

    def mark(self, doing: str) -> None:
        """Note that the loop has come to another place; who watches it sees that it gets on."""
        self.marks += 1
        self.doing = doing

    def save(self, out: Path, name: str, keep: int) -> Path:
        """Commit `out/checkpoints/step-N`: the model with averaged weights, and what a resume needs.

        By the main process alone, within `whole`. Raises RuntimeError, and writes nothing, if a weight, an average or
        what is remembered is not finite. Keeps the newest `keep`.
        """
        folder = out / "checkpoints" / f"step-{self.step:08d}"
        own, remembered = self._own_weights(), self._remembered()
        averages = {f"{key}.{n}": a for key, ema in self.emas.items() for n, a in ema.average.items()}
        for what, tensors in (("a weight", own), ("an average", averages), ("what the task remembers", remembered)):
            if not all_finite(tensors):
                raise RuntimeError(f"not saving step {self.step}: {what} is NaN or infinite")
        with commit(folder) as stage:
            save_tensors(stage / "train" / "weights.safetensors", own)
            save_tensors(stage / "train" / "averages.safetensors", averages)
            if remembered:
                save_tensors(stage / "train" / "remembered.safetensors", remembered)
            for key, optimizer in self.optimizers.items():
                tensors, groups = _flatten(optimizer.state_dict())
                save_tensors(stage / "train" / f"optimizer-{key}.safetensors", tensors, groups)
            progress: dict[str, Any] = {"step": self.step, "samples": self.samples}
            if self.accelerator.scaler is not None:
                progress["scaler"] = self.accelerator.scaler.state_dict()
            write_json(stage / "train" / "progress.json", progress)
            with self.averaged():
                settings = dict(self.task.settings(), step=self.step, samples=self.samples)
                save_model(stage, self.task.components(), settings, name)
        for old in steps(out / "checkpoints")[:-keep]:
            remove(old)
        return folder

    def resume(self, out: Path) -> bool:
        """Take up the newest valid checkpoint of `out`; False if there is none at all. Half-written ones go.

        Raises ValueError if all are damaged, if it lacks what this run's precision needs, or if not all processes find
        the same one.
        """
        if self.accelerator.is_main_process:
            for left in (out / "checkpoints").glob(".*-step-*"):
                shutil.rmtree(left, ignore_errors=True)
        folder = newest_valid(out / "checkpoints")
        if folder is None and steps(out / "checkpoints"):
            raise ValueError(f"no checkpoint in {out / 'checkpoints'} is whole; remove that folder to start anew")
        if len(set(self.ranks.everyones(folder and folder.name))) > 1:
            raise ValueError(f"the processes find different checkpoints in {out}; all machines must share that folder")
        if folder is None:
            return False
        progress = read_json(folder / "train" / "progress.json")
        if self.accelerator.scaler is not None and "scaler" not in progress:
            raise ValueError(f"{folder} was not trained with precision=fp16: go on with the precision that it had")
        source = str(folder / "train")
        own, _ = read_tensors(folder / "train" / "weights.safetensors")
        for key in self.task.trained:
            prefix = f"{key}."
            mine = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
            shards = self._module(key).state_dict()
            load_tensors(self._module(key), {k: scattered(v, shards.get(k)) for k, v in mine.items()}, source)
        for key, optimizer in self.optimizers.items():
            tensors, groups = read_tensors(folder / "train" / f"optimizer-{key}.safetensors")
            optimizer.load_state_dict(_unflatten(scattered_state(tensors, optimizer), groups))
        averages, _ = read_tensors(folder / "train" / "averages.safetensors")
        for key, ema in self.emas.items():
            ema.load({n: averages[f"{key}.{n}"] for n in ema.average})
        if remembered := self._remembered():
            kept, _ = read_tensors(folder / "train" / "remembered.safetensors")
            for name, value in remembered.items():
                value.copy_(kept[name])
        self.step, self.samples = progress["step"], progress["samples"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        log.info("resuming %s at step %d (%d samples)", out, self.step, self.samples)
        return True

    def changing(self) -> list[Tensor]:
        """What training changes without gradients: running statistics, and what the task remembers.

        And the frozen parameters of a module with statistics, which may be made from them, as a codebook is.
        """
        found = list(self._remembered().values())
        for module in (m for key in self.task.trained for m in self._module(key).modules()):
            if buffers := list(module.buffers(recurse=False)):
                found += buffers + [p for p in module.parameters(recurse=False) if not p.requires_grad]
        return found

    def averaged(self) -> ExitStack:
        """Within the block every trained submodule carries its averaged weights; all its methods work.

        Where it is sharded, all processes must enter, and then call the same.
        """
        stack = ExitStack()
        for key, ema in self.emas.items():
            stack.enter_context(ema.applied())
            stack.enter_context(unsharded(self._module(key)))
        return stack

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the main process has all that is sharded as it would without: to be saved, not called.

        Every process must enter.
        """
        modules = [self._module(key) for key in self.task.trained]
        tables: list[dict[str, Any]] = [table for ema in self.emas.values() for table in (ema.parameters, ema.average)]
        tables += [kept for optimizer in self.optimizers.values() for kept in optimizer.state.values()]
        return whole(modules, tables, keep=self.accelerator.is_main_process)

    def _module(self, key: str) -> nn.Module:
        return self.accelerator.unwrap_model(getattr(self.task, key))

    def _own_weights(self) -> dict[str, Tensor]:
        return {f"{key}.{k}": v for key in self.task.trained for k, v in self._module(key).state_dict().items()}

    def _remembered(self) -> dict[str, Tensor]:
        names = self.task.remembered
        return {f"{key}.{k}": v for key in names for k, v in getattr(self.task, key).state_dict().items()}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def _unflatten(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **metadata["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": metadata["groups"]}

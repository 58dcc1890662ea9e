"""All that a run must remember, and how it goes to disk and comes back."""

import logging
import math
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
    commit_file,
    newest_valid,
    read_json,
    read_tensors,
    remove,
    save_tensors,
    steps,
    write_json,
)
from ldm.checkpoints.model import load_tensors
from ldm.training.ema import EMA
from ldm.training.ranks import Ranks
from ldm.training.sharding import scattered, scattered_state, unsharded, whole
from ldm.training.tasks import Task

log = logging.getLogger(__name__)

BEST = "best.json"
"""In the folder of checkpoints: which of them had the lowest loss on held-out samples."""


@dataclass
class TrainState:
    """Progress, and per trained submodule its optimizer and its average.

    Not of the run but of its processes: accumulate, micro-batches a step, more when memory is out; shapes of batches
    that are known to fit; stopped, whether it was asked to; marks, how many places the loop has come by, the same in
    all processes; doing, the latest of them.

    held_out: the latest step that was validated, and its loss; best: the step of the checkpoint with the lowest one so
    far, and that, where the best checkpoint is kept.
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
    held_out: tuple[int, float] | None = None
    best: tuple[int, float] | None = None

    def mark(self, doing: str) -> None:
        """Note that the loop has come to another place; who watches it sees that it gets on."""
        self.marks += 1
        self.doing = doing

    def save(self, out: Path, name: str, keep: int) -> Path:
        """Commit `out/checkpoints/step-N`: the model with averaged weights, and what a resume needs.

        By the main process alone, within `whole`. Raises RuntimeError, and writes nothing, if a weight, an average or
        what is remembered is not finite. Keeps the newest `keep`, and the best.
        """
        folder = out / "checkpoints" / step_name(self.step)
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
            best = self._best()
            progress: dict[str, Any] = {"step": self.step, "samples": self.samples}
            if best is not None:
                progress["best"] = best
            if self.accelerator.scaler is not None:
                progress["scaler"] = self.accelerator.scaler.state_dict()
            write_json(stage / "train" / "progress.json", progress)
            with self.averaged():
                settings = dict(self.task.settings(), step=self.step, samples=self.samples)
                self.task.save(stage, settings, name)
        self.best = best
        self._name_best(out)
        for old in steps(out / "checkpoints")[:-keep]:
            if best is None or old.name != step_name(best[0]):
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
            shards = self.task.kept(self._module(key))
            mine = {k: scattered(v, shards.get(k)) for k, v in mine.items()}
            if self.task.partial:
                _take_up(shards, mine, source)
            else:
                load_tensors(self._module(key), mine, source)
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
        if "best" in progress:
            self.best = (int(progress["best"][0]), float(progress["best"][1]))
            if self.accelerator.is_main_process:
                self._name_best(out)
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
        return {f"{key}.{k}": v for key in self.task.trained for k, v in self.task.kept(self._module(key)).items()}

    def _best(self) -> tuple[int, float] | None:
        """The best checkpoint with the one of this step among them: the first of the lowest loss."""
        found = self.held_out
        if found is None or found[0] != self.step or not math.isfinite(found[1]):
            return self.best
        return found if self.best is None or found[1] < self.best[1] else self.best

    def _name_best(self, out: Path) -> None:
        """Say in `checkpoints/best.json` what the newest checkpoint knows as well."""
        if self.best is not None:
            with commit_file(out / "checkpoints" / BEST) as stage:
                write_json(stage, {"checkpoint": step_name(self.best[0]), "loss": self.best[1]})

    def _remembered(self) -> dict[str, Tensor]:
        names = self.task.remembered
        return {f"{key}.{k}": v for key in names for k, v in getattr(self.task, key).state_dict().items()}


@torch.no_grad()
def _take_up(kept: dict[str, Tensor], saved: dict[str, Tensor], source: str) -> None:
    """Put saved values into tensors of the same names and shapes. Raises ValueError where they are not the same."""
    shapes, found = ({name: t.shape for name, t in tensors.items()} for tensors in (kept, saved))
    if wrong := [name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)]:
        raise ValueError(f"{source} does not fit this model: {len(wrong)} tensors differ, such as {min(wrong)}")
    for name, tensor in kept.items():
        tensor.copy_(saved[name])


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint of a run that `best.json` names, if it is there. Raises ValueError if that is no JSON of ours."""
    path = out / "checkpoints" / BEST
    if not path.is_file():
        return None
    folder = out / "checkpoints" / str(read_json(path)["checkpoint"])
    return folder if folder.is_dir() else None


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

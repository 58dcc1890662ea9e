"""All that a run must remember, and how it goes to disk and comes back."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ldm.training.tasks import Task

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress, and per trained submodule its optimizer and its average."""

    task: Task
    optimizers: dict[str, Any]
    emas: dict[str, EMA]
    accelerator: Accelerator
    step: int = 0
    samples: int = 0

    def save(self, out: Path, name: str, keep: int) -> Path:
        """Commit `out/checkpoints/step-N`: the model with averaged weights, and what a resume needs.

        Raises RuntimeError, and writes nothing, if a weight is not finite. Keeps the newest `keep`.
        """
        folder = out / "checkpoints" / f"step-{self.step:08d}"
        own = self._own_weights()
        if not all_finite(own):
            raise RuntimeError(f"not saving step {self.step}: a weight is NaN or infinite")
        with commit(folder) as stage:
            save_tensors(stage / "train" / "weights.safetensors", own)
            averages = {f"{key}.{n}": a for key, ema in self.emas.items() for n, a in ema.average.items()}
            save_tensors(stage / "train" / "averages.safetensors", averages)
            if remembered := self._remembered():
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
        """Take up the newest valid checkpoint of `out`; False if there is none."""
        folder = newest_valid(out / "checkpoints")
        if folder is None:
            return False
        source = str(folder / "train")
        own, _ = read_tensors(folder / "train" / "weights.safetensors")
        for key in self.task.trained:
            prefix = f"{key}."
            mine = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
            load_tensors(self._module(key), mine, source)
        for key, optimizer in self.optimizers.items():
            tensors, groups = read_tensors(folder / "train" / f"optimizer-{key}.safetensors")
            optimizer.load_state_dict(_unflatten(tensors, groups))
        averages, _ = read_tensors(folder / "train" / "averages.safetensors")
        for key, ema in self.emas.items():
            ema.load({n: averages[f"{key}.{n}"] for n in ema.average})
        if remembered := self._remembered():
            kept, _ = read_tensors(folder / "train" / "remembered.safetensors")
            for name, value in remembered.items():
                value.copy_(kept[name])
        progress = read_json(folder / "train" / "progress.json")
        self.step, self.samples = progress["step"], progress["samples"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        log.info("resuming %s at step %d (%d samples)", out, self.step, self.samples)
        return True

    def averaged(self) -> ExitStack:
        """Within the block every trained submodule carries its averaged weights."""
        stack = ExitStack()
        for ema in self.emas.values():
            stack.enter_context(ema.applied())
        return stack

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

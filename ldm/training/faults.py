"""Steps that are skipped because a loss or a gradient is not finite, and saves that fail."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ldm.checkpoints.files import steps
from ldm.training.ranks import Ranks
from ldm.training.state import TrainState

log = logging.getLogger(__name__)

FAILED_SAVES = 3
"""So many saves in a row that fail end the run."""


@dataclass(frozen=True)
class Outcome:
    """How a step went, on the device.

    skipped: bool, the same on all processes: a gradient was not finite, and nothing has changed.
    finite: [micro-batches] bool: whether this process's losses are; keys: the samples of each micro-batch.
    """

    skipped: Tensor
    finite: Tensor
    keys: list[list[str]]


def gradient_norms(state: TrainState, clip: float) -> dict[str, Tensor]:
    """The norm of each part's gradient, of those that have one, which is then clipped to `clip` (0: not)."""
    norms = {}
    for name, optimizer in state.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:
            state.accelerator.unscale_gradients(optimizer)
            norm = clip_grad_norm_(parameters, clip) if clip else get_total_norm([p.grad for p in parameters])
            norms[name] = norm
    return norms


def step_unless(skipped: Tensor, optimizer: Any) -> None:
    """One step of accelerate's `optimizer`, or none at all if `skipped`, a bool on the device.

    torch's fused optimizers are told on the device, as by a GradScaler, which for its part has seen the gradients
    itself. For others the host waits.
    """
    inner = optimizer.optimizer
    fused = isinstance(inner, torch.optim.AdamW | torch.optim.SGD) and inner.defaults["fused"]
    if isinstance(inner, torch.optim.SGD) and inner.defaults["momentum"]:
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            # A first step makes the momentum, the gradient itself; if it were skipped, of whatever lies in memory.
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    if optimizer.scaler is not None:
        optimizer.step()
    elif fused:
        inner.found_inf = skipped.float()
        optimizer.step()
        del inner.found_inf
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad()


class Skips:
    """Remembers on the device which steps were skipped, until somebody looks.

    With a GradScaler (`scaled`) a gradient too large for float16 is no fault: it is how the scale is found. A loss that
    is not finite is one. `check` raises RuntimeError, on all processes, when `limit` steps in a row were faults.
    """

    def __init__(self, limit: int, *, scaled: bool) -> None:
        self.limit, self.scaled = limit, scaled
        self.streak = 0
        self._noted: list[tuple[int, Outcome]] = []

    @property
    def full(self) -> bool:
        """Whether it is time to look: with the steps that nobody has looked at, there could be too many."""
        return self.streak + len(self._noted) >= self.limit

    def note(self, step: int, outcome: Outcome) -> None:
        """Remember how a step, by its number, went."""
        self._noted.append((step, outcome))

    def look(self, ranks: Ranks) -> dict[int, list[str]]:
        """The faults since the last look: step -> keys of the micro-batches, of all processes, of a loss not finite.

        No keys: the losses were finite, and the gradient was not. Every process must call it; the host waits.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return {}
        flags = torch.cat([torch.cat([~o.skipped.view(1), o.finite]) for _, o in noted]).tolist()
        skipped: dict[int, bool] = {}
        mine: dict[int, list[str]] = {}
        for step, outcome in noted:
            (stepped, *finite), flags = flags[: 1 + len(outcome.keys)], flags[1 + len(outcome.keys) :]
            skipped[step] = not stepped
            mine[step] = [k for keys, fine in zip(outcome.keys, finite, strict=True) if not fine for k in keys]
        if not any(skipped.values()):  # the same on all
            self.streak = 0
            return {}
        everyones = ranks.everyones(mine)
        keys = {step: [k for theirs in everyones for k in theirs[step]] for step in skipped}
        faults: dict[int, list[str]] = {}
        for step, was in skipped.items():
            if was and (keys[step] or not self.scaled):
                faults[step] = keys[step]
                self.streak += 1
            else:
                self.streak = 0
        return faults

    def check(self) -> None:
        """RuntimeError if too many steps in a row were skipped."""
        if self.streak >= self.limit:
            raise RuntimeError(
                f"the last {self.streak} steps were skipped, as a loss or a gradient was not finite; the weights are "
                "as they were before. Go back to an earlier checkpoint (delete the later ones in checkpoints/), or "
                "start anew with a lower optimizer.lr, or with precision=bf16 instead of fp16"
            )


class Saves:
    """Saves a run's state, and bears a disk that fails now and then."""

    def __init__(self, out: Path, keep: int, saved: int = -1) -> None:
        self.out, self.keep = out, keep
        self.saved = saved  # the latest step that is on disk
        self.failed = 0  # in a row

    def save(self, state: TrainState, *, last: bool) -> str:
        """Commit a checkpoint, on the main process; all wait for it and learn why it failed, or "".

        RuntimeError, on all, if a weight is not finite, and for the third failure in a row or that of the `last` save.
        Checkpoints from before stay as they are; also that of this very step, which is not saved twice.
        """
        if state.step == self.saved:
            return ""
        problem, fatal = "", False
        if state.accelerator.is_main_process:
            try:
                state.save(self.out, name=self.out.name, keep=self.keep)
            except OSError as error:
                problem = f"step {state.step} could not be saved: {' '.join(str(error).split())}"
            except RuntimeError as error:
                problem, fatal = str(error), True
        problem, fatal = state.ranks.everyones((problem, fatal))[0]
        self.failed = self.failed + 1 if problem else 0
        self.saved = self.saved if problem else state.step
        if fatal or (problem and (last or self.failed >= FAILED_SAVES)):
            kept = steps(self.out / "checkpoints")
            where = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            times = f" ({self.failed} times in a row)" if self.failed > 1 else ""
            raise RuntimeError(f"{problem}{times}; {where}")
        if problem and state.accelerator.is_main_process:
            log.warning("%s; going on", problem)
        return problem

"""Averages of the weights chosen after training: of any width, from a few kept ones (Karras et al. 2024, sec. 3.2)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.checkpoints.files import commit, newest_valid, read_tensors, save_tensors, steps, verify
from ldm.checkpoints.load import load_model, save_model
from ldm.training.ema import EMA, decay_prefix, gamma, sigma_prefix

log = logging.getLogger(__name__)

FOLDER = "snapshots"
ACCURATE = 0.05
"""The largest error of a profile, relative and in root mean square, that is not warned of."""


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it was after `step` updates, on disk."""

    step: int
    sigma_rel: float
    file: Path


def save_snapshot(emas: dict[str, EMA], out: Path, step: int) -> Path:
    """Commit `out/snapshots/step-N` with the power-function averages of every part, in float32; it is never removed."""
    folder = out / FOLDER / f"step-{step:08d}"
    with commit(folder) as stage:
        for part, ema in emas.items():
            for sigma in ema.sigmas:
                save_tensors(stage / f"{part}.sigma={sigma}.safetensors", ema.under(sigma_prefix(sigma)))
    return folder


def inner_product(step_a: float, gamma_a: float, step_b: float, gamma_b: float) -> float:
    """The integral of p_a p_b, where p(tau) = (g + 1) tau^g / step^(g + 1) up to `step`, then 0 (app. C, eq. 151)."""
    first, last, exponent = (step_a, step_b, gamma_b) if step_a < step_b else (step_b, step_a, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** exponent / last


def coefficients(kept: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[NDArray[np.float64], float]:
    """How much of each kept average makes the wanted one: least squares over the profiles (app. C, alg. 3).

    kept, wanted: (step, gamma). -> the coefficients, scaled to a sum of 1 so that weights which did not move stay what
    they are, and the error of the profile that they make, in root mean square relative to the wanted one's.
    """
    a = np.array([[inner_product(*i, *j) for j in kept] for i in kept])
    b = np.array([inner_product(*i, *wanted) for i in kept])
    x: NDArray[np.float64] = np.linalg.solve(a, b)
    x /= x.sum()
    size = inner_product(*wanted, *wanted)
    return x, float(max(0.0, 1 - (2 * x @ b - x @ a @ x) / size) ** 0.5)


def snapshots(run: Path) -> dict[str, list[Snapshot]]:
    """The snapshots of a run by part, oldest first. Raises ValueError if there are none, or naming a damaged file."""
    found: dict[str, list[Snapshot]] = {}
    for folder in steps(run / FOLDER):
        verify(folder)
        for file in sorted(folder.glob("*.safetensors")):
            part, _, sigma = file.stem.partition(".sigma=")
            found.setdefault(part, []).append(Snapshot(int(folder.name.removeprefix("step-")), float(sigma), file))
    if not found:
        raise ValueError(f"{run} has no snapshots to make an average of: train with snapshot_steps")
    return found


def reconstruct(run: Path, sigma_rel: float, step: int | None = None) -> dict[str, dict[str, Tensor]]:
    """The average of relative width sigma_rel at `step`, or the last snapshot's: float32 tensors by part and name.

    Raises ValueError for a width that no power function has, a step without a snapshot, or a damaged snapshot.
    """
    exponent, every = gamma(sigma_rel), snapshots(run)
    at = sorted({s.step for kept in every.values() for s in kept})
    step = at[-1] if step is None else step
    if step not in at:
        raise ValueError(f"{run} has no snapshot of step {step}, but of {', '.join(map(str, at))}")
    made = {}
    for part, kept in every.items():
        kept = [s for s in kept if s.step <= step]
        x, error = coefficients([(s.step, gamma(s.sigma_rel)) for s in kept], (step, exponent))
        log.info("%s: width %g of %d snapshots, error of the profile %.2g %%", part, sigma_rel, len(kept), 100 * error)
        if error > ACCURATE:
            log.warning("%s: too few snapshots for the width %g; the average is only near it", part, sigma_rel)
        total: dict[str, Tensor] = {}
        for share, snapshot in zip(x.tolist(), kept, strict=True):
            for name, value in read_tensors(snapshot.file)[0].items():
                total.setdefault(name, torch.zeros_like(value)).add_(value, alpha=share)
        made[part] = total
    return made


def tracked(run: Path, decay: float) -> dict[str, dict[str, Tensor]]:
    """The average of one of `ema_decays` in the newest checkpoint: float32 tensors by part and name.

    Raises ValueError if there is no checkpoint, or if it does not keep that decay.
    """
    folder = newest_valid(run / "checkpoints")
    if folder is None:
        raise ValueError(f"{run} has no usable checkpoint")
    made: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder / "train" / "averages.safetensors")[0].items():
        part, _, name = key.partition(".")
        if name.startswith(decay_prefix(decay)):
            made.setdefault(part, {})[name.removeprefix(decay_prefix(decay))] = value
    if not made:
        raise ValueError(f"{folder} keeps no average of decay {decay} (ema_decays of the run)")
    return made


def save_average(run: Path, averages: dict[str, dict[str, Tensor]], out: Path) -> Path:
    """Commit `out`: the model of the run's newest checkpoint with other averages of what it trained.

    Raises ValueError if the run has no usable checkpoint, or if nothing of its model was averaged.
    """
    model = load_model(run)
    changed = sum(_put(model.components, part, values) for part, values in averages.items())
    if not changed:
        raise ValueError(f"none of the averages ({', '.join(averages)}) belong to the model of {run}")
    with commit(out) as stage:
        save_model(stage, model.components, model.settings, model.name)
    return out


@torch.no_grad()
def _put(components: dict[str, nn.Module], part: str, values: dict[str, Tensor]) -> int:
    """Copy the values to where they belong: a part is a component, or holds components as submodules; how many did."""
    own = {f"{c}.{n}": p for c, module in components.items() for n, p in module.named_parameters()}
    targets = {name: own.get(f"{part}.{name}" if part in components else name) for name in values}
    found = {name: target for name, target in targets.items() if target is not None}
    for name, target in found.items():
        target.copy_(values[name])
    return len(found)

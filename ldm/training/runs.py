"""Run folders seen from outside: how each one stands, and what two of them differ in."""

import fcntl
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ldm import __version__
from ldm.checkpoints.files import commit_file, read_json, write_json
from ldm.training.metrics import read_metrics

log = logging.getLogger(__name__)

RECORD = "run.json"
DEPTH = 3
"""How many folders deep runs are looked for."""

BEST = {"loss": min, "psnr": max, "accuracy": max}
"""What a validation is judged by: the first of these that it has."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the samples that all compared runs have seen: where their numbers are shown."""


@dataclass(frozen=True)
class Run:
    """A run folder at a glance; None for what is not known (yet).

    state: running | finished | stopped | failed; best: of the validations, by `best_name`; age_seconds: since its last
    sign of life; error: what ended a failed run, if it could say so.
    """

    folder: str
    task: str
    state: str
    step: int
    total_steps: int
    samples: int
    loss: float | None
    best_name: str | None
    best: float | None
    samples_per_second: float | None
    age_seconds: float
    error: str | None


@contextmanager
def recorded(out: Path, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block `out/run.json` says that the run goes on, afterwards how it ended; with `facts` about it.

    The record is given to the block, which sets its "state". A disk that is full is warned of.
    """
    record: dict[str, Any] = {**facts, "state": "running"}
    _write(out, record)
    try:
        yield record
    except BaseException as error:
        record |= {"state": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise
    finally:
        _write(out, record)


def _write(out: Path, record: dict[str, Any]) -> None:
    try:
        with commit_file(out / RECORD) as stage:
            write_json(stage, record)
    except OSError as error:
        log.warning("%s could not be written: %s", out / RECORD, error)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What a run runs on, for its record."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": platform.platform(),
        "ldm": __version__,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def read_record(out: Path) -> dict[str, Any]:
    """What `recorded` wrote; {} if there is nothing to read."""
    try:
        return dict(read_json(out / RECORD))
    except (ValueError, TypeError):
        return {}


def read_settings(out: Path) -> dict[str, Any]:
    """A run's settings by dotted name, also those that this version no longer knows. Raises ValueError."""
    try:
        found = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{out} is not a run folder: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{out} is not a run folder: its config.yaml does not hold keys and values")
    return flat(found)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists are values."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among these and below. Raises ValueError for what is no folder."""
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no folder {str(missing[0])!r}")
    found: dict[Path, None] = {}
    for folder in folders:
        level = [folder]
        for _ in range(DEPTH + 1):
            runs = [p for p in level if (p / ".lock").is_file() and (p / "config.yaml").is_file()]
            found |= dict.fromkeys(runs)
            below = (p for parent in level if parent not in found for p in sorted(parent.iterdir()))
            level = [p for p in below if p.is_dir() and not p.name.startswith(".")]
    return list(found)


def read_run(out: Path, lines: list[dict[str, Any]] | None = None) -> Run:
    """How the run in `out` stands; its metrics may be at hand. Raises ValueError if it is no run folder."""
    settings, record = read_settings(out), read_record(out)
    lines = read_metrics(out / "metrics.jsonl") if lines is None else lines
    last = lines[-1] if lines else {"step": 0, "samples": 0}
    training = [line for line in lines if line.get("kind") == "train"]
    latest: dict[str, Any] = training[-1] if training else {}
    best_name, best = _best([line for line in lines if line.get("kind") == "validation"])
    total = -(-int(settings.get("samples", 0)) // int(settings.get("batch_size", 1)))
    files = [out / name for name in ("metrics.jsonl", "log.txt", "config.yaml", RECORD)]
    return Run(
        folder=str(out),
        task=str(settings.get("task.kind", "")),
        state=_state(out, record, done=0 < total <= int(last["step"])),
        step=int(last["step"]),
        total_steps=total,
        samples=int(last["samples"]),
        loss=latest.get("loss"),
        best_name=best_name,
        best=best,
        samples_per_second=latest.get("samples_per_second"),
        age_seconds=max(0.0, time.time() - max(f.stat().st_mtime for f in files if f.is_file())),
        error=record.get("error"),
    )


def _state(out: Path, record: dict[str, Any], *, done: bool) -> str:
    said, locked = record.get("state", "running"), _locked(out)
    if said != "running":
        return str(said)
    if locked:
        return "running"
    if record:
        return "failed"  # it ended without a word: killed, or the machine went down
    return "finished" if done else "stopped"  # of an older version


def _locked(out: Path) -> bool:
    try:
        with (out / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _best(validations: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    for name, better in BEST.items():
        values = [line[name] for line in validations if isinstance(line.get(name), int | float)]
        if values:
            return name, float(better(values))
    return None, None


@dataclass(frozen=True)
class Comparison:
    """folders: what is compared; settings: those that differ, with each run's value; unshared: those that some lack.

    numbers: (samples, kind and name) -> each run's value there, interpolated between its lines; None where it has none.
    """

    folders: list[str]
    settings: dict[str, list[Any]]
    unshared: list[str]
    numbers: dict[tuple[int, str], list[float | None]]


def compare(outs: Sequence[Path]) -> Comparison:
    """Runs side by side, at the same numbers of samples. Raises ValueError for fewer than two, or no run folder."""
    if len(outs) < 2:
        raise ValueError(f"give at least two run folders to compare, not {len(outs)}")
    every = [read_settings(out) for out in outs]
    names = dict.fromkeys(name for settings in every for name in settings if name != "out")
    unshared = [name for name in names if not all(name in settings for settings in every)]
    columns = {name: [settings[name] for settings in every] for name in names if name not in unshared}
    differing = {name: values for name, values in columns.items() if any(v != values[0] for v in values)}
    curves = [_curves(read_metrics(out / "metrics.jsonl")) for out in outs]
    ends = [max((samples[-1] for samples, _ in found.values()), default=0) for found in curves]
    shared = dict.fromkeys(name for found in curves for name in found)
    numbers = {
        (samples, name): [_at(found.get(name), samples) for found in curves]
        for samples in dict.fromkeys(round(share * min(ends)) for share in SHARES)
        for name in shared
    }
    known = {place: values for place, values in numbers.items() if any(v is not None for v in values)}
    return Comparison([str(out) for out in outs], differing, unshared, known)


Curves = dict[str, tuple[list[int], list[float]]]


def _curves(lines: list[dict[str, Any]]) -> Curves:
    """Each number of the training and validation lines, but for those of the place in the run: samples, values."""
    found: Curves = {}
    for line in lines:
        if line.get("kind") in ("train", "validation"):
            for name, value in line.items():
                if name not in ("step", "samples", "eta_seconds") and isinstance(value, int | float):
                    samples, values = found.setdefault(f"{line['kind']} {name}", ([], []))
                    samples.append(int(line["samples"]))
                    values.append(float(value))
    return found


def _at(curve: tuple[list[int], list[float]] | None, samples: int) -> float | None:
    if curve is None or not curve[0][0] <= samples <= curve[0][-1]:
        return None
    return float(np.interp(samples, *curve))


def to_json(value: Run | Comparison | list[Run]) -> str:
    """For other programs."""
    if isinstance(value, Comparison):
        rows = [{"samples": s, "name": name, "values": values} for (s, name), values in value.numbers.items()]
        return json.dumps(vars(value) | {"numbers": rows}, indent=1)
    return json.dumps([vars(run) for run in (value if isinstance(value, list) else [value])], indent=1)

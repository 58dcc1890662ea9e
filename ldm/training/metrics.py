"""A run's numbers: means kept on the device, times of its steps, `metrics.jsonl`, and the line that somebody reads."""

import json
import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ldm.training.ranks import Ranks
from ldm.training.tasks import Metrics

T = TypeVar("T")
log = logging.getLogger(__name__)

MEASURED = (
    "samples_per_second",
    "samples_per_second_run",
    "step_seconds",
    "step_seconds_max",
    "data_wait",
    "data_wait_rank",
    "flop_per_second",
    "mfu",
    "device_mb",
    "host_mb",
    "eta_seconds",
)
"""What `metrics.jsonl` says of the machine; all else in it is the same whenever a run is repeated."""


class Means:
    """Running means of metrics, kept on the device so that a step never waits for it."""

    def __init__(self) -> None:
        self.sums: Metrics = {}
        self.weights: dict[str, int] = {}

    def add(self, metrics: Metrics, weight: int = 1) -> None:
        """Count `metrics` in, `weight` times (the number of samples they are means of, say)."""
        for name, value in metrics.items():
            value = value.detach() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0) + weight

    def pop(self) -> Metrics:
        """The means so far; starts anew."""
        means = {name: total / self.weights[name] for name, total in self.sums.items()}
        self.sums, self.weights = {}, {}
        return means


@dataclass(frozen=True)
class Times:
    """Of the steps since the last look, in seconds: each one's, and those that the host spent waiting for data.

    device_mb, host_mb: the most memory held, in 10^6 bytes; on the device since the last look (0 on a CPU).
    """

    steps: list[float]
    waited: float
    device_mb: float
    host_mb: float


class Meter:
    """Times steps without making the host wait: by its clock on a CPU, by events in the stream of a GPU.

    A step begins when its batch is asked for. What lies between two steps, such as a validation, is no part of them; it
    counts in the rate of the run, and in the time that is left.
    flop: of a sample, forward and backward, 0 if unknown; peak: FLOP/s of one device, None if unknown.
    """

    def __init__(self, device: torch.device, batch_size: int, flop: float = 0.0, peak: float | None = None) -> None:
        self.device, self.batch_size, self.flop, self.peak = device, batch_size, flop, peak
        self._began = time.perf_counter()
        self._done = 0  # steps
        self._start: Any = None
        self._steps: list[tuple[Any, Any]] = []
        self._waited = 0.0

    def next(self, stream: Iterator[T]) -> T:
        """The next item of `stream`, with which a step begins."""
        self._start = self._mark()
        before = time.perf_counter()
        item = next(stream)
        self._waited += time.perf_counter() - before
        return item

    def end(self) -> None:
        """The step is over, as far as the host is concerned."""
        self._steps.append((self._start, self._mark()))
        self._done += 1

    def read(self, ranks: Ranks, steps_left: int) -> dict[str, float]:
        """What the steps since the last reading say: some of `MEASURED`. The host waits; every process must call it."""
        found = speed(ranks.everyones(self._pop()), self.batch_size, self.flop, self.peak)
        if self._done:
            seconds = (time.perf_counter() - self._began) / self._done
            found |= {"samples_per_second_run": self.batch_size / seconds, "eta_seconds": steps_left * seconds}
        return found

    def _pop(self) -> Times:
        steps, waited, self._steps, self._waited = self._steps, self._waited, [], 0.0
        device_mb = 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            device_mb = torch.cuda.max_memory_allocated(self.device) / 1e6
            torch.cuda.reset_peak_memory_stats(self.device)
            seconds = [start.elapsed_time(end) / 1e3 for start, end in steps]  # from milliseconds
        else:
            seconds = [end - start for start, end in steps]
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return Times(seconds, waited, device_mb, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def speed(ranks: list[Times], batch_size: int, flop: float, peak: float | None) -> dict[str, float]:
    """What the times of all processes say, the slowest one's where they differ; {} if there was no step.

    `mfu`, the model's FLOP utilisation, is that of Chowdhery et al. 2022, app. B: it counts the FLOP that a sample
    needs, without those that activation checkpointing does again.
    """
    if not ranks[0].steps:
        return {}
    waits = [times.waited / max(1e-9, sum(times.steps)) for times in ranks]
    rate = batch_size * len(ranks[0].steps) / max(1e-9, *(sum(times.steps) for times in ranks))
    found = {
        "samples_per_second": rate,
        "step_seconds": max(statistics.median(times.steps) for times in ranks),
        "step_seconds_max": max(max(times.steps) for times in ranks),
        "data_wait": min(1.0, max(waits)),
        "host_mb": max(times.host_mb for times in ranks),
    }
    if len(ranks) > 1:
        found["data_wait_rank"] = waits.index(max(waits))
    if device_mb := max(times.device_mb for times in ranks):
        found["device_mb"] = device_mb
    if flop:
        found["flop_per_second"] = flop * rate
    if flop and peak:
        found["mfu"] = flop * rate / (peak * len(ranks))
    return found


def rates(optimizers: Mapping[str, Any]) -> dict[str, float]:
    """The learning rate of each part, the highest of its parameter groups; Prodigy's times its estimate."""
    found = {}
    for part, optimizer in optimizers.items():
        scale = max((float(state["d"]) for state in optimizer.state.values() if "d" in state), default=1.0)
        groups = [group["lr"] for group in optimizer.param_groups if group["params"]]
        found[f"lr/{part}"] = scale * max(groups, default=0.0)
    return found


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, in the order of the run also after a resume."""

    def __init__(self, path: Path, samples: int) -> None:
        """Keep the lines up to `samples`; later ones belong to steps that a resumed run does again."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _parsed(line).get("samples", math.inf) <= samples]
        if kept != lines:
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without any that a crash has cut off; [] if there is no such file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [values for values in map(_parsed, lines) if values]


def _parsed(line: str) -> dict[str, Any]:
    """A line; {} for half a line, cut off by a crash."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    whole = isinstance(values, dict) and all(isinstance(values.get(k), int) for k in ("step", "samples"))
    return values if whole else {}


class Console:
    """A bar on a terminal, plain log lines otherwise."""

    def __init__(self, done: int, total: int, *, shown: bool) -> None:
        self.done, self.total, self.shown = done, total, shown
        terminal = shown and sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="sample", dynamic_ncols=True) if terminal else None

    def advance(self, samples: int) -> None:
        self.done += samples
        if self.bar is not None:
            self.bar.update(samples)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of this step: beside the bar, or as a line."""
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(readable(numbers, timed=False)))
        elif self.shown:
            log.info("%s", "  ".join([f"step {step}", f"{100 * self.done / self.total:.0f}%", *readable(numbers)]))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def readable(numbers: Mapping[str, float], *, timed: bool = True) -> Iterable[str]:
    """The numbers of a line as short texts; `timed`: with the speed, which a bar shows itself."""
    for name, value in numbers.items():
        if name not in MEASURED and not name.startswith("lr") and "loss/" not in name:
            yield f"{name} {value:.4g}"
    if timed and "samples_per_second" in numbers:
        yield f"{numbers['samples_per_second']:.3g} samples/s"
    if "step_seconds" in numbers:
        yield f"{numbers['step_seconds']:.3g} s/step"
    if "data_wait" in numbers:
        yield f"data {numbers['data_wait']:.0%}"
    if "mfu" in numbers:
        yield f"MFU {numbers['mfu']:.0%}"
    if timed and "eta_seconds" in numbers:
        yield f"ETA {clock(numbers['eta_seconds'])}"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def floats(metrics: Metrics) -> dict[str, float]:
    """The metrics as Python numbers; this is where the host waits for the device."""
    if not metrics:
        return {}
    values = torch.stack([v.float() for v in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))

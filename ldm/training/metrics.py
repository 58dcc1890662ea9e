"""Where a run's numbers go: `metrics.jsonl`, the log, and a progress bar when somebody is watching."""

import json
import logging
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.training.tasks import Metrics

log = logging.getLogger(__name__)


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


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, in the order of the run also after a resume."""

    def __init__(self, path: Path, samples: int) -> None:
        """Keep the lines up to `samples`; later ones belong to steps that a resumed run does again."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _samples(line) <= samples]
        if kept != lines:
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: float | int | str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _samples(line: str) -> float:
    try:
        return json.loads(line)["samples"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # half a line, cut off by a crash


class Progress:
    """A bar with samples/s and ETA on a terminal, plain log lines otherwise."""

    def __init__(self, done: int, total: int, *, shown: bool) -> None:
        self.start, self.done, self.total, self.shown = done, done, total, shown
        self.began = time.monotonic()
        terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="sample", dynamic_ncols=True) if terminal else None

    def advance(self, samples: int) -> None:
        self.done += samples
        if self.bar is not None:
            self.bar.update(samples)

    def report(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of this step: beside the bar, or as a line."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.shown:
            rate = self.rate()
            left = (self.total - self.done) / rate if rate else 0.0
            share = 100 * self.done / self.total
            log.info("step %d  %.0f%%  %s  %.0f samples/s  ETA %s", step, share, text, rate, clock(left))

    def rate(self) -> float:
        """Samples per second since the run (or its resume) began."""
        return (self.done - self.start) / max(1e-9, time.monotonic() - self.began)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


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

"""`report.html` in a run folder: what its files say, drawn on one page that needs nothing else."""

import base64
import io
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.checkpoints.files import commit_file
from ldm.training.metrics import read_metrics
from ldm.training.report_page import Curve, Page, Preview, render
from ldm.training.runs import read_record, read_run, recorded

log = logging.getLogger(__name__)

REPORT = "report.html"
POINTS = 200
"""Of a curve that are drawn; more lines than that are drawn as their means, with what lies between their extremes."""

PREVIEWS, PREVIEW_PX = 12, (768, 512)
"""How many previews are shown, and how large at most."""

SHARE = 0.01
"""Of a run's time that its report may take while it goes on."""

Lines = Sequence[dict[str, Any]]


@dataclass
class Reporter:
    """Writes the report of the run in `out` while it goes on, but not so often that it takes over 1 % of the time.

    wanted: whether this process is the one that writes it. What keeps it from being written is warned of.
    """

    out: Path
    wanted: bool = True
    cost: float = 0.0  # seconds that the last one took
    written: float = field(default_factory=time.monotonic)

    def update(self) -> None:
        """Write it anew, if that is due."""
        began = time.monotonic()
        if not self.wanted or self.cost > SHARE * (began - self.written):
            return
        try:
            write_report(self.out)
        except (OSError, ValueError) as error:
            log.warning("no report: %s; going on", " ".join(str(error).split()))
        self.written = time.monotonic()
        self.cost = self.written - began


@contextmanager
def reported(out: Path, facts: dict[str, Any], *, main: bool) -> Iterator[dict[str, Any]]:
    """As `recorded`, on the main process, with a report at the end, however that comes."""
    if not main:
        yield {}
        return
    try:
        with recorded(out, facts) as record:
            yield record
    finally:
        Reporter(out).update()


def write_report(out: Path) -> Path:
    """Read the run in `out` and write its page, whole or not at all. ValueError if `out` is no run folder; OSError."""
    record = read_record(out)
    lines = read_metrics(out / "metrics.jsonl")
    page = Page(
        name=out.resolve().name,
        run=read_run(out, lines),
        training=curves(lines, "train"),
        validation=curves(lines, "validation"),
        last=next((line for line in reversed(lines) if line.get("kind") == "train"), {}),
        skipped=[int(line["step"]) for line in lines if line.get("kind") == "skipped"],
        previews=previews(out / "previews"),
        config=(out / "config.yaml").read_text(encoding="utf-8", errors="replace"),
        facts={name: value for name, value in record.items() if isinstance(value, dict)},
    )
    with commit_file(out / REPORT) as stage:
        stage.write_text(render(page), encoding="utf-8")
    return out / REPORT


def curves(lines: Lines, kind: str) -> dict[str, Curve]:
    """Every number of the lines of that kind, over the steps."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        if line.get("kind") == kind:
            for name, value in line.items():
                if name not in ("step", "samples") and isinstance(value, int | float) and math.isfinite(value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(float(line["step"]))
                    values.append(float(value))
    return {name: thin(steps, values) for name, (steps, values) in found.items()}


def thin(steps: Sequence[float], values: Sequence[float], points: int = POINTS) -> Curve:
    """At most `points` of a curve: in stretches of equally many values, the mean, the lowest and the highest."""
    stretches = np.array_split(np.array([steps, values], dtype=float), min(points, len(steps)), axis=1)
    x, mean = np.array([stretch.mean(axis=1) for stretch in stretches]).T.tolist()
    low, high = ([float(pick(stretch[1])) for stretch in stretches] for pick in (np.min, np.max))
    return Curve(x, mean, low, high, last=float(values[-1]))


def previews(folder: Path) -> list[Preview]:
    """At most `PREVIEWS` pictures of the folder, evenly spaced with the first and the last, small, as JPEG."""
    files = sorted(folder.glob("step-*.png"))
    chosen = np.linspace(0, len(files) - 1, min(PREVIEWS, len(files))).round().astype(int)
    found = []
    for file in (files[i] for i in chosen):
        try:
            with Image.open(file, formats=["PNG"]) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoder raises
            log.warning("%s is left out of the report: %s", file, error)
            continue
        picture.thumbnail(PREVIEW_PX, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        found.append(Preview(file.stem, base64.b64encode(buffer.getvalue()).decode("ascii")))
    return found

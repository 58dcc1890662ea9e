"""What a comparison found: raw blocks, what they amount to, JSON for machines and a table for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.instruments import machine

RESAMPLES = 4000
MIN_UNDISTURBED = 0.5  # share of undisturbed blocks from which the others are left out


@dataclass(frozen=True)
class Block:
    """Some calls of one subject in a row, and what else the machine did meanwhile.

    position: place in the round's order. others: cores that anything but this process kept busy. load: 1-minute
    load average at the block's end.
    """

    subject: str
    round: int
    position: int
    calls: int
    elapsed_s: float
    others: float
    load: float
    disturbed: bool

    @property
    def seconds(self) -> float:
        """Seconds per call."""
        return self.elapsed_s / self.calls


@dataclass(frozen=True)
class Checked:
    """A subject before the timing. error: largest |a - b| / max |b| to the baseline; void: why it is not timed."""

    name: str
    first_call_s: float = 0.0  # compilation and autotuning included
    warm_up_s: float = 0.0  # all warm-up calls, the first included
    error: float | None = None
    peak_mb: float | None = None
    void: str | None = None


@dataclass(frozen=True)
class Row:
    """A subject and its numbers; those of a void row are None.

    s per call: median, p10, p90 over n blocks. speedup: baseline's time / this one's, median over rounds, with its
    95 % interval. rate: FLOP/s. of_gemm: rate / the same round's GEMM rate, median. disturbed: how many of its blocks.
    basis, speedup_basis: "undisturbed" where at least half of the blocks (the rounds) were, else "all" of them count.
    """

    subject: Checked
    disturbed: int = 0
    basis: str = "none"
    n: int = 0
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    speedup_basis: str = "none"
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    rate: float | None = None
    of_gemm: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured and nothing that was computed from it; `gemm` are blocks of the GEMM alone."""

    title: str
    device: str
    baseline: str
    tolerance: float
    seed: int
    schedule: dict[str, Any]
    checked: tuple[Checked, ...]
    blocks: tuple[Block, ...]
    gemm: tuple[Block, ...]
    flop: float  # of one call of the baseline
    gemm_flop: float


@dataclass(frozen=True)
class Comparison:
    """A measurement and its rows, in the order the subjects were given."""

    measurement: Measurement
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of one subject."""
        return next(row for row in self.rows if row.subject.name == name)


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % interval of the median by percentile bootstrap (Efron 1979) over whole rounds."""
    rng = np.random.default_rng(seed)
    sample = np.asarray(values)[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    low, high = np.percentile(np.median(sample, axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarise(measurement: Measurement) -> Comparison:
    """The rows of a measurement; the same one always gives the same rows."""
    return Comparison(measurement, tuple(_row(measurement, checked) for checked in measurement.checked))


def _row(measurement: Measurement, checked: Checked) -> Row:
    own = {b.round: b for b in measurement.blocks if b.subject == checked.name}
    if checked.void is not None or not own:
        return Row(checked)
    kept, basis = _undisturbed([[b] for b in own.values()])
    seconds = [b.seconds for (b,) in kept]
    median, p10, p90 = (float(np.percentile(seconds, q)) for q in (50, 10, 90))
    base = {b.round: b for b in measurement.blocks if b.subject == measurement.baseline}
    pairs, speedup_basis = _undisturbed([[base[i], b] for i, b in own.items()])
    ratios = [a.seconds / b.seconds for a, b in pairs]
    low, high = bootstrap(ratios, measurement.seed)
    return Row(
        subject=checked,
        disturbed=sum(b.disturbed for b in own.values()),
        basis=basis,
        n=len(seconds),
        median_s=median,
        p10_s=p10,
        p90_s=p90,
        speedup_basis=speedup_basis,
        speedup=float(np.median(ratios)),
        low=low,
        high=high,
        rate=measurement.flop / median,
        of_gemm=_of_gemm(measurement, own),
    )


def _of_gemm(measurement: Measurement, own: dict[int, Block]) -> float | None:
    pairs, _ = _undisturbed([[own[g.round], g] for g in measurement.gemm if g.round in own])
    if not pairs:
        return None
    each = [(measurement.flop / a.seconds) / (measurement.gemm_flop / g.seconds) for a, g in pairs]
    return float(np.median(each))


def _undisturbed(groups: list[list[Block]]) -> tuple[list[list[Block]], str]:
    quiet = [group for group in groups if not any(b.disturbed for b in group)]
    if quiet and len(quiet) >= MIN_UNDISTURBED * len(groups):
        return quiet, "undisturbed"
    return groups, "all"


def write(result: Comparison | Sequence[Comparison], path: Path) -> None:
    """Write comparisons as JSON: the machine, each row, and every raw block."""
    results = [result] if isinstance(result, Comparison) else list(result)
    document = {"machine": machine(), "comparisons": [_document(each) for each in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _document(result: Comparison) -> dict[str, Any]:
    raw = asdict(result.measurement)
    for kind in ("blocks", "gemm"):
        for block, source in zip(raw[kind], getattr(result.measurement, kind), strict=True):
            block["seconds"] = source.seconds
    return {"rows": [asdict(row) for row in result.rows], **raw}


COLUMNS = (
    "subject", "s/call", "p10 to p90", "speed-up", "95 %", "GFLOP/s", "of GEMM", "+MB", "error", "first call, s", "n",
)  # fmt: skip


def table(result: Comparison) -> str:
    """A Markdown table with its caption; the README says how to read it."""
    m = result.measurement
    unit = "TFLOP/s" if m.device.startswith("cuda") else "GFLOP/s"
    head = [unit if column == "GFLOP/s" else column for column in COLUMNS]
    lines = [
        f"### {m.title} ({m.device})",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|--:" * (len(head) - 1) + "|",
        *(f"| {' | '.join(_cells(row, unit))} |" for row in result.rows),
        "",
        *_notes(result, unit),
    ]
    return "\n".join(lines)


def _cells(row: Row, unit: str) -> list[str]:
    subject = row.subject
    error = "-" if subject.error is None else f"{subject.error:.1e}"
    peak = "-" if subject.peak_mb is None else f"{subject.peak_mb:.0f}"
    if row.median_s is None or row.rate is None:
        blank = ["-"] * 6
        return [subject.name, f"void: {subject.void}", *blank[1:], peak, error, f"{subject.first_call_s:.3g}", "0"]
    return [
        subject.name,
        f"{row.median_s:.4g}",
        f"{row.p10_s:.4g} to {row.p90_s:.4g}",
        f"{row.speedup:.3f}",
        f"{row.low:.3f} to {row.high:.3f}{'*' * (row.speedup_basis == 'all')}",
        f"{row.rate / (1e12 if unit == 'TFLOP/s' else 1e9):.4g}",
        "-" if row.of_gemm is None else f"{row.of_gemm:.0%}",
        peak,
        error,
        f"{subject.first_call_s:.3g}",
        f"{row.n}{'*' * (row.basis == 'all')}",
    ]


def _notes(result: Comparison, unit: str) -> list[str]:
    m = result.measurement
    blocks = m.blocks + m.gemm
    notes = [f"Baseline: {m.baseline}; {m.flop / 1e9:.4g} GFLOP a call, counted there; error allowed {m.tolerance:g}."]
    if m.gemm:
        scale = 1e12 if unit == "TFLOP/s" else 1e9
        low, middle, high = np.percentile([m.gemm_flop / b.seconds / scale for b in m.gemm], [0, 50, 100])
        notes.append(f"GEMM between the blocks: median {middle:.4g} {unit}, {low:.4g} to {high:.4g}.")
    disturbed = sum(b.disturbed for b in blocks)
    notes.append(f"Disturbed by other work: {disturbed} of {len(blocks)} blocks.")
    if any("all" in (row.basis, row.speedup_basis) for row in result.rows):
        notes.append("*: more than half of its blocks or rounds were disturbed, so all of them count; measure again.")
    return notes

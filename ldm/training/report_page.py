"""A run as one HTML file that needs nothing else: no network, no script, every text from the run escaped."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from data_pipeline.html import document
from ldm.training.metrics import MEASURED, clock
from ldm.training.runs import Run

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 26
"""Of a chart, and its margins, in units of its own."""

LOG_RATIO = 15
"""Positive values that span more than this are drawn on a logarithmic scale."""

FEW = 40
"""Up to so many points, each is marked."""

MAX_CHARTS = 24
"""Of a run's own metrics; those that come first are shown."""

COLOURS = ("#2b6cb0", "#d9622b", "#2f9e6e", "#b0508f", "#c99700", "#5a6b7b")
LEVELS = ("#fbb761", "#ef7a4d", "#c9406b", "#8a2a86", "#3b1f78")
"""From the least noise to the most."""

_STYLE = """h2 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
h3 { font-size: 18px; margin: 28px 0 10px; }
p.bad { color: var(--bad); }
section { padding: 14px 18px; }
.grid { gap: 14px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); align-items: start; }
.legend { color: var(--soft); font-size: 13px; }
.legend span { margin-right: 14px; white-space: nowrap; } .legend b { color: var(--ink); font-weight: 600; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
svg text { fill: var(--soft); } svg .axis { stroke: #cbd2d9; } svg .rule { stroke: #eceff2; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .band { opacity: .16; }
svg .skip { stroke: var(--bad); stroke-width: 1.5; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 14px; }
img { width: 100%; height: auto; border-radius: 6px; background: #f0f2f5; display: block; }
figcaption { color: var(--soft); margin-top: 3px; }
td { padding: 4px 12px 4px 0; }
td:first-child { color: var(--soft); width: 40%; } tr:first-child td { border-top: 0; }
pre { margin: 0; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Curve:
    """Points to draw: x, their means, what lies between their lowest and highest values; and the very last value."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    last: float


@dataclass(frozen=True)
class Preview:
    """A JPEG in base64, and what it shows."""

    caption: str
    jpeg: str


@dataclass(frozen=True)
class Page:
    """All that the page shows. last: the last line of training; skipped: steps; facts: tables by title."""

    name: str
    run: Run
    training: dict[str, Curve]
    validation: dict[str, Curve]
    last: dict[str, Any]
    skipped: list[int]
    previews: list[Preview]
    config: str
    facts: dict[str, dict[str, Any]]


def render(page: Page) -> str:
    """The whole file."""
    run = page.run
    bad = f'<p class="bad">{escape(run.error)}</p>' if run.error else ""
    facts = "".join(
        f"<section><b>{escape(value)}</b><span>{escape(what)}</span></section>" for value, what in _facts(page)
    )
    figures = "".join(
        f'<figure><img alt="" src="data:image/jpeg;base64,{escape(p.jpeg)}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in page.previews
    )
    tables = "".join(_table(title, rows) for title, rows in page.facts.items())
    body = [
        f"<h1>{escape(page.name)}</h1><p>{escape(f'{run.task}: {run.state}')}</p>{bad}",
        f'<div class="grid facts">{facts}</div>',
        *_sections(page),
        f'<h3>Previews</h3><section class="pictures">{figures}</section>' if figures else "",
        f'<h3>The run</h3><div class="grid charts">{tables}</div>' if tables else "",
        f"<h3>Settings</h3><section><pre>{escape(page.config)}</pre></section>",
    ]
    return document(page.name, _STYLE, body)


def _facts(page: Page) -> Iterable[tuple[str, str]]:
    """(value, what it is)"""
    run, last = page.run, page.last
    share = f" ({run.step / run.total_steps:.0%})" if run.total_steps else ""
    yield f"{run.step:,}{share}", f"of {run.total_steps:,} steps"
    if run.loss is not None:
        yield f"{run.loss:.4g}", "loss"
    if run.best is not None:
        yield f"{run.best:.4g}", f"best validation {run.best_name}"
    if "samples_per_second" in last:
        yield f"{last['samples_per_second']:.3g}", "samples a second"
    if "mfu" in last:
        yield f"{last['mfu']:.0%}", "of the device's FLOP (MFU)"
    if run.state == "running" and "eta_seconds" in last:
        yield clock(last["eta_seconds"]), "to go"
    if page.skipped:
        yield f"{len(page.skipped):,}", "steps skipped (red marks)"


def _sections(page: Page) -> Iterable[str]:
    """Groups of charts, each under a heading."""
    own = [n for n in page.training if n not in MEASURED and not n.startswith("lr") and n != "gradient"]
    names = dict.fromkeys([*own, *(n for n in page.validation if not n.startswith("loss/"))])
    get, validated = page.training.get, page.validation.get
    learning = [
        chart(
            name,
            _named({"training": get(name), "validation": validated(name)}),
            page.skipped,
            colours=COLOURS if get(name) else COLOURS[1:],
        )
        for name in itertools.islice(names, MAX_CHARTS)
    ]
    by_level = {f"fifth {k + 1}": validated(f"loss/{k}") for k in range(len(LEVELS))}
    title = "validation loss by noise, from the least (fifth 1) to the most"
    learning.append(chart(title, _named(by_level), page.skipped, colours=LEVELS))
    yield _group("Learning", learning)
    lr = {n.removeprefix("lr/"): c for n, c in page.training.items() if n.startswith("lr/")}
    times = _named({"median": get("step_seconds"), "longest": get("step_seconds_max")})
    yield _group(
        "Steps",
        [
            chart("learning rate", lr or _named({"": get("lr")}), zero=True),
            chart("gradient norm", _named({"": get("gradient")}), page.skipped),
            chart("samples a second", _named({"": get("samples_per_second")}), zero=True),
            chart("seconds a step", times, zero=True),
            chart("share of time waiting for data", _named({"": get("data_wait")}), zero=True),
            chart("model FLOP utilisation", _named({"": get("mfu")}), zero=True),
            chart("peak memory, MB", _named({"device": get("device_mb"), "host": get("host_mb")}), zero=True),
        ],
    )


def _named(curves: Mapping[str, Curve | None]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if curve is not None}


def _group(title: str, charts: list[str]) -> str:
    return f'<h3>{escape(title)}</h3><div class="grid charts">{"".join(charts)}</div>' if any(charts) else ""


def _table(title: str, rows: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(_shown(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<section><h2>{escape(title)}</h2><table>{body}</table></section>"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def chart(
    title: str,
    curves: Mapping[str, Curve],
    skipped: Iterable[int] = (),
    *,
    zero: bool = False,
    colours: tuple[str, ...] = COLOURS,
) -> str:
    """Curves over steps with their legend; "" if there is none. skipped: steps to mark; zero: the axis begins there."""
    if not curves:
        return ""
    low, high, logarithmic = _span(curves.values(), zero=zero)
    last_step = max(curve.x[-1] for curve in curves.values())

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1.0)

    def y(value: float) -> float:
        if logarithmic:
            part = (math.log(max(value, low / 10)) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            part = (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(part, 0.0), 1.0)

    floor = HEIGHT - BOTTOM
    across = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{y(v) + 4:.1f}" text-anchor="end">{short(v)}</text>'
        for v in (log_ticks(low, high) if logarithmic else ticks(low, high))
    )
    along = "".join(
        f'<text x="{x(v):.1f}" y="{floor + 18}" text-anchor="middle">{short(v)}</text>'
        for v in ticks(0.0, max(last_step, 1.0))
    )
    marks = "".join(
        f'<line class="skip" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{floor - 9}" y2="{floor}"/>'
        for s in {round(x(s), 1): s for s in skipped}.values()
    )
    coloured = list(zip(curves.items(), itertools.cycle(colours), strict=False))
    drawn = "".join(_drawn(curve, x, y, colour) for (_, curve), colour in coloured)
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)} <b>{short(curve.last)}</b></span>'
        for (name, curve), colour in coloured
    )
    return (
        f'<section><h2>{escape(title)}</h2><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{across}{along}<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f"{drawn}{marks}</svg></section>"
    )


def _span(curves: Iterable[Curve], *, zero: bool) -> tuple[float, float, bool]:
    """The lowest and highest value of the axis, and whether it is logarithmic.

    All means are on it, and most of what lies around them: a single outlier does not flatten the rest.
    """
    curves = list(curves)
    means = [v for curve in curves for v in curve.mean]
    lows, highs = (sorted(v for curve in curves for v in getattr(curve, side)) for side in ("low", "high"))
    low = min(*means, lows[len(lows) // 50])
    high = max(*means, highs[-1 - len(highs) // 50])
    if low > 0 and high / low > LOG_RATIO and not zero:
        return low / 1.1, high * 1.1, True
    if zero:
        low = min(low, 0.0)
    if high == low:
        high, low = high + (abs(high) or 1.0) / 2, low - (0.0 if zero else (abs(low) or 1.0) / 2)
    margin = 0.05 * (high - low)
    return low - (0.0 if zero and low == 0 else margin), high + margin, False


def _drawn(curve: Curve, x: Callable[[float], float], y: Callable[[float], float], colour: str) -> str:
    over = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.x, curve.high, strict=True)]
    under = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.x, curve.low, strict=True)]
    line = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.x, curve.mean, strict=True)]
    band = f'<polygon class="band" fill="{colour}" points="{" ".join(over + under[::-1])}"/>' if over != under else ""
    dots = ""
    if len(line) <= FEW:
        places = (p.split(",") for p in line)
        dots = "".join(f'<circle cx="{cx}" cy="{cy}" r="2.4" fill="{colour}"/>' for cx, cy in places)
    return f'{band}<polyline class="curve" stroke="{colour}" points="{" ".join(line)}"/>{dots}'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; where they are few, also twice and five times those."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(exponents) > 4 else (1, 2, 5)
    return [v for e in exponents for f in factors if low <= (v := f * 10.0**e) <= high]


def short(value: float) -> str:
    """A number in a few characters: 0.0123, 1.5k, 2M, 1e-05."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"

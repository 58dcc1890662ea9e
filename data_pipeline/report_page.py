"""A survey as one HTML file that needs nothing else: no network, no script, every text from the data escaped."""

from collections.abc import Iterable
from html import escape

from data_pipeline.html import document
from data_pipeline.survey import Bars, Picture, Survey

_NAME_CHARACTERS, _TEXT_CHARACTERS = 80, 160

_STYLE = """main { max-width: 1180px; }
h2 { font-size: 16px; margin: 0 0 12px; }
section { padding: 18px 20px; }
.grid { margin-bottom: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); align-items: start; }
.facts section { padding: 14px 18px; }
svg { font-size: 13px; }
svg text { fill: var(--ink); } svg text.n { fill: var(--soft); }
td { padding: 5px 8px 5px 0; }
td:nth-child(2) { text-align: right; white-space: nowrap; padding-right: 16px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px; }
figure div { height: 132px; display: flex; align-items: center; justify-content: center; background: #f0f2f5;
  border-radius: 6px; overflow: hidden; }
img { max-width: 100%; max-height: 132px; }
figcaption { line-height: 1.35; margin-top: 4px; }
figcaption i { display: block; color: var(--soft); font-style: normal; }
"""


def render(survey: Survey, name: str) -> str:
    """The page for the folder called `name`."""
    info, report = survey.info, survey.report
    rows = report.delivered + report.rejected_count
    held = f"{info.size} x {info.size} px" if info.size else "pictures in their own sizes"
    made_from = " ".join([str(info.source.get("kind", "")), *_settings(info.source.get("settings", {}))])
    facts = [
        (f"{report.delivered:,}", "delivered"),
        (f"{report.rejected_count:,}", "rejected"),
        (f"{report.delivered / max(rows, 1):.1%}", "of the rows are used"),
        (f"{info.bytes / 1e6:,.1f} MB", f"in {len(info.shards):,} shards"),
        (f"{survey.repeated:,}", "repeat the bytes of another"),
        (f"{survey.alike:,}", "look like another"),
    ]
    reasons = sorted(report.rejected.items(), key=lambda item: -item[1].count)
    outcomes = {"delivered": report.delivered, **{reason: r.count for reason, r in reasons}}
    lengths_of = "" if survey.captions_read == info.samples else f", of {survey.captions_read:,} samples"
    charts = [
        _chart("What became of the rows", outcomes, first="var(--good)", rest="var(--bad)"),
        _chart("Shorter side of the originals, px", survey.sides),
        _chart("Shape of the originals, width : height", survey.aspects),
        _chart(f"Words in the main caption{lengths_of}", survey.lengths),
        _chart("Captions of a sample", survey.captions_each),
        _chart("Most frequent words", dict(list(survey.words.items())[:12])),
    ]
    table = "".join(
        f"<tr><td>{escape(reason)}</td><td>{r.count:,}</td><td>{escape('; '.join(r.examples))}</td></tr>"
        for reason, r in reasons
    )
    body = [
        f"<h1>{escape(name)}</h1><p>{escape(f'{held}, {info.image_format}; from {made_from}')}</p>",
        '<div class="grid facts">',
        *(f"<section><b>{escape(value)}</b><span>{escape(what)}</span></section>" for value, what in facts),
        '</div><div class="grid charts">',
        *charts,
        "</div>",
        f'<div class="grid"><section><h2>Rejected, by reason</h2><table>{table}</table></section></div>' * bool(table),
        _pictures("Some that were delivered", survey.kept),
        _pictures("Some that were turned away by filters", survey.rejected),
    ]
    return document(name, _STYLE, body)


def _settings(settings: dict[str, object]) -> Iterable[str]:
    return (f"{k}={v}" for k, v in settings.items() if v not in (None, "", [], {}))


def _chart(title: str, bars: Bars, first: str = "var(--bar)", rest: str = "var(--bar)") -> str:
    """Horizontal bars, one a line, each with its count and share; "" when there is nothing to show."""
    if not bars:
        return ""
    step, left, wide, right = 24, 150, 260, 110
    most, total = max(bars.values()), max(sum(bars.values()), 1)
    lines = []
    for i, (label, count) in enumerate(bars.items()):
        y, width = i * step, max(1.0, wide * count / max(most, 1))
        colour = rest if i else first
        short = label if len(label) <= 22 else label[:21] + "\N{HORIZONTAL ELLIPSIS}"
        lines.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(short)}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="{step - 7}" rx="3" fill="{colour}"/>'
            f'<text class="n" x="{left + width + 8:.1f}" y="{y + 16}">{count:,} ({count / total:.1%})</text>'
        )
    box = f"0 0 {left + wide + right} {step * len(bars)}"
    return f'<section><h2>{escape(title)}</h2><svg viewBox="{box}" role="img">{"".join(lines)}</svg></section>'


def _pictures(title: str, pictures: list[Picture]) -> str:
    if not pictures:
        return ""
    figures = "".join(
        f'<figure><div><img alt="" src="data:image/jpeg;base64,{escape(p.jpeg)}"></div><figcaption>'
        f"{escape(_cut(p.text, _TEXT_CHARACTERS))}<i>{escape(_cut(p.name, _NAME_CHARACTERS))}</i></figcaption></figure>"
        for p in pictures
    )
    return f'<div class="grid"><section><h2>{escape(title)}</h2><div class="pictures">{figures}</div></section></div>'


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "\N{HORIZONTAL ELLIPSIS}"

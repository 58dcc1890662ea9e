"""The page of a run: right points at right places, nothing from outside, whole or not at all, and cheap."""

import base64
import io
import json
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.loader import fixed_batch
from ldm.diffusion.process import Diffusion
from ldm.training import engine, report
from ldm.training.metrics import read_metrics
from ldm.training.report import PREVIEW_PX, Reporter, curves, previews, thin, write_report
from ldm.training.report_page import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, chart, log_ticks, short, ticks
from ldm.training.run import build, run
from ldm.training.runs import read_run
from tests.conftest import frozen, tiny_config

HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> & <b>'
VOID = {"meta", "img", "line", "rect", "circle", "polyline", "polygon"}


class Reader(HTMLParser):
    """Tags with their attributes, and text; every tag that opens must close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def folder(out: Path, lines: list[dict[str, Any]], record: dict[str, Any] | None = None, config: str = "") -> Path:
    """A run folder as a run leaves it, but for checkpoints."""
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(f"samples: 1000\nbatch_size: 10\ntask:\n  kind: autoencoder\n{config}")
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / ".lock").touch()
    if record is not None:
        (out / "run.json").write_text(json.dumps(record))
    return out


def line(step: int, kind: str = "train", **numbers: Any) -> dict[str, Any]:
    return {"step": step, "samples": 10 * step, "kind": kind, **numbers}


def points(page: str, tag: str = "polyline") -> list[list[tuple[float, float]]]:
    pairs = [attributes["points"].split() for attributes in Reader(page).of(tag)]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in curve)] for curve in pairs]


def test_thinning_keeps_means_and_extremes() -> None:
    assert thin([1, 2, 3], [5.0, 4.0, 9.0], 3) == Curve([1, 2, 3], [5, 4, 9], [5, 4, 9], [5, 4, 9], 9.0)
    steps = list(range(10))
    assert thin(steps, [0, 2, 4, 6, 8, 10, 12, 14, 16, 99], 2) == Curve([2, 7], [4, 30.2], [0, 10], [8, 99], 99.0)
    values = np.random.default_rng(0).normal(size=20_001)
    values[12_345] = 50.0
    found = thin(range(20_001), values)
    assert len(found.x) == len(found.mean) == 200 and max(found.high) == 50.0 and min(found.low) == values.min()
    assert np.mean(found.mean) == pytest.approx(values.mean(), abs=1e-3)


def test_numbers_that_are_none_are_gaps() -> None:
    lines = [line(1, loss=1.0), line(2, loss=float("nan")), line(3, loss=3.0, words="x"), line(3, "skipped", keys=[])]
    assert curves(lines, "train") == {"loss": Curve([1, 3], [1, 3], [1, 3], [1, 3], 3.0)}


def test_points_lie_where_they_should() -> None:
    linear = chart("a", {"": thin([0, 50, 100], [1.0, 2.0, 3.0])})
    ((x0, y0), (x1, y1), (x2, y2)) = points(linear)[0]
    assert (x0, x2) == (LEFT, WIDTH - RIGHT) and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.1) and y0 > y1 > y2
    assert TOP <= y2 < y0 <= HEIGHT - BOTTOM and y0 - y2 > 0.85 * (HEIGHT - TOP - BOTTOM)

    (log,) = points(chart("a", {"": thin([1, 2, 3], [1.0, 10.0, 100.0])}))
    assert log[0][1] - log[1][1] == pytest.approx(log[1][1] - log[2][1], abs=0.1)  # equal ratios, equal ways

    from_zero = chart("a", {"": thin([1, 2], [10.0, 20.0])}, zero=True)
    (low, high) = points(from_zero)[0]
    floor = HEIGHT - BOTTOM
    assert floor - high[1] == pytest.approx(2 * (floor - low[1]), abs=0.2)
    assert chart("a", {}) == ""
    assert points(chart("a", {"": thin([1], [0.0])}))  # one point, of any value, is drawn


def test_an_outlier_does_not_flatten_the_rest() -> None:
    values = np.linspace(2.0, 1.0, 4000)
    values[1000] = 30.0
    (curve,) = points(chart("a", {"": thin(range(4000), values)}))
    assert curve[-1][1] - curve[0][1] > 0.35 * (HEIGHT - TOP - BOTTOM)  # 0.03 on an axis that ends at 30
    below = values.copy()
    below[1000] = -30.0
    (under,) = points(chart("a", {"": thin(range(4000), below)}))
    assert under[-1][1] - under[0][1] > 0.35 * (HEIGHT - TOP - BOTTOM)
    (band,) = points(chart("a", {"": thin(range(4000), values)}), "polygon")
    assert min(y for _, y in band) == TOP  # and it shows


def test_round_ticks_and_short_numbers() -> None:
    assert ticks(0, 400_000) == [0, 100_000, 200_000, 300_000, 400_000]
    assert ticks(0.12, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert log_ticks(0.04, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(1e-9, 1e-2) == pytest.approx([10.0**e for e in range(-9, -1)])
    assert [short(v) for v in (0, 0.01234, 999, 1500, 2e6, 3.2e9, 1e-5)] == (
        ["0", "0.0123", "999", "1.5k", "2M", "3.2G", "1e-05"]
    )


def test_nothing_comes_from_outside_and_all_text_is_text(tmp_path: Path) -> None:
    record = {"state": "failed", "error": HOSTILE, "summary": {HOSTILE: HOSTILE, "parameters": {HOSTILE: 3}}}
    out = folder(
        tmp_path / "<b>", [line(1, loss=1.0), line(2, **{"loss": 2.0, HOSTILE: 1.0})], record, f"# {HOSTILE}\n"
    )
    page = write_report(out).read_text()
    seen = Reader(page)
    assert {tag for tag, _ in seen.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "section", "b", "span"),
        *("div", "i", "svg", "text", "line", "polyline", "polygon", "circle", "table", "tr", "td", "pre"),
    }
    assert seen.text.count("alert(1)") == 6  # the metric, the error, the settings, and three in the summary
    for _, attributes in seen.tags:
        assert not {"href", "src", "onerror", "onload", "xlink:href", "srcset"} & attributes.keys()
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in page
    assert "failed" in seen.text


def test_the_page_shows_what_the_run_wrote(tmp_path: Path) -> None:
    lines = []
    for step in range(1, 21):
        times = {"samples_per_second": 100.0, "step_seconds": 0.1, "step_seconds_max": 0.2, "data_wait": 0.1}
        times |= {"host_mb": 100.0, "device_mb": 50.0, "mfu": 0.31, "eta_seconds": 60.0}
        lines.append(line(step, loss=1 / step, kl=0.1, gradient=1.0, lr=1e-4, **{"lr/a": 1e-4, "lr/b": 2e-5}, **times))
        if step % 5 == 0:
            lines.append(line(step, "validation", loss=1 / step, **{f"loss/{k}": float(k + step) for k in range(5)}))
    lines[10:10] = [line(7, "skipped", keys=["x"]), line(8, "skipped", keys=[])]
    page = write_report(folder(tmp_path / "out", lines)).read_text()
    seen = Reader(page)
    assert [a["aria-label"] for a in seen.of("svg")] == [
        "loss",
        "kl",
        "validation loss by noise, from the least (fifth 1) to the most",
        "learning rate",
        "gradient norm",
        "samples a second",
        "seconds a step",
        "share of time waiting for data",
        "model FLOP utilisation",
        "peak memory, MB",
    ]
    drawn = [len(curve) for curve in points(page)]
    assert drawn == [20, 4, 20, *[4] * 5, 20, 20, *[20] * 8]
    assert page.count('class="skip"') == 2 * 4  # in the charts of learning, and that of the gradient
    for fact in ("20 (20%)", "of 100 steps", "0.05", "best validation loss", "31%", "steps skipped"):
        assert fact in seen.text
    assert "batch_size: 10" in seen.text


def test_thousands_of_lines_are_drawn_in_little_space(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [line(i, loss=float(v), gradient=float(v)) for i, v in enumerate(rng.normal(5, 1, 5000), 1)]
    out = folder(tmp_path / "out", lines)
    page = write_report(out).read_text()
    assert len(page) < 100_000 and [len(curve) for curve in points(page)] == [200, 200]
    assert [len(band) for band in points(page, "polygon")] == [400, 400]


def test_previews_are_few_small_and_span_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = folder(tmp_path / "out", [line(1, loss=1.0)])
    (out / "previews").mkdir()
    for i in range(30):
        Image.new("RGB", (2000, 500), (8 * i, 0, 0)).save(out / "previews" / f"step-{100 * i:08d}.png")
    chosen = [int(p.caption.removeprefix("step-")) // 100 for p in previews(out / "previews")]
    assert len(chosen) == 12 and (chosen[0], chosen[-1]) == (0, 29)
    assert set(np.diff(chosen)) == {2, 3}
    sources = [a["src"] for a in Reader(write_report(out).read_text()).of("img")]
    for i, source in zip(chosen, sources, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        assert picture.format == "JPEG" and picture.size == (PREVIEW_PX[0], PREVIEW_PX[0] // 4)
        assert abs(picture.getpixel((5, 5))[0] - 8 * i) <= 3  # type: ignore[index]
    (out / "previews" / "step-00002900.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    assert len(previews(out / "previews")) == 11 and "step-00002900.png is left out" in caplog.text


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder(tmp_path / "out", [line(1, loss=1.0)])
    before = write_report(out).read_bytes()

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:100].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write_report(out)
    Reporter(out).update()  # which warns
    assert (out / "report.html").read_bytes() == before
    assert [p.name for p in out.iterdir() if p.name.startswith(".tmp")] == []
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path)


def test_a_report_takes_one_percent_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []

    def write(out: Path) -> None:
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report, "write_report", write)
    reporter = Reporter(tmp_path, written=0.0)
    for _ in range(500):
        now[0] += 1.0
        reporter.update()
    assert written == [1.0, 203.0, 405.0]
    Reporter(tmp_path, wanted=False).update()
    assert len(written) == 3


def test_runs_report_themselves_however_they_end(
    shards: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = frozen(models["autoencoder"].parent)
    run(tiny_config("denoising", tmp_path / "whole", shards, *extra))
    page = (tmp_path / "whole" / "report.html").read_text()
    seen = Reader(page)
    assert "denoising: finished" in seen.text and "4 (100%)" in seen.text and "fifth 5" in seen.text
    assert len(seen.of("img")) == 2 and "flop per sample" in seen.text and "torch" in seen.text
    assert read_run(tmp_path / "whole").state == "finished"
    written = (models["autoencoder"] / "report.html").stat()
    assert written.st_size < 1_000_000 and time.time() > written.st_mtime

    real, states = engine.update, []

    def fail(state: Any, *rest: Any) -> Any:
        states.append(read_run(tmp_path / "broken").state)
        if state.step == 2:
            raise RuntimeError("a planted\nfault")
        return real(state, *rest)

    monkeypatch.setattr(engine, "update", fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(tiny_config("denoising", tmp_path / "broken", shards, *extra))
    assert states == ["running"] * 3
    text = Reader((tmp_path / "broken" / "report.html").read_text()).text
    assert "denoising: failed" in text and "RuntimeError: a planted fault" in text
    assert read_run(tmp_path / "broken").error == "RuntimeError: a planted fault"


def test_fifths_of_the_validation_are_its_parts(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """8 samples: fifths of 2, 2, 2, 1 and 1, whose mean is the loss."""
    extra = frozen(models["autoencoder"].parent)
    run(tiny_config("denoising", tmp_path / "a", shards, "validation_samples=8", *extra))
    for found in read_metrics(tmp_path / "a" / "metrics.jsonl"):
        if found["kind"] == "validation":
            parts = [found[f"loss/{k}"] for k in range(5)]
            assert sum(n * v for n, v in zip((2, 2, 2, 1, 1), parts, strict=True)) / 8 == pytest.approx(found["loss"])


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "mode"])
def test_fifths_go_from_the_least_noise_to_the_most(
    timesteps: str, shards: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every sample's loss is its t, fifths rise, also where t falls with u (`mode`)."""
    extra = ["task.diffusion.schedule=flow", "task.diffusion.prediction=flow", f"task.diffusion.timesteps={timesteps}"]
    config = tiny_config("denoising", tmp_path / "a", shards, *extra, *frozen(models["autoencoder"].parent))
    data, task = build(config)
    monkeypatch.setattr(Diffusion, "loss", lambda self, *_, u, **__: self.levels(u).t.float())
    for count in (4, 5, 13, 48):
        found = {k: v.item() for k, v in task.validate(fixed_batch(data, config.data, count)).items()}
        fifths = [found[name] for name in sorted(found) if name.startswith("loss/")]
        assert len(fifths) == (5 if count >= 5 else 0) and fifths == sorted(set(fifths))

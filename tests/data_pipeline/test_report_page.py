"""What is said about a folder: the survey's counts, the page, the contact sheet, the doctor's findings."""

import base64
import io
import re
import shutil
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import BuildConfig, build
from data_pipeline.doctor import ERROR, OK, WARNING, Training, examine
from data_pipeline.filters import FilterConfig
from data_pipeline.preview import contact_sheet
from data_pipeline.reader import ShardReader
from data_pipeline.report_page import render
from data_pipeline.shards import RawSample
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.survey import survey

HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> & <b>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of 96 x 64, 4 of 32 x 32 (too small), 3 copies of one, 1 unreadable; captions of 1 to 5 words."""
    source = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for i in range(24):
        size = (64, 96, 3) if i < 20 else (32, 32, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(source / f"p{i:02d}.png")
        (source / f"p{i:02d}.txt").write_text(
            HOSTILE if i == 0 else " ".join(["cat", "dog", "cat", "tree", "sky"][: 1 + i % 5])
        )
    for i in range(3):
        shutil.copy(source / "p05.png", source / f"q{i}.png")
        (source / f"q{i}.txt").write_text("a copy")
    (source / "<i>bad.png").write_text("no picture")
    (source / "<i>bad.txt").write_text("bad")
    out = tmp_path_factory.mktemp("shards") / "out"
    build(
        FolderSource(FolderConfig(str(source))),
        BuildConfig(samples_per_shard=9, filters=FilterConfig(min_side_px=64)),
        out,
    )
    return out


def test_counts_are_right(folder: Path) -> None:
    found = survey(folder)
    assert (found.report.delivered, found.report.rejected_count, found.captions_read) == (23, 5, 23)
    assert found.sides == {"64-127": 23} and found.aspects == {"3:2": 23}
    assert found.repeated == 3 and found.alike == 3
    assert found.lengths == {"1": 3, "2": 7, "3-4": 8, "5-8": 5}
    assert (found.words["cat"], found.words["dog"], found.words["tree"], found.words["sky"]) == (31, 16, 8, 4)
    assert found.captions_each == {"1": 23}
    assert len(found.kept) == 23 and len(found.rejected) == 2  # of one reason in one shard
    shown = Image.open(io.BytesIO(base64.b64decode(found.kept[0].jpeg)))
    assert shown.format == "JPEG" and max(shown.size) <= 160
    assert found.to_json()["rejected"]["min_side_px"]["count"] == 4
    assert len(survey(folder, pictures=5).kept) == 5


class Page(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_and_runs_nothing(folder: Path) -> None:
    page = Page(render(survey(folder), HOSTILE))
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "div", "section", "b", "span", "svg",
        "text", "rect", "table", "tr", "td", "figure", "img", "figcaption", "i",
    }  # fmt: skip
    assert len(page.links) == 25 and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert page.handlers == [] and page.text.count("<script>alert(1)</script>") >= 2
    assert "<i>bad.png" in page.text  # as text
    assert "default-src 'none'" in render(survey(folder), "x")
    assert not re.findall(r"https?://(?!example\.com/x)", page.text)


def test_the_page_is_bounded(folder: Path) -> None:
    assert len(render(survey(folder, pictures=4), "x")) < 8 * 24_000 + 30_000


def test_contact_sheet(folder: Path) -> None:
    sheet = contact_sheet(folder, 6, 3)
    pixels = np.asarray(sheet)
    assert sheet.width == 12 + 3 * 172 and (pixels != 255).mean() > 0.1
    assert sheet.height > contact_sheet(folder, 3, 3).height
    for wrong in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1 picture and 1 column"):
            contact_sheet(folder, *wrong)


def levels(folder: Path, training: Training) -> dict[str, str]:
    return {f.text: f.level for f in examine(folder, training, lambda caption: len(caption.split()) + 2)}


def test_the_doctor_passes_what_is_well(shard_folder: Path) -> None:
    found = levels(shard_folder, Training(ranks=2, workers=2, batch=2, samples_per_second=10))
    assert set(found.values()) == {OK}
    assert any("an epoch takes 4 s" in text for text in found)
    assert any("37 samples are 18 batches of 2" in text for text in found)


@pytest.mark.parametrize(
    ("training", "level", "text"),
    [
        (Training(ranks=3, batch=4), ERROR, "cannot be shared by 3 ranks"),
        (Training(batch=64), ERROR, "fewer than one batch of 64"),
        (Training(batch=16), WARNING, "is seen very often|are 2.3 batches"),
        (Training(ranks=2, workers=4, batch=2), WARNING, "4 shards for 8 readers"),
        (Training(max_tokens=4), WARNING, "the model sees only the first 4"),
    ],
)
def test_the_doctor_finds_what_does_not_fit(shard_folder: Path, training: Training, level: str, text: str) -> None:
    assert [
        f.level for f in examine(shard_folder, training, lambda c: len(c.split()) + 2) if re.search(text, f.text)
    ] == [level]


def test_the_doctor_finds_bad_data(folder: Path, tmp_path: Path) -> None:
    assert any(f.level == WARNING and "repeat another's bytes" in f.text for f in examine(folder, Training()))
    pictures = tmp_path / "flat"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (100, 100, 100 + i)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("the same")
    build(FolderSource(FolderConfig(str(pictures))), BuildConfig(size=16), tmp_path / "out")
    said = {f.text: f.level for f in examine(tmp_path / "out", Training())}
    assert any("values of 12 pictures from 100 to 111" in text and level == WARNING for text, level in said.items())
    assert any("12 of 12 samples have the same caption" in text for text in said)
    (tmp_path / "out" / "00000.tar").unlink()
    assert [f.level for f in examine(tmp_path / "out", Training())] == [ERROR]
    assert examine(tmp_path / "nowhere", Training())[0].text.startswith("no folder")
    with pytest.raises(ValueError, match="ranks=0"):
        Training(ranks=0)


def test_the_doctor_decodes(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    real = ShardReader.__getitem__

    def gray(self: ShardReader, index: int) -> object:
        sample = real(self, index)
        return type(sample)(
            sample.key, buffer.getvalue() if index == 3 else sample.image_bytes, sample.captions, sample.meta
        )

    monkeypatch.setattr(ShardReader, "__getitem__", gray)
    assert any(f.level == ERROR and "mode L" in f.text for f in examine(shard_folder, Training()))


def test_the_doctor_holds_one_sample_at_a_time(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 2000 samples would be gigabytes."""
    real, read = ShardReader.__getitem__, list[weakref.ref[RawSample]]()
    alive = []

    def watched(self: ShardReader, index: int) -> RawSample:
        sample = real(self, index)
        read.append(weakref.ref(sample))
        alive.append(sum(each() is not None for each in read))
        return sample

    monkeypatch.setattr(ShardReader, "__getitem__", watched)
    examine(shard_folder, Training())
    assert len(read) >= 37 and max(alive) <= 2  # the one before is let go when the next is there

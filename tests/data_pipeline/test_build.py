"""Builds: the same bytes for any number of workers and after any interruption; every sample accounted for."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline import executors, storage
from data_pipeline.assembly import index
from data_pipeline.build import BuildConfig, build
from data_pipeline.duplicates import perceptual_hash
from data_pipeline.filters import FilterConfig
from data_pipeline.images import read_image
from data_pipeline.ledger import PAGE, Ledger, index_names, publish, read_ledgers, write_ledger
from data_pipeline.reader import ShardReader
from data_pipeline.report import Report
from data_pipeline.resize import resize_crop
from data_pipeline.shards import read_index
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource

SETTINGS = BuildConfig(size=16, samples_per_shard=10)


@dataclass
class Listed:
    """A source given as a list: a key, or a reason to reject."""

    items: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        key, reason = self.items[index]
        if reason:
            raise Rejected(reason, key)
        return Sample(key, Image.new("RGB", (8, 9)), ("a caption",), {})

    def name(self, index: int) -> str:
        return f"item {index}"


def content(folder: Path, *, timed: bool = False) -> dict[str, bytes]:
    """All files of a folder; the report, which holds the time taken, only if asked."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if timed or p.name != "report.json"}


def shards_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] == "0"}


def test_workers_change_no_byte(source: FolderSource, shard_folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build(source, replace(SETTINGS, workers=workers), tmp_path / str(workers))
        assert content(tmp_path / str(workers)) == content(shard_folder)


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_formats(source: FolderSource, tmp_path: Path, image_format: str) -> None:
    build(source, BuildConfig(image_format=image_format), tmp_path / "out")
    stored = ShardReader(tmp_path / "out")
    assert stored.info.size is None and stored.info.image_format == image_format
    (tmp_path / "picture").write_bytes(stored[0].image_bytes)
    with Image.open(tmp_path / "picture") as picture:
        assert picture.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[image_format]
        assert picture.size == source[0].image.size


def test_delivered_and_rejected_make_up_the_source(tmp_path: Path) -> None:
    items = [(f"k{i}", "bad eyes" if i % 3 == 0 else "no ears" if 10 <= i < 20 else "") for i in range(45)]
    calls: list[tuple[int, int]] = []
    report = build(Listed(items), SETTINGS, tmp_path / "out", lambda *done: calls.append(done))
    assert {r: v.count for r, v in report.rejected.items()} == {"bad eyes": 15, "no ears": 7}
    assert report.delivered == 23 == len(ShardReader(tmp_path / "out"))
    assert report.rejected["no ears"].examples[:2] == ["item 10 (k10)", "item 11 (k11)"]
    assert calls == [(0, 45), (10, 45), (20, 45), (30, 45), (40, 45), (45, 45)]
    assert [s.file for s in ShardReader(tmp_path / "out").info.shards] == [
        "00000.tar", "00002.tar", "00003.tar", "00004.tar",
    ]  # fmt: skip
    stored = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert stored == report
    assert "15, such as item 0 (k0); item 3 (k3)" in str(report) and "8 .. 8, mean 8.0 px" in str(report)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not one of 2 samples is usable \(dull: 2, such as item 0 \(a\)\)"):
        build(Listed([("a", "dull"), ("b", "dull")]), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="not one of 0 samples"):
        build(Listed([]), SETTINGS, tmp_path / "empty")
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("second", [3, 25])
def test_duplicate_keys_are_an_error(tmp_path: Path, second: int) -> None:
    items = [(f"k{i}", "") for i in range(30)]
    items[second] = ("k1", "")
    with pytest.raises(ValueError, match="duplicate key 'k1'"):
        build(Listed(items), SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("key", ["", "a.b", "../x", "A", "a" * 81, "a/b"])
def test_unsafe_keys_are_an_error(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="allowed are 1 to 80 of 0-9 a-z _ -"):
        build(Listed([(key, "")]), SETTINGS, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"size": 0},
        {"executor": "cloud"},
        {"workers": -1},
        {"samples_per_shard": 0},
        {"image_format": "gif"},
        {"quality": 0},
    ],
)
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        BuildConfig(**setting)


def test_refuses_a_folder_that_is_not_its_own(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, SETTINGS, out)
    before = content(out)
    with pytest.raises(ValueError, match=r"different build \(size: 16 there, 32 asked\)"):
        build(source, replace(SETTINGS, size=32), out)
    with pytest.raises(ValueError, match=r"different build \(samples: 37 there, 5 asked\)"):
        build(ShapesSource(ShapesConfig(count=5)), SETTINGS, out)
    assert content(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.doc").write_text("dear")
    with pytest.raises(ValueError, match="is not empty"):
        build(source, SETTINGS, tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        build(source, SETTINGS, tmp_path / "mine" / "letter.doc")


def test_notices_that_the_source_changed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("one")
    build(FolderSource(FolderConfig(str(folder))), SETTINGS, tmp_path / "out")
    (folder / "a.txt").write_text("other")
    with pytest.raises(ValueError, match="the source changed"):
        build(FolderSource(FolderConfig(str(folder))), SETTINGS, tmp_path / "out")


def test_keeps_whole_shards_and_remakes_damaged_ones(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, SETTINGS, out)
    before = content(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    tar = bytearray((out / "00001.tar").read_bytes())
    tar[700] ^= 1
    (out / "00001.tar").write_bytes(tar)
    index = (out / "00002.json").read_bytes()
    (out / "00002.json").write_bytes(index.replace(b'"count": 1', b'"count": 2', 1))
    assert build(source, SETTINGS, out).kept_shards == 2
    assert content(out) == before
    assert all((out / name).stat().st_mtime_ns == times[name] for name in ("00000.tar", "00003.tar"))


@dataclass
class Deadly(Listed):
    """Ends the process that reads item 15, as the kernel does when memory runs out; `times` in all."""

    marks: Path = Path()
    times: int = 1

    def __getitem__(self, index: int) -> Sample:
        if index == 15 and len(list(self.marks.iterdir())) < self.times:
            (self.marks / str(os.getpid())).touch()
            os._exit(1)
        return super().__getitem__(index)


def test_the_shard_of_a_dead_worker_is_made_by_another(tmp_path: Path) -> None:
    items = [(f"k{i}", "") for i in range(40)]
    (tmp_path / "marks").mkdir()
    build(Deadly(items, tmp_path / "marks"), replace(SETTINGS, workers=2), tmp_path / "out")
    build(Listed(items), SETTINGS, tmp_path / "whole")
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_a_shard_that_kills_twice_is_reported_and_the_others_are_made(tmp_path: Path) -> None:
    items = [(f"k{i}", "") for i in range(40)]
    (tmp_path / "marks").mkdir()
    with pytest.raises(RuntimeError, match=r"worker processes died twice .* making shards 1; all others are kept"):
        build(Deadly(items, tmp_path / "marks", times=9), replace(SETTINGS, workers=1), tmp_path / "out")
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert {p.name for p in (tmp_path / "out").glob("0*.json")} == {"00000.json", "00002.json", "00003.json"}
    assert not (tmp_path / "out" / "index.json").exists()


def test_what_a_worker_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key 'NO': allowed are"):
        build(Listed([("NO", "")]), replace(SETTINGS, workers=1), tmp_path)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_make_the_same_folder(
    source: FolderSource, shard_folder: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    reports = [build(source, SETTINGS, tmp_path, part=(part, 3)) for part in order]
    assert reports[:2] == [None, None] and reports[2] is not None and reports[2].delivered == 37
    assert content(tmp_path) == content(shard_folder)


def test_one_part_alone_is_not_a_folder(source: FolderSource, tmp_path: Path) -> None:
    assert build(source, SETTINGS, tmp_path, part=(2, 3)) is None
    assert [p.name for p in sorted(tmp_path.glob("*.tar"))] == ["00001.tar"]
    with pytest.raises(ValueError, match=r"3 of 4 shards in .* are missing or damaged \(00000, 00002, 00003\)"):
        index(tmp_path)
    for part in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="allowed are 1/N to N/N"):
            build(source, SETTINGS, tmp_path, part=part)


def test_the_index_is_recovered_from_the_shards(shard_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
    (copy / "index.json").unlink()
    assert index(copy).delivered == 37
    assert content(copy) == content(shard_folder)
    (copy / "00002.tar").write_bytes((copy / "00002.tar").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"1 of 4 shards .* \(00002\)"):
        index(copy)
    with pytest.raises(ValueError, match=r"has no build\.json"):
        index(tmp_path)


def test_every_row_is_in_the_ledger_once(tmp_path: Path) -> None:
    items = [(f"k{i}", "bad eyes" if i % 3 == 0 else "") for i in range(25)]
    build(Listed(items), SETTINGS, tmp_path)
    rows: dict[int, str] = {}
    for _, ledger in read_ledgers(tmp_path, index_names(tmp_path, read_index(tmp_path))):
        for entry in (*ledger.samples, *ledger.rejected):
            assert entry["row"] not in rows and entry["name"] == f"item {entry['row']}"
            rows[entry["row"]] = entry.get("reason", "")
    assert rows == {i: reason for i, (_, reason) in enumerate(items)}
    assert read_index(tmp_path).rows == 25


def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(0, 3, 0, "", [], [{"row": row, "name": "", "reason": "", "detail": ""} for row in (0, 2)])
    with pytest.raises(RuntimeError, match="0 delivered and 2 rejected rows are not the rows 0 to 2"):
        write_ledger(tmp_path, "00000", ledger)


def test_filters_and_hashes(pictures: Path, tmp_path: Path) -> None:
    """The ledger has thumbnails of a few that a filter turned away, and hashes of all that were kept."""
    settings = replace(SETTINGS, filters=FilterConfig(min_side_px=22))
    report = build(FolderSource(FolderConfig(str(pictures))), settings, tmp_path)
    small = [p for p in pictures.glob("*.png") if min(Image.open(p).size) < 22]
    assert report is not None and report.rejected["min_side_px"].count == len(small) > 8
    shown = 0
    for _, ledger in read_ledgers(tmp_path, index_names(tmp_path, read_index(tmp_path))):
        pictured = [r for r in ledger.rejected if "thumbnail" in r]
        assert len(pictured) == min(2, len(ledger.rejected))
        shown += len(pictured)
        for sample in ledger.samples:
            original = (pictures / sample["name"]).read_bytes()
            assert sample["content"] == hashlib.sha256(original).hexdigest()
            stored = resize_crop(read_image(original).image, 16)
            assert sample["phash"] == perceptual_hash(stored) and sample["size"] == [16, 16]
            assert sample["original"] == list(read_image(original).image.size)
    assert shown == 8


def test_an_object_store_gets_the_same_bytes(source: FolderSource, shard_folder: Path) -> None:
    out = "memory://bucket/out"
    build(source, SETTINGS, out)
    stored = {f.name: storage.read(storage.join(out, f.name)) for f in storage.list_files(out)}
    assert {n: d for n, d in stored.items() if n != "report.json"} == content(shard_folder)
    storage.remove(storage.join(out, "00001.json"))
    report = build(source, SETTINGS, out)
    assert report is not None and report.kept_shards == 3
    assert storage.read(storage.join(out, "00001.json")) == (shard_folder / "00001.json").read_bytes()


@pytest.mark.long
def test_ray_makes_the_same_bytes(
    source: FolderSource, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real local cluster; one worker dies on the way."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where Ray's workers find the sources above
    build(source, replace(SETTINGS, executor="ray", workers=2), tmp_path / "out")
    assert content(tmp_path / "out") == content(shard_folder)
    (tmp_path / "marks").mkdir()
    items = [(f"k{i}", "") for i in range(40)]
    ray = replace(SETTINGS, executor="ray", workers=2)
    build(Deadly(items, tmp_path / "marks"), ray, tmp_path / "deadly")
    build(Listed(items), SETTINGS, tmp_path / "whole")
    assert shards_of(tmp_path / "deadly") == shards_of(tmp_path / "whole")
    with pytest.raises(ValueError, match="key 'NO': allowed are"):
        build(Listed([("NO", "")]), ray, tmp_path / "no")


@dataclass
class Located(Listed):
    """Notes the Ray node that reads item 0."""

    marks: Path = Path()

    def __getitem__(self, index: int) -> Sample:
        if index == 0:
            import ray

            (self.marks / ray.get_runtime_context().get_node_id()).touch()
        return super().__getitem__(index)


@pytest.mark.long
def test_an_existing_ray_cluster_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same build, sent to the cluster that RAY_ADDRESS names."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    items = [(f"k{i}", "") for i in range(25)]
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        build(Located(items, tmp_path / "marks"), replace(SETTINGS, executor="ray"), tmp_path / "out")
        assert [mark.name for mark in (tmp_path / "marks").iterdir()] == [cluster.head_node.node_id]
    finally:
        cluster.shutdown()
    build(Listed(items), SETTINGS, tmp_path / "whole")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_ray_is_asked_for_when_missing(source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'ldm\[ray\]'"):
        build(source, replace(SETTINGS, executor="ray"), tmp_path)


def test_a_picture_longer_than_its_format_holds_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for width in (16_383, 16_384):
        Image.new("RGB", (width, 1)).save(tmp_path / f"in/{width}.png")
        (tmp_path / f"in/{width}.txt").write_text("long")
    source = FolderSource(FolderConfig(str(tmp_path / "in")))
    report = build(source, BuildConfig(image_format="webp"), tmp_path / "out")
    assert report is not None and report.delivered == 1 and report.rejected["too long for its format"].count == 1
    ((_, ledger),) = read_ledgers(tmp_path / "out", index_names(tmp_path / "out", read_index(tmp_path / "out")))
    assert ledger.rejected[0]["detail"] == "16384 px, webp holds 16383"


def test_names_and_details_that_no_file_can_hold(tmp_path: Path) -> None:
    source = Listed([("k", ""), ("\ud800" + "x" * 9000, "dull")])
    build(source, BuildConfig(), tmp_path / "out")
    ((_, ledger),) = read_ledgers(tmp_path / "out", index_names(tmp_path / "out", read_index(tmp_path / "out")))
    assert ledger.rejected[0]["detail"] == "?" + "x" * 8191


def test_publishing_clears_the_page_of_before(source: FolderSource, tmp_path: Path) -> None:
    build(source, SETTINGS, tmp_path)
    (tmp_path / PAGE).write_text("pictures of before")
    publish(tmp_path, index_names(tmp_path, read_index(tmp_path)), read_index(tmp_path))
    assert not (tmp_path / PAGE).exists()


class Unreadable(Exception):
    """It pickles, but its class cannot be called with what it says."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def _raise_unreadable(number: int) -> None:
    raise Unreadable("lost", f"at {number}")


def test_errors_of_other_processes_are_told_even_if_they_cannot_travel() -> None:
    with pytest.raises(RuntimeError, match="Unreadable: lost at 7"):
        list(executors.run(_raise_unreadable, [7], "processes", 1))

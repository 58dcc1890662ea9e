"""Builds: the same bytes for any number of workers and after any interruption; every sample accounted for."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.build import BuildConfig, build
from data_pipeline.report import Report
from data_pipeline.shards import ShardDataset
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


def content(folder: Path, *, timed: bool = False) -> dict[str, bytes]:
    """All files of a folder; the report, which holds the time taken, only if asked."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if timed or p.name != "report.json"}


def test_workers_change_no_byte(source: FolderSource, shard_folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build(source, replace(SETTINGS, workers=workers), tmp_path / str(workers))
        assert content(tmp_path / str(workers)) == content(shard_folder)


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_formats(source: FolderSource, tmp_path: Path, image_format: str) -> None:
    build(source, BuildConfig(image_format=image_format), tmp_path / "out")
    stored = ShardDataset(tmp_path / "out")
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
    assert report.delivered == 23 == len(ShardDataset(tmp_path / "out"))
    assert report.rejected["no ears"].examples == ["k10", "k11", "k13", "k14", "k16"]
    assert calls == [(0, 45), (10, 45), (20, 45), (30, 45), (40, 45), (45, 45)]
    assert [s.file for s in ShardDataset(tmp_path / "out").info.shards] == [
        "00000.tar", "00002.tar", "00003.tar", "00004.tar",
    ]  # fmt: skip
    stored = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert stored == report
    assert "15, such as k0; k3; k6" in str(report) and "8 .. 8, mean 8.0 px" in str(report)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not one of 2 samples is usable \(dull: 2, such as a\)"):
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
    [{"size": 0}, {"workers": -1}, {"samples_per_shard": 0}, {"image_format": "gif"}, {"quality": 0}],
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


class Deadly(Listed):
    """Ends the process that reads its last sample, as the kernel does when memory runs out."""

    def __getitem__(self, index: int) -> Sample:
        if index == len(self) - 1:
            os._exit(1)
        return super().__getitem__(index)


def test_a_dead_worker_is_reported_and_finished_shards_stay(tmp_path: Path) -> None:
    items = [(f"k{i}", "") for i in range(30)]
    with pytest.raises(RuntimeError, match=r"a worker process died .* finished shards are kept"):
        build(Deadly(items), replace(SETTINGS, workers=1), tmp_path)
    assert (tmp_path / "00001.json").exists() and not (tmp_path / "index.json").exists()


class Crash(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_survives_a_crash_at_every_point(
    source: FolderSource, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)
    for k in range(1, 100):
        left = k

        def failing(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return real(*args)

        out = tmp_path / str(k)
        with monkeypatch.context() as patch:
            patch.setattr(f"data_pipeline.shards.os.{call}", failing)
            try:
                build(source, SETTINGS, out)
            except Crash:
                pass
            else:
                assert left > 0 and k > 10
                return
        if (out / "index.json").exists():  # only once all is there
            assert ShardDataset(out).damaged() == []
        build(source, SETTINGS, out)
        assert content(out) == content(shard_folder)
    raise AssertionError("more calls than expected")


SCRIPT = """
import sys
from pathlib import Path
from data_pipeline.build import BuildConfig, build
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
if __name__ == "__main__":
    build(ShapesSource(ShapesConfig(count=600)), BuildConfig(size=32, samples_per_shard=20), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_survives_being_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(out: str) -> "subprocess.Popen[bytes]":
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / out)], env=env)

    assert run("whole").wait() == 0
    chance = random.Random(0)
    kills = 0
    while kills < 12:
        child = run("killed")
        deadline = time.monotonic() + 30
        before = len(list((tmp_path / "killed").glob("*.tar")))
        while (
            child.poll() is None and time.monotonic() < deadline
        ):  # the first dies before any shard, the rest after one
            begun = (tmp_path / "killed" / "build.json").exists()
            if begun and (kills == 0 or len(list((tmp_path / "killed").glob("*.tar"))) > before):
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
        for tar in (tmp_path / "killed").glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "whole" / tar.name).read_bytes()
    assert kills > 0
    assert run("killed").wait() == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")

"""Kills, power cuts and full disks at every operation on the disk: nothing lost, nothing twice, not one byte else."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import copying, durable
from data_pipeline.build import BuildConfig, build
from data_pipeline.ledger import read_ledgers
from data_pipeline.reader import ShardReader
from data_pipeline.remove import take_out
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from data_pipeline.verify import verify

SOURCE = ShapesSource(ShapesConfig(count=9))
SETTINGS = BuildConfig(size=32, samples_per_shard=4)
OUT_OF_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN_DISK = OSError(errno.EIO, os.strerror(errno.EIO))
Act = Callable[[Path], object]


def make(out: Path) -> object:
    return build(SOURCE, SETTINGS, out)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds the time taken."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing, of which there are thousands here, only matters to `Fault`."""
    monkeypatch.setattr(durable, "operate", lambda name, act, *given: None if name == "fsync" else act(*given))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build makes: shards of 4, 4 and 1 samples."""
    out = tmp_path_factory.mktemp("whole") / "out"
    make(out)
    return out


@dataclass
class Fault:
    """Lets the first `before` operations on the disk pass, then raises `error`, or ends the process.

    power: a power cut, after which a file whose content was not flushed is empty, and a name that was not flushed
    is gone; what had the name before is back.
    """

    before: int
    error: OSError | None = None
    power: bool = False
    done: int = 0
    unflushed: dict[int, Path] = field(default_factory=dict)
    renamed: list[tuple[Path, bytes | None]] = field(default_factory=list)

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.done == self.before:
            if self.error is None:
                self.die()
            raise self.error
        self.done += 1
        if name == "rename":
            old = arguments[1].read_bytes() if arguments[1].exists() else None
            self.renamed.append((arguments[1], old))
        result = None if name == "fsync" else function(*arguments)  # a kill loses nothing that was written
        if name == "open":
            self.unflushed[result.fileno()] = arguments[0]
        if name == "fsync":
            self.unflushed.pop(arguments[0], None)
            if os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
                self.renamed.clear()
        return result

    def die(self) -> None:
        if self.power:
            for path, old in reversed(self.renamed):
                if old is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(old)
            for path in self.unflushed.values():
                if path.exists():
                    os.truncate(path, 0)
        os._exit(9)


def in_child(act: Act, out: Path, fault: Fault) -> int:
    """Exit status of a forked process that does it: 9 when the fault struck, 0 when it was never reached."""
    child = os.fork()
    if child == 0:
        durable.operate = fault
        try:
            act(out)
        except (OSError, RuntimeError) as error:
            os._exit(9 if str(error) else 1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


FAULTS = {
    "killed": lambda k: Fault(k),
    "power cut": lambda k: Fault(k, power=True),
    "disk full": lambda k: Fault(k, OUT_OF_SPACE),
    "disk broken": lambda k: Fault(k, BROKEN_DISK),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_build_survives_a_fault_at_every_operation(kind: str, whole: Path, tmp_path: Path) -> None:
    for k in range(200):
        out = tmp_path / str(k)
        out.mkdir()
        status = in_child(make, out, FAULTS[kind](k))
        if status == 0:
            break
        assert status == 9
        if (out / "index.json").exists():  # only once all is there
            assert verify(out) == []
        for tar in out.glob("0*.tar"):  # no half shard has a name
            assert tar.read_bytes() in (b"", (whole / tar.name).read_bytes()) if kind == "power cut" else True
        make(out)
        assert content(out) == content(whole)
        shutil.rmtree(out)
    assert 35 < k < 200
    assert content(out) == content(whole)


def test_a_full_disk_is_not_filled_further(tmp_path: Path) -> None:
    """What was half written when the disk was full is taken away at once."""
    for k in range(1, 20):
        in_child(make, tmp_path / str(k), Fault(k, OUT_OF_SPACE))
        assert not list((tmp_path / str(k)).glob(".*"))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_removal_survives_a_fault_at_every_operation(kind: str, whole: Path, tmp_path: Path) -> None:
    keys = [ShardReader(whole)[i].key for i in range(9)]
    gone = {key: ("removed on request", "by key") for key in keys if key[-1] in "37"}

    def remove(out: Path) -> object:
        return take_out(out, gone)

    expected = Path(shutil.copytree(whole, tmp_path / "expected"))
    remove(expected)
    assert len(ShardReader(expected)) == 9 - len(gone) == 7
    for k in range(200):
        out = Path(shutil.copytree(whole, tmp_path / str(k)))
        status = in_child(remove, out, FAULTS[kind](k))
        assert status in (0, 9)
        assert verify(out) == []  # at every moment the folder is whole: as it was, or as it was asked for
        assert len(ShardReader(out)) in (9, 7)
        remove(out)
        assert content(out) == content(expected)
        shutil.rmtree(out)
        if status == 0:
            break
    assert 25 < k < 200


def test_a_split_survives_a_kill_at_every_operation(whole: Path, tmp_path: Path) -> None:
    def split(out: Path) -> object:
        return copying.split(whole, (out / "train", out / "val"), count=3, seed=1)

    split(tmp_path)
    for k in range(0, 200, 2):
        out = tmp_path / str(k)
        status = in_child(split, out, Fault(k))
        split(out)
        for part in ("train", "val"):
            assert content(out / part) == content(tmp_path / part)
        if status == 0:
            break
    assert 30 < k < 200


def kill_at_random(whole: Path, out: Path, kills: int, chance: random.Random) -> int:
    """Build again and again, killing each attempt, until one gets through; returns how many kills struck."""
    struck = 0
    while struck < kills:
        child = os.fork()
        if child == 0:
            try:
                make(out)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            assert content(out) == content(whole)
            shutil.rmtree(out)
            continue
        struck += 1
        for tar in out.glob("0*.tar"):
            assert tar.read_bytes() == (whole / tar.name).read_bytes()
    return struck


def random_kills(whole: Path, out: Path, kills: int, seed: int) -> None:
    assert kill_at_random(whole, out, kills, random.Random(seed)) == kills
    make(out)
    assert content(out) == content(whole)
    rows = [
        e["row"] for _, part in read_ledgers(out, ["00000", "00001", "00002"]) for e in part.samples + part.rejected
    ]
    assert rows == list(range(9))  # 0 lost, 0 twice
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_survives_being_killed_at_random(whole: Path, tmp_path: Path) -> None:
    random_kills(whole, tmp_path / "out", kills=25, seed=0)


@pytest.mark.long
def test_survives_being_killed_at_random_200_times(whole: Path, tmp_path: Path) -> None:
    random_kills(whole, tmp_path / "out", kills=200, seed=1)


def test_two_builds_of_the_same_at_once(whole: Path, tmp_path: Path) -> None:
    """By mistake, or where a machine was thought dead: both write the same bytes."""
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number in range(2):
                    build(SOURCE, SETTINGS, tmp_path / "out", part=(number + 1, 2))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    make(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)

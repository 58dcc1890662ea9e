"""Runs in folders, surroundings and on data that nobody thought of: the same bytes, or one line that says why not."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, Loader, open_data
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.checkpoints.files import steps
from ldm.cli.main import main
from ldm.config import to_yaml
from ldm.training import engine
from ldm.training.run import run
from tests.conftest import tiny_config
from tests.training.test_resume import files_of

ODD = "räksmörgås 猫 & co, 100 %"
SHORT = ["samples=16", "save_steps=1", "validate_steps=0", "preview_steps=0"]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of two steps in a folder like any other."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(tiny_config("autoencoder", out, shards, *SHORT))
    return files_of(out)


def in_the_way(place: Path) -> Path:
    place.write_text("a file")
    return place


def below_a_file(place: Path) -> Path:
    return in_the_way(place) / "run"


def loop(place: Path) -> Path:
    place.symlink_to(place.name)
    return place


def to_nowhere(place: Path) -> Path:
    place.symlink_to("nowhere")
    return place


PLACES: dict[str, Callable[[Path], Path]] = {
    "a file in the way": in_the_way,
    "below a file": below_a_file,
    "a link to itself": loop,
    "a link to nothing": to_nowhere,
    "not to be written to": lambda place: Path("/proc/run"),
    "a name that is too long": lambda place: place.with_name(256 * "n"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_is_told_in_one_line(
    place: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = PLACES[place](tmp_path / "place")
    before = sorted(tmp_path.iterdir())
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config("autoencoder", out, shards, *SHORT)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["ldm", "train", str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = str(ended.value.code)
    assert said.startswith("ldm: ") and str(out) in said and "\n" not in said
    assert sorted(p for p in tmp_path.iterdir() if p != config) == before


def test_a_long_and_foreign_name_behind_a_link_changes_no_byte(
    whole: dict[str, bytes], shards: Path, tmp_path: Path
) -> None:
    """Of the run's folder and of the data's; also when the run goes on there."""
    (tmp_path / ODD).mkdir()
    (tmp_path / "link").symlink_to(ODD)
    shutil.copytree(shards, tmp_path / ODD / "shards")
    out = tmp_path / "link" / (200 * "n")
    config = tiny_config("autoencoder", out, tmp_path / "link" / "shards", *SHORT)
    run(config)
    shutil.rmtree(out / "checkpoints" / "step-00000002")
    assert run(config).step == 2 and files_of(out) == whole


def test_checkpoints_on_another_disk(whole: dict[str, bytes], shards: Path, tmp_path: Path) -> None:
    """The folder of checkpoints is a link, and so is one of them."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large disk")
    config = tiny_config("autoencoder", tmp_path / "run", shards, *SHORT)
    run(config)
    first, second = steps(tmp_path / "large disk")
    shutil.rmtree(second)
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    assert run(config).step == 2 and files_of(tmp_path / "run") == whole


def test_a_folder_that_vanishes_is_made_again(
    whole: dict[str, bytes], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.update

    def update(state: Any, *more: Any) -> Any:
        if state.step == 1:
            shutil.rmtree(tmp_path / "run")
        return real(state, *more)

    monkeypatch.setattr(engine, "update", update)
    run(tiny_config("autoencoder", tmp_path / "run", shards, *SHORT))
    assert files_of(tmp_path / "run") == whole
    assert [folder.name for folder in steps(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize("days", [-1 / 24, 3650])
def test_a_clock_that_jumps_changes_no_byte(
    days: float, whole: dict[str, bytes], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever somebody asks for the time, it is an hour earlier, or ten years later; and summer time begins."""
    real, asked = time.time, 0

    def jumping() -> float:
        nonlocal asked
        asked += 1
        return real() + asked % 20 * days * 86_400

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setenv("TZ", "America/St_Johns")
    time.tzset()
    try:
        run(tiny_config("autoencoder", tmp_path, shards, *SHORT, "keep=1"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert asked > 0 and files_of(tmp_path) == whole
    assert [folder.name for folder in steps(tmp_path / "checkpoints")] == ["step-00000002"]


def test_the_newest_checkpoint_is_that_of_the_last_step_whatever_its_date(
    whole: dict[str, bytes], shards: Path, tmp_path: Path
) -> None:
    config = tiny_config("autoencoder", tmp_path, shards, *SHORT)
    run(config)
    first, second = steps(tmp_path / "checkpoints")
    os.utime(first, (2**31, 2**31))
    os.utime(second, (0, 0))
    assert run(config).step == 2 and files_of(tmp_path) == whole
    run(tiny_config("autoencoder", tmp_path, shards, *SHORT, "samples=24"))
    assert [folder.name for folder in steps(tmp_path / "checkpoints")] == ["step-00000002", "step-00000003"]


def shell(line: str, out: Path, shards: Path, **environment: str) -> int:
    """The exit status of a shell's line in which $TRAIN is the command that trains; nothing else is in its world."""
    config = out.parent / "config.yaml"
    config.write_text(to_yaml(tiny_config("autoencoder", out, shards, *SHORT)), encoding="utf-8")
    root = str(Path(__file__).parents[2])
    world = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    train = f"'{sys.executable}' -m ldm train '{config}'"
    return subprocess.run(
        ["bash", "-c", line.replace("$TRAIN", train)], env=world | environment, timeout=100
    ).returncode


@pytest.mark.slow
def test_a_bare_world_changes_no_byte(whole: dict[str, bytes], shards: Path, tmp_path: Path) -> None:
    """No HOME, no language, another time zone, nothing to read from, and nobody who reads what is said.

    A broken pipe is no failure: the status of the run tells a scheduler whether to start it again.
    """
    line = "set -o pipefail; $TRAIN 2>&1 < /dev/null | true"
    assert shell(line, tmp_path / ODD, shards, LC_ALL="C", TZ="Pacific/Apia") == 0
    assert files_of(tmp_path / ODD) == whole


@pytest.mark.slow
def test_no_output_at_all_changes_no_byte(whole: dict[str, bytes], shards: Path, tmp_path: Path) -> None:
    assert shell("$TRAIN <&- >&- 2>&-", tmp_path / "run", shards) == 0
    assert files_of(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_no_failure(whole: dict[str, bytes], shards: Path, tmp_path: Path) -> None:
    assert shell("$TRAIN > /dev/full 2>&1", tmp_path / "run", shards, HOME="/nowhere") == 0
    assert files_of(tmp_path / "run") == whole


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of 1, 3 and 10 pictures."""
    root = tmp_path_factory.mktemp("few")
    for count in (1, 3, 10):
        build(ShapesSource(ShapesConfig(count=count, seed=1)), BuildConfig(size=32), root / str(count))
    return {count: root / str(count) for count in (1, 3, 10)}


@pytest.mark.parametrize("pictures", [1, 3, 10])
def test_more_workers_than_pictures(pictures: int, few: dict[int, Path], tmp_path: Path) -> None:
    """A global batch of all pictures, five times; validated on as many as there are."""
    words = [f"batch_size={pictures}", f"samples={5 * pictures}", "data.workers=4", "preview_steps=0"]
    state = run(tiny_config("autoencoder", tmp_path, few[pictures], *words))
    assert state.step == 5 and state.samples == 5 * pictures


@pytest.mark.parametrize("pictures", [1, 3, 10])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_few_pictures_cycle(pictures: int, world: int, few: dict[int, Path]) -> None:
    """More processes and places than pictures: each epoch of the global stream has every picture once."""
    data = open_data(DataConfig(str(few[pictures])))
    often = -(-4 // pictures)  # a batch has a place for each of four processes, so an epoch must have four samples
    config = DataConfig(str(few[pictures]), repeats=(float(often),))
    streams = [iter(Loader(data, config, batch_size=4, seed=0, rank=rank, world=world)) for rank in range(world)]
    found = [(p, k) for _ in range(3 * pictures) for stream in streams for b in [next(stream)] for p, k in seen(b)]
    assert [p for p, _ in found] == list(range(12 * pictures))
    every = sorted(data[0].key(i) for i in range(pictures))
    for first in range(0, 12 * pictures, pictures):
        assert sorted(key for _, key in found[first : first + pictures]) == every


def seen(batch: Any) -> list[tuple[int, str]]:
    return list(zip(batch.positions.tolist(), batch.keys, strict=True))


@pytest.mark.parametrize(
    ("pictures", "batch", "world", "reason"),
    [
        (1, 8, 1, "1 samples, fewer than one batch of 8; set batch_size to 1 or less, or add samples"),
        (3, 8, 4, "3 samples, fewer than one batch of 8; set batch_size to 3 or less"),
        (10, 12, 2, "10 samples, fewer than one batch of 12; set batch_size to 10 or less"),
        (3, 3, 2, "batch_size=3 must be a positive multiple of the 2 processes"),
        (1, 1, 4, "batch_size=1 must be a positive multiple of the 4 processes"),
    ],
)
def test_too_few_pictures_are_told_with_the_numbers(
    pictures: int, batch: int, world: int, reason: str, few: dict[int, Path]
) -> None:
    with pytest.raises(ValueError, match=reason):
        Loader(
            open_data(DataConfig(str(few[pictures]))),
            DataConfig(str(few[pictures])),
            batch_size=batch,
            seed=0,
            world=world,
        )

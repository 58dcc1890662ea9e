"""Numbers and previews reach the trackers that are asked for, and no tracker can end a run."""

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.training import run as run_module
from ldm.training.metrics import read_metrics
from ldm.training.run import run
from ldm.training.trackers import start_trackers, stop_trackers, track, track_picture
from tests.conftest import frozen, tiny_config
from tests.training.test_resume import train_in_two_parts


class Tracker:
    """Remembers what it is told, or fails."""

    def __init__(self, name: str, *, fails: bool = False) -> None:
        self.name, self.fails, self.told = name, fails, []

    def _take(self, *what: Any) -> None:
        if self.fails:
            raise ConnectionError("the server is away")
        self.told.append(what)

    def log(self, values: dict, step: int) -> None:
        self._take("log", values, step)

    def log_images(self, values: dict, step: int, **more: Any) -> None:
        self._take("images", values, step, more)

    def store_init_configuration(self, values: dict) -> None:
        self._take("settings", values)

    def finish(self) -> None:
        self._take("finish")


def accelerator(*trackers: Tracker, main: bool = True) -> Any:
    started: list[Any] = []
    return SimpleNamespace(
        trackers=list(trackers),
        is_main_process=main,
        started=started,
        init_trackers=lambda project, init_kwargs: started.append((project, init_kwargs)),
    )


def test_what_trackers_are_told() -> None:
    board, wandb, other = Tracker("tensorboard"), Tracker("wandb"), Tracker("mlflow")
    three = accelerator(board, wandb, other)
    settings = {"lr": 0.1, "on": True, "previews": ("a", "b"), "none": None}
    start_trackers(three, Path("runs/a"), 7, settings)
    project, arguments = three.started[0]
    assert project == "ldm" and arguments["tensorboard"] == {"purge_step": 8}
    assert arguments["wandb"] == {"name": "a", "group": "a", "dir": "runs/a"}
    assert wandb.told[0] == ("settings", {"lr": 0.1, "on": True, "previews": '["a", "b"]', "none": "null"})
    assert "lr: 0.1" in board.told[0][1]["config"]

    track(three, "train", 8, {"loss": 0.5, "keys": ["a"], "reason": "text"})
    assert [t.told[-1] for t in (board, wandb, other)] == [("log", {"train/loss": 0.5}, 8)] * 3

    picture = Image.new("RGB", (3, 2), "red")
    track_picture(three, 9, picture)
    kind, values, step, more = board.told[-1]
    assert (kind, step, more) == ("images", 9, {"dataformats": "NHWC"})
    assert values["preview"].shape == (1, 2, 3, 3) and (values["preview"] == [255, 0, 0]).all()
    assert wandb.told[-1] == ("images", {"preview": [picture]}, 9, {})
    assert other.told[-1][0] == "log"
    stop_trackers(three)
    assert [t.told[-1] for t in (board, wandb, other)] == [("finish",)] * 3


def test_other_processes_tell_nothing_at_the_start() -> None:
    tracker = Tracker("wandb")
    start_trackers(accelerator(tracker, main=False), Path("a"), 0, {"lr": 1.0})
    assert tracker.told == []


def test_a_tracker_that_fails_is_warned_of_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, fine = Tracker("wandb", fails=True), Tracker("mlflow")
    with caplog.at_level(logging.WARNING):
        track(accelerator(broken, fine), "train", 1, {"loss": 1.0})
        track_picture(accelerator(broken), 1, Image.new("RGB", (2, 2)))
        stop_trackers(accelerator(broken, fine))
    assert [what[0] for what in fine.told] == ["log", "finish"]
    assert caplog.messages == ["tracker wandb: the server is away; going on"] * 3


def test_one_that_is_not_installed_is_refused_before_any_work(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "get_available_trackers", lambda: [])
    for name, hint in (("tensorboard", r"pip install 'ldm\[track\]'"), ("mlflow", "install its package")):
        with pytest.raises(ValueError, match=f"trackers: {name} is not installed: {hint}") as error:
            run(tiny_config("autoencoder", tmp_path / "out", shards, f"trackers=[{name}]"))
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord', did you mean 'tensorboard'"):
        tiny_config("autoencoder", tmp_path / "out", shards, "trackers=[tensorbord]")


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install 'ldm[track]'")
def test_tensorboard_holds_what_metrics_jsonl_holds(shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    train_in_two_parts("autoencoder", out, shards, "trackers=[tensorboard]")
    found = EventAccumulator(str(out / "ldm"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    lines = read_metrics(out / "metrics.jsonl")
    for kind, name in (("train", "loss"), ("train", "samples_per_second"), ("validation", "psnr")):
        said = [(e.step, e.value) for e in found.Scalars(f"{kind}/{name}")]
        written = [(line["step"], line[name]) for line in lines if line["kind"] == kind]
        assert [step for step, _ in said] == [step for step, _ in written] and len(said) > 1
        assert all(math.isclose(a, b, rel_tol=1e-5) for (_, a), (_, b) in zip(said, written, strict=True))
    assert [e.step for e in found.Images("preview")] == [2, 4]
    with Image.open(out / "previews" / "step-00000004.png") as picture:
        assert (found.Images("preview")[-1].width, found.Images("preview")[-1].height) == picture.size


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install 'ldm[track]'")
def test_wandb_without_a_network(
    shards: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    run(tiny_config("denoising", out, shards, "trackers=[wandb]", *frozen(models["autoencoder"].parent)))
    (folder,) = (out / "wandb").glob("offline-run-*")
    (records,) = folder.glob("*.wandb")
    data = records.read_bytes()
    assert b"train/loss" in data and b"validation/loss/4" in data
    pictures = list(folder.rglob("*.png"))
    with Image.open(out / "previews" / "step-00000004.png") as expected:
        wanted = np.asarray(expected.convert("RGB"))
    assert any(np.array_equal(np.asarray(Image.open(p).convert("RGB")), wanted) for p in pictures)


def test_one_that_does_not_start_is_one_line() -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module\nnamed 'x'")

    three = accelerator(Tracker("wandb"))
    three.init_trackers = fail
    with pytest.raises(ValueError, match="one does not start \\(No module named 'x'\\); leave it out"):
        start_trackers(three, Path("a"), 0, {})

"""A run that is asked to stop saves first, on all processes after the same step, and its exit status says so."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ldm.checkpoints.files import steps
from ldm.cli.main import application
from ldm.training import run as run_module
from ldm.training import stopping
from ldm.training.stopping import SIGNALS, STOPPED, StopSignal
from tests.training.launch import launch
from tests.training.planted import batches, tiny_run


def folders(out: Path) -> list[str]:
    return [folder.name for folder in steps(out / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_under_way(number: signal.Signals, tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]

    def plant(batch: object, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    state = tiny_run(tmp_path, plant, save_steps=100)
    assert state.stopped and state.step == 3 and folders(tmp_path) == ["step-00000003"]
    assert [signal.getsignal(s) for s in SIGNALS] == before

    def at_once(start: int) -> object:
        os.kill(os.getpid(), number)
        return batches()(start)

    before_bytes = (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").stat().st_mtime_ns
    assert tiny_run(tmp_path, source=at_once).stopped
    after_bytes = (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").stat().st_mtime_ns
    assert after_bytes == before_bytes  # a good checkpoint is never put at risk to write the same again
    state = tiny_run(tmp_path, save_steps=100)
    assert not state.stopped and state.step == 6 and folders(tmp_path) == ["step-00000003", "step-00000006"]


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path: Path) -> None:
    def plant(batch: object, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    state = tiny_run(tmp_path, plant)
    assert not state.stopped and state.step == 6


def hold() -> None:
    stopping.TOGETHER = 0.3
    with StopSignal():
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert process.pid is not None
    time.sleep(0.3)
    for _ in range(3):  # a launcher passes on what a terminal has sent already
        os.kill(process.pid, number)
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.exitcode is None
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number


@pytest.mark.parametrize(("stopped", "status"), [(True, 75), (False, 0)])
def test_the_command_says_by_its_exit_status_whether_to_run_it_again(
    stopped: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    state = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), step=3, stopped=stopped)
    monkeypatch.setattr(run_module, "run", lambda config: state)
    (tmp_path / "c.yaml").write_text("task: {kind: autoencoder}\n")
    words = ["train", str(tmp_path / "c.yaml"), f"out={tmp_path}", "data.path=shards"]
    try:
        assert CliRunner().invoke(application(), words).exit_code == status
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert "75 stopped and saved" in CliRunner().invoke(application(), ["train", "--help"]).stdout


@pytest.mark.slow
def test_one_process_that_is_asked_stops_all_after_the_same_step(tmp_path: Path) -> None:
    ended = launch(tmp_path / "out", "term")
    assert ended.statuses == [STOPPED, STOPPED], ended.said
    assert folders(tmp_path / "out") == ["step-00000002", "step-00000004"]
    assert launch(tmp_path / "out", "none").statuses == [0, 0]
    assert launch(tmp_path / "whole", "none").statuses == [0, 0]
    for name in ("weights", "averages", "optimizer-line"):
        file = f"checkpoints/step-00000006/train/{name}.safetensors"
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

"""One process that dies, stops, hangs or fails takes the others down in time, and is named by them."""

import multiprocessing
import time
from pathlib import Path

import pytest

from ldm.training.state import TrainState
from ldm.training.watch import HUNG, Watch
from tests.training.launch import launch
from tests.training.planted import tiny_run

TIMEOUT = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "statuses", "said"),
    [
        ("kill", [1, -9], r"this run was left by rank 1 \(host .*, process \d+\)"),
        ("raise", [1, 1], r"left by rank 1 .* in a forward pass at step 3: ValueError: planted here"),
        ("stop", [HUNG, None], r"no progress for 3 s; waiting for rank 1 \(host .*, process \d+\), last heard of"),
        ("stuck", [HUNG, HUNG], r"waiting for rank 1 \(.*\), last heard of loading data at step 3$"),
    ],
)
def test_the_others_end_in_time_and_name_it(fault: str, statuses: list[int | None], said: str, tmp_path: Path) -> None:
    import re

    ended = launch(tmp_path / "out", fault, f"timeout_seconds={TIMEOUT}")
    assert ended.statuses == statuses, ended.said
    assert ended.seconds < TIMEOUT + 5
    assert re.search(said, ended.said[0], re.MULTILINE), ended.said[0]
    assert launch(tmp_path / "out", "none", f"timeout_seconds={TIMEOUT}").statuses == [0, 0]  # and it goes on


def hang(out: Path, delay: float, at: int) -> None:
    def plant(batch: object, step: int) -> None:
        if step == at:
            time.sleep(delay)

    tiny_run(out, plant, timeout_seconds=1.0)


@pytest.mark.parametrize(
    ("delay", "at", "status"),
    [(60.0, 2, HUNG), (0.5, 2, 0), (1.4, 0, 0)],  # the first step may take twice as long
)
def test_a_process_by_itself_that_hangs_ends(delay: float, at: int, status: int, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path, delay, at))
    process.start()
    process.join(30)
    assert process.exitcode == status
    assert not (tmp_path / ".ranks").exists()


def test_time_that_passes_while_all_is_suspended_does_not_count(tmp_path: Path) -> None:
    """SIGSTOP for longer than the limit, then SIGCONT: the run goes on and finishes."""
    import os
    import signal

    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path, 0.8, 2))
    process.start()
    assert process.pid is not None
    while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0


def test_progress_in_any_process_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process alone draws previews: the others stand still meanwhile, and that is no reason to end."""
    monkeypatch.setattr(Watch, "_end", lambda self, waited: endings.append(waited))
    for busy in (True, False):
        endings: list[float] = []
        state = TrainState(None, {}, {}, None)  # type: ignore[arg-type]
        state.ranks.count, state.step = 2, 0
        other = Watch(state, tmp_path, 0.3)
        other._pulse, state.ranks.rank = 1, 1
        monkeypatch.setattr(state.ranks, "largest", lambda value: 0)
        other._tell()
        state.ranks.rank = 0
        with Watch(state, tmp_path, 0.3):
            state.ranks.rank = 0
            for mark in range(10):
                time.sleep(0.1)
                if busy:
                    report = other._file(1).read_text().replace('"marks": 0', f'"marks": {mark}')
                    other._file(1).write_text(report if mark == 0 else _marked(report, mark))
        assert bool(endings) is not busy


def _marked(report: str, mark: int) -> str:
    import json

    return json.dumps(json.loads(report) | {"marks": mark, "pulse": mark})

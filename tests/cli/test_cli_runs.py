"""`ldm runs`: what stands in run folders, as text and as JSON."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ldm.cli.main import application
from ldm.training import run as run_module
from ldm.training.run import own_folder, run
from ldm.training.runs import compare, find_runs, read_run, recorded
from tests.conftest import tiny_config


def ldm(*words: str | Path) -> str:
    result = CliRunner().invoke(application(), [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def folder(out: Path, state: str | None = None, steps: int = 10, lr: float = 0.1, loss: float = 1.0) -> Path:
    """A run of 10 steps of 4 samples, which got so far; its loss falls from `loss` in proportion to the samples."""
    out.mkdir(parents=True)
    settings: dict[str, Any] = {"samples": 40, "batch_size": 4, "out": str(out), "task": {"kind": "denoising"}}
    (out / "config.yaml").write_text(json.dumps(settings | {"optimizer": {"lr": lr}}))
    lines = [
        {"step": s, "samples": 4 * s, "kind": kind, "loss": loss * (1 - s / 20) * scale, "samples_per_second": 8.0}
        for s in range(2, steps + 1, 2)
        for kind, scale in (("train", 1.0), ("validation", 0.5))
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / ".lock").touch()
    if state is not None:
        (out / "run.json").write_text(json.dumps({"state": state}))
    return out


def test_the_state_of_a_run(tmp_path: Path) -> None:
    assert read_run(folder(tmp_path / "finished", "finished")).state == "finished"
    assert read_run(folder(tmp_path / "stopped", "stopped", 4)).state == "stopped"
    assert read_run(folder(tmp_path / "killed", "running", 4)).state == "failed"
    assert read_run(folder(tmp_path / "old")).state == "finished"
    assert read_run(folder(tmp_path / "old-stopped", None, 4)).state == "stopped"
    for name in ("running", None):
        out = folder(tmp_path / f"live-{name}", name, 4)
        with (out / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert read_run(out).state == "running"
    (tmp_path / "killed" / "run.json").write_text("{half")
    assert read_run(tmp_path / "killed").state == "stopped"

    found = read_run(tmp_path / "stopped")
    assert (found.task, found.step, found.total_steps, found.samples) == ("denoising", 4, 10, 16)
    assert (found.loss, found.best_name, found.best) == (pytest.approx(0.8), "loss", pytest.approx(0.4))
    assert found.samples_per_second == 8.0 and found.age_seconds < 60
    for file in (tmp_path / "stopped").iterdir():
        os.utime(file, (time.time() - 7200,) * 2)
    assert read_run(tmp_path / "stopped").age_seconds == pytest.approx(7200, abs=60)


def test_a_record_says_how_a_run_ended(tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        return json.loads((tmp_path / "run.json").read_text())

    with recorded(tmp_path, {"a": 1}) as record:
        assert state() == {"a": 1, "state": "running"}
        record["state"] = "stopped"
    assert state() == {"a": 1, "state": "stopped"}
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path, {}):
        raise KeyboardInterrupt
    assert state() == {"state": "failed", "error": "KeyboardInterrupt: "}


def test_listing(tmp_path: Path) -> None:
    folder(tmp_path / "a" / "b" / "one", "finished")
    folder(tmp_path / "two", "stopped", 4)
    (tmp_path / "two" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert [p.name for p in find_runs([tmp_path])] == ["two", "one"]
    head, *rows = ldm("runs", tmp_path).splitlines()
    assert head.split()[:4] == ["run", "task", "state", "step"]
    assert [row.split()[1:8] for row in rows] == [
        ["denoising", "stopped", "4", "10", "0.8", "loss", "0.4"],
        ["denoising", "finished", "10", "10", "0.5", "loss", "0.25"],
    ]
    assert ldm("runs", "list", tmp_path / "two") == ldm("runs", tmp_path / "two")
    assert [r["state"] for r in json.loads(ldm("runs", tmp_path, "--json"))] == ["stopped", "finished"]
    assert ldm("runs", tmp_path / "empty") == "no runs here\n"
    assert "compare" in ldm("runs", "--help")
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        ldm("runs", "nowhere")


def test_comparing_at_equal_samples(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", lr=0.1), folder(tmp_path / "two", steps=8, lr=0.2, loss=3.0)
    found = compare([one, two])
    assert found.settings == {"optimizer.lr": [0.1, 0.2]} and found.unshared == []
    assert list(dict.fromkeys(samples for samples, _ in found.numbers)) == [8, 16, 24, 32]  # of the shorter one
    for samples in (8, 16, 24, 32):
        left = 1 - samples / 80
        assert found.numbers[samples, "train loss"] == pytest.approx([left, 3 * left])
        assert found.numbers[samples, "validation loss"] == pytest.approx([left / 2, 3 * left / 2])
    late = folder(tmp_path / "late")
    lines = (late / "metrics.jsonl").read_text().splitlines()[4:]  # from step 6 on
    (late / "metrics.jsonl").write_text("\n".join(lines))
    assert compare([one, late]).numbers[10, "train loss"] == [pytest.approx(0.875), None]
    text = ldm("runs", "compare", one, two)
    assert "optimizer.lr" in text and "after 32 samples" in text and "1.8" in text
    told = json.loads(ldm("runs", "compare", one, two, "--json"))
    assert told["settings"] == {"optimizer.lr": [0.1, 0.2]} and {"samples", "name", "values"} == set(told["numbers"][0])
    with pytest.raises(ValueError, match="at least two run folders to compare, not 1"):
        ldm("runs", "compare", one)
    with pytest.raises(ValueError, match="is not a run folder"):
        ldm("runs", "compare", one, tmp_path)


def test_a_real_run_is_listed_and_its_report_written_anew(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    run(tiny_config("autoencoder", out, shards))
    found = read_run(out)
    assert (found.state, found.step, found.total_steps, found.best_name) == ("finished", 4, 4, "psnr")
    assert found.loss is not None and found.samples_per_second is not None
    (out / "report.html").unlink()
    assert ldm("runs", "report", out) == f"{out / 'report.html'}\n"
    assert "autoencoder: finished" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match="is not a run folder"):
        ldm("runs", "report", tmp_path)


def test_looking_at_a_run_does_not_keep_it_from_starting(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ldm runs` holds the lock for an instant; a run that comes just then waits a little."""
    config = tiny_config("autoencoder", tmp_path, shards)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        monkeypatch.setattr(run_module.time, "sleep", lambda seconds: fcntl.flock(lock, fcntl.LOCK_UN))
        with own_folder(tmp_path, config, main=True):
            assert (tmp_path / "config.yaml").exists()

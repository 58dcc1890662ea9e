"""N steps, a stop, and N more give the bytes of 2N steps; and the test notices when they would not."""

import json
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.training import state as state_module
from ldm.training.ema import EMA
from ldm.training.metrics import MEASURED
from ldm.training.run import run
from tests.conftest import TINY, frozen, tiny_config


def files_of(out: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint, but the manifest that repeats their hashes."""
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.json", "model.json")  # model.json holds the run's name
    }


def train_in_two_parts(kind: str, out: Path, shards: Path, *more: str) -> None:
    """Two steps, then a second process's worth of two more. The schedule must know the full length at once,
    so the first part is cut short by a stop signal rather than by a smaller `samples`."""
    import os
    import signal

    from ldm.training import engine

    real, calls = engine.update, 0

    def update(*args: object) -> object:
        nonlocal calls
        outcome = real(*args)  # type: ignore[arg-type]
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "update", update)
        assert run(tiny_config(kind, out, shards, "save_steps=100", *more)).step == 2
    assert run(tiny_config(kind, out, shards, "save_steps=100", *more)).step == 4


@pytest.fixture
def more(request: pytest.FixtureRequest, models: dict[str, Path]) -> list[str]:
    """What the kind of task under test needs besides its tiny config."""
    return frozen(models["autoencoder"].parent) if request.getfixturevalue("kind") == "denoising" else []


@pytest.mark.parametrize("kind", TINY)
def test_two_halves_equal_the_whole(kind: str, more: list[str], shards: Path, tmp_path: Path) -> None:
    parts = "task.micro_batch=2" if kind == "contrastive" else "accumulate=2"
    extra = [parts, "data.caption=random", *more]
    if kind == "denoising":
        extra += ["task.diffusion.timesteps=loss_second_moment"]  # which remembers something
    run(tiny_config(kind, tmp_path / "whole", shards, "save_steps=100", *extra))
    train_in_two_parts(kind, tmp_path / "parts", shards, *extra)

    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []

    def numbers(name: str) -> list[dict]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]

    assert numbers("whole") == numbers("parts")


@pytest.mark.parametrize("kind", ["autoencoder"])
@pytest.mark.parametrize("defect", ["optimizer", "average", "weights", "position"])
def test_a_resume_that_forgets_something_is_noticed(
    kind: str, more: list[str], defect: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config(kind, tmp_path / "whole", shards, "save_steps=100"))
    if defect == "optimizer":
        monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)
    elif defect == "average":
        monkeypatch.setattr(EMA, "load", lambda self, average: None)
    elif defect == "weights":
        monkeypatch.setattr(state_module, "load_tensors", lambda module, tensors, source: None)
    else:
        real = state_module.read_json
        monkeypatch.setattr(state_module, "read_json", lambda path: {**real(path), "samples": 8})
    train_in_two_parts(kind, tmp_path / "parts", shards)
    assert files_of(tmp_path / "whole") != files_of(tmp_path / "parts")


def test_workers_change_nothing(shards: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        run(tiny_config("autoencoder", tmp_path / str(workers), shards, f"data.workers={workers}"))
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_a_damaged_checkpoint_is_passed_over(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "whole", shards))
    run(tiny_config("autoencoder", tmp_path / "hurt", shards))
    newest = newest_valid(tmp_path / "hurt" / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"
    file = newest / "train" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    run(tiny_config("autoencoder", tmp_path / "hurt", shards))  # from step 2 again
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "hurt")


def test_what_a_killed_save_left_is_removed(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path, shards))
    for name in (".tmp-step-00000009", ".del-step-00000001"):
        (tmp_path / "checkpoints" / name / "train").mkdir(parents=True)
    assert run(tiny_config("autoencoder", tmp_path, shards)).step == 4
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_average_follows_its_formula(shards: Path, tmp_path: Path) -> None:
    """decay 0 keeps the weights themselves; otherwise min(decay, (1 + n) / (10 + n)) after n updates."""
    module = torch.nn.Linear(1, 1, bias=False)
    values = [3.0, -1.0, 5.0]
    module.weight.data.fill_(2.0)
    ema, expected = EMA(module, 0.15), 2.0
    for n, value in enumerate(values):
        module.weight.data.fill_(value)
        ema.update(n)
        decay = min(0.15, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)

    run(tiny_config("autoencoder", tmp_path / "out", shards, "ema=0"))
    folder = newest_valid(tmp_path / "out" / "checkpoints")
    assert folder is not None
    own, _ = read_tensors(folder / "train" / "weights.safetensors")
    model, _ = read_tensors(folder / "autoencoder.safetensors")
    assert all(torch.equal(own[f"autoencoder.{name}"], value) for name, value in model.items())

"""The loop does what its settings say, and refuses what it cannot do."""

import fcntl
import json
import math
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipeline.loader import DataConfig, fixed_batch
from data_pipeline.reader import ShardReader
from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.training import engine
from ldm.training.denoising import DenoisingTask
from ldm.training.optim import OptimizerConfig, build_optimizer, learning_rate
from ldm.training.randomness import SampleRandomness
from ldm.training.run import RunConfig, build, describe, own_folder, run
from ldm.training.state import TrainState
from tests.conftest import frozen, tiny_config


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    return read_tensors(folder / "train" / "weights.safetensors")[0]


@pytest.mark.parametrize("kind", ["autoencoder", "denoising"])
def test_accumulating_gradients_changes_nothing(
    kind: str, shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    extra = frozen(models["autoencoder"].parent) if kind == "denoising" else []
    for parts in (1, 4):
        run(tiny_config(kind, tmp_path / str(parts), shards, f"accumulate={parts}", *extra))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    trained = [k for k in one if "latent_" not in k]  # running statistics see micro-batches, not batches
    for name in trained:
        torch.testing.assert_close(one[name], four[name], atol=2e-5, rtol=1e-3)


def test_learning_rate_follows_its_formula() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final=0.1)
    rates = [learning_rate(config, step, 104) for step in (0, 1, 3, 4, 54, 104)]
    expected = [0.5, 1.0, 2.0, 2.0, 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))), 0.2]
    assert rates == pytest.approx(expected)
    assert learning_rate(OptimizerConfig(lr=2.0, schedule="constant"), 99, 100) == 2.0


def test_only_matrices_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, plain = build_optimizer(module, OptimizerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and [p.shape for p in decayed["params"]] == [(4, 3)]
    assert plain["weight_decay"] == 0 and len(plain["params"]) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch_size=64"], "has 48 samples, fewer than one batch of 64"),
        (["accumulate=16"], "accumulate=16 needs at least that many"),
        (["data.size=17"], "picture size 17 must be a multiple of the latent factor 2"),
        (["data.path=nowhere"], "nowhere"),
        (["init=nowhere"], "no model at 'nowhere'"),
        (["out="], "out= must name the folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    settings: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_config("autoencoder", tmp_path / "out", shards, *settings))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_one_run_a_folder(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        lock.write("1234 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"in use by another run \(process 1234 on elsewhere\)"):
            run(tiny_config("autoencoder", tmp_path / "out", shards))
    run(tiny_config("autoencoder", tmp_path / "out", shards))  # the lock of a dead process is no lock


def hold(out: Path, config: RunConfig) -> None:
    with own_folder(out, config, main=True):
        (out / "held").touch()
        time.sleep(60)


def test_two_processes_at_once_and_a_killed_one(shards: Path, tmp_path: Path) -> None:
    config = tiny_config("autoencoder", tmp_path, shards)
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, config))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid} on {socket.gethostname()}\)"):
        run(config)
    other.kill()
    other.join()
    assert run(config).step == 4


def test_resuming_with_other_settings(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "out", shards))
    with pytest.raises(ValueError, match=r"other settings \(optimizer.lr was 0.0001, now 0.1\)"):
        run(tiny_config("autoencoder", tmp_path / "out", shards, "optimizer.lr=0.1"))
    state = run(tiny_config("autoencoder", tmp_path / "out", shards, "samples=48", "log_steps=2"))
    assert (state.step, state.samples) == (6, 48)


def test_fine_tuning_starts_from_the_models_weights(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    source = newest_valid(models["autoencoder"] / "checkpoints")
    assert source is not None
    model, _ = read_tensors(source / "autoencoder.safetensors")
    start = ["samples=8", "optimizer.lr=0", f"init={models['autoencoder']}"]  # one step that moves nothing
    run(tiny_config("autoencoder", tmp_path / "tuned", shards, *start))
    tuned = weights(tmp_path / "tuned")
    assert all(torch.equal(tuned[f"autoencoder.{k}"], v) for k, v in model.items() if "latent_" not in k)
    with pytest.raises(ValueError, match="does not fit this model"):
        run(tiny_config("autoencoder", tmp_path / "other", shards, "task.model.channels=16", *start))
    with pytest.raises(ValueError, match="has no autoencoder"):
        run(tiny_config("autoencoder", tmp_path / "no", shards, f"init={models['contrastive']}"))


def test_dry_run_writes_nothing(shards: Path, tmp_path: Path) -> None:
    text = describe(tiny_config("autoencoder", tmp_path / "out", shards))
    assert "autoencoder: 0.0" in text and "TFLOP in all" in text and "batch_size: 8" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a weight", "an average"])
def test_what_is_not_finite_is_never_saved(
    what: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.update

    def poisoned(state: TrainState, *rest: Any) -> Any:
        outcome = real(state, *rest)
        if state.step == 2:
            average = next(iter(state.emas["autoencoder"].average.values()))
            (average if what == "an average" else next(state.task.parameters()).data).fill_(math.nan)
        return outcome

    monkeypatch.setattr(engine, "update", poisoned)
    with pytest.raises(RuntimeError, match=f"not saving step 3: {what} is NaN or infinite; the last .*step-00000002"):
        run(tiny_config("autoencoder", tmp_path / "out", shards, "save_steps=1"))
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "out").values())


def test_bf16_trains_on_a_cpu(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "half", shards, "precision=bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    run(tiny_config("autoencoder", tmp_path / "full", shards))
    half, full = weights(tmp_path / "half"), weights(tmp_path / "full")
    assert all(v.dtype == torch.float32 for v in half.values())
    assert any(not torch.equal(half[k], full[k]) for k in full)
    assert max((half[k] - full[k]).abs().max().item() for k in full if "latent_" not in k) < 1e-2


def test_a_samples_randomness_is_its_own() -> None:
    together = SampleRandomness(3, torch.tensor([5, 9, 11]))
    alone = SampleRandomness(3, torch.tensor([9]))
    assert torch.equal(together.normal("noise", (2, 2))[1], alone.normal("noise", (2, 2))[0])
    assert torch.equal(together.uniform("t")[1], alone.uniform("t")[0])
    assert not torch.equal(alone.normal("noise", (2, 2)), alone.normal("posterior", (2, 2)))
    many = SampleRandomness(0, torch.arange(4000))
    assert many.uniform("t").mean().item() == pytest.approx(0.5, abs=0.02)
    assert many.normal("noise", (4,)).std().item() == pytest.approx(1, abs=0.02)


def test_captions_are_dropped_at_their_rate(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    extra = frozen(models["autoencoder"].parent)
    config = tiny_config("denoising", tmp_path, shards, "task.dropout=0.25", "task.null_prompt=nothing", *extra)
    _, task = build(config)
    assert isinstance(task, DenoisingTask)
    heard: list[str] = []
    task.text.register_forward_hook(lambda module, args, out: heard.extend(args[0]))
    batch = fixed_batch(ShardReader(shards), DataConfig(str(shards), size=16), 48)
    for start in range(0, 960, 48):
        moved = batch.__class__(batch.image, batch.captions, batch.positions + start, batch.keys)
        next(task.losses(moved, 0))
    assert heard.count("nothing") / len(heard) == pytest.approx(0.25, abs=0.05)
    heard.clear()
    task.validate(batch)
    assert heard == batch.captions
    assert task.settings()["null_prompt"] == "nothing" and task.settings()["caption_dropout"] == 0.25


def test_validation_does_not_depend_on_the_batch_size(shards: Path, tmp_path: Path) -> None:
    numbers = []
    for size in (8, 16):
        out = tmp_path / str(size)
        run(tiny_config("autoencoder", out, shards, f"batch_size={size}", f"samples={size}", "optimizer.lr=0"))
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        numbers.append(next(line["psnr"] for line in lines if line["kind"] == "validation"))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)


def test_latents_are_normalised_by_training(shards: Path, tmp_path: Path) -> None:
    config = tiny_config("autoencoder", tmp_path / "out", shards, "samples=400", "optimizer.lr=0", "task.kl_weight=0")
    task = run(config).task
    model = task.components()["autoencoder"]
    batch = fixed_batch(ShardReader(shards), DataConfig(str(shards), size=16), 48)
    noise = SampleRandomness(0, batch.positions).normal("posterior", (2, 8, 8))
    with torch.no_grad():
        latent = model.encode(batch.image, noise)
    assert latent.mean((0, 2, 3)).abs().max() < 0.1 and (latent.std((0, 2, 3)) - 1).abs().max() < 0.1

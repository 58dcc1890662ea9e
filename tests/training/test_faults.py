"""Losses that are not finite, and disks that fail: nothing that was learnt is lost, and it is said what happened."""

import errno
import json
import logging
import math
import multiprocessing
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_pipeline.loader import DataConfig, fixed_batch, open_data
from ldm.checkpoints import files
from ldm.checkpoints.files import newest_valid, read_tensors, steps
from ldm.training import engine
from ldm.training import state as state_module
from ldm.training.engine import TrainConfig, prepare, update
from ldm.training.faults import Outcome, Skips
from ldm.training.importance import BUCKETS, LossSecondMoment
from ldm.training.metrics import Means
from ldm.training.optim import KINDS, OptimizerConfig
from ldm.training.ranks import Ranks
from ldm.training.run import build
from ldm.training.state import TrainState
from tests.conftest import frozen, tiny_config
from tests.training.launch import launch
from tests.training.planted import TinyTask, batches, tiny_run


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def poison(*when: int) -> Callable[[Any, int], None]:
    """The third sample of those steps becomes NaN."""

    def plant(batch: Any, step: int) -> None:
        if step in when and len(batch) > 2:
            batch.image[2, 0] = math.nan

    return plant


def remembered(state: TrainState) -> list[Tensor]:
    """Copies of all that a step may change."""
    tensors = [*state.task.state_dict().values(), *(a for e in state.emas.values() for a in e.average.values())]
    for optimizer in state.optimizers.values():
        tensors += [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [tensor.clone() for tensor in tensors]


def prepared(plant: Any = None, kind: str = "adamw", accumulate: int = 1) -> tuple[TrainState, TrainConfig]:
    optimizer = OptimizerConfig(kind=kind, lr=1.0 if kind == "prodigy" else 0.01)
    config = TrainConfig(batch_size=8, accumulate=accumulate, ema=0.5, ema_decays=(0.9,), optimizer=optimizer)
    return prepare(TinyTask(plant), config, Accelerator(cpu=True)), config


def do_step(state: TrainState, config: TrainConfig, batch: Any) -> Outcome:
    outcome = update(state, batch, config, Means())
    for ema in state.emas.values():
        ema.update(state.step, outcome.skipped)
    state.step += 1
    return outcome


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw8bit"])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_changes_nothing(kind: str, first: bool) -> None:
    """Not the weights, the optimizer, the averages or running statistics; and the next step is as if it never was."""
    stream = batches()(0)
    good, bad = [next(stream) for _ in range(4)], next(stream)
    bad.image[3, 1] = math.inf
    skipping, config = prepared(kind=kind)
    straight, _ = prepared(kind=kind)
    for batch in good[: 0 if first else 3]:
        assert not do_step(skipping, config, batch).skipped and not do_step(straight, config, batch).skipped
    before = remembered(skipping)
    outcome = do_step(skipping, config, bad)
    assert outcome.skipped and not outcome.finite and outcome.keys == [bad.keys]
    if not first:  # the first step makes an optimizer's state, at zero
        assert all(torch.equal(a, b) for a, b in zip(before, remembered(skipping), strict=True))
    skipping.step -= 1
    assert not do_step(skipping, config, good[3]).skipped and not do_step(straight, config, good[3]).skipped
    assert all(torch.equal(a, b) for a, b in zip(remembered(straight), remembered(skipping), strict=True))


def test_only_the_micro_batch_whose_loss_is_not_finite_is_blamed() -> None:
    state, config = prepared(poison(0), accumulate=2)
    batch = next(batches()(0))
    outcome = do_step(state, config, batch)
    assert outcome.skipped and outcome.keys == [batch.keys[:4], batch.keys[4:]]
    assert outcome.finite.tolist() == [False, False]  # both were poisoned, at their third sample
    batch = next(batches()(0))
    batch.image[6, 0] = math.nan
    state.step = 1
    assert do_step(state, config, batch).finite.tolist() == [True, False]


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too(caplog: pytest.LogCaptureFixture) -> None:
    state, config = prepared()
    state.task.line.layer.bias.register_hook(lambda gradient: gradient * math.inf)
    before = remembered(state)
    outcome = do_step(state, config, next(batches()(0)))
    assert outcome.skipped and outcome.finite.all()
    assert all(torch.equal(a, b) for a, b in zip(before, remembered(state), strict=False))


def test_a_loss_that_is_not_finite_over_a_finite_gradient_is_skipped_too() -> None:
    state, config = prepared()
    state.task.offset = math.inf
    outcome = do_step(state, config, next(batches()(0)))
    assert outcome.skipped and not outcome.finite.any()


def test_the_run_goes_on_after_a_skipped_step_and_names_the_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        state = tiny_run(tmp_path, poison(1, 4), log_steps=3, save_steps=6)
    assert (state.step, state.samples) == (6, 48)
    found = [(line["step"], line["samples"], line["keys"]) for line in lines(tmp_path, "skipped")]
    assert found == [(2, 16, [f"s{i}" for i in range(8, 16)]), (5, 40, [f"s{i}" for i in range(32, 40)])]
    assert "step 2 was skipped, as the loss is not finite, of some of 8 samples: s8, s9" in caplog.text
    for line in lines(tmp_path, "train"):
        assert all(math.isfinite(v) for v in line.values() if not isinstance(v, str))


def test_too_many_skips_in_a_row_end_the_run_and_some_do_not(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "some", poison(0, 1, 3, 5), max_skips=3).step == 6
    with pytest.raises(RuntimeError, match=r"the last 3 steps were skipped.*checkpoint.*optimizer.lr.*bf16"):
        tiny_run(tmp_path / "all", poison(*range(2, 100)), max_skips=3, samples=800, log_steps=0, save_steps=2)
    assert [folder.name for folder in steps(tmp_path / "all" / "checkpoints")] == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in lines(tmp_path / "all", "skipped")] == [3, 4, 5]


def test_a_scaler_that_looks_for_its_scale_makes_no_fault() -> None:
    """fp16: gradients that overflow are skipped by the scaler; a loss that is not finite is a fault all the same."""
    flag, ranks = torch.tensor, Ranks()
    skips = Skips(2, scaled=True)
    for step in range(5):
        skips.note(step, Outcome(flag(True), flag([True]), [["a"]]))
    assert skips.full and skips.look(ranks) == {} and skips.streak == 0
    skips.note(5, Outcome(flag(True), flag([True, False]), [["a"], ["b"]]))
    skips.note(6, Outcome(flag(False), flag([True, True]), [["c"], ["d"]]))
    assert skips.look(ranks) == {5: ["b"]} and skips.streak == 0
    plain = Skips(2, scaled=False)
    plain.note(0, Outcome(flag(True), flag([True]), [["a"]]))
    assert plain.look(ranks) == {0: []} and plain.streak == 1
    plain.check()
    plain.note(1, Outcome(flag(True), flag([True]), [["a"]]))
    plain.look(ranks)
    with pytest.raises(RuntimeError, match="the last 2 steps"):
        plain.check()


def test_importance_forgets_losses_that_are_not_finite() -> None:
    clean, hurt = LossSecondMoment(), LossSecondMoment()
    at = (torch.arange(BUCKETS, dtype=torch.float64) + 0.5) / BUCKETS
    for sampler in (clean, hurt):
        sampler.draw(at, 0)
        sampler.learn(at, 1 + at)
    hurt.learn(at[:3], torch.tensor([math.nan, math.inf, -math.inf]))
    for a, b in zip(clean.draw(at, 1), hurt.draw(at, 1), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(clean.seen, hurt.seen) and torch.equal(clean.moment, hurt.moment)


@pytest.mark.slow
def test_all_processes_skip_together(tmp_path: Path) -> None:
    ended = launch(tmp_path / "out", "nan", "save_steps=1")
    assert ended.statuses == [0, 0], ended.said
    assert [(line["step"], line["keys"]) for line in lines(tmp_path / "out", "skipped")] == [
        (4, ["s28", "s29", "s30", "s31"])
    ]
    before, after = (
        {
            path.name: read_tensors(path)[0]
            for path in (tmp_path / "out" / "checkpoints" / f"step-{step:08d}" / "train").glob("*.safetensors")
        }
        for step in (5, 6)
    )
    assert before.keys() == after.keys() and all(t.isfinite().all() for part in after.values() for t in part.values())


class Disk:
    """Lets the n-th saves fail, halfway."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
        self.saves, self.failing, self.real = 0, failing, state_module.save_tensors
        monkeypatch.setattr(state_module, "save_tensors", self)

    def __call__(self, path: Path, *rest: Any) -> None:
        self.saves += path.name == "weights.safetensors"
        if self.saves in self.failing and path.name == "averages.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(path, *rest)


def test_a_save_that_fails_is_borne(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Disk(monkeypatch, 2, 3, 5)
    state = tiny_run(tmp_path, save_steps=1, keep=9)
    assert state.step == 6
    assert [p.name[-1] for p in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "4", "6"]  # no staged files
    assert [line["step"] for line in lines(tmp_path, "failed save")] == [2, 3, 5]
    assert "step 2 could not be saved: [Errno 28] No space left on device; going on" in caplog.text


def test_the_third_save_in_a_row_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"step 4 could not be saved.*\(3 times in a row\).*last.*step-00000001"):
        tiny_run(tmp_path, save_steps=1)
    assert disk.saves == 4 and newest_valid(tmp_path / "checkpoints") is not None


def test_the_last_save_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, 2)
    with pytest.raises(RuntimeError, match=r"step 6 could not be saved: .*; the last checkpoint is .*step-00000004"):
        tiny_run(tmp_path, save_steps=4)
    Disk(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="there is no checkpoint yet"):
        tiny_run(tmp_path / "other", save_steps=6)


def with_small_files(out: Path, limit: int) -> None:
    def plant(batch: Any, step: int) -> None:
        soft = limit if 2 <= step < 4 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    tiny_run(out, plant, save_steps=1, keep=9)


@pytest.mark.parametrize(("limit", "kept"), [(150, "1256"), (600, "1256")])
def test_a_file_system_that_refuses(limit: int, kept: str, tmp_path: Path) -> None:
    """A limit that the kernel holds writes to, instead of a planted error: in JSON, in tensors, and in the metrics."""
    process = multiprocessing.get_context("fork").Process(target=with_small_files, args=(tmp_path, limit))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "".join(p.name[-1] for p in sorted((tmp_path / "checkpoints").iterdir())) == kept
    for folder in steps(tmp_path / "checkpoints"):
        files.verify(folder)


def test_a_run_does_without_what_it_can_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def small(*_: Any) -> None:
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(engine, "save_snapshot", full)
    monkeypatch.setattr(engine, "preview", small)
    monkeypatch.setattr(engine.MetricsFile, "write", full)
    assert tiny_run(tmp_path, snapshot_steps=3, preview_steps=3).step == 6
    for text in ("no snapshot: [Errno 28]", "no preview: the GPU is full", "no line of metrics: [Errno 28]"):
        assert text in caplog.text
    assert newest_valid(tmp_path / "checkpoints") is not None


def test_a_resume_that_lacks_something_says_so(tmp_path: Path) -> None:
    state = tiny_run(tmp_path)
    state.accelerator = SimpleNamespace(scaler=object(), is_main_process=True)
    with pytest.raises(ValueError, match="was not trained with precision=fp16"):
        state.resume(tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/train/weights.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        tiny_run(tmp_path)


HOST = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Waiting(TorchFunctionMode):
    """Notes where the host reads a tensor, which on a GPU would wait for all work under way.

    Random numbers are drawn on the host; what they are is no secret to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in HOST:
            frames = [f for f in traceback.extract_stack()[:-1] if "site-packages" not in f.filename]
            if not frames[-1].filename.endswith("randomness.py"):
                self.found.append(f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")
        return function(*args, **(kwargs or {}))


def test_codes_that_are_running_means_survive_a_skipped_step(shards: Path, tmp_path: Path) -> None:
    config = tiny_config("autoencoder", tmp_path, shards, "task.codebook.entries=16", "task.codebook.decay=0.9")
    state = prepare(build(config)[1], config, Accelerator(cpu=True))
    batch = fixed_batch(open_data(config.data), DataConfig(str(shards), size=16), 8)
    do_step(state, config, batch)
    before = remembered(state)
    batch.image[0] = math.nan
    assert do_step(state, config, batch).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, remembered(state), strict=True))


@pytest.mark.parametrize("kind", ["autoencoder", "denoising"])
def test_no_step_waits_for_the_device(kind: str, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    extra = frozen(models["autoencoder"].parent) if kind == "denoising" else []
    extra += ["task.diffusion.timesteps=loss_second_moment"] if kind == "denoising" else []
    config = tiny_config(kind, tmp_path, shards, "accumulate=2", "ema_decays=[0.9]", "snapshot_steps=2", *extra)
    _, task = build(config)
    state = prepare(task, config, Accelerator(cpu=True))
    batch = fixed_batch(open_data(config.data), DataConfig(str(shards), size=16), 8)
    do_step(state, config, batch)  # what is done once
    with Waiting() as waiting:
        do_step(state, config, batch)
    assert waiting.found == []


@pytest.mark.parametrize("read", [float, bool, Tensor.item, Tensor.tolist, Tensor.cpu, torch.nonzero])
def test_the_last_test_would_notice(read: Callable[[Tensor], object]) -> None:
    state, config = prepared(lambda batch, step: read(batch.image.sum()))
    with Waiting() as waiting:
        do_step(state, config, next(batches()(0)))
    assert waiting.found and "read(batch.image.sum())" in waiting.found[0]

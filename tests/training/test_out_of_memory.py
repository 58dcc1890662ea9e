"""Out of memory, all processes halve their micro-batches, and the gradient is what it was."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data_pipeline.batch import Batch
from ldm.checkpoints.files import read_tensors
from ldm.training import microbatch
from ldm.training.engine import TrainConfig, prepare, update
from ldm.training.metrics import Means
from ldm.training.microbatch import gradients
from ldm.training.run import run
from ldm.training.state import TrainState
from tests.conftest import tiny_config
from tests.training.launch import launch
from tests.training.planted import TinyTask, batches, tiny_run


def small(most: int, when: Callable[[], bool] = lambda: True) -> Callable[[Batch, int], None]:
    """Memory for so many samples."""

    def plant(batch: Batch, step: int) -> None:
        if len(batch) > most and when():
            raise torch.OutOfMemoryError("planted")

    return plant


def prepared(plant: Any = None, dropout: float = 0.0) -> TrainState:
    return prepare(TinyTask(plant, dropout), TrainConfig(batch_size=8), Accelerator(cpu=True))


def found(state: TrainState, batch: Batch) -> list[Tensor]:
    """The gradients of a step, and the running statistics after it."""
    before = [(buffer, buffer.clone()) for buffer in state.changing()]
    finite, measured = gradients(state, batch, 0, lambda: [b.copy_(value) for b, value in before])
    assert finite.all() and len(finite) == state.accumulate == len(measured)
    return [p.grad.clone() for p in state.task.parameters()]


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize(("most", "parts"), [(8, 1), (7, 2), (4, 2), (2, 4), (1, 8)])
def test_halving_leaves_the_gradient_as_it_was(
    most: int, parts: int, tried: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(microbatch, "tried", lambda state: tried)
    batch = next(batches()(0))
    whole, split = prepared(), prepared(small(most))
    expected = found(whole, batch)
    with caplog.at_level(logging.WARNING):
        for mine, theirs in zip(expected, found(split, batch), strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=0)
    assert split.accumulate == parts
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"out of memory at step 0: going on with {2**k} micro-batches" for k in range(1, parts.bit_length())
    ]


def test_micro_batches_of_different_sizes_count_by_their_samples() -> None:
    batch, whole, split = next(batches()(0)), prepared(), prepared()
    split.accumulate = 3  # 2, 3 and 3 samples
    for mine, theirs in zip(found(whole, batch), found(split, batch), strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=0)


def test_memory_that_runs_out_halfway_leaves_no_half_gradient() -> None:
    """The second micro-batch fails when the first has left its gradient, its statistics and its random numbers."""
    calls = 0

    def second(batch: Batch, step: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("planted")

    batch = next(batches()(0))
    hurt, plain = prepared(second, dropout=0.5), prepared(dropout=0.5)
    hurt.accumulate, plain.accumulate = 2, 4
    means, expected = Means(), Means()
    config = TrainConfig(batch_size=8)
    update(hurt, batch, config, means), update(plain, batch, config, expected)
    for mine, theirs in zip(hurt.task.state_dict().values(), plain.task.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert means.pop() == expected.pop() and hurt.accumulate == 4


def test_where_halving_does_not_help_it_is_said() -> None:
    state = prepared(small(0))
    with pytest.raises(RuntimeError, match=r"out of memory with one sample in a micro-batch; use speed.checkpointing"):
        found(state, next(batches()(0)))
    assert state.accumulate == 8
    state = prepared(small(4))
    state.task.whole = True
    with pytest.raises(RuntimeError, match=r"out of memory at step 0; start again with task.micro_batch"):
        found(state, next(batches()(0)))


def test_a_trial_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a run whose batches were tried before, dropout and running statistics included."""
    trials = 0
    real = microbatch._fits

    def fits(*args: Any) -> bool:
        nonlocal trials
        trials += 1
        return real(*args)

    monkeypatch.setattr(microbatch, "_fits", fits)
    for tried in (False, True):
        monkeypatch.setattr(microbatch, "tried", lambda state, tried=tried: tried)
        tiny_run(tmp_path / str(tried), save_steps=1, accumulate=2, keep=6)
        assert trials == (1 if tried else 0)  # once a shape
    for step in range(1, 7):
        one, other = (tmp_path / str(tried) / "checkpoints" / f"step-{step:08d}" / "train" for tried in (False, True))
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
        assert all((other / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


@pytest.mark.parametrize(
    "extra",
    [
        ["task.codebook.entries=16", "task.codebook.decay=0.9"],
        ["task.adversary.weight=0.5", "task.adversary.lecam=0.1", "task.adversary.model={channels: 8, layers: 1}"],
    ],
)
def test_a_trial_of_an_autoencoder_leaves_no_trace(
    extra: list[str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are running means, and an adversary with its own."""
    if "adversary" in extra[0]:
        extra = [*extra, "task.adversary.model.norm_groups=4"]
    for tried in (False, True):
        monkeypatch.setattr(microbatch, "tried", lambda state, tried=tried: tried)
        run(tiny_config("autoencoder", tmp_path / str(tried), shards, "samples=16", *extra))
    one, other = (tmp_path / str(tried) / "checkpoints" / "step-00000002" / "train" for tried in (False, True))
    assert len(list(one.iterdir())) >= 4
    assert [p.name for p in one.iterdir() if (other / p.name).read_bytes() != p.read_bytes()] == []


def test_every_new_shape_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "tried", lambda state: True)
    state = prepared()
    seen: list[tuple[int, ...]] = []
    state.task.plant = lambda batch, step: seen.append(tuple(batch.image.shape))
    batch = next(batches()(0))
    other = Batch(batch.image.reshape(8, 3, 4, 1), batch.captions, batch.positions, batch.keys)
    for b in (batch, other, batch, other):
        update(state, b, TrainConfig(batch_size=8), Means())
    assert seen == [(8, 3, 2, 2)] * 2 + [(8, 3, 4, 1)] * 2 + [(8, 3, 2, 2), (8, 3, 4, 1)]


def test_a_trial_holds_the_place_of_the_optimizers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers a parameter, until the optimizer has its own."""
    monkeypatch.setattr(microbatch, "tried", lambda state: True)
    real, taken = torch.empty_like, 0

    def empty_like(tensor: Tensor, **words: Any) -> Tensor:
        nonlocal taken
        taken += tensor.numel()
        return real(tensor, **words)

    state, batch = prepared(), next(batches()(0))
    monkeypatch.setattr(torch, "empty_like", empty_like)
    assert microbatch._fits(state, batch, 0, lambda: None)
    assert taken == 2 * sum(p.numel() for p in state.task.parameters())
    update(state, batch, TrainConfig(batch_size=8), Means())
    taken = 0
    assert microbatch._fits(state, batch, 0, lambda: None) and taken == 0


@pytest.mark.slow
def test_all_processes_halve_together(tmp_path: Path) -> None:
    """Only rank 1 lacks memory; one step of SGD at rate 1 shows the gradient."""
    for most in (9, 1):
        ended = launch(tmp_path / str(most), f"memory:{most}", "samples=8", "save_steps=1")
        assert ended.statuses == [0, 0], ended.said
        assert ("going on with 4 micro-batches" in ended.said[0]) is (most == 1)
    plain, split = (
        read_tensors(tmp_path / str(most) / "checkpoints" / "step-00000001" / "train" / "weights.safetensors")[0]
        for most in (9, 1)
    )
    start = TinyTask().state_dict()
    for name, value in plain.items():
        if "mean" not in name:  # running statistics see micro-batches
            assert (value - start[name]).abs().max() > 1e-3
            torch.testing.assert_close(split[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_memory_that_runs_out_later_names_the_process(tmp_path: Path) -> None:
    ended = launch(tmp_path / "out", "late memory", "timeout_seconds=60")
    assert ended.statuses == [1, 1]
    assert "is out of memory at step 3; start again with accumulate=2 (planted)" in ended.said[1]
    assert "left by rank 1" in ended.said[0]

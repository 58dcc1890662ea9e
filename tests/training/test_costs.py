"""What a dry run says of arithmetic, memory and disk, against closed forms and against real runs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.loader import open_data
from ldm.checkpoints.files import newest_valid
from ldm.training.costs import Trial, checkpoint_bytes, estimate, memory_bytes, optimizer_bytes, summarise
from ldm.training.engine import TrainConfig
from ldm.training.memory import SpeedConfig
from ldm.training.optim import KINDS, OptimizerConfig, build_optimizer
from ldm.training.run import build, describe, run
from ldm.training.tasks import Metrics, Task
from tests.conftest import TINY, frozen, tiny_config

IN, HIDDEN, OUT = 768, 40, 5
"""Of the small network: pictures of 16 x 16 px go in."""


class SmallTask(Task):
    """Two linear layers without biases, and a frozen one; the second yields only late in the run."""

    trained = ("net", "late")

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, OUT, bias=False))
        self.late = nn.Linear(OUT, OUT, bias=False)
        self.frozen = nn.Linear(10, 10, bias=False).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        self.seen += 1
        out = self.net(batch.image.flatten(1))
        yield "net", out.square().mean(), {}
        if step >= 10:
            yield "late", self.late(out.detach()).square().mean(), {}

    def components(self) -> dict[str, nn.Module]:
        return {"net": self.net, "frozen": self.frozen}


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**{"samples": 120, "batch_size": 12, **changes})  # type: ignore[arg-type]


@pytest.fixture
def data(shards: Path) -> DataConfig:
    return DataConfig(str(shards), size=16)


def test_a_pass_costs_what_its_layers_cost(data: DataConfig) -> None:
    task = SmallTask()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    trial = Trial(task, open_data(data), config(), data)
    # forward, gradient of the weights, gradient of the input (not of the pictures); 2 FLOP a multiply-add
    flop = trial.flop()
    assert flop == 2 * (2 * IN * HIDDEN + 3 * HIDDEN * OUT + 2 * OUT * OUT)
    # for the backward pass: the pictures, what ReLU put out, and the output
    assert trial.saved_bytes() == 4 * (IN + HIDDEN + OUT)
    assert 0 < trial.seconds() < 10
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())

    summary = summarise(task, open_data(data), config(), data)
    assert summary.parameters == {"net": HIDDEN * (IN + OUT), "frozen": 100}
    assert summary.trained == HIDDEN * (IN + OUT) + OUT * OUT
    assert summary.flop == 120 * flop and (summary.data_samples, summary.epochs) == (48, 2.5)


@pytest.mark.parametrize(
    "kind",
    [dict(kind=kind, lr=1.0) for kind in KINDS if kind != "adamw8bit"] + [dict(kind="sgd", betas=(0.0, 0.9))],
    ids=str,
)
def test_an_optimizer_keeps_what_is_said(kind: dict) -> None:
    settings = OptimizerConfig(**kind)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 50))
    optimizer = build_optimizer(module, settings)
    module(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    kept = sum(t.numel() * t.element_size() for t in tensors)
    assert optimizer_bytes(list(module.parameters()), settings) == kept


def test_memory_by_what_it_is() -> None:
    task, trained = SmallTask(), HIDDEN * (IN + OUT) + OUT * OUT
    plain = memory_bytes(task, config())
    assert plain == {
        "weights": 4 * (trained + 100),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "averages": 4 * trained,
    }
    more = memory_bytes(task, config(precision="bf16", ema_decays=(0.9, 0.99), snapshot_steps=5))
    assert more["averages"] == 4 * trained * 5  # and two sigmas
    assert more["16-bit copies of trained weights"] == 2 * trained
    eight = memory_bytes(task, config(optimizer=OptimizerConfig(kind="adamw8bit")))
    assert eight["optimizer"] == 2 * trained


def test_the_text_of_a_dry_run(data: DataConfig) -> None:
    task, flop = SmallTask(), 2 * (2 * IN * HIDDEN + 3 * HIDDEN * OUT + 2 * OUT * OUT)
    text = estimate(task, open_data(data), config(accumulate=3), data, tflops=flop * 120 / 90 / 1e12)
    assert "time: 1:30 at" in text and "as given" in text
    assert "activations of 4 samples 12.7 KiB" in text  # 4 * 4 * 813 bytes
    assert "48 samples in" in text and "2.5 epochs" in text and "16 bits" not in text
    measured = estimate(task, open_data(data), config(precision="bf16"), data, tflops=0.0)
    assert "as this CPU has just done" in measured and "16 bits" in measured
    snapshots = estimate(task, open_data(data), config(snapshot_steps=3), data, tflops=1.0)
    assert "and 4 snapshots" in snapshots  # of 10 steps: 3, 6, 9, and the last


def test_a_known_gpu_is_reckoned_with_a_share_of_its_peak(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    task = SmallTask()
    text = estimate(task, open_data(data), config(precision="bf16"), data, tflops=0.0)
    assert "at 346 TFLOP/s, 35% of the peak of NVIDIA H200" in text
    text = estimate(task, open_data(data), config(speed=SpeedConfig(tf32=True)), data, tflops=0.0)
    assert "at 173 TFLOP/s" in text


@pytest.mark.parametrize("kind", TINY)
def test_checkpoints_are_as_large_as_said(kind: str, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    extra = frozen(models["autoencoder"].parent) if kind == "denoising" else []
    settings = tiny_config(kind, tmp_path / "out", shards, "ema_decays=[0.9]", *extra)
    _, task = build(settings)
    run(settings)
    folder = newest_valid(tmp_path / "out" / "checkpoints")
    assert folder is not None
    tensors = [file for file in folder.rglob("*.safetensors")]
    header = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in tensors)
    size = sum(file.stat().st_size for file in tensors) - header
    assert size == pytest.approx(checkpoint_bytes(task, settings), rel=0.02)


def test_checkpointing_saves_activations_and_is_no_useful_work(
    shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    extra = frozen(models["autoencoder"].parent)
    said = {}
    for on in ("false", "true"):
        text = describe(tiny_config("denoising", tmp_path / "out", shards, f"speed.checkpointing={on}", *extra), 1.0)
        activations = re.search(r"activations of 8 samples ([\d.]+) (KiB|MiB)", text)
        assert activations is not None
        said[on] = float(activations[1]) * {"KiB": 1, "MiB": 1024}[activations[2]]
        said[f"flop {on}"] = re.search(r"([\d.]+) GFLOP a sample", text)[1]  # type: ignore[index]
    assert said["true"] < 0.7 * said["false"]
    assert said["flop true"] == said["flop false"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more", [[], ["task.codebook={entries: 16, decay: 0.9, restart: 0.5}"], ["task.adversary.weight=0.5"]], ids=str
)
def test_a_trial_changes_nothing(more: list[str], shards: Path, tmp_path: Path) -> None:
    extra = ["task.perceptual=random", "task.adversary.model={channels: 8, layers: 1, norm_groups: 4}", *more]
    settings = tiny_config("autoencoder", tmp_path, shards, *extra)
    data, task = build(settings)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    trial = Trial(task, data, settings, settings.data)
    assert trial.flop() > 0 and trial.saved_bytes() > 0
    assert [name for name, tensor in task.state_dict().items() if not torch.equal(before[name], tensor)] == []
    assert all(p.grad is None for p in task.parameters())

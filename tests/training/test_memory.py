"""What makes a run faster or smaller leaves what it computes as it was, and is refused where it cannot work."""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.files import newest_valid
from ldm.checkpoints.load import load_model
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.training.engine import TrainConfig, prepare, update
from ldm.training.memory import (
    SDPA,
    SpeedConfig,
    check_device,
    checkpoint_blocks,
    compile_forward,
    compute_in,
    sdpa_order,
)
from ldm.training.metrics import Means
from ldm.training.onednn import TrainedOneDNNLinear, train_by_onednn
from ldm.training.optim import OptimizerConfig
from ldm.training.run import run
from ldm.training.tasks import Metrics, Task, freeze
from ldm.types import Conditioning
from tests.conftest import frozen, tiny_config
from tests.training.test_resume import files_of, train_in_two_parts

CPU = torch.device("cpu")
UNET = UNetConfig(
    in_channels=2, out_channels=2, channels=16, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=16, heads=2,
    norm_groups=4, residual_resample=True,
)  # fmt: skip
DIT = DiTConfig(in_channels=2, out_channels=2, width=32, depth=2, heads=2, classes=0, context_dim=16)
MMDIT = MMDiTConfig(
    in_channels=2, out_channels=2, width=32, depth=2, heads=2, context_dim=16, pooled_dim=8, base_size=4, max_size=8
)
BLOCKS = {"unet": 10, "dit": 2, "mmdit": 2, "autoencoder": 12}


def made(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A small model in training mode whose every weight counts, and what it is called with."""
    torch.manual_seed(0)
    model: nn.Module
    cond = Conditioning(context=torch.randn(2, 5, 16), pooled=torch.randn(2, 8))
    inputs: tuple[Any, ...] = (torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0]), cond)
    if name == "autoencoder":
        model = AutoencoderKL(AutoencoderConfig(channels=8, multipliers=(1, 2), blocks=1, norm_groups=4))
        inputs = (torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8))
    else:
        model = {"unet": lambda: UNet(UNET), "dit": lambda: DiT(DIT), "mmdit": lambda: MMDiT(MMDIT)}[name]()
    for parameter in model.parameters():  # the zero-initialised layers would hide everything else
        nn.init.normal_(parameter, std=0.1)
    return model.train(), inputs


def gradients(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    out = model(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Kept:
    """Counts the bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def of(self, model: nn.Module, inputs: tuple[Any, ...]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.count, lambda t: t):
            model(*inputs)
        return self.bytes


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointing_changes_no_bit(name: str) -> None:
    model, inputs = made(name)
    for module in list(model.modules()):  # dropout in the middle of blocks: it must fall alike when run again
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda module, args, out: F.dropout(out, 0.3, module.training))
    before = gradients(model, inputs)
    names = list(model.state_dict())
    plain = Kept().of(model, inputs)
    assert checkpoint_blocks(model) == BLOCKS[name]
    after = gradients(model, inputs)
    assert len(before) == len(after) > 10
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert list(model.state_dict()) == names
    assert Kept().of(model, inputs) < 0.6 * plain
    with torch.no_grad():
        model.eval()
        out = model(*inputs)
        assert not (out[0] if isinstance(out, tuple) else out).requires_grad


@pytest.mark.parametrize("kind", ["autoencoder", "contrastive", "denoising"])
def test_a_run_with_checkpointing_is_the_run_without(
    kind: str, shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    extra = frozen(models["autoencoder"].parent) if kind == "denoising" else []
    for word in ("false", "true"):
        run(tiny_config(kind, tmp_path / word, shards, f"speed.checkpointing={word}", *extra))
    assert files_of(tmp_path / "false") == files_of(tmp_path / "true")


def test_channels_last_changes_the_layout_alone(shards: Path, tmp_path: Path) -> None:
    """And a resume puts the optimizer's state, which files keep in torch's own layout, into that of the weights."""
    words = ["speed.channels_last=true", "optimizer.lr=0.01"]
    state = run(tiny_config("autoencoder", tmp_path / "whole", shards, "save_steps=100", *words))
    kernel = state.task.autoencoder.encoder.levels[0].blocks[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    train_in_two_parts("autoencoder", tmp_path / "parts", shards, *words)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")

    run(tiny_config("autoencoder", tmp_path / "plain", shards, "save_steps=100", "optimizer.lr=0.01"))
    one, two = (load_model(tmp_path / name).components["autoencoder"] for name in ("whole", "plain"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # four steps of 0.01; Adam shows rounding


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednns_linear_layer_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, bias=bias)
    x = torch.randn(shape).transpose(0, -2).requires_grad_()  # not contiguous
    weight = torch.randn(*x.shape[:-1], 5).transpose(0, -2).contiguous().transpose(0, -2)
    found = []
    for _ in range(2):
        x.grad = None
        layer.zero_grad()
        out = layer(x)
        (out * weight).sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        assert train_by_onednn(nn.Sequential(layer)) and type(layer) is TrainedOneDNNLinear
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_run_by_onednn_resumes_exactly(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    words = frozen(models["autoencoder"].parent)
    state = run(tiny_config("denoising", tmp_path / "whole", shards, "save_steps=100", *words))
    assert type(state.task.denoiser.time[0]) is TrainedOneDNNLinear
    train_in_two_parts("denoising", tmp_path / "parts", shards, *words)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


def test_frozen_models_in_16_bits_answer_nearly_the_same_in_float32() -> None:
    model, (image, noise) = made("autoencoder")
    assert isinstance(model, AutoencoderKL)
    freeze(model)
    exact = model.encode(image, noise), model.decode(noise)
    weights = copy.deepcopy(model.state_dict())
    compute_in(model, torch.bfloat16, CPU)
    rough = model.encode(image, noise), model.decode(noise)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 1e-5 < (a - b).norm() / a.norm() < 0.05
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_run_keeps_its_frozen_models_unaltered(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    state = run(tiny_config("denoising", out, shards, "speed.frozen=bf16", *frozen(models["autoencoder"].parent)))
    (text,) = load_model(models["contrastive"]).require("text")
    rough, exact = (encoder(["a red circle"]).context for encoder in (state.task.text, text))
    assert rough.dtype == torch.float32 and 1e-5 < (rough - exact).norm() / exact.norm() < 0.05
    for kind, name in (("autoencoder", "autoencoder"), ("contrastive", "text")):
        folder = newest_valid(models[kind] / "checkpoints")
        kept = newest_valid(out / "checkpoints")
        assert folder is not None and kept is not None
        assert (folder / f"{name}.safetensors").read_bytes() == (kept / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precision=fp16"], "precision=fp16 needs a GPU, and this run is on a CPU: use bf16 or no"),
        (["speed.frozen=fp16"], "speed.frozen=fp16 needs a GPU"),
        (["speed.tf32=true"], "tf32 needs an NVIDIA GPU from Ampere on, and this run is on cpu"),
        (["speed.compile=fast"], "unknown speed.compile 'fast'"),
        (["speed.frozen=fp8"], "unknown speed.frozen 'fp8'"),
        (["speed.sdpa_order=[flsh]"], "did you mean 'flash'"),
        (["speed.sdpa_order=[math, math]"], "names a kernel twice"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(tiny_config("autoencoder", tmp_path / "out", shards, *words))
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "checkpoints").exists()


def test_devices_are_asked_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda")
    check_device(SpeedConfig(), "fp16", gpu)
    with pytest.raises(ValueError, match="precision=bf16 needs a GPU from Ampere on, not Tesla T4: use fp16"):
        check_device(SpeedConfig(), "bf16", gpu)
    with pytest.raises(ValueError, match="tf32 needs"):
        check_device(SpeedConfig(tf32=True), "no", gpu)


def test_the_order_of_attention_kernels_is_set_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order = torch._C._get_sdp_priority_order
    before = order()
    with sdpa_order(("math", "flash")):
        assert order()[:2] == [SDPA["math"].value, SDPA["flash"].value]
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert order() == before and "math, flash" in caplog.text
    with sdpa_order(()):
        assert order() == before


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_stays_eager_otherwise() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (torch.randn(4, 6),)
    before = gradients(model, inputs)
    names = list(model.state_dict())
    compile_forward(model, "default", "denoiser")
    for a, b in zip(before, gradients(model, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert list(model.state_dict()) == names
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    model.eval()
    model(inputs[0][:1])  # another batch size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(forward: object, **options: object) -> Any:
        assert options == {"mode": "max-autotune", "dynamic": False}

        def fail(*args: object) -> None:
            raise TorchDynamoException("no compiler here\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    layer = nn.Linear(3, 3)
    expected = layer(torch.ones(1, 3))
    compile_forward(layer, "max-autotune", "denoiser")
    assert torch.equal(layer(torch.ones(1, 3)), expected) and torch.equal(layer(torch.ones(1, 3)), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "speed.compile=max-autotune does not work for denoiser (no compiler here); going on without"
    ]


class Resident(Task):
    """A task that touches nothing but what is on the device: what the engine itself does shows."""

    trained = ("network",)
    seed = 0

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(4))
        self.network(torch.zeros(1, 3, 8, 8))

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        loss = self.network(batch.image).square().mean()
        yield "network", loss, {"loss": loss.detach()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs beside its host")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])  # others must be told on the host whether to skip a step
def test_a_step_never_waits_for_the_device(kind: str, precision: str) -> None:
    config = TrainConfig(
        batch_size=8,
        accumulate=2,
        precision=precision,
        ema_decays=(0.99,),
        snapshot_steps=10,
        optimizer=OptimizerConfig(kind=kind, lr=1.0),
        speed=SpeedConfig(channels_last=True),
    )
    state = prepare(Resident(), config, Accelerator(mixed_precision=precision))
    batch = Batch(torch.randn(8, 3, 8, 8), [""] * 8, torch.arange(8), [""] * 8).to("cuda")
    means = Means()
    for step in range(3):  # the first makes the optimizer's state
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            outcome = update(state, batch, config, means)
            for ema in state.emas.values():
                ema.update(step, outcome.skipped)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(means.pop()["loss"].item())

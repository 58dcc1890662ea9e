"""Two processes that share out the weights train what one process trains, and leave the same checkpoints."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.checkpoints.load import load_model
from ldm.config import load_config, to_yaml
from ldm.training.ema import EMA
from ldm.training.engine import TrainConfig, prepare
from ldm.training.memory import SpeedConfig
from ldm.training.run import RunConfig, build, run
from ldm.training.sharding import check, full, local, scattered, unsharded, whole
from tests.conftest import frozen, tiny_config
from tests.training.launch import launch, two_processes
from tests.training.planted import TinyTask
from tests.training.test_resume import files_of

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def launched(config: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A run of two processes, as `accelerate launch` starts one."""
    return two_processes("-m", "ldm", "train", str(config), *words, **environment)


def trained(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by file and name."""
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    return {
        f"{p.relative_to(folder)}:{name}": value
        for p in sorted(folder.rglob("*.safetensors"))
        for name, value in read_tensors(p)[0].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "denoising"])
def test_shards_train_what_one_process_does(kind: str, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """In one go; stopped and resumed, byte for byte; begun by one process alone; and ended by one alone."""
    more = ["optimizer.schedule=constant", "ema_decays=[0.5]", "snapshot_steps=4", "preview_steps=4"]
    more += ["optimizer.groups=[{match: 'conv_in', lr_scale: 0.5}]"]
    if kind == "denoising":  # an autoencoder's statistics are of micro-batches
        more += [*frozen(models["autoencoder"].parent), "accumulate=2"]
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(kind, tmp_path / "one", shards, *more)))

    def alone(name: str, samples: int) -> None:
        run(tiny_config(kind, tmp_path / name, shards, *more, f"samples={samples}"))

    def shared(name: str, samples: int) -> None:
        ended = launched(tmp_path / "c.yaml", f"out={tmp_path / name}", f"samples={samples}", **FSDP2)
        assert ended.returncode == 0, ended.stderr

    alone("one", 32)
    shared("whole", 32)
    shared("resumed", 16)
    shutil.copytree(tmp_path / "resumed", tmp_path / "ended alone")
    (tmp_path / "ended alone" / "config.yaml").write_text((tmp_path / "one" / "config.yaml").read_text())
    shared("resumed", 32)
    alone("ended alone", 32)
    alone("begun alone", 16)
    shared("begun alone", 32)

    expected = trained(tmp_path / "one")
    for name in ("whole", "resumed", "ended alone", "begun alone"):
        found = trained(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():  # the tolerance of test_processes
            torch.testing.assert_close(found[key], value, atol=5e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "whole")
    for file in (tmp_path / "one" / "snapshots").rglob("*.safetensors"):
        found, _ = read_tensors(tmp_path / "whole" / file.relative_to(tmp_path / "one"))
        for key, value in read_tensors(file)[0].items():
            torch.testing.assert_close(found[key], value, atol=5e-5, rtol=1e-3)
    assert (tmp_path / "whole" / "previews" / "step-00000004.png").exists()
    assert load_model(str(tmp_path / "whole")).components.keys() == load_model(str(tmp_path / "one")).components.keys()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without shards: the same steps are skipped, and the same weights come of it."""
    found = {}
    for name, environment in (("without", {}), ("shards", FSDP2)):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        ended = launch(tmp_path / name, "nan", "dropout=0")
        assert ended.statuses == [0, 0], ended.said
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "skipped"] == [4]
        found[name] = trained(tmp_path / name)
    for key, value in found["without"].items():
        torch.testing.assert_close(found["shards"][key], value, atol=1e-6, rtol=1e-5)


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    """A mesh of this process alone: its shards are whole, and yet are shards."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def small(mesh: DeviceMesh) -> nn.Module:
    """A network in shards, whose second layer is gathered by itself."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    fully_shard(module[1], mesh=mesh)
    return fully_shard(module, mesh=mesh)


def test_what_was_gathered_with_averages_is_not_trained_on(one_rank: DeviceMesh) -> None:
    """A forward pass leaves weights gathered, until the next backward pass; there is none in validation."""
    module, x = small(one_rank), torch.ones(2, 5)
    own = module(x).detach()
    module(x).sum().backward()
    ema = EMA(module, 0.5)
    for average in ema.average.values():
        local(average).zero_()
    with torch.no_grad():
        with ema.applied(), unsharded(module):
            assert not module(x).any()
            assert not nn.functional.linear(x, module[0].weight, module[0].bias).any()  # nor is `forward` needed
        assert torch.equal(module(x), own)


def test_whole_gives_back_the_shards(one_rank: DeviceMesh) -> None:
    module = small(one_rank)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    ema = EMA(module, 0.5)
    before = dict(module.named_parameters())
    with whole([module], [ema.parameters, *optimizer.state.values()], keep=True):
        assert type(module) is nn.Sequential and type(module[1]) is nn.Linear
        held = [*module.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
        assert not any(isinstance(value, DTensor) for value in held)
        assert all(ema.parameters[f"{i}.{n}"] is v for i, m in enumerate(module) for n, v in m._parameters.items())
    assert all(value is before[name] for name, value in module.named_parameters())
    assert isinstance(module, FSDPModule) and isinstance(module[1], FSDPModule)
    assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())


def test_scattering_is_the_way_back(one_rank: DeviceMesh) -> None:
    parameter = small(one_rank)[0].weight
    value = torch.randn(4, 5)
    shard = scattered(value, parameter)
    assert isinstance(shard, DTensor) and shard.placements == parameter.placements
    assert torch.equal(full(shard), value)
    assert scattered(value, None) is value and full(value) is value


def test_deepspeed_is_refused_and_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU accelerate would go on without it, and say nothing."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="use FSDP2"):
        prepare(TinyTask(), TrainConfig(), accelerator)


PLUGIN = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False, "cpu_offload": None}


@pytest.mark.parametrize(
    ("plugin", "optimizer", "precision", "speed", "said"),
    [
        ({"fsdp_version": 1}, "adamw", "no", SpeedConfig(), "fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "adamw", "no", SpeedConfig(), "fsdp_cpu_ram_efficient_loading"),
        ({"activation_checkpointing": True}, "adamw", "no", SpeedConfig(), "speed.checkpointing=true"),
        ({"cpu_offload": CPUOffloadPolicy()}, "adamw", "no", SpeedConfig(), "fsdp_offload_params"),
        ({}, "adafactor", "no", SpeedConfig(), "adamw, lion, not adafactor"),
        ({}, "adamw", "fp16", SpeedConfig(), "bf16 or no, not fp16"),
        ({}, "adamw", "no", SpeedConfig(channels_last=True), "speed.channels_last"),
        ({}, "adamw", "no", SpeedConfig(compile="default"), "speed.compile"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    plugin: dict[str, object], optimizer: str, precision: str, speed: SpeedConfig, said: str
) -> None:
    check(TinyTask(), "adamw", "bf16", SpeedConfig(checkpointing=True), SimpleNamespace(**PLUGIN))
    with pytest.raises(ValueError, match=said):
        check(TinyTask(), optimizer, precision, speed, SimpleNamespace(**PLUGIN | plugin))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.adversary={weight: 0.5, model: {layers: 1}}"], "one trained part, not autoencoder and discriminator"),
        (["task.learn_logvar=true"], "single number, as autoencoder.logvar"),
        (["task.codebook={entries: 8, decay: 0.9}"], "autoencoder.codebook learns without gradients"),
    ],
)
def test_parts_that_cannot_be_shared_out_are_refused(words: list[str], said: str, shards: Path, tmp_path: Path) -> None:
    _, task = build(tiny_config("autoencoder", tmp_path, shards, *words))
    with pytest.raises(ValueError, match=said):
        check(task, "adamw", "no", SpeedConfig(), SimpleNamespace(**PLUGIN))


def test_a_word_cannot_be_shared_out(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Its vectors are also the text encoder's, which would go on with the old ones."""
    words = ["task.kind=finetuning", f"task.model={models['denoising']}", "task.method=full", "task.word=red"]
    where = [f"data.path={shards}", "data.size=16", f"out={tmp_path}"]
    _, task = build(load_config(RunConfig, [], [*words, *where, "task.train_text=true"]))
    with pytest.raises(ValueError, match=r"part the vectors of task\.word"):
        check(task, "adamw", "no", SpeedConfig(), SimpleNamespace(**PLUGIN))

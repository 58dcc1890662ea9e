"""Every optimizer does the arithmetic of its paper, every schedule its formula, and both resume byte for byte."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ldm.checkpoints.files import read_tensors, save_tensors
from ldm.config import load_config, to_yaml
from ldm.training.optim import (
    KINDS,
    OptimizerConfig,
    ParameterGroup,
    build_optimizer,
    check_groups,
    learning_rate,
    set_learning_rate,
)
from ldm.training.optimizers import Adafactor
from ldm.training.run import RunConfig, run
from ldm.training.state import _flatten, _unflatten
from tests.conftest import tiny_config
from tests.training.test_resume import files_of, train_in_two_parts

RATES = [0.03, 0.05, 0.02, 0.04]
Rule = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


def installed(kind: str) -> bool:
    if kind != "adamw8bit":
        return True
    try:
        import bitsandbytes.optim  # noqa: F401
    except Exception:
        return False
    return True


HERE = [k if installed(k) else pytest.param(k, marks=pytest.mark.skip("no bitsandbytes")) for k in KINDS]


def matrix() -> tuple[np.ndarray, list[np.ndarray]]:
    """A matrix of weights and four gradients."""
    random = np.random.default_rng(5)
    return random.normal(size=(4, 6)), [random.normal(size=(4, 6)) for _ in RATES]


def stepped(config: OptimizerConfig, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The weights after a step for each rate of RATES, by what `build_optimizer` makes."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = build_optimizer(module, config)
    for lr, gradient in zip(RATES, gradients, strict=True):
        set_learning_rate([optimizer], lr)
        module.weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    return module.weight.detach().double().numpy()


def adamw(w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    m = v = np.zeros_like(w)
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w = w - lr * 0.1 * w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-3)
    return w


def lion(w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(w)
    for lr, g in zip(RATES, gradients, strict=True):
        w = w - lr * (np.sign(0.9 * m + 0.1 * g) + 0.1 * w)
        m = 0.98 * m + 0.02 * g
    return w


def adafactor(w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """Shazeer & Stern 2018, algorithm 4: sums over rows and columns, as they are written there."""
    rows, columns = np.zeros((4, 1)), np.zeros((1, 6))
    for t, (lr, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        rows = beta * rows + (1 - beta) * square.sum(1, keepdims=True)
        columns = beta * columns + (1 - beta) * square.sum(0, keepdims=True)
        update = g / np.sqrt(rows @ columns / rows.sum())
        update = update / max(1.0, np.sqrt(np.mean(update**2)))
        w = w - lr * 0.1 * w - lr * update
    return w


def sgd(w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    m = np.zeros_like(w)
    for lr, g in zip(RATES, gradients, strict=True):
        m = 0.9 * m + g + 0.1 * w
        w = w - lr * m
    return w


@pytest.mark.parametrize("rule", [adamw, lion, adafactor, sgd], ids=lambda rule: rule.__name__)
def test_an_optimizer_follows_its_paper(rule: Rule) -> None:
    config = OptimizerConfig(kind=rule.__name__, lr=1.0, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)
    start, gradients = matrix()
    expected = rule(start, gradients)
    np.testing.assert_allclose(stepped(config, start, gradients), expected, rtol=1e-5, atol=1e-6)


def test_prodigy_follows_its_paper() -> None:
    """Mishchenko & Defazio 2023, algorithm 4, with decoupled decay; gradients that agree, so that d grows."""
    rates, d, d0, r, root = (1.0, 0.9, 1.1, 1.0, 0.8, 1.0), 1e-6, 1e-6, 0.0, math.sqrt(0.98)
    w, noise = (1e-6 * matrix()[0] for _ in range(2))  # as small as the steps, or float32 would round those away
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    optimizer = build_optimizer(module, OptimizerConfig(kind="prodigy", lr=1, betas=(0.9, 0.98), eps=1e-3))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    start, m, v, s = w, *np.zeros((3, 4, 6))
    for k, lr in enumerate(rates):
        g = np.sign(start) * (1 + 0.1 * k) + 1e5 * noise
        m, v = 0.9 * m + 0.1 * d * g, 0.98 * v + 0.02 * d * d * g * g
        r = root * r + (1 - root) * lr * d * d * np.sum(g * (start - w))
        s = root * s + (1 - root) * lr * d * d * g
        w = w - lr * d * 0.1 * w - lr * d * m / (np.sqrt(v) + d * 1e-3)
        d = max(d, r / np.abs(s).sum())
        set_learning_rate([optimizer], lr)
        module.weight.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        assert optimizer.state[module.weight]["d"].item() == pytest.approx(d, rel=1e-5)
    assert d > 2 * d0
    np.testing.assert_allclose(module.weight.detach().numpy(), w, rtol=1e-4, atol=1e-10)


def test_adafactor_equals_torchs_but_for_the_size_of_its_steps() -> None:
    """torch's goes by the root mean square of the parameters and by 1 / sqrt(step), which are undone here."""
    start, gradients = matrix()
    ours, theirs = (nn.Parameter(torch.tensor(start, dtype=torch.float32)) for _ in range(2))
    one = Adafactor([ours], lr=1.0)
    two = torch.optim.Adafactor([theirs], lr=0.05, weight_decay=0.0)
    for step, gradient in enumerate(gradients, 1):
        ours.grad = theirs.grad = torch.tensor(gradient, dtype=torch.float32)
        size = max(1e-3, theirs.detach().square().mean().sqrt().item())
        set_learning_rate([one], size * min(0.05, step**-0.5))
        one.step(), two.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adafactor_takes_a_kernel_for_a_matrix() -> None:
    kernel = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for shape in ((4, 2, 3, 3), (4, 18)):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = Adafactor([parameter], lr=0.1)
        for scale in (1.0, -0.5):
            parameter.grad = (scale * kernel + scale**2).reshape(shape)
            optimizer.step()
        found.append(parameter.detach().reshape(-1))
        assert {tuple(v.shape) for v in optimizer.state[parameter].values() if isinstance(v, Tensor)} == {(4,), (18,)}
    assert torch.equal(*found)


def test_prodigy_finds_the_rate_by_itself() -> None:
    """The minimum is 3 away in every coordinate; d starts a million times smaller and must not pass the distance."""
    module = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(module.weight)
    scale = torch.linspace(0.5, 2, 20)
    optimizer = build_optimizer(module, OptimizerConfig(kind="prodigy", lr=1.0, weight_decay=0.0))
    for step in range(400):
        set_learning_rate([optimizer], 0.5 * (1 + math.cos(math.pi * step / 400)))
        optimizer.zero_grad()
        (scale * (module.weight - 3).abs()).sum().backward()
        optimizer.step()
    d = optimizer.state[module.weight]["d"].item()
    assert 0.1 < d <= 3
    assert (module.weight - 3).abs().max() < 0.05


@pytest.mark.parametrize("kind", HERE)
def test_state_goes_to_disk_and_back(kind: str, tmp_path: Path) -> None:
    """Six steps, or three, the files of a checkpoint, and three more: the same bytes; with another layout in memory."""
    path = tmp_path / "optimizer.safetensors"

    def network() -> nn.Module:
        torch.manual_seed(1)
        made = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 80))  # 8-bit state from 4,096 values on
        return made.to(memory_format=torch.channels_last)

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_learning_rate([optimizer], 0.01 * (step + 1))
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = torch.empty_like(parameter).copy_(noise)
            optimizer.step()

    groups = [ParameterGroup(match=r"2\.bias", lr_scale=0.5, weight_decay=0.0)]
    config = OptimizerConfig(kind=kind, lr=1.0, groups=groups)
    whole = network()
    one = build_optimizer(whole, config)
    train(whole, one, range(6))

    first = network()
    two = build_optimizer(first, config)
    train(first, two, range(3))
    save_tensors(path, *_flatten(two.state_dict()))
    second = network()
    second.load_state_dict(first.state_dict())
    three = build_optimizer(second, config)
    three.load_state_dict(_unflatten(*read_tensors(path)))
    train(second, three, range(3, 6))

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    save_tensors(tmp_path / "one", *_flatten(one.state_dict()))
    save_tensors(tmp_path / "three", *_flatten(three.state_dict()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in HERE if k != "adamw"])  # which test_resume tries
def test_two_halves_equal_the_whole(kind: str, shards: Path, tmp_path: Path) -> None:
    words = [f"optimizer.kind={kind}", "optimizer.lr=1", "optimizer.schedule=wsd", "optimizer.decay_share=0.5"]
    words += ["optimizer.groups=[{match: decoder, lr_scale: 0.5}]", "ema_decays=[0.9, 0.99]", "snapshot_steps=2"]
    run(tiny_config("autoencoder", tmp_path / "whole", shards, "save_steps=100", *words))
    train_in_two_parts("autoencoder", tmp_path / "parts", shards, *words)
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_bitsandbytes_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"adamw8bit' needs bitsandbytes: pip install 'ldm\[gpu\]'") as error:
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(kind="adamw8bit"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        (dict(schedule="linear"), {0: 2.0, 25: 1.55, 50: 1.1, 100: 0.2}),
        (dict(schedule="linear", warmup_steps=20), {0: 0.1, 9: 1.0, 19: 2.0, 20: 2.0, 60: 1.1, 100: 0.2}),
        (dict(schedule="cosine", warmup_steps=20), {19: 2.0, 20: 2.0, 40: 2 * (0.1 + 0.45 * (1 + 0.5**0.5)), 60: 1.1}),
        (dict(schedule="constant", warmup_steps=4), {0: 0.5, 3: 2.0, 4: 2.0, 99: 2.0}),
        (dict(schedule="wsd", warmup_steps=4), {0: 0.5, 4: 2.0, 79: 2.0, 80: 2.0, 90: 1.1, 100: 0.2}),
        (dict(schedule="wsd", decay_share=1.0), {0: 2.0, 50: 1.1, 100: 0.2}),
        (dict(schedule="wsd", warmup_steps=90), {89: 2.0, 90: 2.0, 95: 1.1, 100: 0.2}),
    ],
)
def test_rates_follow_their_formula(changes: dict[str, object], rates: dict[int, float]) -> None:
    settings = {"lr": 2.0, "final": 0.1, "decay_share": 0.2} | changes
    config = OptimizerConfig(**settings)  # type: ignore[arg-type]
    assert {step: learning_rate(config, step, 100) for step in rates} == pytest.approx(rates)


def test_a_group_is_what_its_expression_finds() -> None:
    module = nn.ModuleDict({"up": nn.Linear(3, 4), "out": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    module["out"].bias.requires_grad_(False)
    groups = [ParameterGroup(match=r"^net\.up\.", lr_scale=0.1), ParameterGroup(match="weight", weight_decay=0.7)]
    config = OptimizerConfig(weight_decay=0.3, groups=groups)
    made = build_optimizer(module, config, "net")
    set_learning_rate([made], 2.0)
    names = {id(p): n for n, p in module.named_parameters()}
    found = [([names[id(p)] for p in g["params"]], g["weight_decay"], g["lr"]) for g in made.param_groups]
    assert found == [
        ([], 0.3, 2.0),
        (["norm.bias"], 0.0, 2.0),
        (["up.weight"], 0.3, 0.2),
        (["up.bias"], 0.0, 0.2),
        (["out.weight"], 0.7, 2.0),
        (["norm.weight"], 0.0, 2.0),
    ]
    with pytest.raises(ValueError, match=r"'vp' matches none of the 5 trained parameters \(net.up.weight, \.\.\., net"):
        check_groups({"net": module}, OptimizerConfig(groups=[ParameterGroup(match="vp")]))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.kind=adam", "unknown optimizer 'adam', did you mean 'adamw'"),
        ("optimizer.schedule=cosin", "did you mean 'cosine'"),
        ("optimizer.groups=[{match: '('}]", r"'\(' is no regular expression"),
        ("optimizer.groups=[{match: a, lr_scale: -1}]", "must not be negative"),
        ("optimizer.groups=[{match: a, lr: 1}]", "'lr'"),
        ("optimizer.groups=[{lr_scale: 1}]", "match"),
        ("optimizer.decay_share=0", r"decay_share in \(0, 1\]"),
        ("optimizer.betas=[0.9, 1]", "betas must be in"),
        ("optimizer.lr=-1", "must not be negative"),
        ("optimizer.kind=prodigy", "optimizer.lr multiplies it: give 1, not 0.0001"),
    ],
)
def test_mistakes_are_one_line(word: str, message: str) -> None:
    base = ["task.kind=autoencoder", "out=o", "data.path=d"]
    with pytest.raises(ValueError, match=message) as error:
        load_config(RunConfig, [], [*base, word])
    assert "\n" not in str(error.value)


def test_groups_are_written_and_read_back(tmp_path: Path) -> None:
    words = ["optimizer.groups=[{match: up, lr_scale: 0.5}, {match: down, weight_decay: 0}]"]
    config = load_config(RunConfig, [], ["task.kind=autoencoder", "out=o", "data.path=d", *words])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, [tmp_path / "c.yaml"], []) == config
    assert config.optimizer.groups == [ParameterGroup("up", 0.5), ParameterGroup("down", weight_decay=0)]


def test_a_group_that_matches_nothing_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'encodre' matches none"):
        run(tiny_config("autoencoder", tmp_path / "out", shards, "optimizer.groups=[{match: encodre}]"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_rate_does_not_depend_on_the_number_of_processes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine writes the rate that it sets; a second process, which is only said to be there, changes nothing."""
    found = []
    for processes in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        if processes == 2:
            monkeypatch.setattr(Accelerator, "num_processes", 2)
        out = tmp_path / str(processes)
        run(tiny_config("autoencoder", out, shards, "optimizer.warmup_steps=2", "optimizer.schedule=linear"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([line["lr"] for line in lines if line["kind"] == "train"])
    assert found[0] == found[1] == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.5e-4])

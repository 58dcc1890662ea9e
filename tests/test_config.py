"""YAML and overrides become dataclasses, or one clear line."""

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import load_config, to_yaml
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import CLIP, ImageEncoder
from ldm.models.text import TextEncoder
from ldm.models.vq import AutoencoderVQ, VQConfig
from ldm.training.denoising import ARCHITECTURES
from ldm.training.run import TASKS, RunConfig

BASE = ["task.kind=autoencoder", "out=o", "data.path=d"]


def test_files_then_overrides_then_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("batch_size: 4\nseed: 1\ntask: {model: {multipliers: [1, 2]}}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = load_config(RunConfig, [tmp_path / "a.yaml", tmp_path / "b.yaml"], [*BASE, "optimizer.lr=1e-3"])
    assert (config.batch_size, config.seed, config.optimizer.lr, config.keep) == (4, 2, 1e-3, 2)
    assert config.task.model.multipliers == (1, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*BASE, "optimizer.lrr=1"], "'lrr'.*Did you mean: 'lr'"),
        (["task.kind=autoencodr"], "unknown task.kind 'autoencodr'; did you mean 'autoencoder'"),
        (["out=o"], "'task.kind' must be given: one of autoencoder, contrastive, denoising"),
        (["task.kind=autoencoder", "data.path=d"], "'out' must be given"),
        ([*BASE, "batch_size=many"], "'many'.*at 'batch_size'"),
        ([*BASE, "task.model.multipliers.0=2"], "a list is given whole"),
        ([*BASE, "out=${oc.env:HOME}"], "not supported"),
        ([*BASE, "batch_size"], "key=value"),
        ([*BASE, "batch_size=[1"], "not valid YAML"),
        ([*BASE, "batch_size=0"], "batch_size must be at least 1, not 0"),
        ([*BASE, "precision=bf61"], "did you mean 'bf16'"),
        ([*BASE, "attention=flash"], "unknown attention back-end 'flash'"),
        ([*BASE, "optimizer.kind=adam"], "unknown optimizer 'adam', did you mean 'adamw'"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(RunConfig, [], overrides)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config file"):
        load_config(RunConfig, [tmp_path / "no.yaml"], [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="keys and values"):
        load_config(RunConfig, [tmp_path / "list.yaml"], [])
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_config(RunConfig, [tmp_path / "latin.yaml"], [])


@pytest.mark.parametrize("kind", TASKS)
def test_a_written_config_reads_back_equal(kind: str, tmp_path: Path) -> None:
    extra = {"denoising": ["task.autoencoder=a", "task.text=t"], "classifier": ["task.autoencoder=a"]}.get(kind, [])
    extra = ["task.model=m", "task.method=full"] if kind == "finetuning" else extra
    config = load_config(RunConfig, [], [*BASE, f"task.kind={kind}", *extra])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, [tmp_path / "c.yaml"], []) == config


@pytest.mark.parametrize("path", sorted(Path("configs/overlays").iterdir()), ids=str)
@pytest.mark.parametrize("model", ["v1", "v2-base", "v2-v", "xl"])
def test_overlays_fit_the_full_size_models(path: Path, model: str) -> None:
    model_path = Path("configs/stable-diffusion") / f"{model}.yaml"
    plain, with_it = (load_config(RunConfig, files, []) for files in ([model_path], [model_path, path]))
    assert with_it != plain and with_it.task == plain.task
    assert with_it.batch_size == plain.batch_size and with_it.optimizer == plain.optimizer
    assert "Time:" in path.read_text() and "Expect:" in path.read_text()


@pytest.mark.parametrize(
    "path", sorted(set(Path("configs").rglob("*.yaml")) - set(Path("configs/overlays").iterdir())), ids=str
)
def test_shipped_configs_are_valid_and_say_what_to_expect(path: Path) -> None:
    config = load_config(RunConfig, [path], [])
    head = path.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head if not line[:1].isalpha())
    text = "\n".join(line for line in head if line.startswith("#"))
    assert "ldm " in text and "Time:" in text and "Expect:" in text
    said = re.search(r"Expect:.*?([\d,]+) parameters", text)
    if said:
        with torch.device("meta"):
            model = network(config.task)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == said[1]
    assert said or path.parts[1] in ("demo", "emoji", "classifier")


def network(task: Any) -> torch.nn.Module:
    """What the task trains."""
    if task.kind == "autoencoder":
        if task.codebook.entries:
            return AutoencoderVQ(VQConfig(**asdict(task.model) | {"codebook": task.codebook}))
        return AutoencoderKL(task.model)
    if task.kind == "contrastive":
        return CLIP(TextEncoder(task.text), ImageEncoder(task.image))
    denoiser = ARCHITECTURES[task.architecture](getattr(task, task.architecture))
    return torch.nn.ModuleList([denoiser, *([TextEncoder(task.text_model)] if task.train_text else [])])


def names(schema: object, prefix: str = "") -> list[str]:
    """Dotted names of every key of a config dataclass."""
    found = []
    for field in fields(schema):  # type: ignore[arg-type]
        value = field.default_factory() if callable(field.default_factory) else field.default
        found += names(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return found


def test_the_schema_grows_on_purpose() -> None:
    """A new key is added here too: it is something every user may meet."""
    listed = [*names(RunConfig), *(f"{k}: {n}" for k, (_, c) in TASKS.items() for n in names(c))]
    assert listed == (Path(__file__).parent / "schema.txt").read_text().split("\n")[:-1]

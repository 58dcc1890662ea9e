"""Every architecture goes through the denoising task, and what does not fit is named before any work."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoints import compvis
from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.checkpoints.load import load_model
from ldm.pipeline import Pipeline, Request, pairs
from ldm.training.run import run
from tests.checkpoints.families import make
from tests.conftest import frozen, tiny_config

SMALL = "in_channels: 2, out_channels: 2, width: 32, depth: 2, heads: 2"
DIT = ["task.architecture=dit", f"task.dit={{{SMALL}, classes: 0, context_dim: 16, pooled_dim: 8}}"]
MMDIT = [
    "task.architecture=mmdit",
    f"task.mmdit={{{SMALL}, context_dim: 16, pooled_dim: 8, base_size: 4, max_size: 8, qk_norm: true}}",
]
SIZES = ["task.unet.pooled_dim=8", "task.unet.pooled_layers=2", "task.unet.size_dim=4", "task.unet.cross_only=[0]"]
GUIDED = ["task.unet.residual_resample=true", "task.unet.scale_shift=true"]


@pytest.mark.parametrize("changes", [DIT, MMDIT, SIZES, GUIDED], ids=["dit", "mmdit", "sizes", "guided"])
def test_every_architecture_trains_and_draws(
    changes: list[str], models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    config = tiny_config("denoising", tmp_path / "run", shards, *frozen(models["denoising"].parent), *changes)
    run(config)
    pipeline = Pipeline.load(tmp_path / "run")
    assert type(pipeline.denoiser).__name__.lower() == config.task.architecture
    images = pipeline(Request(*pairs(["a red circle"]), steps=2))
    assert images.shape == (1, 3, 16, 16) and torch.isfinite(images).all()


OBJECTIVES = {
    "edm": ["schedule=edm", "prediction=v", "spacing=karras"],
    "hybrid": ["objective=hybrid", "variance=learned_range", "timesteps=loss_second_moment"],
    "vlb": ["objective=vlb", "variance=learned_range"],
    "flow": ["schedule=flow", "prediction=flow", "dynamic_shift=true", "timesteps=logit_normal"],
    "near": ["coupling=nearest", "noise_offset=0.1", "input_perturbation=0.1", "huber=0.1", "weighting=soft_min_snr"],
    "transport": ["coupling=optimal_transport", "schedule=sigmoid", "zero_snr=true", "prediction=v"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_draws(name: str, models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    words = [f"task.diffusion.{word}" for word in OBJECTIVES[name]]
    if "variance=learned_range" in OBJECTIVES[name]:
        words.append("task.unet.out_channels=4")
    run(tiny_config("denoising", tmp_path / "run", shards, *frozen(models["denoising"].parent), *words))
    pipeline = Pipeline.load(tmp_path / "run")
    for sampler in ("ddim", "ddpm"):
        images = pipeline(Request(*pairs(["a red circle"]), steps=2, sampler=sampler))
        assert images.shape == (1, 3, 16, 16) and torch.isfinite(images).all()


def test_importance_goes_on_after_a_resume(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """The weights do not tell, while every level is drawn as often; what was learned of the losses does."""
    words = ["task.diffusion.timesteps=loss_second_moment", *frozen(models["denoising"].parent)]
    run(tiny_config("denoising", tmp_path / "whole", shards, *words))
    folder = newest_valid(tmp_path / "whole" / "checkpoints")
    assert folder is not None
    seen = read_tensors(folder / "train" / "remembered.safetensors")[0]
    state = {name.removeprefix("importance."): value for name, value in seen.items()}
    config = tiny_config("denoising", tmp_path / "whole", shards, *words)
    assert state["seen"].sum() + state["new"][1].sum() == config.samples


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["task.diffusion.variance=learned_range", "task.diffusion.objective=vlb"], r"task\.unet\.out_channels is 2"),
        (["task.architecture=dti"], "did you mean 'dit'"),
        (["task.architecture=dit"], r"task\.dit\.in_channels is 4"),
        (["task.unet.classes=3"], r"task\.unet\.classes is 3"),
        (["task.unet.head_dim=24"], "head_dim 24 must divide"),
        (["task.unet.size_dim=8"], "pooled_layers 2"),
    ],
)
def test_what_does_not_fit_is_named(
    change: list[str], reason: str, models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        run(tiny_config("denoising", tmp_path / "run", shards, *frozen(models["denoising"].parent), *change))


def test_training_goes_on_from_a_file_of_stable_diffusion(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "sd.safetensors"
    model = make("sd1")
    compvis.write(model, file, dtype=torch.float16)
    unet = "{channels: 32, multipliers: [1, 2], blocks: 1, depths: [1, 0], context_dim: 16, heads: 2}"
    changes = [f"init={file}", f"task.autoencoder={file}", f"task.text={file}", f"task.unet={unet}"]
    changes += ["task.unet.in_channels=4", "task.unet.out_channels=4", "optimizer.lr=0", "optimizer.weight_decay=0"]
    run(tiny_config("denoising", tmp_path / "run", shards, *changes))
    trained, before = (m.components["denoiser"].state_dict() for m in (load_model(tmp_path / "run"), model))
    for name, tensor in before.items():  # at a learning rate of nothing
        torch.testing.assert_close(trained[name], tensor.half().float(), rtol=0, atol=0)

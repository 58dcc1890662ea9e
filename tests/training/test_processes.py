"""Two processes train what one process trains."""

from pathlib import Path

import pytest
import torch

from ldm.config import load_config
from ldm.training.run import RunConfig
from tests.conftest import LOOP, TINY, frozen, tiny_config
from tests.training.launch import by_one_and_by_two

KEPT = ["task.prior=prediction", "data.prior=[true,false]"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_two_processes_equal_one(kind: str, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    extra = frozen(models["autoencoder"].parent) if kind == "denoising" else []
    if kind == "denoising":
        extra += ["task.diffusion.timesteps=loss_second_moment"]
    found = by_one_and_by_two(lambda out: tiny_config(kind, out, shards, *extra), tmp_path)
    for name, value in found[1].items():
        # Adam divides by the gradient's size, so where that is near nothing rounding shows; a step moves 1e-4
        torch.testing.assert_close(found[2][name], value, atol=5e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["adapter", "task.adapter.rank=2", "task.word=red", "task.initial=circle", *KEPT],
        ["full", "task.train_text=true", *KEPT],
        ["inpainting"],
    ],
    ids=lambda words: words[0],
)
def test_two_processes_fine_tune_as_one(
    method: list[str], shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    task = ["task.kind=finetuning", f"task.model={models['denoising']}", f"task.method={method[0]}", *method[1:]]
    where = [f"data.path=[{shards},{shards}]", "data.size=16", f"validation={shards}", "validation_samples=8"]
    found = by_one_and_by_two(lambda out: load_config(RunConfig, [], [*task, *LOOP, *where, f"out={out}"]), tmp_path)
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, atol=5e-5, rtol=1e-3)

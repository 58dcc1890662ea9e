"""A run that is killed, however often and wherever, ends with the bytes of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import frozen

GAN = [
    "task.adversary.weight=0.5",
    "task.adversary.start_step=1",
    "task.adversary.model={channels: 8, layers: 1, norm_groups: 4}",
    "task.perceptual=random",
]
STAGES = {"autoencoder": ("autoencoder", GAN), "contrastive": ("contrastive", []), "denoising": ("denoising", [])}


def killed(how: str, stage: str, work: Path, shards: Path, models: dict[str, Path], count: int, seed: int = 0) -> Any:
    kind, more = STAGES[stage]
    if kind == "denoising":
        more = [*frozen(models["autoencoder"].parent), "task.diffusion.timesteps=loss_second_moment"]
    words = [how, kind, str(work), str(shards), str(count), str(seed), *more, "ema_decays=[0.9]"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kills", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [3, pytest.param(167, marks=pytest.mark.long)])
def test_killed_at_random(stage: str, count: int, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """In the long form 501 kills in all."""
    found = killed("random", stage, tmp_path, shards, models, count)
    assert found["wrong"] == [] and found["kills"] == count and found["runs"] >= 1
    assert found["struck"] > 0
    assert count < 100 or found["saved"] > 0


@pytest.mark.slow
def test_killed_at_some_operations(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    found = killed("every", "autoencoder", tmp_path, shards, models, count=50, seed=17)
    assert found["wrong"] == [] and found["struck"] == found["kills"] - 1 >= 2


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_operation(stage: str, shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    found = killed("every", stage, tmp_path, shards, models, count=1)
    assert found["wrong"] == [] and found["struck"] == found["kills"] - 1 >= 60

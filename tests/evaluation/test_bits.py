"""Bits per dimension: the estimate against the whole sum, and the command on trained models."""

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm.cli.evaluate import app
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.evaluation.likelihood import Counting, bound
from ldm.training.run import run
from ldm.types import Conditioning
from tests.conftest import frozen, tiny_config

MU, S = 0.3, 0.7
CHAIN = DiffusionConfig(schedule="linear", train_steps=40, beta_start=0.01, beta_end=0.2)


def exact(x, t, cond):
    """The eps of Gaussian data N(MU, S^2)."""
    level = Diffusion.from_config(CHAIN).schedule.at(t.double()).like(x)
    return level.sigma * (x - level.alpha * MU) / (level.alpha**2 * S**2 + level.sigma**2)


def count(evaluations, images=32):
    diffusion = Diffusion.from_config(CHAIN)
    noise = ImageNoise(range(images), (1, 12, 12))
    x0 = MU + S * noise().double()
    return bound(diffusion.denoise(exact, Conditioning()), x0, diffusion.schedule, noise, evaluations), x0


def test_few_levels_estimate_the_sum_over_all():
    """Of 32 images of 144 values: 5 standard errors of the difference, 1 false alarm in 10^6."""
    (few, _), (all_levels, x0) = count(7), count(40)
    difference = few["bits_per_dim"] - all_levels["bits_per_dim"]
    assert difference.mean().abs() < 5 * difference.std() / math.sqrt(32)
    assert torch.equal(few["prior"], all_levels["prior"])
    exact_bits = ((x0 - MU).square() / (2 * S**2) / math.log(2) + math.log2(S * math.sqrt(2 * math.pi))).mean()
    assert abs(all_levels["bits_per_dim"].mean() - exact_bits) < 0.1  # 5 standard errors, which hide what it loses


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="unknown method 'elbo'"):
        Counting("elbo")
    with pytest.raises(ValueError, match="steps must be at least 2"):
        Counting(steps=1)


def test_the_command(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    flow = ["task.diffusion.schedule=flow", "task.diffusion.prediction=flow"]
    varying = ["task.diffusion.objective=hybrid", "task.diffusion.variance=learned_range", "task.unet.out_channels=4"]
    for name, words in (("flow", flow), ("varying", varying)):
        run(tiny_config("denoising", tmp_path / name, shards, *frozen(models["denoising"].parent), *words))

    def told(model, *words):
        result = CliRunner().invoke(app, ["nll", str(model), str(shards), "--count", "3", "--steps", "4", *words])
        if result.exception:
            raise result.exception
        return dict(line.split() for line in result.output.splitlines())

    for name in ("varying", "flow"):
        for method in ("vlb", "ode"):
            if (name, method) == ("flow", "vlb"):
                with pytest.raises(ValueError, match="use --method ode"):
                    told(tmp_path / name, "--method", method)
                continue
            numbers = told(tmp_path / name, "--method", method)
            assert math.isfinite(float(numbers["bits_per_dim"])) and numbers["pictures"] == "3"
            assert numbers == told(tmp_path / name, "--method", method)  # nothing is left to chance

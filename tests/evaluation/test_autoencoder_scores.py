"""SSIM and the Frechet distance are their formulas; an autoencoder's scores are those of what it does."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline.loader import DataConfig, fixed_batch
from data_pipeline.reader import ShardReader
from ldm.checkpoints.load import load_model
from ldm.cli.evaluate import app
from ldm.evaluation.autoencoder import (
    Judges,
    evaluate_autoencoder,
    frechet_distance,
    pictures,
    set_statistics,
    ssim,
    table,
)
from ldm.evaluation.metrics import psnr


class Halved(nn.Module):
    """A first stage that keeps every second pixel, adds `bias` to what it makes, and knows its latents' statistics."""

    latent_mean: Tensor
    latent_std: Tensor
    latent_channels = 3

    def __init__(self, mean: float = 0.0, std: float = 1.0, bias: float = 0.0, spread: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias, self.spread = bias, spread
        self.register_buffer("latent_mean", torch.full((3, 1, 1), mean))
        self.register_buffer("latent_std", torch.full((3, 1, 1), std))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        raw = image[:, :, ::2, ::2] + (0 if noise is None else self.spread * noise)
        return (raw - self.latent_mean) / self.latent_std

    def decode(self, latent: Tensor) -> Tensor:
        raw = latent * self.latent_std + self.latent_mean + self.bias
        return raw.repeat_interleave(2, 2).repeat_interleave(2, 3)


def blocks(count: int, seed: int = 5) -> Tensor:
    """Pictures of 2 x 2 px squares, which `Halved` keeps whole, in [-0.9, 0.9]."""
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return small.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_ssim_agrees_with_an_independent_one() -> None:
    """scipy's Gaussian, cut at 3.5 sigma, has 11 taps; its borders are dropped as ours are."""
    random = np.random.default_rng(0)
    a = random.uniform(-1, 1, (2, 3, 24, 30))
    b = 0.7 * a + 0.3 * random.uniform(-1, 1, a.shape)
    expected = []
    for x, y in zip(a, b, strict=True):
        found = []
        for p, q in zip((x + 1) / 2, (y + 1) / 2, strict=True):  # in [0, 1], range 1

            def blur(values: np.ndarray) -> np.ndarray:
                return gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

            m, n = blur(p), blur(q)
            v, w, c = blur(p * p) - m * m, blur(q * q) - n * n, blur(p * q) - m * n
            found.append(((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))).mean())
        expected.append(np.mean(found))
    assert ssim(torch.tensor(a), torch.tensor(b)).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_simple_pairs() -> None:
    a = blocks(2)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    flat = ssim(torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.25))
    x, y, c1 = 0.75, 0.375, 0.01**2  # in [0, 1]; without variance the first factor alone counts
    assert flat.item() == pytest.approx((2 * x * y + c1) / (x**2 + y**2 + c1))
    soft = [a + sigma * torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) for sigma in (0.05, 0.2, 0.5)]
    means = [ssim(a, b).mean().item() for b in soft]
    assert means == sorted(means, reverse=True)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_frechet_distance_in_closed_form() -> None:
    """Rows that have a given mean and covariance exactly: for diagonal ones the trace is a sum of squares."""
    random = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = random - random.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    a = white * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0])
    b = white * torch.tensor([3.0, 2.0, 0.0]) + torch.tensor([0.0, 2.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (3 - 1) ** 2 + 0 + 0.5**2, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    mixed, other = a @ torch.randn(3, 3, dtype=torch.float64), b @ torch.randn(3, 3, dtype=torch.float64) + random.cos()
    first, second = (np.cov(x.numpy().T) for x in (mixed, other))
    expected = ((mixed.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(
        first + second - 2 * sqrtm(first @ second).real
    )
    assert frechet_distance(mixed, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, mixed) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], b)


def test_scores_are_those_of_what_the_autoencoder_does() -> None:
    images = blocks(20)
    judges = Judges(lambda a, b: (a - b).abs().flatten(1).mean(1), "gap", lambda x: x.mean((2, 3)), "means")
    found = evaluate_autoencoder(Halved(bias=0.1), images.split(8), judges)
    scores = found.scores
    assert scores["images"] == 20 and scores["extractor"] == "means"
    assert scores["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-5)
    assert scores["gap"] == pytest.approx(0.1, rel=1e-5) and scores["rfid"] == pytest.approx(0.03, rel=1e-4)
    assert scores["ssim"] == pytest.approx(ssim(images, images + 0.1).mean().item(), rel=1e-5)
    assert torch.equal(found.images, images) and psnr(found.images, found.rebuilt - 0.1).min() > 100
    assert "means" in table(scores) and "psnr" in table(scores)


@pytest.mark.parametrize("kind", ["channel", "scalar"])
def test_statistics_make_latents_normal(kind: str) -> None:
    """Latents are sampled: their variance is that of the means plus 0.3^2. Whatever was set before does not matter."""
    images = blocks(200) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1) + torch.tensor([0.0, 0.1, -0.3]).view(3, 1, 1)
    model = Halved(mean=3.0, std=0.2, bias=0.05, spread=0.3)
    found = evaluate_autoencoder(model, images.split(50), Judges())
    variance = images.double().var((0, 2, 3), correction=0) + 0.09
    assert found.latent_mean.tolist() == pytest.approx(images.double().mean((0, 2, 3)).tolist(), abs=0.01)
    assert found.latent_std.tolist() == pytest.approx(variance.sqrt().tolist(), rel=0.02)
    assert found.scores["latent_std"] == pytest.approx(
        (found.latent_std**2).mean().add(found.latent_mean.var(correction=0)).sqrt().item() / 0.2, rel=1e-4
    )
    set_statistics(model, found, kind)
    again = evaluate_autoencoder(model, images.split(50), Judges())
    assert again.scores["latent_mean"] == pytest.approx(0, abs=1e-5)
    assert again.scores["latent_std"] == pytest.approx(1, rel=1e-5)
    assert (model.latent_std.unique().numel() == 1) == (kind == "scalar")
    assert again.scores["psnr"] == pytest.approx(found.scores["psnr"], rel=1e-3)  # pictures stay as they were


def test_pictures_are_different_ones_and_as_many_as_asked(shards: Path) -> None:
    parts = list(pictures(shards, 16, 40))
    images = torch.cat(parts)
    assert images.shape == (40, 3, 16, 16) and [len(part) for part in parts] == [16, 16, 8]
    every = torch.cat(list(pictures(shards, 16, 48)))
    stored = fixed_batch(ShardReader(shards), DataConfig(str(shards), 16), 48).image
    assert sorted(x.sum().item() for x in every) == sorted(x.sum().item() for x in stored)  # each once
    assert torch.equal(every[:40], images)
    with pytest.raises(ValueError, match="has 48 pictures"):
        pictures(shards, 16, 49)


def test_the_command(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    words = ["autoencoder", str(models["autoencoder"]), str(shards), "--count", "12", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*words, "--features", str(models["contrastive"]), "--statistics", "scalar"])
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert {"psnr", "ssim", "random_distance", "rfid", "latent_mean", "latent_std"} <= scores.keys()
    assert scores["extractor"] == f"image tower of {models['contrastive']}" and "psnr" in result.output
    (before,) = load_model(models["autoencoder"]).require("autoencoder")
    written = load_model(tmp_path / "o" / "model")
    (after,) = written.require("autoencoder")
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert changed == {"latent_mean", "latent_std"} and written.settings["size"] == 16
    refused = CliRunner().invoke(app, [*words[:3], "--count", "2", "--statistics", "scalar"])
    assert isinstance(refused.exception, ValueError) and "give --out" in str(refused.exception)

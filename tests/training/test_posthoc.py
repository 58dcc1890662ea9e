"""An average made after training is the one that would have been tracked."""

import itertools
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoints.files import newest_valid, read_tensors, steps
from ldm.checkpoints.load import load_model
from ldm.training.ema import EMA, gamma, sigma_prefix
from ldm.training.posthoc import (
    coefficients,
    inner_product,
    reconstruct,
    save_average,
    save_snapshot,
    snapshots,
    tracked,
)
from ldm.training.run import run
from tests.conftest import tiny_config

TRACKED = (0.05, 0.10)
WANTED = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


def profile(step: float, exponent: float, tau: np.ndarray) -> np.ndarray:
    return np.where(tau <= step, (exponent + 1) * tau**exponent / step ** (exponent + 1), 0.0)


@pytest.mark.parametrize(
    ("one", "two"),
    list(itertools.combinations_with_replacement([(40.0, 16.97), (40.0, 6.94), (100.0, 16.97), (70.0, 0.3)], 2)),
)
def test_inner_products_are_their_integrals(one: tuple[float, float], two: tuple[float, float]) -> None:
    end = min(one[0], two[0])
    nodes, weights = np.polynomial.legendre.leggauss(200)  # over [0, end], where neither is cut off
    tau = end * (nodes + 1) / 2
    integral = end / 2 * np.sum(weights * profile(*one, tau) * profile(*two, tau))
    assert inner_product(*one, *two) == pytest.approx(integral, rel=1e-6)
    assert inner_product(*two, *one) == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("sigma", WANTED)
def test_the_solution_is_the_nearest_profile(sigma: float) -> None:
    """Against least squares over a grid of 200,000 points, which knows nothing of the inner products."""
    kept = [(float(step), gamma(s)) for step in (25, 50, 75, 100) for s in TRACKED]
    wanted = (100.0, gamma(sigma))
    x, error = coefficients(kept, wanted)
    tau = (np.arange(200_000) + 0.5) / 2000
    basis, target = np.stack([profile(*k, tau) for k in kept], axis=1), profile(*wanted, tau)
    best, *_ = np.linalg.lstsq(basis, target, rcond=None)
    np.testing.assert_allclose(x, best / best.sum(), rtol=2e-3, atol=2e-4)
    left = np.linalg.norm(basis @ x - target) / np.linalg.norm(target)
    assert error == pytest.approx(left, rel=1e-2, abs=1e-5) and x.sum() == pytest.approx(1)


def walk(out: Path, steps: int, every: int) -> dict[float, torch.Tensor]:
    """Weights that settle while they shiver, with snapshots in `out`; -> the averages of WANTED, tracked directly."""
    random = torch.Generator().manual_seed(2)
    module = nn.Linear(50, 1, bias=False)
    ends = torch.randn(50, generator=random)
    few, all_ = EMA(module, 0.0, sigmas=TRACKED), EMA(module, 0.0, sigmas=WANTED)
    for n in range(steps):
        noise = 0.1 * torch.randn(50, generator=random)
        module.weight.data.copy_(ends * (1 - np.exp(-3 * n / steps)) + noise)
        few.update(n), all_.update(n)
        if (n + 1) % every == 0:
            save_snapshot({"denoiser": few}, out, n + 1)
    return {sigma: all_.under(sigma_prefix(sigma))["weight"] for sigma in WANTED}


def test_an_average_made_later_is_the_tracked_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    direct = walk(tmp_path, steps=2000, every=100)
    for sigma, expected in direct.items():
        made = reconstruct(tmp_path, sigma)["denoiser"]["weight"]
        error = (made - expected).norm() / expected.norm()
        assert error < {0.05: 1e-6, 0.1: 1e-6, 0.25: 1e-2}.get(sigma, 1e-3), (sigma, error)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1 and "too few snapshots for the width 0.25" in warned[0]
    apart = (direct[0.05] - direct[0.25]).norm() / direct[0.05].norm()
    assert apart > 0.05  # so the averages are not all the same thing

    early = reconstruct(tmp_path, 0.07, step=1000)["denoiser"]["weight"]  # of what there was by then
    for folder in steps(tmp_path / "snapshots")[10:]:
        shutil.rmtree(folder)
    assert torch.equal(reconstruct(tmp_path, 0.07)["denoiser"]["weight"], early)


def test_too_few_snapshots_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    walk(tmp_path, steps=20, every=20)
    reconstruct(tmp_path, 0.02)
    assert "too few snapshots for the width 0.02" in caplog.text


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruct(tmp_path, 0.1)
    walk(tmp_path, steps=20, every=10)
    with pytest.raises(ValueError, match="no snapshot of step 15, but of 10, 20"):
        reconstruct(tmp_path, 0.1, step=15)
    with pytest.raises(ValueError, match=r"below 0\.2887, not 0\.4"):
        reconstruct(tmp_path, 0.4)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        tracked(tmp_path, 0.9)
    file = tmp_path / "snapshots" / "step-00000010" / "denoiser.sigma=0.05.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"denoiser\.sigma=0\.05\.safetensors is altered"):
        snapshots(tmp_path)


@pytest.mark.parametrize("kind", ["autoencoder", "contrastive"])
def test_a_run_becomes_a_model_of_another_average(kind: str, shards: Path, tmp_path: Path) -> None:
    """contrastive trains one part that holds two components, and a temperature that neither has."""
    out = tmp_path / "run"
    run(tiny_config(kind, out, shards, "snapshot_steps=1", "ema_decays=[0.1, 0.05]", "optimizer.lr=0.01"))
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    kept, _ = read_tensors(folder / "train" / "averages.safetensors")
    cases = {"sigma=0.1/": reconstruct(out, 0.1), "decay=0.1/": tracked(out, 0.1)}
    part = {"autoencoder": "autoencoder", "contrastive": "clip"}[kind]
    for number, (prefix, averages) in enumerate(cases.items()):
        model = load_model(save_average(out, averages, tmp_path / str(number)))
        before = load_model(out)
        assert model.settings == before.settings and model.components.keys() == before.components.keys()
        for name, component in model.components.items():
            inside = f"{part}.{prefix}" if part == name else f"{part}.{prefix}{name}."
            old = dict(before.components[name].named_parameters())
            for n, value in component.named_parameters():
                torch.testing.assert_close(value, kept[inside + n], rtol=1e-5, atol=1e-6)
            assert any(not torch.equal(value, old[n]) for n, value in component.named_parameters())
    with pytest.raises(ValueError, match=r"no average of decay 0\.75"):
        tracked(out, 0.75)
    with pytest.raises(ValueError, match="none of the averages"):
        save_average(out, {"other": {"x": torch.zeros(1)}}, tmp_path / "no")

"""How training draws its levels and weighs their errors, against the papers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.objective import WEIGHTINGS, squared_or_huber
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.types import Conditioning

PUBLISHED = {  # the weight of the squared error of x0, as a function of the SNR
    "min_snr": lambda snr: snr.clamp(max=5),
    "soft_min_snr": lambda snr: 1 / (1 / snr + 1 / 5),
    "p2": lambda snr: snr / (1 + snr) ** 0.5,  # on eps: 1 / (1 + SNR)^gamma
    "edm": lambda snr: 1 + snr,  # (sigma^2 + 1) / sigma^2
    "debiased": lambda snr: snr / snr.sqrt(),  # on eps: 1 / sqrt(SNR)
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weightings_against_their_papers(weighting: str, prediction: str) -> None:
    diffusion = Diffusion.from_config(DiffusionConfig(prediction=prediction, weighting=weighting, p2_gamma=0.5))
    level = diffusion.levels(torch.linspace(0.01, 0.99, 40, dtype=torch.float64))
    alpha, sigma = level.alpha, level.sigma
    # how far x0 moves when the output does, squared, from the definition of each prediction
    slope = {
        "eps": sigma / alpha,
        "x0": torch.ones_like(alpha),
        "v": sigma,
        "flow": sigma / (alpha + sigma),
    }[prediction]
    expected = PUBLISHED[weighting]((alpha / sigma) ** 2) * slope**2
    torch.testing.assert_close(diffusion.weight(level), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_are_finite_at_both_ends(weighting: str) -> None:
    for prediction in ("x0", "v", "flow"):
        config = DiffusionConfig(schedule="flow", prediction=prediction, weighting=weighting)
        diffusion = Diffusion.from_config(config)
        assert diffusion.weight(diffusion.schedule.at(torch.tensor([0.0, 1000.0]))).isfinite().all()


def density(timesteps: str, **more: float) -> tuple[Tensor, Tensor]:
    """Times of a flow at 20,000 even quantiles, and those quantiles."""
    config = DiffusionConfig(schedule="flow", prediction="flow", timesteps=timesteps, **more)  # type: ignore[arg-type]
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return Diffusion.from_config(config).levels(u).sigma, u


def test_logit_normal_has_its_mean_and_spread() -> None:
    time, _ = density("logit_normal", logit_mean=0.5, logit_std=0.8)
    logit = time.logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-6) and logit.std().item() == pytest.approx(0.8, abs=1e-3)


def test_cosmap_has_the_published_density() -> None:
    """p(t) = 2 / (pi (1 - 2 t + 2 t^2)), whose integral is known."""
    time, u = density("cosmap")
    cdf = 2 / math.pi * (torch.atan(2 * time - 1) + math.pi / 4)
    torch.testing.assert_close(cdf, u, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_is_a_distribution_on_all_times(scale: float) -> None:
    time, u = density("mode", mode_scale=scale)
    assert (time.diff() < 0).all() and time.min() >= 0 and time.max() <= 1
    torch.testing.assert_close(time, 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u))


def test_huber_is_squared_for_small_errors_and_straight_for_large_ones() -> None:
    error = torch.tensor([1e-4, 0.01, 1.0, 1e4], dtype=torch.float64)
    expected = 2 * 0.1 * ((error**2 + 0.01).sqrt() - 0.1)
    torch.testing.assert_close(squared_or_huber(error, 0.1), expected, rtol=1e-6, atol=0)
    assert squared_or_huber(error, 0.0).equal(error**2)
    small = torch.tensor(1e-5, dtype=torch.float32)
    torch.testing.assert_close(squared_or_huber(small, 0.1), small**2, rtol=1e-3, atol=0)


def test_offset_and_perturbation_reach_the_network() -> None:
    """The offset is part of the target, the perturbation is not."""
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    u, given = torch.tensor([0.3, 0.8]), {}

    def more(purpose: str, shape: tuple[int, ...]) -> Tensor:
        given[purpose] = torch.randn(2, *shape)
        return given[purpose]

    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    diffusion = Diffusion.from_config(DiffusionConfig(noise_offset=0.1, input_perturbation=0.2))
    loss = diffusion.loss(network, x0, Conditioning(), noise=noise, u=u, more=more)
    assert given["noise offset"].shape == (2, 3, 1, 1)
    target = noise + 0.1 * given["noise offset"]
    level = diffusion.levels(u).like(x0)
    expected = level.alpha * x0 + level.sigma * (target + 0.2 * given["input perturbation"])
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(loss, target.square().flatten(1).mean(1))

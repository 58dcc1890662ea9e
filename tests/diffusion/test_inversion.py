"""Inversion: ddim leads back to the picture, and the noise is that of the exact ODE."""

import math

import pytest
import torch
from torch import nn

from ldm.diffusion.inversion import invert
from ldm.diffusion.noise import FlowSchedule, discrete, zero_terminal_snr
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import ddim
from ldm.types import Conditioning

FLOW = FlowSchedule()
SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
TRAJECTORIES = [
    (SD, "trailing"),
    (SD, "leading"),  # ends at sigma > 0
    (SD, "karras"),
    (zero_terminal_snr(SD), "trailing"),  # starts at alpha = 0
    (FLOW, "trailing"),
    (FLOW, "linspace"),
    (discrete("cosine", 1000, 0.0, 0.0), "trailing"),
]


def mixture(x, level, means=(-1.0, 0.5, 1.2), spread=0.3):
    """E[x0 | x_t] of three equal normal distributions."""
    variance = level.alpha**2 * spread**2 + level.sigma**2
    away = x[..., None] - level.alpha * x.new_tensor(means)
    weight = (-away.square() / (2 * variance)).softmax(-1)
    return (weight * (x.new_tensor(means) + level.alpha * spread**2 / variance * away)).sum(-1)


def last(steps):
    return list(steps)[-1].x


def missed(denoise, x0, levels, **options):
    """How far ddim from the noise that is found ends from x0."""
    return (last(ddim(denoise, last(invert(denoise, x0, levels, **options)), levels)) - x0).abs().max().item()


@pytest.fixture
def pictures():
    """Values of the mixture and between its parts: [4, 1, 4, 4]."""
    return torch.linspace(-1.5, 1.7, 64, dtype=torch.float64).view(4, 1, 4, 4)


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize(("schedule", "spacing"), TRAJECTORIES)
def test_the_round_trip_is_exact(gaussian, x, pictures, schedule, spacing, steps):
    """To rounding, within 30 iterations a step; plain inversion is far from that."""
    levels = schedule.trajectory(steps, spacing)
    for denoise, x0 in ((gaussian.denoise, gaussian.mu + gaussian.s * x), (mixture, pictures)):
        exactly = missed(denoise, x0, levels, iterations=30, tolerance=1e-12)
        assert exactly < 1e-9
        assert missed(denoise, x0, levels, iterations=0) > 1e-3


@pytest.mark.parametrize(("schedule", "spacing"), TRAJECTORIES)
def test_few_evaluations_are_enough(pictures, schedule, spacing):
    """25 steps, defaults: fewer than 8 evaluations a step for 1e-5 on data with sharp, separate parts."""
    levels, calls = schedule.trajectory(25, spacing), []

    def denoise(x, level):
        calls.append(level)
        return mixture(x, level)

    found = last(invert(denoise, pictures, levels))
    assert len(calls) < 8 * 25
    assert (last(ddim(mixture, found, levels)) - pictures).abs().max() < 1e-4
    calls.clear()
    list(invert(denoise, pictures, levels, iterations=0))
    assert len(calls) == 25 + 1


def test_steps_run_from_clean_to_noisy_and_those_of_ddim_are_the_same(pictures):
    levels = SD.trajectory(20, "trailing")
    up = list(invert(mixture, pictures, levels, iterations=30, tolerance=1e-13))
    down = list(ddim(mixture, up[-1].x, levels))
    assert [step.index for step in up] == list(range(20))
    for k, step in enumerate(down[:-1]):
        torch.testing.assert_close(step.x, up[18 - k].x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.x0, up[19 - k].x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("iterations", [0, 30])
def test_the_noise_is_that_of_the_exact_ode_to_first_order(gaussian, x, iterations):
    """Halving the step halves the error, on a smooth stretch of the flow."""
    x0, errors = gaussian.mu + gaussian.s * x, []
    for steps in (80, 160):
        levels = FLOW.at(torch.linspace(900, 50, steps + 1, dtype=torch.float64))
        found = last(invert(gaussian.denoise, x0, levels, iterations=iterations, tolerance=1e-13))
        errors.append((found - gaussian.end(x0, levels[-1], levels[0])).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)
    assert errors[1] < 0.02


def test_plain_inversion_misses_by_the_first_order(gaussian, x):
    x0 = gaussian.mu + gaussian.s * x
    coarse, fine = (missed(gaussian.denoise, x0, FLOW.trajectory(n, "trailing"), iterations=0) for n in (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


def test_plain_inversion_takes_the_eps_below(pictures):
    """Written out: alpha' / alpha * x + (sigma' - alpha' / alpha * sigma) * eps; from clean, eps of the mean above."""
    levels = SD.trajectory(5, "trailing")
    first, second, *_ = invert(mixture, pictures, levels, iterations=0)

    def eps(x, level):
        return (x - level.alpha * mixture(x, level)) / level.sigma

    low, high = levels[4], levels[3]
    x = low.alpha * pictures + low.sigma * eps(low.alpha * pictures, low)
    torch.testing.assert_close(first.x, x)
    grown = high.alpha / low.alpha
    torch.testing.assert_close(second.x, grown * x + (high.sigma - grown * low.sigma) * eps(x, low))


def test_the_whole_way_is_the_exact_noise_in_the_limit(gaussian, x):
    x0 = gaussian.mu + gaussian.s * x
    for schedule in (SD, zero_terminal_snr(SD), FLOW):
        levels = schedule.trajectory(1000, "trailing")
        found = last(invert(gaussian.denoise, x0, levels, tolerance=1e-10))
        assert (found - gaussian.end(x0, levels[-1], levels[0])).abs().max() < 0.02


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, t, cond):
        return self.layers(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("scaled_linear", "eps"), ("scaled_linear", "v"), ("flow", "flow")]
)
def test_a_random_network_is_inverted_and_no_image_depends_on_another(schedule, prediction):
    torch.manual_seed(0)
    diffusion = Diffusion.from_config(DiffusionConfig(schedule=schedule, prediction=prediction))
    denoise = diffusion.denoise(Network().double().requires_grad_(False), Conditioning())
    levels, x0 = diffusion.trajectory(20), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    x0 = x0 * x0.new_tensor([0.2, 1.0, 3.0]).view(-1, 1, 1, 1)  # they settle at different times
    assert missed(denoise, x0, levels, iterations=40, tolerance=1e-13) < 1e-9
    assert missed(denoise, x0, levels, iterations=0) > 1e-3
    together = last(invert(denoise, x0, levels))
    for k in range(3):
        torch.testing.assert_close(last(invert(denoise, x0[k : k + 1], levels))[0], together[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_are_kept(pictures, dtype):
    levels = SD.trajectory(20, "trailing")
    steps = list(invert(mixture, pictures.to(dtype), levels))
    assert all(step.x.dtype == step.x0.dtype == dtype for step in steps)
    exact = last(invert(mixture, pictures, levels))
    assert (steps[-1].x.double() - exact).abs().max() < 100 * torch.finfo(dtype).eps


def test_what_does_not_settle_is_said(pictures, caplog):
    levels = SD.trajectory(10, "trailing")
    list(invert(mixture, pictures, levels, iterations=30))
    list(invert(mixture, pictures, levels, iterations=0))  # nobody asked for it to settle
    assert not caplog.records
    list(invert(mixture, pictures, levels, iterations=2))
    assert "was left moving by" in caplog.text and "after 2 iterations" in caplog.text


def test_what_cannot_be_inverted_is_refused(pictures):
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        next(invert(None, pictures, SD.trajectory(5, "trailing"), iterations=-1))
    with pytest.raises(ValueError, match="single step from pure noise to clean cannot be inverted"):
        next(invert(None, pictures, FLOW.trajectory(1, "trailing")))

"""The variational bound against numeric integrals, and against the entropy that it bounds."""

import math

import pytest
import torch

from ldm.diffusion.noise import DiscreteSchedule, discrete, zero_terminal_snr
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.variational import prior_bits, step_bits
from ldm.types import Conditioning

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
SHORT = DiscreteSchedule(torch.tensor([0.95, 0.8, 0.5, 0.2, 0.05], dtype=torch.float64))


def normal(x, mean, variance):
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def numeric_bits(p, q, x):
    """The integral of p log2(p / q), by the trapezoid rule."""
    return torch.trapezoid(p * (p.log2() - q.log2()), x).item()


def reverse(schedule, index, x0, x):
    """Mean and variance of q(x below | x, x0), by completing the square: one Gaussian times another."""
    here = schedule.alpha_bar[index].item()
    below = schedule.alpha_bar[index - 1].item()
    forward = here / below  # x = sqrt(forward) below + noise of variance 1 - forward
    precision = 1 / (1 - below) + forward / (1 - forward)
    mean = (math.sqrt(below) * x0 / (1 - below) + math.sqrt(forward) * x / (1 - forward)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("v", [None, -1.0, -0.3, 0.4, 1.0])
@pytest.mark.parametrize("index", [1, 2, 4])
def test_a_step_is_the_numeric_divergence(index, v):
    x0, estimate, x = 0.7, 0.2, -0.4
    mean, variance = reverse(SHORT, index, x0, x)
    guessed, _ = reverse(SHORT, index, estimate, x)
    forward = (1 - SHORT.alpha_bar[index] / SHORT.alpha_bar[index - 1]).item()
    share = 1.0 if v is None else (v + 1) / 2
    chosen = math.exp(share * math.log(forward) + (1 - share) * math.log(variance))
    grid = torch.linspace(mean - 12 * math.sqrt(variance), mean + 12 * math.sqrt(variance), 40_001, dtype=torch.float64)
    expected = numeric_bits(normal(grid, mean, variance), normal(grid, guessed, chosen), grid)
    shape = (1, 1, 1, 1)
    given = [torch.full(shape, value, dtype=torch.float64) for value in (x0, estimate)]
    found = step_bits(
        SHORT, torch.tensor([index]), *given, None if v is None else torch.full(shape, v, dtype=torch.float64)
    )
    assert found.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("v", "variance"), [(None, 0.05), (1.0, 0.05), (-1.0, (1 - 0.8 / 0.95) * 0.05 / 0.2)])
def test_the_last_step_is_a_density(v, variance):
    x0, estimate = torch.tensor([[[[0.7]]]]).double(), torch.tensor([[[[0.2]]]]).double()
    found = step_bits(SHORT, torch.tensor([0]), x0, estimate, None if v is None else torch.full_like(x0, v))
    expected = -math.log2(normal(x0, estimate, variance).item())
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_prior_is_the_numeric_divergence():
    x0 = torch.tensor([[[[0.7, -1.1]]]], dtype=torch.float64)
    grid = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    left = SHORT.alpha_bar[-1].item()
    each = [
        numeric_bits(normal(grid, math.sqrt(left) * v, 1 - left), normal(grid, 0.0, 1.0), grid)
        for v in x0.flatten().tolist()
    ]
    assert prior_bits(SHORT, x0).item() == pytest.approx(sum(each) / 2, abs=1e-9)
    assert prior_bits(zero_terminal_snr(SD), x0).item() == 0


def bound(schedule, gaussian, v):
    """The whole bound for Gaussian data and its exact denoiser, over many samples at once: bits per dimension."""
    generator = torch.Generator().manual_seed(0)
    x0 = gaussian.mu + gaussian.s * torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=generator)
    total = prior_bits(schedule, x0)
    for index in range(len(schedule.alpha_bar)):
        level = schedule.at(float(index))
        x = level.alpha * x0 + level.sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        given = None if v is None else torch.full_like(x0, v(index))
        total = total + step_bits(schedule, torch.tensor([index]), x0, gaussian.denoise(x, level), given)
    return total.item(), x0


def test_the_bound_is_above_the_entropy_and_near_it(gaussian):
    """An exact network on a fine chain loses little with the largest variance, which is about the true one at the end.

    With the smallest, the last steps lose 0.7 bits: between the two lies what a network can learn.
    """
    found, x0 = bound(SD, gaussian, None)
    entropy = -normal(x0, gaussian.mu, gaussian.s**2).log2().mean().item()
    assert 0 < found - entropy < 0.03
    assert 0.5 < bound(SD, gaussian, lambda index: -1.0)[0] - entropy < 0.8


def test_a_better_variance_makes_a_better_bound(gaussian):
    """With the exact variance of the reverse step, between the two ends, the bound is tighter than at both."""
    schedule = discrete("linear", 20, 0.02, 0.3)

    def exact(index):
        """The variance that x below has given x, posterior variance of x0 included, on the scale of -1..1."""
        here = schedule.alpha_bar[index].item()
        below = schedule.alpha_bar[index - 1].item() if index else 1.0
        large = 1 - here / below
        small = large * (1 - below) / (1 - here)
        uncertain = gaussian.s**2 * (1 - here) / (here * gaussian.s**2 + 1 - here)
        true = small + (math.sqrt(below) * large / (1 - here)) ** 2 * uncertain
        if not index:
            second = schedule.alpha_bar[1].item()
            small = (1 - second / here) * (1 - here) / (1 - second)
        return 2 * math.log(true / small) / math.log(large / small) - 1

    best, x0 = bound(schedule, gaussian, exact)
    entropy = -normal(x0, gaussian.mu, gaussian.s**2).log2().mean().item()
    assert entropy < best
    for other in (lambda index: -1.0, lambda index: 1.0):
        assert best < bound(schedule, gaussian, other)[0]


def network_of(gaussian, diffusion, v):
    def network(x, t, cond):
        level = diffusion.schedule.at(t.double()).like(x)
        eps = (x - level.alpha * gaussian.denoise(x, level)) / level.sigma
        return torch.cat([eps, v.expand_as(eps)], dim=1)

    return network


def test_training_on_the_bound_estimates_it(gaussian):
    """The mean loss over the levels, objective vlb, is the bound without its prior."""
    diffusion = Diffusion.from_config(
        DiffusionConfig(schedule="linear", train_steps=20, beta_start=0.02, beta_end=0.3, objective="vlb",
                        variance="learned_range")
    )  # fmt: skip
    expected, x0 = bound(diffusion.schedule, gaussian, lambda index: 0.2)
    rows = x0.expand(20, -1, -1, -1)
    noise = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    network = network_of(gaussian, diffusion, torch.tensor(0.2, dtype=torch.float64))
    u = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    loss = diffusion.loss(network, rows, Conditioning(), noise=noise, u=u)
    assert loss.mean().item() + prior_bits(diffusion.schedule, x0).item() == pytest.approx(expected, abs=0.05)


def test_hybrid_teaches_the_mean_by_the_simple_loss_alone(gaussian):
    settings = {"schedule": "linear", "train_steps": 20, "beta_start": 0.02, "beta_end": 0.3}
    x0, noise = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = torch.tensor([0.01, 0.3, 0.6, 0.99], dtype=torch.float64)

    def gradients(**more):
        diffusion = Diffusion.from_config(DiffusionConfig(**settings, **more))
        channels = 2 if diffusion.config.variance == "learned_range" else 1
        scale = torch.ones(1, channels, 1, 1, dtype=torch.float64, requires_grad=True)

        def network(x, t, cond):
            return scale * torch.cat([x, 0.3 * x], dim=1)[:, :channels]

        loss = diffusion.loss(network, x0, Conditioning(), noise=noise, u=u)
        loss.mean().backward()
        return loss.detach(), scale.grad.flatten()

    plain, simple = gradients()
    both, hybrid = gradients(objective="hybrid", variance="learned_range")
    alone, whole = gradients(objective="vlb", variance="learned_range")
    assert torch.allclose(both, plain + 0.001 * alone)
    assert hybrid[0] == pytest.approx(simple[0].item()) and hybrid[1] == pytest.approx(0.001 * whole[1].item())
    assert whole[0].abs() > 1e-3 and whole[1].abs() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "hybrid"}, "objective 'hybrid' does not go with variance 'fixed'"),
        ({"variance": "learned_range"}, "objective 'simple' does not go with variance 'learned_range'"),
        (
            {"objective": "vlb", "schedule": "flow", "prediction": "flow"},
            "objective 'vlb' needs a chain .*, not 'flow'",
        ),
        ({"objective": "vbl"}, "unknown objective 'vbl', did you mean 'vlb'"),
    ],
)
def test_pairs_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_config(DiffusionConfig(**settings))

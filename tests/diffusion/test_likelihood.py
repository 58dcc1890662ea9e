"""Likelihoods against exact densities: what the exact ODE makes of unit noise."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ldm.diffusion.likelihood import bits_per_dim, log_likelihood
from ldm.diffusion.noise import FlowSchedule, discrete, zero_terminal_snr
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.types import Conditioning

FLOW = FlowSchedule()
SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
ZERO = zero_terminal_snr(SD)
TRAJECTORIES = [
    (SD, "linspace"),
    (SD, "trailing"),
    (SD, "karras"),
    (SD, "leading"),
    (ZERO, "linspace"),
    (FLOW, "linspace"),
    (FLOW, "karras"),
]


def ends(levels):
    """The first level, and the last with noise."""
    return levels[0], levels[int((levels.sigma > 0).sum()) - 1]


def pushed(mean, spread, levels):
    """Where the ODE of data N(mean, spread^2) takes N(0, 1) from the first level: the density of x / alpha."""
    first, low = ends(levels)
    widths = [(level.alpha**2 * spread**2 + level.sigma**2).sqrt() for level in (first, low)]
    stretch = widths[1] / widths[0] / low.alpha
    return Normal(mean - stretch * first.alpha * mean, stretch)


class Correlated:
    """Data N(mu, cov) over all the values of a picture, each with its own mean and spread."""

    def __init__(self, shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(shape)
        factor = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
        self.mu = torch.randn(size, dtype=torch.float64, generator=generator)
        self.variances, self.axes = torch.linalg.eigh(factor @ factor.T + 0.02 * torch.eye(size, dtype=torch.float64))
        self.shape = shape

    def denoise(self, x, level):
        away = (x.flatten(1) - level.alpha * self.mu.to(x)) @ self.axes.to(x)
        gain = level.alpha * self.variances / (level.alpha**2 * self.variances + level.sigma**2)
        return (self.mu.to(x) + (gain.to(x) * away) @ self.axes.T.to(x)).view_as(x)

    def log_prob(self, x, levels):
        """Axis by axis, on which the values are independent."""
        density = pushed(self.mu @ self.axes, self.variances.sqrt(), levels)
        return density.log_prob(x.flatten(1) @ self.axes).sum(1)

    def pictures(self, count):
        drawn = torch.randn(count, len(self.mu), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return (self.mu + (drawn * self.variances.sqrt()) @ self.axes.T).view(count, *self.shape)


def bits(found, expected, size):
    """The largest difference, in bits a value."""
    return (bits_per_dim(found, size) - bits_per_dim(expected, size)).abs().max().item()


@pytest.mark.parametrize(("schedule", "spacing"), TRAJECTORIES)
def test_gaussian_data_has_its_exact_density(gaussian, x, schedule, spacing):
    """50 steps, within 1e-4 bits a value."""
    levels, x0 = schedule.trajectory(50, spacing), gaussian.mu + gaussian.s * x
    with torch.no_grad():
        found = log_likelihood(gaussian.denoise, x0, levels, at=schedule.at_ratio)
    expected = pushed(gaussian.mu, gaussian.s, levels).log_prob(x0).flatten(1).sum(1)
    assert bits(found.nats, expected, 16) < 1e-4
    assert torch.equal(found.error, torch.zeros(4, dtype=torch.float64))


def test_the_error_is_of_order_four(gaussian, x):
    """On a smooth stretch, in both coordinates: ratios from 0.3 to 4."""
    x0, errors = gaussian.mu + gaussian.s * x, []
    for steps in (40, 80):
        levels = FLOW.at_ratio(torch.linspace(math.log(4), math.log(0.3), steps + 1, dtype=torch.float64).exp())
        expected = pushed(gaussian.mu, gaussian.s, levels).log_prob(x0).flatten(1).sum(1)
        errors.append(bits(log_likelihood(gaussian.denoise, x0, levels, at=FLOW.at_ratio).nats, expected, 16))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("schedule", [SD, ZERO, FLOW])
def test_values_that_depend_on_each_other(schedule):
    data = Correlated((3, 2, 2))
    x0, levels = data.pictures(5), schedule.trajectory(60, "linspace")
    found = log_likelihood(data.denoise, x0, levels, at=schedule.at_ratio)
    assert bits(found.nats, data.log_prob(x0, levels), 12) < 1e-4


MEANS, SPREADS, SHARES = (-1.0, 0.5, 1.2), (0.2, 0.3, 0.25), (0.3, 0.5, 0.2)


def parts(x, level):
    """The mixture's parts at a level: densities [..., 3] weighted by their shares, means, variances of x0 given x."""
    mean, spread, share = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, SPREADS, SHARES))
    return share, Normal(level.alpha * mean, (level.alpha**2 * spread**2 + level.sigma**2).sqrt()), mean, spread


def mixed(x, level):
    """E[x0 | x_t]."""
    share, normal, mean, spread = parts(x, level)
    weight = (share.log() + normal.log_prob(x[..., None])).softmax(-1)
    gain = level.alpha * spread**2 / normal.variance
    return (weight * (mean + gain * (x[..., None] - normal.mean))).sum(-1)


def exact_mixture(y, levels):
    """In one dimension the ODE carries quantiles over: log N(x) + log p_low(y) - log p_first(x), x of y's quantile."""
    first, low = ends(levels)
    share, normal, _, _ = parts(y, low)
    quantile = (share * normal.cdf(low.alpha * y[:, None])).sum(1)
    density = (share * normal.log_prob(low.alpha * y[:, None]).exp()).sum(1).log() + low.alpha.log()
    share, normal, _, _ = parts(y, first)
    left, right = torch.full_like(y, -12.0), torch.full_like(y, 12.0)
    for _ in range(80):
        middle = (left + right) / 2
        under = (share * normal.cdf(middle[:, None])).sum(1) < quantile
        left, right = torch.where(under, middle, left), torch.where(under, right, middle)
    x = (left + right) / 2
    return Normal(0.0, 1.0).log_prob(x) + density - (share * normal.log_prob(x[:, None]).exp()).sum(1).log()


@pytest.mark.parametrize("schedule", [SD, ZERO, FLOW])
def test_a_mixture_has_its_exact_density(schedule):
    """Within its parts and between them."""
    y, levels = torch.linspace(-1.6, 1.9, 36, dtype=torch.float64), schedule.trajectory(200, "linspace")
    found = log_likelihood(mixed, y.view(-1, 1, 1, 1), levels, at=schedule.at_ratio)
    assert bits(found.nats, exact_mixture(y, levels), 1) < 1e-4
    if schedule is FLOW:  # from pure noise it is the data's own density, but for its noise of 1/1000
        truth = torch.tensor(SHARES) * Normal(torch.tensor(MEANS), torch.tensor(SPREADS)).log_prob(y[:, None]).exp()
        assert bits(found.nats, truth.sum(1).log(), 1) < 1e-3


def test_probes_are_exact_where_values_do_not_depend_on_each_other(gaussian, x):
    """v^T J v is the trace of a diagonal J, whatever the signs v."""
    levels = SD.trajectory(10, "linspace")
    exact, one, two = (
        log_likelihood(gaussian.denoise, x, levels, at=SD.at_ratio, probes=probes, seeds=range(4))
        for probes in (0, 1, 2)
    )
    torch.testing.assert_close(one.nats, exact.nats, rtol=1e-10, atol=1e-10)
    assert one.error.isnan().all() and (two.error < 1e-9).all()


def test_probes_are_unbiased_with_the_error_that_is_told():
    """40 images of 400 probes: each within 5 errors (1 false alarm in 40000 runs), and these errors are of unit size.

    The sum of 40 squared standard scores is in 12 ... 90 but for 1 run in 10^4.
    """
    data = Correlated((1, 3, 3))
    x0, levels = data.pictures(40), FLOW.trajectory(10, "linspace")
    exact = log_likelihood(data.denoise, x0, levels, at=FLOW.at_ratio)
    found = log_likelihood(data.denoise, x0, levels, at=FLOW.at_ratio, probes=400, seeds=range(40))
    score = (found.nats - exact.nats) / found.error
    assert score.abs().max() < 5
    assert 12 < score.square().sum().item() < 90
    assert (found.error > 0.01).all()


def test_an_image_has_the_same_probes_alone_and_in_a_batch():
    data = Correlated((1, 3, 3))
    x0, levels = data.pictures(3), FLOW.trajectory(10, "linspace")

    def found(rows, seeds):
        return log_likelihood(data.denoise, x0[rows], levels, at=FLOW.at_ratio, probes=3, seeds=seeds).nats

    together = found(slice(0, 3), [5, 6, 7])
    for k, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(found(slice(k, k + 1), [seed])[0], together[k], rtol=1e-12, atol=1e-12)
        assert abs(found(slice(k, k + 1), [seed + 1])[0] - together[k]) > 1e-3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, cond):
        return self.layer(x).tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_its_own_type_without_gradients_to_its_weights(dtype):
    """The exact divergence is the limit of the probes for a network that is no exact denoiser, too."""
    torch.manual_seed(0)
    diffusion = Diffusion.from_config(DiffusionConfig(schedule="flow", prediction="flow"))
    network, x0 = Network().to(dtype), torch.randn(2, 2, 3, 3).to(dtype)
    seen = []

    def told(x, t, cond):
        seen.append(x.dtype)
        return network(x, t, cond)

    denoise, levels = diffusion.denoise(told, Conditioning()), diffusion.trajectory(6, "linspace")
    with torch.no_grad():
        exact = log_likelihood(denoise, x0, levels, at=diffusion.schedule.at_ratio)
        found = log_likelihood(denoise, x0, levels, at=diffusion.schedule.at_ratio, probes=200, seeds=[1, 2])
    assert set(seen) == {dtype} and exact.nats.dtype == torch.float64
    assert ((found.nats - exact.nats).abs() < 5 * found.error).all()
    assert not exact.nats.requires_grad and network.layer.weight.grad is None


def test_bits_of_even_bytes_are_eight():
    """Bytes as -1 ... 1, all equally likely, with noise of their distance: density 1 / (2 + 2 / 255) a value."""
    size, width = 12, 2 + 2 / 255
    nats = torch.full((3,), -size * math.log(width), dtype=torch.float64)
    assert bits_per_dim(nats, size, step=2 / 255).tolist() == pytest.approx([8.0] * 3)
    assert bits_per_dim(nats, size).tolist() == pytest.approx([math.log2(width)] * 3)


def test_what_has_no_likelihood_is_refused(gaussian, x):
    with pytest.raises(ValueError, match="at least 2 levels with noise, got 1"):
        log_likelihood(gaussian.denoise, x, FLOW.trajectory(1, "trailing"), at=FLOW.at_ratio)
    with pytest.raises(ValueError, match="a seed for each of 4 images, got 2 probes and 3 seeds"):
        log_likelihood(gaussian.denoise, x, SD.trajectory(5, "trailing"), at=SD.at_ratio, probes=2, seeds=[1, 2, 3])

"""Guidance by gradients on Gaussian data, where the posterior of what is observed is known exactly."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ldm.diffusion.guidance import guided
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.steering import classifier_guided, estimate_guided
from ldm.types import Conditioning

SPACES = {
    f"{schedule}-{prediction}{'-zero' * zero}": Diffusion.from_config(
        DiffusionConfig(schedule=schedule, prediction=prediction, zero_snr=zero)
    )
    for schedule, prediction, zero in [
        ("scaled_linear", "eps", False),
        ("cosine", "eps", False),
        ("scaled_linear", "x0", False),
        ("scaled_linear", "v", True),
        ("scaled_linear", "x0", True),
        ("scaled_linear", "flow", False),
        ("flow", "flow", False),
        ("flow", "v", False),
        ("flow", "x0", False),
    ]
}
NONE = Conditioning()
SEEN, BLUR = 1.1, 0.5  # y, and the standard deviation of its noise


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


@pytest.fixture
def posterior(gaussian):
    """The data given y = x0 + noise: of the same kind."""
    precision = gaussian.s**-2 + BLUR**-2
    mean = (gaussian.mu / gaussian.s**2 + SEEN / BLUR**2) / precision
    return type(gaussian)(mean, precision**-0.5)


def exact(gaussian, space):
    """The network that knows the data."""
    return lambda x, t, cond: space.output_of(gaussian.denoise(x, space.schedule.at(t)), x, t)


def left(gaussian, level):
    """The variance of x0 given x_t."""
    return (gaussian.s * level.sigma / gaussian.spread(level)) ** 2


def of_estimate(gaussian, space):
    """log p(y | x_t), told the exact estimate of x0."""

    def score(x0, t):
        level = space.schedule.at(t).like(x0)
        return Normal(x0, (left(gaussian, level) + BLUR**2).sqrt()).log_prob(x0.new_tensor(SEEN)).flatten(1).sum(1)

    return score


def of_noisy(gaussian, space):
    """log p(y | x_t), as a classifier of noisy pictures says it."""
    score = of_estimate(gaussian, space)
    return lambda x, t: score(gaussian.denoise(x, space.schedule.at(t)), t)


def both(gaussian, space, scale=1.0):
    network = exact(gaussian, space)
    return (
        classifier_guided(network, space, of_noisy(gaussian, space), scale),
        estimate_guided(network, space, of_estimate(gaussian, space), scale),
    )


def test_scale_one_is_the_exact_posterior_at_every_level(gaussian, posterior, space, x):
    t = torch.tensor([0.7, 40.0, 500.0, 990.0], dtype=torch.float64)
    for network in both(gaussian, space):
        x0 = space.x0_of(network(x, t, NONE), x, t)
        torch.testing.assert_close(x0, posterior.denoise(x, space.schedule.at(t)), rtol=1e-8, atol=1e-8)


def test_the_shift_grows_with_the_scale_as_eps_says(gaussian, x):
    """Dhariwal & Nichol 2021, algorithm 2, with the gradient written out."""
    space = SPACES["scaled_linear-eps"]
    t = torch.full((4,), 600.0)
    level = space.schedule.at(t).like(x)
    gain = level.alpha * gaussian.s**2 / gaussian.spread(level) ** 2  # of the estimate with x
    gradient = gain * (SEEN - gaussian.denoise(x, level)) / (left(gaussian, level) + BLUR**2)
    for network in both(gaussian, space, scale=3.0):
        expected = exact(gaussian, space)(x, t, NONE) - 3.0 * level.sigma * gradient
        torch.testing.assert_close(network(x, t, NONE), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["flow-flow", "flow-x0", "scaled_linear-v-zero", "scaled_linear-x0-zero"])
def test_without_signal_nothing_moves(gaussian, x, name):
    """Also in a batch in which other images have some."""
    space = SPACES[name]
    last = 1000.0 if name.startswith("flow") else 999.0
    t = torch.tensor([last, 500.0, last, 500.0], dtype=torch.float64)
    plain = exact(gaussian, space)(x, t, NONE)
    for network in both(gaussian, space):
        moved = network(x, t, NONE) - plain
        assert torch.equal(moved[::2], torch.zeros_like(moved[::2]))
        assert (moved[1::2].abs() > 1e-3).all()


def moments(take, data, levels, at):
    """Mean and standard deviation at the end, exactly: see test_samplers_sde.moments."""
    steps = len(levels.t) - 1
    x = (levels[0].alpha * data.mu).repeat(2 * steps + 2)[:, None]
    x[1] += data.spread(levels[0])
    draws = iter(torch.eye(2 * steps + 2, dtype=torch.float64)[2:, :, None])
    with torch.no_grad():
        end = list(take(data.denoise, x, levels, noise=lambda: next(draws), at=at))[-1].x
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde"])
def test_guided_samples_have_the_moments_of_the_posterior(gaussian, posterior, space, name, way):
    """What the sampler makes of the posterior's own estimates, and so the posterior but for the sampler's own error.

    From alpha = 0 the first step is unguided, which moves the mean by about one step's worth.
    """
    levels, at = space.trajectory(150, "linspace"), space.schedule.at_ratio
    denoise = space.denoise(both(gaussian, space)[way], NONE)
    guided_data = SimpleNamespace(mu=posterior.mu, spread=posterior.spread, denoise=denoise)
    mean, spread = moments(SAMPLERS[name], guided_data, levels, at)
    own_mean, own_spread = moments(SAMPLERS[name], posterior, levels, at)
    assert mean == pytest.approx(own_mean, abs=1e-10 if levels.alpha[0] > 0 else 3e-3)
    assert spread == pytest.approx(own_spread, abs=1e-10)
    assert mean == pytest.approx(posterior.mu, abs=3e-3) and spread == pytest.approx(posterior.s, abs=0.03)


def test_the_sign_of_a_value_makes_a_truncated_normal(gaussian):
    """y = (x0 > 0): the ODE carries quantiles over, so the noise's even quantiles end at those of the posterior."""
    space = SPACES["flow-v"]

    def log_prob(x, t):
        level = space.schedule.at(t).like(x)
        return torch.special.log_ndtr(gaussian.denoise(x, level) / left(gaussian, level).sqrt()).flatten(1).sum(1)

    share = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    start = torch.special.ndtri(share).view(-1, 1, 1, 1)
    denoise = space.denoise(classifier_guided(exact(gaussian, space), space, log_prob, 1.0), NONE)
    end = list(SAMPLERS["dpmpp_2m"](denoise, start, space.trajectory(300)))[-1].x.flatten()
    below = Normal(0.0, 1.0).cdf(torch.tensor(-gaussian.mu / gaussian.s, dtype=torch.float64))
    expected = gaussian.mu + gaussian.s * torch.special.ndtri(below + share * (1 - below))
    assert (end - expected).abs().max() < 0.01
    assert (end > 0).all()


def test_it_goes_around_guidance_by_the_prompt(gaussian, x):
    space = SPACES["flow-v"]
    t = torch.full((4,), 400.0, dtype=torch.float64)
    cond, uncond = (Conditioning(context=torch.full((n, 1, 1), float(n), dtype=torch.float64)) for n in (4, 1))
    prompted = guided(lambda x, t, cond: x * cond.context.view(-1, 1, 1, 1), uncond, 2.0)
    plain = prompted(x, t, cond)
    torch.testing.assert_close(plain, 7 * x)
    level = space.schedule.at(t).like(x)
    moved = space.x0_of(classifier_guided(prompted, space, lambda x, t: x.flatten(1).sum(1), 0.3)(x, t, cond), x, t)
    torch.testing.assert_close(moved - space.x0_of(plain, x, t), 0.3 * level.sigma**2 / level.alpha + 0 * x)


class Network(nn.Module):
    """Says its variance as well: [B, 2, H, W]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x, t, cond):
        return self.layer(x).tanh()


def test_weights_get_no_gradient_and_the_variance_passes(x):
    torch.manual_seed(0)
    network, space = Network().double(), SPACES["flow-v"]
    t = torch.full((4,), 300.0, dtype=torch.float64)

    def wish(x, t):
        return x.flatten(1).sum(1)

    with torch.no_grad():
        plain = network(x, t, NONE)
        for wrap in (classifier_guided, estimate_guided):
            output = wrap(network, space, wish, 2.0)(x, t, NONE)
            assert not output.requires_grad and not x.requires_grad
            assert torch.equal(output[:, 1:], plain[:, 1:])
            assert (output[:, :1] - plain[:, :1]).abs().min() > 1e-3
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_are_kept_and_steep_scores_do_not_overflow(gaussian, x, dtype):
    """Scores of 1e6 with a scale of 1e-6 are those of 1, though the gradients of the one are beyond float16."""
    space = SPACES["flow-v"]
    t = torch.full((4,), 300.0)

    def network(x, t, cond):
        return x.tanh()

    def score(factor):
        return lambda x0, t: (factor * x0).flatten(1).sum(1)

    expected = estimate_guided(network, space, score(1.0), 1.0)(x, t, NONE)
    found = estimate_guided(network, space, score(1e6), 1e-6)(x.to(dtype), t, NONE)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < 10 * torch.finfo(dtype).eps * expected.abs().max()
    kept = classifier_guided(network, space, score(1.0), 1.0)(x.to(dtype), t, NONE)
    assert kept.dtype == dtype


def test_what_cannot_guide_is_refused(gaussian, x):
    space = SPACES["flow-v"]
    t = torch.full((4,), 300.0)
    network = exact(gaussian, space)
    for wrap in (classifier_guided, estimate_guided):
        with pytest.raises(ValueError, match="must be a finite number, got nan"):
            wrap(network, space, lambda x, t: x.sum(), math.nan)
        with pytest.raises(ValueError, match=r"differentiable \[4\], one value an image; got a differentiable \[\]"):
            wrap(network, space, lambda x, t: x.sum(), 1.0)(x, t, NONE)
        with pytest.raises(ValueError, match=r"got a constant \[4\]"):
            wrap(network, space, lambda x, t: x.detach().flatten(1).sum(1), 1.0)(x, t, NONE)
    with pytest.raises(ValueError, match="lets no gradient through"):
        estimate_guided(lambda x, t, cond: x.detach(), space, lambda x, t: x.flatten(1).sum(1), 1.0)(x, t, NONE)

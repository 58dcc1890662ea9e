"""The samplers that draw noise: exact moments, statistics, and each image on its own."""

import math

import pytest
import torch

from ldm.diffusion.noise import FlowSchedule, ImageNoise, discrete
from ldm.diffusion.samplers import SAMPLERS, ddim, sampler, traits
from ldm.diffusion.samplers.onestep import dpmpp_sde, lcm, tcd

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
STOCHASTIC = [name for name in SAMPLERS if traits(name).stochastic]
DIFFUSIONS = [name for name in STOCHASTIC if name not in ("lcm", "tcd")]  # these two want another network


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def last(steps):
    return list(steps)[-1].x


def moments(take, gaussian, levels, at):
    """Mean and standard deviation at the end, exactly: for Gaussian data a sampler is affine in all it draws.

    Image 0 draws nothing, image 1 starts one standard deviation off, image k + 2 draws 1 as its k-th draw.
    """
    steps = len(levels.t) - 1
    x = (levels[0].alpha * gaussian.mu).repeat(2 * steps + 2)[:, None]
    x[1] += gaussian.spread(levels[0])
    draws = iter(torch.eye(2 * steps + 2, dtype=torch.float64)[2:, :, None])
    end = last(take(gaussian.denoise, x, levels, noise=lambda: next(draws), at=at))
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


WEAK_ORDER = dict.fromkeys(DIFFUSIONS, 2) | {"ddpm": 1, "euler_a": 1}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_mean_and_spread_converge_to_those_of_the_data(gaussian, name):
    """On a smooth stretch, without chance: halving the step divides the error of the spread by 2^order.

    The methods with a parabola come down to order 2 from above.
    """
    schedule = FlowSchedule()
    errors = []
    for steps in (80, 160):
        ramp = torch.linspace(math.log(5.0), math.log(0.1), steps + 1, dtype=torch.float64)
        levels = schedule.at_ratio(ramp.exp())
        mean, spread = moments(sampler(name), gaussian, levels, schedule.at_ratio)
        assert abs(mean - (levels[-1].alpha * gaussian.mu).item()) < 1e-12
        errors.append(abs(spread - gaussian.spread(levels[-1]).item()))
    assert -0.2 < math.log2(errors[0] / errors[1]) - WEAK_ORDER[name] < 0.5
    assert errors[1] < 8e-3


@pytest.mark.parametrize(("schedule", "spacing"), [(SD, "karras"), (FlowSchedule(), "trailing")])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_whole_way_has_the_spread_of_the_data(gaussian, name, schedule, spacing):
    """From the noisy end, pure for the flow, to clean."""
    mean, spread = moments(sampler(name), gaussian, schedule.trajectory(100, spacing), schedule.at_ratio)
    assert mean == pytest.approx(gaussian.mu, abs=1e-12)
    assert spread == pytest.approx(gaussian.s, abs=0.03 if WEAK_ORDER[name] == 1 else 4e-3)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_drawn_samples_have_the_moments_that_were_worked_out(gaussian, name):
    """Mean and variance of 40000 values, at 5 standard errors each: 1 false alarm in 10^5 runs of all of these."""
    levels, count = SD.trajectory(25, "karras"), 40_000
    start = torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = levels.alpha[0] * gaussian.mu + gaussian.spread(levels[0]) * start
    end = last(sampler(name)(gaussian.denoise, x, levels, noise=noise_like(x), at=SD.at_ratio))
    mean, spread = moments(sampler(name), gaussian, levels, SD.at_ratio)
    assert abs(end.mean().item() - mean) < 5 * spread / math.sqrt(count)
    assert abs(end.var().item() / spread**2 - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("schedule", [SD, FlowSchedule()])
def test_consistency_samplers_are_exact_for_an_exact_consistency_function(gaussian, schedule, steps):
    """Told where the ODE ends from here, each step of LCM, and of TCD at gamma 1, has the data's moments."""
    levels = schedule.trajectory(steps, "trailing")
    clean = schedule.trajectory(1, "trailing")[1]

    class Consistent:
        mu, spread = gaussian.mu, gaussian.spread

        @staticmethod
        def denoise(x, level):
            return gaussian.end(x, level, clean)

    def gamma_one(*args, **options):
        return tcd(*args, gamma=1.0, **options)

    for take in (lcm, gamma_one):
        if take is gamma_one and schedule is SD:
            continue  # its floor of t = 0 is the chain's first level, which is not clean
        mean, spread = moments(take, Consistent, levels, schedule.at_ratio)
        assert mean == pytest.approx(gaussian.mu, abs=1e-9) and spread == pytest.approx(gaussian.s, abs=1e-9)


def test_tcd_without_noise_is_ddim(gaussian, x):
    levels = SD.trajectory(5, "trailing")
    still = last(tcd(gaussian.denoise, x, levels, gamma=0.0, noise=noise_like(x), at=SD.at_ratio))
    assert torch.allclose(still, last(ddim(gaussian.denoise, x, levels)), rtol=1e-12, atol=1e-12)


def test_euler_ancestral_is_ddpm(gaussian, x):
    levels = SD.trajectory(9, "karras")
    ends = [last(sampler(n)(gaussian.denoise, x, levels, noise=noise_like(x))) for n in ("euler_a", "ddpm")]
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_is_the_same_alone_and_in_a_batch(gaussian, name):
    levels = SD.trajectory(6, "trailing")

    def draw(seeds):
        noise = ImageNoise(seeds, (2, 4, 4))
        return last(sampler(name)(gaussian.denoise, noise(), levels, noise=noise, at=SD.at_ratio))

    together = draw([5, 6, 7])
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(draw([seed])[0], together[row])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_without_a_source_of_noise_nothing_is_evaluated(x, name):
    with pytest.raises(ValueError, match="no source of noise was given"):
        next(sampler(name)(None, x, SD.trajectory(5, "trailing"), at=SD.at_ratio))


def test_the_two_draws_of_a_step_belong_to_one_path(gaussian):
    """The noise to the middle and to the end correlate as the solution of the SDE does: sqrt of the share of its clock.

    For the equation in ratios that clock is 1 / ratio^2 (Lu et al. 2022b, eq. 18, for eta = 1).
    """
    levels = SD.at_ratio(torch.tensor([4.0, 1.0]))
    seen = []

    def denoise(x, level):
        seen.append(x / level.alpha)
        return torch.zeros_like(x)

    x = torch.zeros(100_000, 1, dtype=torch.float64)
    end = last(dpmpp_sde(denoise, x, levels, noise=noise_like(x), at=SD.at_ratio)) / levels.alpha[1]
    found = torch.corrcoef(torch.stack([seen[1], end])[..., 0])[0, 1].item()
    expected = math.sqrt((1 / 4 - 1 / 16) / (1 - 1 / 16))
    assert found == pytest.approx(expected, abs=5 / math.sqrt(100_000))  # 5 standard errors

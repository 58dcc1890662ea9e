"""Samplers on a mixture of Gaussians: far from linear, and still known exactly, end point and distribution."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel, discrete
from ldm.diffusion.samplers import SAMPLERS, multistep, onestep, sampler
from tests.diffusion.test_samplers_order import MEASURED, in_time, order
from tests.diffusion.test_samplers_sde import DIFFUSIONS, last, noise_like

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)


@dataclass(frozen=True)
class Mixture:
    """Data of several Gaussians, every value on its own."""

    shares: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.1, 0.4, 1.3)
    spreads: tuple[float, ...] = (0.4, 0.55, 0.3)

    def parts(self, level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor]:
        """Shares, means and spreads of x_t, each [parts]."""
        shares, means, spreads = (torch.tensor(v, dtype=torch.float64) for v in (self.shares, self.means, self.spreads))
        return shares, level.alpha * means, (level.alpha**2 * spreads**2 + level.sigma**2).sqrt()

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t]: each part's own estimate, by how likely x is of that part."""
        shares, means, spreads = self.parts(level)
        away = (x[..., None] - means) / spreads
        likely = torch.softmax(shares.log() - spreads.log() - away**2 / 2, -1)
        _, means_clean, spreads_clean = self.parts(NoiseLevel(level.t, torch.tensor(1.0), torch.tensor(0.0)))
        return (likely * (means_clean + level.alpha * spreads_clean**2 / spreads * away)).sum(-1)

    def share_below(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The distribution function of x_t."""
        shares, means, spreads = self.parts(level)
        return (shares * torch.special.ndtr((x[..., None] - means) / spreads)).sum(-1)

    def quantile(self, share: Tensor, level: NoiseLevel) -> Tensor:
        """Its inverse, by halving to the last bit."""
        low, high = torch.full_like(share, -50.0), torch.full_like(share, 50.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.share_below(middle, level) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def end(self, x: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """Where the probability-flow ODE takes x: in one dimension paths cannot cross, so each keeps its quantile."""
        return self.quantile(self.share_below(x, start), end)

    def moment(self, k: int, center: float) -> float:
        """E[(x0 - center)^k], from (j - 1)!! s^j, the even moments of a Gaussian."""

        def of_part(mean: float, spread: float) -> float:
            even = range(0, k + 1, 2)
            return sum(
                math.comb(k, j) * (mean - center) ** (k - j) * spread**j * math.prod(range(1, j, 2)) for j in even
            )

        return sum(w * of_part(m, s) for w, m, s in zip(self.shares, self.means, self.spreads, strict=True))


MIXTURE = Mixture()


@pytest.mark.parametrize(("name", "levels", "strides", "expected"), MEASURED)
def test_order_of_convergence(name, levels, strides, expected):
    """As test_samplers_order.py measures it, where the denoiser is a curve and not a line."""
    start = levels(torch.zeros(1, dtype=torch.float64))[0]
    x = MIXTURE.quantile(torch.linspace(0.02, 0.98, 15, dtype=torch.float64), start)
    margin = 0.05 if levels is in_time else 0.2
    assert order(SAMPLERS[name], MIXTURE, x, levels, strides) == pytest.approx(expected, abs=margin)


COUNT = 30_000
STEPS = dict.fromkeys(DIFFUSIONS, 80) | {"ddpm": 600}
del STEPS["euler_a"]  # bit by bit the same as ddpm: test_samplers_sde.py


def drawn(take, steps, noise_scale=1.0):
    """COUNT values from the exact distribution at the start of the chain, taken to clean."""
    levels = SD.trajectory(steps, "karras")
    shares = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    x = MIXTURE.quantile(shares, levels[0])
    noise = noise_like(x)
    return last(take(MIXTURE.denoise, x, levels, noise=lambda: noise_scale * noise(), at=SD.at_ratio))


def far(end):
    """How far values are from the data: four moments in standard errors of theirs, and Kolmogorov-Smirnov's distance.

    The standard error of a mean of (x - mean)^k comes from the exact moment 2 k. P(distance > d) = 2 exp(-2 d^2).
    """
    mean = MIXTURE.moment(1, 0.0)
    errors = []
    for k in range(1, 5):
        exact = MIXTURE.moment(k, mean)
        spread = math.sqrt((MIXTURE.moment(2 * k, mean) - exact**2) / len(end))
        errors.append(abs(((end - mean) ** k).mean().item() - exact) / spread)
    clean = SD.trajectory(1, "trailing")[1]
    shares, counted = MIXTURE.share_below(end.sort().values, clean), torch.arange(len(end) + 1) / len(end)
    distance = torch.maximum(counted[1:] - shares, shares - counted[:-1]).max().item()
    return errors, distance * math.sqrt(len(end))


def caught(end):
    """Whether a moment is 6 standard errors off, or the distance beyond what chance gives once in 10^6 samples.

    What is left of the methods' own errors is at most 1.5 standard errors: for all tests below that are to pass
    together, fewer than one seed in a thousand is a false alarm, and the seed is fixed.
    """
    errors, distance = far(end)
    return max(errors) > 6 or distance > 2.7


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_what_is_drawn_has_the_distribution_of_the_data(name):
    assert not caught(drawn(sampler(name), STEPS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_sde", "dpmpp_2m_sde", "sa_solver"])
def test_noise_that_is_5_per_cent_too_weak_is_caught(name):
    assert caught(drawn(sampler(name), STEPS[name], noise_scale=0.95))


@pytest.mark.parametrize("mean", [multistep._midpoint, multistep._line, multistep._parabola])
def test_a_correction_of_the_wrong_sign_is_caught(mean):
    def turned(places, decay):
        first, *rest = mean(places, decay)
        return [2 - first, *(-share for share in rest)]

    def take(denoise, x, levels, noise, at):
        return multistep._exponential(denoise, x, levels, turned, 1.0, noise)

    assert caught(drawn(take, 60))


def test_two_draws_of_a_step_that_are_not_of_one_path_are_caught(monkeypatch):
    monkeypatch.setattr(onestep, "_two_draws", lambda noise, level, middle, below, x: (noise(), noise()))
    assert caught(drawn(sampler("dpmpp_sde"), 60))

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from ldm.diffusion.noise import STRIDES, FlowSchedule, discrete, zero_terminal_snr
from ldm.diffusion.samplers import SAMPLERS, ddim, ddpm, euler, plms, sampler, traits
from ldm.diffusion.samplers.multistep import dpmpp_2m_sde

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)


def last(steps):
    return list(steps)[-1].x


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


BOUNDS = [("ddim", 0.15), ("euler", 0.15), ("heun", 0.02), ("flow_heun", 0.02), ("plms", 4e-3)]
BOUNDS += [(name, 0.02) for name in ("dpm2", "unipc", "unipc_3", "deis", "ipndm", "lms")]
BOUNDS += [(name, 0.04) for name in ("dpmpp_2s", "dpmpp_2m", "dpmpp_3m")]


@pytest.mark.parametrize(("name", "bound"), BOUNDS)
@pytest.mark.parametrize("schedule", [FlowSchedule(), FlowSchedule(3.0)])
def test_flow_from_pure_noise_to_clean_reaches_the_exact_end(gaussian, x, name, bound, schedule):
    levels = schedule.trajectory(40, "trailing")
    end = last(sampler(name)(gaussian.denoise, x, levels, at=schedule.at_ratio))
    assert (end - gaussian.end(x, levels[0], levels[40])).abs().max() < bound


def test_plms_survives_a_start_of_almost_pure_noise(gaussian, x):
    """alpha = 5e-5: eps extrapolated over 1 / alpha would be off by 20."""
    levels = discrete("cosine", 1000, 0.0, 0.0).trajectory(10, "trailing")
    assert (last(plms(gaussian.denoise, x, levels)) - gaussian.end(x, levels[0], levels[10])).abs().max() < 1e-3


ORIGINAL = ("ddim", "ddpm", "plms", "euler", "flow_heun")
ZERO = zero_terminal_snr(SD)


@pytest.mark.parametrize("name", SAMPLERS)
def test_exactly_n_finite_steps_for_every_n(gaussian, x, name):
    x = x[:1]
    chains = [(SD, spacing) for spacing in (*STRIDES, "karras")]
    for schedule, spacing in [*chains, (ZERO, "trailing"), (FlowSchedule(), "trailing"), (FlowSchedule(3.0), "beta")]:
        for steps in (1, 2, 3, 4, 5, 7, 20, *((30, 50, 333, 1000) if name in ORIGINAL else ())):
            levels = schedule.trajectory(steps, spacing)
            taken = list(sampler(name)(gaussian.denoise, x, levels, noise=noise_like(x), at=schedule.at_ratio))
            assert [step.index for step in taken] == list(range(steps))
            assert all(step.x.isfinite().all() and step.x0.isfinite().all() for step in taken)
            # an amplified error of rounding would be finite too; one step from 14.6 to 0.03 does take these to 34
            assert taken[-1].x.abs().max() < 40


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ORIGINAL])
@pytest.mark.parametrize("schedule", [SD, ZERO, FlowSchedule()])
def test_a_thousand_steps(gaussian, x, name, schedule):
    levels = schedule.trajectory(1000, "trailing")
    taken = list(sampler(name)(gaussian.denoise, x[:1], levels, noise=noise_like(x[:1]), at=schedule.at_ratio))
    assert len(taken) == 1000 and taken[-1].x.isfinite().all()
    if not traits(name).stochastic:
        assert (taken[-1].x - gaussian.end(x[:1], levels[0], levels[-1])).abs().max() < 6e-3


EXTRAPOLATED = ("plms", "ipndm", "lms")  # their polynomials of eps go on to the clean level


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in EXTRAPOLATED])
def test_the_last_step_to_clean_is_the_estimate(gaussian, x, name, spacing):
    *_, step = sampler(name)(gaussian.denoise, x, SD.trajectory(9, spacing), noise=noise_like(x), at=SD.at_ratio)
    assert torch.allclose(step.x, step.x0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sums_are_at_least_float32_and_the_result_is_of_the_type_given(gaussian, x, name, dtype):
    """With an estimate that does not depend on x the only roundings left are of the start and of the result."""
    seen = set()

    def denoise(x, level):
        seen.add(x.dtype)
        return torch.full_like(x, 0.5)

    levels, start = SD.trajectory(200, "trailing"), x.to(dtype)
    levels = levels[:-20]  # to a level that still holds noise, all of the steps before in it
    rows = noise_like(x), noise_like(x)
    taken = list(sampler(name)(denoise, start, levels, noise=rows[0], at=SD.at_ratio))
    exact = list(sampler(name)(lambda x, level: torch.full_like(x, 0.5), start.double(), levels, noise=rows[1],
                               at=SD.at_ratio))  # fmt: skip
    assert seen == {dtype} and {taken[-1].x.dtype, taken[-1].x0.dtype} == {dtype}
    rounding = max(torch.finfo(dtype).eps, 1e-4) * exact[-1].x.abs().max()
    assert (taken[-1].x.double() - exact[-1].x).abs().max() < rounding


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_have_the_mean_and_spread_of_the_data(gaussian, schedule, eta):
    levels = schedule.trajectory(250, "trailing")
    generator = torch.Generator().manual_seed(0)
    x = levels.sigma[0] * torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=generator)
    x = x + levels.alpha[0] * (gaussian.mu + gaussian.s * noise_like(x, 2)())
    take = ddpm if eta == 1 else sampler("ddim", eta=eta)
    images = last(take(gaussian.denoise, x, levels, noise=noise_like(x)))
    assert images.mean().item() == pytest.approx(gaussian.mu, abs=0.012)
    assert images.std().item() == pytest.approx(gaussian.s, rel=0.04)


def test_ddpm_draws_from_the_exact_posterior(x):
    """Told the true x0, one step is q(x_below | x, x0) of Ho et al. 2020, eq. 6 and 7, written in their betas."""
    truth = torch.full_like(x, 0.4)
    levels = SD.at(torch.tensor([500.0, 499.0]))
    bar, bar_below = SD.alpha_bar[500], SD.alpha_bar[499]
    alpha = bar / bar_below
    beta = 1 - alpha
    mean = bar_below.sqrt() * beta / (1 - bar) * truth + alpha.sqrt() * (1 - bar_below) / (1 - bar) * x
    variance = (1 - bar_below) / (1 - bar) * beta
    step = last(ddpm(lambda x, level: truth, x, levels, noise=lambda: torch.ones_like(x)))
    assert (step - mean - variance.sqrt()).abs().max() < 1e-12


def test_ddpm_is_ddim_at_eta_one(gaussian, x):
    levels = SD.trajectory(20, "leading")
    ancestral = last(ddpm(gaussian.denoise, x, levels, noise=noise_like(x)))
    assert torch.equal(ancestral, last(ddim(gaussian.denoise, x, levels, eta=1.0, noise=noise_like(x))))


class WithVariance:
    """A denoiser that has learned its variance too: v, of any shape that x0 takes."""

    def __init__(self, denoise, v):
        self.denoise, self.v, self.seen = denoise, v, set()

    def __call__(self, x, level):
        return self.denoise(x, level)

    def with_variance(self, x, level):
        self.seen.add(x.dtype)
        return self.denoise(x, level), self.v.to(x).expand_as(x)


V = torch.tensor([-1.0, -0.3, 0.0, 0.8, 1.0, 1.4], dtype=torch.float64)


def moments(take, gaussian, levels):
    """Mean and standard deviation [steps, pixels] after each step, exactly: for Gaussian data all of it is affine.

    Image 0 draws nothing, image 1 starts one standard deviation off, image k + 2 draws 1 as its k-th draw.
    """
    count = len(levels.t) + 1
    x = (levels[0].alpha * gaussian.mu).repeat(count, len(V))
    x[1] += gaussian.spread(levels[0])
    draws = iter(torch.eye(count, dtype=torch.float64)[2:, :, None].expand(-1, -1, len(V)))
    steps = [step.x for step in take(x, levels, noise=lambda: next(draws))]
    return torch.stack([x[0] for x in steps]), torch.stack([(x[1:] - x[0]).square().sum(0).sqrt() for x in steps])


def spreads_in_betas(gaussian, levels, w):
    """Standard deviations [steps, pixels] of ancestral sampling, in the papers' own betas."""
    bars = levels.alpha.square()
    variance = (bars[0] * gaussian.s**2 + 1 - bars[0]).expand(len(w))
    found = []
    for bar, below in itertools.pairwise(bars):
        beta = 1 - bar / below
        tilde = (1 - below) / (1 - bar) * beta
        gain = bar.sqrt() * gaussian.s**2 / (bar * gaussian.s**2 + 1 - bar)
        slope = below.sqrt() * beta / (1 - bar) * gain + (bar / below).sqrt() * (1 - below) / (1 - bar)
        variance = slope**2 * variance
        if below < 1:
            variance = variance + (w * beta.log() + (1 - w) * tilde.log()).exp()
        found.append(variance.sqrt())
    return torch.stack(found)


CHAINS = [(SD, "trailing", 20), (SD, "leading", 7), (SD, "trailing", 1000), (ZERO, "trailing", 10), (SD, "karras", 12)]


@pytest.mark.parametrize(("schedule", "spacing", "steps"), CHAINS)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm_has_the_moments_of_its_variance(gaussian, variance, schedule, spacing, steps):
    """Strided and full chains, with and without signal at the start, each pixel with a v of its own."""
    levels = schedule.trajectory(steps, spacing)
    denoise = WithVariance(gaussian.denoise, V)
    mean, spread = moments(partial(ddpm, denoise, variance=variance), gaussian, levels)
    w = {"small": torch.zeros_like(V), "large": torch.ones_like(V), "learned": (V + 1) / 2}[variance]
    assert (mean - levels.alpha[1:, None] * gaussian.mu).abs().max() < 1e-12
    assert (spread / spreads_in_betas(gaussian, levels, w) - 1).abs().max() < 1e-9


@pytest.mark.parametrize(("variance", "s"), [("small", 0.0), ("large", 1.0)])
@pytest.mark.parametrize("schedule", [SD, ZERO, FlowSchedule(), FlowSchedule(3.0)])
def test_the_two_variances_are_exact_at_their_two_ends(gaussian, schedule, variance, s):
    """Ho et al. 2020, sec. 3.2: for a point and for a standard normal, whatever the scale of x and length of steps."""
    data = replace(gaussian, s=s)
    levels = schedule.trajectory(5, "trailing")[:-1]
    _, spread = moments(partial(ddpm, data.denoise, variance=variance), data, levels)
    assert torch.allclose(spread, data.spread(levels)[1:, None].expand_as(spread), rtol=1e-12)


@pytest.mark.parametrize("levels", [SD.trajectory(9, "trailing"), FlowSchedule().trajectory(9, "trailing")])
def test_learned_variance_goes_from_small_to_large(gaussian, x, levels):
    def end(denoise, **options):
        return last(ddpm(denoise, x, levels, noise=noise_like(x), **options))

    for v, variance in ((-1.0, "small"), (1.0, "large")):
        learned = WithVariance(gaussian.denoise, torch.tensor(v))
        assert torch.allclose(end(learned), end(gaussian.denoise, variance=variance), rtol=1e-12, atol=1e-12)
    assert torch.equal(end(gaussian.denoise), end(gaussian.denoise, variance="small"))
    assert (end(gaussian.denoise, variance="small") - end(gaussian.denoise, variance="large")).abs().max() > 1e-3


def test_learned_variance_is_seen_through_the_sums_in_float32(gaussian, x):
    learned, levels = WithVariance(gaussian.denoise, torch.tensor(0.5)), SD.trajectory(9, "trailing")
    drawn = noise_like(x)
    half = list(ddpm(learned, x.half(), levels, noise=lambda: drawn()))
    assert learned.seen == {torch.float16} and {half[-1].x.dtype, half[-1].x0.dtype} == {torch.float16}
    exact = last(ddpm(learned, x.half().double(), levels, noise=noise_like(x)))
    assert (half[-1].x - exact).abs().max() < 1e-2


@pytest.mark.parametrize("variance", ["small", "large"])
def test_nothing_is_drawn_at_the_step_to_clean(gaussian, x, variance):
    draws = []

    def noise():
        draws.append(1)
        return torch.randn_like(x)

    steps = list(ddpm(gaussian.denoise, x, SD.trajectory(6, "trailing"), variance=variance, noise=noise))
    assert len(draws) == 5 and torch.allclose(steps[-1].x, steps[-1].x0)


def network(x, t):
    """A made-up eps network, as nonlinear as a real one."""
    return torch.sin(1.7 * x + t / 300) + 0.1 * x.flip(-1)


def x0_of_network(x, level):
    return (x - level.sigma * network(x, level.t)) / level.alpha


def compvis(x, steps, *, eta=0.0, linear_multistep=False, noise=None):
    """DDIM and PLMS from the papers alone: eps, a table of alpha_bar, and Stable Diffusion's timesteps."""
    stride = 1000 // steps
    times = [1 + k * stride for k in range(steps)]
    bars = [SD.alpha_bar[t] for t in times]
    bars_before = [SD.alpha_bar[0], *bars[:-1]]

    def transfer(x, eps, k):
        bar, before = bars[k], bars_before[k]
        spread = eta * ((1 - before) / (1 - bar) * (1 - bar / before)).sqrt()
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        x = before.sqrt() * x0 + (1 - before - spread**2).sqrt() * eps
        return x + spread * noise() if eta else x

    old = []
    for k in reversed(range(steps)):
        eps = network(x, times[k])
        if not linear_multistep:
            mixed = eps
        elif len(old) == 0:
            mixed = (eps + network(transfer(x, eps, k), times[max(k - 1, 0)])) / 2
        elif len(old) == 1:
            mixed = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = transfer(x, mixed, k)
        old.append(eps)
    return x


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_equal_to_stable_diffusions_samplers(x, steps):
    levels = SD.trajectory(steps, "leading")
    assert (last(ddim(x0_of_network, x, levels)) - compvis(x, steps)).abs().max() < 1e-10
    assert (last(euler(x0_of_network, x, levels)) - compvis(x, steps)).abs().max() < 1e-10
    expected = compvis(x, steps, linear_multistep=True)
    assert (last(plms(x0_of_network, x, levels)) - expected).abs().max() < 1e-10
    for eta in (0.5, 1.0):
        expected = compvis(x, steps, eta=eta, noise=noise_like(x))
        ours = last(ddim(x0_of_network, x, levels, eta=eta, noise=noise_like(x)))
        assert (ours - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", [name for name in SAMPLERS if traits(name).evaluations])
def test_evaluations_of_the_network(gaussian, x, name):
    asked = []

    def denoise(x, level):
        asked.append(level)
        return gaussian.denoise(x, level)

    last(sampler(name)(denoise, x, SD.trajectory(10, "trailing"), noise=noise_like(x), at=SD.at_ratio))
    last_step = 1  # to clean, always of one evaluation
    assert len(asked) == (11 if name == "plms" else 9 * traits(name).evaluations + last_step)
    assert all(level.sigma > 0 for level in asked)


def test_the_caller_owns_the_loop(gaussian, x):
    asked = []

    def denoise(x, level):
        asked.append(level)
        return gaussian.denoise(x, level)

    steps = ddim(denoise, x, SD.trajectory(10, "trailing"))
    next(steps), next(steps)
    steps.close()
    assert len(asked) == 2


def test_bad_requests_are_refused(gaussian, x):
    with pytest.raises(ValueError, match=r"did you mean 'ddim'.*ddim, ddpm, deis, .*heun, .*plms, "):
        sampler("dimm")
    with pytest.raises(ValueError, match="eta is for sampler 'ddim' alone"):
        sampler("plms", eta=0.3)
    with pytest.raises(ValueError, match=r"eta must be in 0\.\.1, got 2"):
        sampler("ddim", eta=2)
    with pytest.raises(
        ValueError, match=r"variance \(small, large, learned\) is for sampler 'ddpm' alone, not for 'ddim'"
    ):
        sampler("ddim", variance="large")
    with pytest.raises(ValueError, match=r"unknown variance of ddpm 'smal', did you mean 'small'"):
        sampler("ddpm", variance="smal")
    with pytest.raises(ValueError, match=r"unknown variance of ddpm 'lurned', did you mean 'learned'"):
        next(ddpm(None, x, SD.trajectory(5, "trailing"), variance="lurned", noise=noise_like(x)))
    with pytest.raises(ValueError, match=r"variance 'learned' needs a network that predicts it.*'small' and 'large'"):
        next(ddpm(lambda x, level: 1 / 0, x, SD.trajectory(5, "trailing"), variance="learned", noise=noise_like(x)))
    with pytest.raises(ValueError, match="no source of noise"):
        last(ddpm(gaussian.denoise, x, SD.trajectory(5, "trailing")))
    for name in SAMPLERS:
        if traits(name).between:
            with pytest.raises(ValueError, match=f"^{name} evaluates between the levels, but was not given `at`"):
                next(sampler(name)(gaussian.denoise, x, SD.trajectory(5, "trailing"), noise=noise_like(x)))
    with pytest.raises(ValueError, match=r"unknown kind of dpmpp_2m_sde 'hun', did you mean 'heun'"):
        next(dpmpp_2m_sde(gaussian.denoise, x, SD.trajectory(5, "trailing"), kind="hun", noise=noise_like(x)))


def test_ddim_with_all_its_noise_is_ddpm(gaussian, x):
    levels = SD.trajectory(7, "karras")
    ends = [
        last(take(gaussian.denoise, x, levels, noise=noise_like(x)))
        for take in (sampler("ddim", eta=1.0), sampler("ddpm"))
    ]
    assert torch.equal(*ends)

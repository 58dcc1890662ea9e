"""Repainting, resampling and measurements against the exact conditional distributions of Gaussian data."""

import math

import pytest
import torch

from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.noise import FlowSchedule, ImageNoise, NoiseLevel, discrete, zero_terminal_snr
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.restoration import blur, completed, downscale, measured, repainted, resampled
from ldm.diffusion.samplers import SAMPLERS, Step, ddim, sampler, traits
from ldm.diffusion.steering import estimate_guided
from ldm.types import Conditioning

FLOW = FlowSchedule()
SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
ZERO = zero_terminal_snr(SD)
ODE = [name for name in SAMPLERS if not traits(name).stochastic]
STOCHASTIC = [name for name in SAMPLERS if traits(name).stochastic]


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def last(steps):
    return list(steps)[-1].x


@pytest.fixture
def known():
    return torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)


@pytest.fixture
def mask():
    """The left half is known, a column is a blend, the rest is drawn."""
    return torch.tensor([0.0, 0.0, 0.3, 1.0], dtype=torch.float64).expand(1, 1, 4, 4)


@pytest.mark.parametrize("schedule", [SD, ZERO, FLOW])
@pytest.mark.parametrize("name", ODE)
def test_what_is_known_keeps_one_noise_all_the_way(gaussian, x, known, mask, schedule, name):
    """alpha * known + sigma * eps at every level, with the eps of the start."""
    levels = schedule.trajectory(12, "linspace")
    eps = ((x - levels.alpha[0] * known) / levels.sigma[0])[..., :2]
    denoise = completed(gaussian.denoise, known, mask)
    for step in SAMPLERS[name](denoise, x, levels, at=schedule.at_ratio):
        level = levels[step.index + 1]
        expected = level.alpha * known[..., :2] + level.sigma * eps
        torch.testing.assert_close(step.x[..., :2], expected, rtol=1e-9, atol=1e-9)
        if level.sigma > 0:
            assert (step.x[..., 3] - known[..., 3]).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", [SD, FLOW])
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "lcm"])  # which drops its noise at the end
def test_what_is_known_has_the_noise_of_its_level(gaussian, known, mask, schedule, name):
    """Its mean and spread where the trajectory stops, exactly: the sampler is affine in all it draws."""
    levels = schedule.at_ratio(torch.linspace(math.log(5.0), math.log(0.2), 9, dtype=torch.float64).exp())
    draws = 40
    x = (levels.alpha[0] * known).expand(draws + 2, 1, 4, 4).clone()
    x[1] += levels.sigma[0]
    rows = iter(torch.eye(draws + 2, dtype=torch.float64)[2:])
    noise = lambda: next(rows).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    end = last(sampler(name)(completed(gaussian.denoise, known, mask), x, levels, noise=noise, at=schedule.at_ratio))
    assert (end[0] - levels.alpha[-1] * known)[..., :2].abs().max() < 1e-9
    spread = (end[1:] - end[0]).square().sum(0).sqrt()[..., :2]
    torch.testing.assert_close(spread, levels.sigma[-1].expand_as(spread), rtol=1e-9, atol=1e-9)


def test_the_estimate_is_the_blend(gaussian, x, known, mask):
    level = SD.at(500)
    x0 = completed(gaussian.denoise, known, mask)(x, level)
    torch.testing.assert_close(x0, mask * gaussian.denoise(x, level) + (1 - mask) * known)
    assert torch.equal(x0[..., :2], known.expand_as(x)[..., :2])
    assert torch.equal(x0[..., 3], gaussian.denoise(x, level)[..., 3])


@pytest.mark.parametrize(
    ("schedule", "spacing", "dtype"),
    [(SD, "leading", torch.float32), (SD, "trailing", torch.float16), (FLOW, "trailing", torch.float32)],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_result_has_what_is_known_to_the_byte(gaussian, known, mask, schedule, spacing, name, dtype):
    """Also where the trajectory ends with noise (leading); the steps before it are the sampler's own."""
    levels = schedule.trajectory(6, spacing)
    noise = BrownianNoise([1, 2, 3], (1, 4, 4))
    options = {"noise": noise, "at": schedule.at_ratio}
    steps = list(repainted(SAMPLERS[name], known, mask)(gaussian.denoise, noise().to(dtype), levels, **options))
    assert [step.index for step in steps] == list(range(6))
    assert steps[-1].x.dtype == dtype
    assert torch.equal(steps[-1].x[..., :2], known.to(dtype).expand(3, 1, 4, 4)[..., :2])
    assert not torch.equal(steps[-1].x[0, ..., 3], steps[-1].x[1, ..., 3])
    noise = BrownianNoise([1, 2, 3], (1, 4, 4))
    options = {"noise": noise, "at": schedule.at_ratio}
    plain = list(SAMPLERS[name](completed(gaussian.denoise, known, mask), noise().to(dtype), levels, **options))
    assert all(torch.equal(a.x, b.x) for a, b in zip(steps[:-1], plain, strict=False))
    assert torch.equal(steps[-1].x[..., 2:], plain[-1].x[..., 2:])


def test_a_learned_variance_is_the_smallest_where_all_is_known(gaussian, x, known, mask):
    class Learned:
        def __call__(self, x, level):
            return gaussian.denoise(x, level)

        def with_variance(self, x, level):
            return gaussian.denoise(x, level), 0.5 * torch.ones_like(x)

    denoise = completed(Learned(), known, mask)
    x0, v = denoise.with_variance(x, SD.at(500))
    assert torch.equal(x0, denoise(x, SD.at(500)))
    torch.testing.assert_close(v[0, 0, 0], torch.tensor([-1, -1, -0.55, 0.5], dtype=torch.float64))


class Pair:
    """Two pixels, standard normal, with a correlation of 0.9."""

    correlation = 0.9
    cov = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)

    def denoise(self, x, level):
        seen = level.alpha**2 * self.cov + level.sigma**2 * torch.eye(2, dtype=torch.float64)
        return x @ (level.alpha * self.cov @ torch.linalg.inv(seen)).T


PAIR_KNOWN = torch.tensor([1.5, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
PAIR_MASK = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)


def drawn_pixel(take, levels, at):
    """Mean and standard deviation of the second pixel given the first, exactly: everything is affine in the noise."""
    calls = []

    def silent():
        calls.append(1)
        return torch.zeros(1, 1, 1, 2, dtype=torch.float64)

    take = repainted(take, PAIR_KNOWN, PAIR_MASK)
    list(take(Pair().denoise, silent(), levels, noise=silent, at=at))
    count = 2 * len(calls)
    units = iter(torch.cat([torch.zeros(1, count), torch.eye(count)]).double().view(count + 1, -1, 2).unbind(1))
    noise = lambda: next(units).view(count + 1, 1, 1, 2)  # noqa: E731
    end = last(take(Pair().denoise, noise(), levels, noise=noise, at=at))[:, 0, 0, 1]
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


def off(take, levels, at):
    """How far the drawn pixel is from its exact conditional distribution: the Wasserstein distance."""
    mean, spread = drawn_pixel(take, levels, at)
    exact = Pair.correlation * PAIR_KNOWN[..., 0].item(), math.sqrt(1 - Pair.correlation**2)
    return math.hypot(mean - exact[0], spread - exact[1])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "heun", "dpmpp_2m_sde", "unipc"])
def test_resampling_brings_the_exact_conditional_distribution_nearer(name):
    """Plain replacement is far off; each doubling of `times` brings it nearer, down to the error of the steps."""
    levels = FLOW.trajectory(40, "trailing")
    plain, *more = (off(resampled(SAMPLERS[name], 4, times), levels, FLOW.at_ratio) for times in (1, 2, 4, 16))
    assert plain > 0.2
    assert plain > more[0] > more[1] > more[2]
    assert more[2] < plain / 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_once_is_the_sampler_itself_and_twice_works_around_every_one(gaussian, x, name):
    take, levels = SAMPLERS[name], SD.trajectory(10, "trailing")
    assert resampled(take, 3, 1) is take

    def drawn(seeds, times=2):
        noise, calls = BrownianNoise(seeds, (1, 4, 4)), []

        def denoise(x, level):
            calls.append(level)
            return gaussian.denoise(x, level)

        steps = list(resampled(take, 3, times)(denoise, noise(), levels, noise=noise, at=SD.at_ratio))
        assert [step.index for step in steps] == list(range(10))
        return steps, len(calls)

    (steps, twice), (_, once), (alone, _) = drawn([5, 6]), drawn([5, 6], 1), drawn([6])
    if name != "dpm_adaptive":  # which goes by its errors; elsewhere a start anew may need an evaluation more
        assert twice <= 2 * once + 2 * 4
    assert torch.equal(alone[-1].x[0], steps[-1].x[1])
    assert 0.3 < steps[-1].x.std() < 1.2 and (steps[-1].x.mean() - gaussian.mu).abs() < 0.6


def test_every_time_has_fresh_noise():
    """What is drawn going up, and in a stretch of a stochastic sampler, is never drawn twice."""

    class Path(ImageNoise):
        drawn = 0

        def __call__(self):
            self.drawn += 1
            return super().__call__()

        def between(self, a, b):
            raise AssertionError("the path says the same each time")

    noise = Path([1], (1, 2, 2))
    list(
        resampled(SAMPLERS["euler_a"], 2, 3)(lambda x, level: 0 * x, noise(), SD.trajectory(4, "trailing"), noise=noise)
    )
    # the start; 2 stretches: 2 x up, 3 x 2 steps, of which the last to clean draws nothing
    assert noise.drawn == 1 + 2 * (2 + 3 * 2) - 3


@pytest.mark.parametrize(("high", "low"), [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_way_up_has_the_moments_of_the_level_above(gaussian, high, low):
    """Data of any spread, forward by noise: from clean and from between, also to pure noise."""
    levels = FLOW.at(torch.tensor([1000.0, 700.0, 200.0, 0.0], dtype=torch.float64))
    below = levels.alpha[low] * gaussian.mu + torch.zeros(3, 1, dtype=torch.float64)
    below[1] += gaussian.spread(levels[low])
    starts = []

    def arrives(denoise, x, rest, **options):  # below, wherever it starts
        starts.append(x)
        for k in range(len(rest.t) - 1):
            yield Step(k, below, below)

    way = NoiseLevel(*(v[high : low + 1] for v in (levels.t, levels.alpha, levels.sigma)))
    noise = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    list(resampled(arrives, low - high, 2)(None, below, way, noise=lambda: noise))
    up = starts[1]
    assert up[0].item() == pytest.approx(levels.alpha[high].item() * gaussian.mu, abs=1e-12)
    spread = (up[1:] - up[0]).square().sum().sqrt().item()
    assert spread == pytest.approx(gaussian.spread(levels[high]).item(), abs=1e-12)


def test_a_stretch_ends_as_the_whole_way_goes_on():
    """`lcm` drops its noise in its last step, which the last of a stretch is not."""
    levels, noise = SD.trajectory(6, "trailing"), ImageNoise([1], (1, 32, 32))
    steps = list(resampled(SAMPLERS["lcm"], 2, 2)(lambda x, level: 0 * x, noise(), levels, noise=noise))
    for step in steps:
        assert step.x.std().item() == pytest.approx(levels.sigma[step.index + 1].item(), rel=0.11)  # 5 errors


UNIT = {"mu": 0.0, "s": 1.0}
SPACES = {
    name: Diffusion.from_config(DiffusionConfig(schedule=schedule, prediction=prediction, zero_snr=zero))
    for name, schedule, prediction, zero in [
        ("chain", "scaled_linear", "eps", False),
        ("zero", "scaled_linear", "v", True),
        ("flow", "flow", "flow", False),
    ]
}


def restored(gaussian, space, operator, y, noise_std):
    data = type(gaussian)(**UNIT)

    def network(x, t, cond):
        return space.output_of(data.denoise(x, space.schedule.at(t)), x, t)

    return space.denoise(estimate_guided(network, space, measured(operator, y, noise_std, space), 1.0), Conditioning())


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", SPACES)
def test_pooled_data_of_unit_variance_has_its_exact_posterior_at_every_level(gaussian, x, name, noise_std):
    """E[x0 | x_t, y] by the rule of Gaussian conditioning: x_t leaves x0 a variance r^2 I, and y = A x0 + noise."""
    space, operator = SPACES[name], downscale(2)
    y = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64).view(1, 1, 2, 2)
    denoise = restored(gaussian, space, operator, y, noise_std)
    up = torch.nn.functional.interpolate
    for t in (10.0, 300.0, 900.0):
        level = space.schedule.at(t)
        left = level.sigma**2 / (level.alpha**2 + level.sigma**2)
        plain = level.alpha / (level.alpha**2 + level.sigma**2) * x
        gain = left / 4 / (left / 4 + noise_std**2)  # A A^T = I / 4, and 4 A^T spreads a mean over its square
        expected = plain + up(gain * (y - operator(plain)), scale_factor=2.0)
        torch.testing.assert_close(denoise(x, level), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", SPACES)
def test_restored_pictures_have_the_exact_posterior(gaussian, name, noise_std):
    """Mean and covariance of a square of four values from its mean, by a sampler of the ODE in 150 steps.

    It starts about the mean of the noisy end, which for the chain is not quite 0.
    """
    space, seen = SPACES[name], 0.8
    y = torch.full((1, 1, 1, 1), seen, dtype=torch.float64)
    denoise = restored(gaussian, space, downscale(2), y, noise_std)
    units = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().view(5, 1, 2, 2)
    share = 0.25 / (0.25 + noise_std**2)  # of the mean's variance that y explains
    levels = space.trajectory(150, "linspace")
    with torch.no_grad():
        end = last(SAMPLERS["heun"](denoise, levels.alpha[0] * share * seen + units, levels)).flatten(1)
    cov = (end[1:] - end[0]).T @ (end[1:] - end[0])
    ones = torch.full((4, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(end[0], torch.full((4,), share * seen, dtype=torch.float64), rtol=0, atol=3e-3)
    torch.testing.assert_close(cov, torch.eye(4, dtype=torch.float64) - share * ones, rtol=0, atol=1e-3)
    if noise_std == 0:
        assert abs(end[0].mean().item() - seen) < 1e-9


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "ddpm", "unipc"])
def test_what_was_measured_without_noise_is_met(gaussian, x, name):
    space, operator = SPACES["flow"], downscale(2)
    y = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    denoise = restored(gaussian, space, operator, y, 0.0)
    with torch.no_grad():
        end = last(SAMPLERS[name](denoise, x, space.trajectory(20), noise=noise_like(x), at=space.schedule.at_ratio))
    assert (operator(end) - y).abs().max() < 1e-9


def test_gains_are_the_mean_squared_length_of_the_rows(x):
    """Read off at noise_std 0, alpha 0, where -2 score is |y - A x0|^2 / gain; the blur's within its one probe."""
    space, t = SPACES["flow"], torch.full((4,), 1000.0)
    for operator, tolerance in ((downscale(2), 1e-12), (lambda v: 3 * v, 1e-12), (blur(0.6), 0.5)):
        rows = torch.autograd.functional.jacobian(operator, x[:1]).reshape(-1, 16)
        rows = rows[rows.abs().sum(1) > 0]
        y = torch.zeros_like(operator(x[:1]))
        score = measured(operator, y, 0.0, space)(x.clone().requires_grad_(), t)
        gain = -operator(x).square().flatten(1).sum(1) / (2 * score)
        assert gain.tolist() == pytest.approx([rows.square().sum(1).mean().item()] * 4, rel=tolerance)


def test_a_blur_is_a_gaussian_of_its_radius():
    """The spread of a point's image, and what is even stays even, up to the edges."""
    point = torch.zeros(1, 2, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    seen = blur(2.0)(point)[0, 1]
    away = torch.arange(41, dtype=torch.float64) - 20
    assert seen.sum().item() == pytest.approx(1)
    assert (seen.sum(0) * away**2).sum().item() == pytest.approx(4.0, rel=0.01)
    assert (seen.sum(1) * away**2).sum().item() == pytest.approx(4.0, rel=0.01)
    even = torch.full((1, 3, 5, 7), 0.4, dtype=torch.float32)
    torch.testing.assert_close(blur(3.0)(even), even)


def test_downscaling_takes_means():
    assert torch.equal(
        downscale(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5])
    )


def test_what_does_not_fit_is_refused_in_a_line(gaussian, x, known, mask):
    space = SPACES["flow"]
    cases = [
        (
            lambda: completed(gaussian.denoise, known, mask[..., :3]),
            r"mask must be \[B or 1, 1, H, W\].*got \[1, 1, 4, 3\]",
        ),
        (lambda: repainted(ddim, known.expand(2, 1, 4, 4), mask.expand(3, 1, 4, 4)), "mask must be"),
        (lambda: completed(gaussian.denoise, known, 2 * mask), r"mask must be in 0\.\.1, got 0\.\.2"),
        (lambda: completed(gaussian.denoise, known, mask)(x[..., :2], SD.at(1)), "known picture is"),
        (
            lambda: repainted(ddim, known.expand(3, 1, 4, 4), mask)(None, x, SD.trajectory(4, "trailing")),
            "known picture is",
        ),
        (lambda: resampled(ddim, 0, 2), "at least 1 level and at least 1 time, got 0 and 2"),
        (lambda: resampled(ddim, 2, 0), "got 2 and 0"),
        (lambda: next(resampled(ddim, 2, 2)(None, x, SD.trajectory(4, "trailing"))), "no source of noise"),
        (lambda: downscale(0), "factor must be at least 1, got 0"),
        (lambda: downscale(3)(x), "a picture of 4x4 px cannot be scaled down by 3"),
        (lambda: blur(0.0), "radius must be above 0 px, got 0.0"),
        (lambda: measured(blur(1.0), x, -1.0, space), "noise_std must be a finite number of at least 0, got -1.0"),
        (
            lambda: measured(downscale(2), x, 0.1, space)(x, torch.ones(4)),
            r"measurement is \[4, 1, 4, 4\], but the operator",
        ),
    ]
    for attempt, message in cases:
        with pytest.raises(ValueError, match=message):
            attempt()

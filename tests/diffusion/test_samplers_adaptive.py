"""DPM adaptive: errors that follow the tolerance, and steps of each image's own."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ldm.diffusion.noise import FlowSchedule, NoiseLevel, discrete, zero_terminal_snr
from ldm.diffusion.samplers.adaptive import _both_orders, dpm_adaptive

FLOW = FlowSchedule()
SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
COSINE = discrete("cosine", 1000, 0.0, 0.0)  # starts at alpha = 5e-5, ends at ratio 0.006
SCHEDULES = [SD, zero_terminal_snr(SD), FLOW, FlowSchedule(3.0), COSINE]
RTOL, ATOL = 0.05, 0.0078  # by default


class Asked:
    """A denoiser that notes the levels it is asked at."""

    def __init__(self, denoise):
        self.denoise, self.levels = denoise, []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.denoise(x, level)


def two_points(x, level):
    """E[x0 | x] where the data is -1 or 1: bends sharply for some x and not for others."""
    level = level.like(x)
    return torch.tanh(level.alpha * x / level.sigma**2)


def end(denoise, x, levels, **options):
    return list(dpm_adaptive(denoise, x, levels, at=FLOW.at_ratio, **options))[-1].x


def test_error_and_evaluations_follow_the_tolerance(gaussian, x):
    """Steps of local error h^3 = tolerance: the error is in proportion to it, the number of steps to its -1/3."""
    levels = FLOW.at_ratio(torch.tensor([5.0, 0.1]))
    errors, evaluations = [], []
    for share in (1.0, 1e-3, 1e-6):
        denoise = Asked(gaussian.denoise)
        found = end(denoise, x, levels, rtol=RTOL * share, atol=ATOL * share)
        errors.append((found - gaussian.end(x, levels[0], levels[1])).abs().max().item())
        evaluations.append(len(denoise.levels))
    assert errors[0] < ATOL and errors[1] < 1e-3 * ATOL * 100 and errors[0] > errors[1] > errors[2]
    assert math.log10(errors[1] / errors[2]) == pytest.approx(3, abs=0.5)
    assert math.log10(evaluations[2] / evaluations[1]) == pytest.approx(1, abs=0.15)
    assert evaluations[0] < 40


def test_no_long_step_is_taken_on_two_orders_that_agree_by_chance(gaussian, x):
    """Over a whole trajectory at once they can be equal and both off by 5: 60 of other lengths and data."""
    for s in (0.05, 0.3, 0.7, 1.0, 2.0):
        data = replace(gaussian, s=s)
        for top in torch.linspace(1, 4, 12):
            levels = FLOW.at_ratio(torch.stack([top.double().exp(), torch.tensor(0.01).double()]))
            start = levels.alpha[0] * data.mu + data.spread(levels[0]) * x
            assert (end(data.denoise, start, levels) - data.end(start, levels[0], levels[1])).abs().max() < 0.03 * s


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_an_image_is_the_same_alone_and_in_a_batch_where_each_has_other_steps(steps):
    levels = SD.trajectory(steps, "trailing")
    x = torch.randn(11, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(0.1, 3, 11).view(-1, 1, 1, 1)

    def draw(x):
        denoise = Asked(two_points)
        taken = list(dpm_adaptive(denoise, x, levels, at=SD.at_ratio))
        return taken, len(denoise.levels)

    together, most = draw(x)
    alone = [draw(row[None]) for row in x]
    for image, (taken, _) in enumerate(alone):
        for step, other in zip(taken, together, strict=True):
            assert torch.equal(step.x[0], other.x[image]) and torch.equal(step.x0[0], other.x0[image])
    counts = [count for _, count in alone]
    assert len(set(counts)) > 2 and most >= max(counts)


def test_it_arrives_at_every_level(gaussian, x):
    levels = FLOW.at_ratio(torch.tensor([5.0, 3.0, 2.9, 0.5, 0.1]).double())
    denoise = Asked(gaussian.denoise)
    steps = []
    for step in dpm_adaptive(denoise, x, levels, at=FLOW.at_ratio, rtol=1e-6, atol=1e-7):
        steps.append((step, len(denoise.levels)))
    for k, (step, asked) in enumerate(steps, 1):
        assert step.index == k - 1
        assert (step.x - gaussian.end(x, levels[0], levels[k])).abs().max() < 3e-6
        if k < len(steps):  # the next stretch sets out from that level, with every image
            assert (denoise.levels[asked].sigma / levels.sigma[k] - 1).abs().max() < 1e-12
            assert denoise.levels[asked].sigma.shape == (4,)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_from_its_noise_to_clean(gaussian, x, schedule, steps):
    levels = schedule.trajectory(steps, "trailing")
    denoise = Asked(gaussian.denoise)
    *_, step = dpm_adaptive(denoise, x, levels, at=schedule.at_ratio)
    assert (step.x - gaussian.end(x, levels[0], levels[-1])).abs().max() < 0.01
    assert torch.allclose(step.x, step.x0)
    lowest = min((level.sigma / level.alpha).min().item() for level in denoise.levels)
    ends_at = (1 / SD.alpha_bar[0] - 1).sqrt().item() if schedule in SCHEDULES[:2] else 0.01
    assert lowest == pytest.approx(ends_at, rel=1e-6) or steps == 20  # levels of a trajectory may be lower


def test_one_step_is_that_of_the_paper(x):
    """DPM-Solver-2 and -3 (Lu et al. 2022a, app. C) as they are written there, in alpha, sigma and lambda."""
    s, t = 1.7, 0.9
    h = math.log(s / t)

    def eps_at(x, level):
        return torch.sin(1.3 * x + level.t / 500)

    def level_of(share):
        return FLOW.at_ratio(torch.tensor(s * math.exp(-share * h), dtype=torch.float64))

    a, b, c, d = (level_of(share) for share in (0, 1 / 3, 2 / 3, 1))
    eps = eps_at(x, a)
    u1 = b.alpha / a.alpha * x - b.sigma * math.expm1(h / 3) * eps
    d1 = eps_at(u1, b) - eps
    bend = math.expm1(2 / 3 * h) / (2 / 3 * h) - 1
    u2 = c.alpha / a.alpha * x - c.sigma * math.expm1(2 / 3 * h) * eps - 2 * c.sigma * bend * d1
    d2 = eps_at(u2, c) - eps
    plain = d.alpha / a.alpha * x - d.sigma * math.expm1(h) * eps
    second = plain - 3 / 2 * d.sigma * math.expm1(h) * d1
    third = plain - 3 / 2 * d.sigma * (math.expm1(h) / h - 1) * d2

    def slope(y, ratios):
        level = FLOW.at_ratio(ratios)
        shaped = NoiseLevel(level.t.view(-1, 1, 1, 1), *(v.view(-1, 1, 1, 1) for v in (level.alpha, level.sigma)))
        return eps_at(shaped.alpha * y, shaped), y

    rows = torch.full((4,), s, dtype=torch.float64), torch.tensor([h, h, h, 0.0], dtype=torch.float64)
    low, high, _ = _both_orders(slope, x / a.alpha, *rows)
    assert (d.alpha * low - second)[:3].abs().max() < 1e-12 and (d.alpha * high - third)[:3].abs().max() < 1e-12
    assert torch.equal(high[3], x[3] / a.alpha)  # a step of 0 stays


def test_half_precision_comes_and_goes(gaussian, x):
    levels, seen = SD.trajectory(3, "trailing"), set()

    def denoise(x, level):
        seen.add(x.dtype)
        return gaussian.denoise(x, level)

    steps = list(dpm_adaptive(denoise, x.half(), levels, at=SD.at_ratio))
    assert seen == {torch.float16} == {steps[-1].x.dtype, steps[-1].x0.dtype}
    assert (steps[-1].x - gaussian.end(x, levels[0], levels[3])).abs().max() < 0.02


def test_what_cannot_be_done_is_said(gaussian, x):
    levels = FLOW.at_ratio(torch.tensor([5.0, 0.1]))
    for wrong in ({"rtol": -0.1}, {"atol": 0.0}, {"rtol": math.nan}):
        with pytest.raises(ValueError, match="rtol must not be below 0 and atol must be above 0"):
            end(None, x, levels, **wrong)
    with pytest.raises(RuntimeError, match=r"no step is short enough for Tolerance\(relative=0\.0, absolute=1e-15\)"):
        end(gaussian.denoise, x.float(), levels, rtol=0.0, atol=1e-15)

    def broken(x, level):
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 2, math.nan, x)

    with pytest.raises(
        RuntimeError, match=r"image 2 is stuck between sigma / alpha 5 and 0.1: its estimates .* not finite"
    ):
        end(broken, x, levels)


def by_the_paper(denoise, x, schedule, ratios, rtol, atol):
    """DPM-Solver-23 of one image in the paper's own variables (Lu et al. 2022a, algorithms 2 and 3), and its tries.

    With h_init 0.05 and theta 0.9; ours besides: a try changes h by 0.2 to 5 times, h is
    at most 1, and a step cut short by a level is no reason to go on with a shorter one.
    """

    def coefficients(lam):
        level = schedule.at_ratio(torch.tensor([math.exp(-lam)], dtype=torch.float64))
        return level, level.alpha.item(), level.sigma.item()

    def eps(x, lam):
        level, alpha, sigma = coefficients(lam)
        return (x - alpha * denoise(x, level)) / sigma

    h, tries, r1, r2 = 0.05, 0, 1 / 3, 2 / 3
    for start, end in itertools.pairwise(-math.log(ratio) for ratio in ratios):
        lam = start
        while lam < end:
            step = min(h, end - lam)
            to = end if h >= end - lam else lam + step
            (_, alpha, _), (_, alpha1, sigma1) = coefficients(lam), coefficients(lam + r1 * step)
            (_, alpha2, sigma2), (_, alpha_t, sigma_t) = coefficients(lam + r2 * step), coefficients(to)
            first = eps(x, lam)
            x1 = alpha1 / alpha * x - sigma1 * math.expm1(r1 * step) * first
            d1 = eps(x1, lam + r1 * step) - first
            x2 = alpha2 / alpha * x - sigma2 * math.expm1(r2 * step) * first
            x2 = x2 - sigma2 * r2 / r1 * (math.expm1(r2 * step) / (r2 * step) - 1) * d1
            d2 = eps(x2, lam + r2 * step) - first
            straight = alpha_t / alpha * x - sigma_t * math.expm1(step) * first
            low = straight - sigma_t / (2 * r1) * math.expm1(step) * d1
            high = straight - sigma_t / r2 * (math.expm1(step) / step - 1) * d2
            allowed = torch.maximum(torch.tensor(atol).double(), rtol * torch.maximum(low.abs(), x.abs()))
            error = ((low - high) / allowed).square().mean().sqrt().item()
            tries += 1
            wanted = min(step * min(max(0.9 * max(error, 1e-12) ** (-1 / 3), 0.2), 5.0), 1.0)
            if error <= 1:
                x, lam, cut = high, to, step < h
                h = max(wanted, h) if cut else wanted
            else:
                h = wanted
    return x, tries


@pytest.mark.parametrize("ratios", [(60.0, 0.05), (30.0, 3.0, 0.4, 0.05)])
@pytest.mark.parametrize("sharpness", [1.0, 9.0])
@pytest.mark.parametrize("tolerance", [{}, {"rtol": 1e-4, "atol": 1e-5}])
def test_equal_to_the_paper_step_by_step(ratios, sharpness, tolerance):
    """On a denoiser that bends so much that some tries fail, one image at a time; the paper's tolerances by default."""
    schedule, asked = FlowSchedule(), []

    def denoise(x, level):
        asked.append(level)
        wide = level.like(x)
        calm = wide.sigma > 4 * wide.alpha  # and so with long strides into where it is not
        return torch.tanh(sharpness * x / (wide.alpha + wide.sigma)) * wide.alpha + ~calm * 0.3 * torch.sin(3 * x)

    levels = schedule.at_ratio(torch.tensor(ratios, dtype=torch.float64))
    for seed in range(3):
        start = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rtol, atol = tolerance.get("rtol", 0.05), tolerance.get("atol", 0.0078)
        expected, tries = by_the_paper(denoise, start, schedule, ratios, rtol, atol)
        asked.clear()
        *_, step = dpm_adaptive(denoise, start, levels, at=schedule.at_ratio, **tolerance)
        assert (step.x - expected).abs().max() < 1e-9
        assert len(asked) == 3 * tries

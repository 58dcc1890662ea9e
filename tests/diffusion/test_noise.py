import pytest
import torch

from ldm.diffusion.noise import (
    FLOW_SPACINGS,
    SPACINGS,
    STRIDES,
    EDMSchedule,
    FlowSchedule,
    ImageNoise,
    discrete,
    zero_terminal_snr,
)
from ldm.diffusion.prediction import to_x0
from ldm.diffusion.spacings import RATIO_SPACINGS, beta_times

EXACT = [s for s in SPACINGS if s not in ("compvis", "ays_video")]
SD = ("scaled_linear", 1000, 0.00085, 0.012)
DISCRETE = [SD, ("linear", 1000, 1e-4, 0.02), ("cosine", 1000, 0.0, 0.0)]


def test_stable_diffusion_values():
    alpha_bar = discrete(*SD).alpha_bar
    expected = torch.tensor([0.99915, 0.998296, 0.2763327, 0.0046601], dtype=torch.float64)
    assert (alpha_bar[[0, 1, 500, 999]] - expected).abs().max() < 1e-7
    sigma_over_alpha = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert sigma_over_alpha[0] == pytest.approx(0.0291672, abs=1e-7)
    assert sigma_over_alpha[-1] == pytest.approx(14.614641, abs=1e-6)


def test_cosine_follows_its_formula_until_the_clip():
    alpha_bar = discrete(*DISCRETE[2]).alpha_bar
    time = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    exact = torch.cos(time) ** 2 / torch.cos(time[0]) ** 2
    assert (alpha_bar[:990] - exact[1:991]).abs().max() < 1e-12
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.001)


@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_schedules_preserve_variance(kind):
    level = discrete(*kind).at(torch.arange(1000))
    assert level.alpha.dtype == torch.float64
    assert (level.alpha**2 + level.sigma**2 - 1).abs().max() < 1e-15
    assert (level.alpha.diff() < 0).all()


def test_at_interpolates_between_whole_steps():
    schedule = discrete(*SD)
    assert schedule.at(3).alpha ** 2 == pytest.approx(schedule.alpha_bar[3].item())
    assert schedule.at(3.25).alpha ** 2 == pytest.approx(torch.lerp(*schedule.alpha_bar[3:5], 0.25).item())
    assert schedule.at(999).t == 999


@pytest.mark.parametrize(("schedule", "t"), [(discrete(*SD), 1000), (discrete(*SD), -1), (FlowSchedule(), 1000.5)])
def test_at_refuses_t_outside(schedule, t):
    with pytest.raises(ValueError, match=r"t must be in 0\.\.(999|1000), got"):
        schedule.at(t)


@pytest.mark.parametrize("spacing", STRIDES)
@pytest.mark.parametrize("total", [1000, 37])
def test_discrete_trajectory_has_exactly_the_steps_asked_for(spacing, total):
    schedule = discrete("scaled_linear", total, 0.00085, 0.012)
    for steps in range(1, total + 1):
        levels = schedule.trajectory(steps, spacing)
        assert len(levels.t) == len(levels.alpha) == len(levels.sigma) == steps + 1
        assert levels.t.max() <= total - 1 and levels.t.min() >= 0
        assert (levels.t == levels.t.round()).all()
        assert (levels.alpha.diff() > 0).all() and (levels.sigma.diff() < 0).all()


@pytest.mark.parametrize("spacing", EXACT)
def test_every_spacing_has_exactly_the_steps_asked_for(spacing):
    schedule = discrete(*SD)
    for steps in (*range(1, 60), 333, 1000):
        levels = schedule.trajectory(steps, spacing)
        assert len(levels.t) == steps + 1
        assert levels.t.max() <= 999 and levels.t.min() >= 0 and levels.sigma[-1] < 0.03
        assert (levels.alpha.diff() > 0).all() and (levels.sigma.diff() < 0).all()
        if spacing in FLOW_SPACINGS:
            levels = FlowSchedule(3.0).trajectory(steps, spacing)
            assert len(levels.t) == steps + 1 and levels.sigma[0] == 1 and levels.sigma[-1] == 0
            assert (levels.sigma.diff() < 0).all()


def test_leading_is_stable_diffusions():
    schedule = discrete(*SD)
    levels = schedule.trajectory(50, "leading")
    assert levels.t.tolist() == [*range(981, 0, -20), 0]
    assert levels.alpha[-1] ** 2 == pytest.approx(0.99915)
    for steps in (n for n in range(1, 1000) if 1000 % n == 0):
        expected = [k * (1000 // steps) + 1 for k in reversed(range(steps))]
        assert schedule.trajectory(steps, "leading").t[:-1].tolist() == expected


def test_trailing_and_linspace_meet_their_ends():
    schedule = discrete(*SD)
    assert schedule.trajectory(50, "trailing").t[:-1].tolist() == list(range(999, 0, -20))
    assert schedule.trajectory(4, "linspace").t[:-1].tolist() == [999, 666, 333, 0]
    for spacing in ("trailing", "linspace"):
        for steps in (1, 7, 50, 1000):
            levels = schedule.trajectory(steps, spacing)
            assert levels.t[0] == 999 and levels.alpha[-1] == 1 and levels.sigma[-1] == 0


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_trajectory_runs_from_pure_noise_to_clean(spacing, shift):
    for steps in (1, 2, 3, 50, 1000, 2000):
        levels = FlowSchedule(shift).trajectory(steps, spacing)
        assert len(levels.t) == steps + 1
        assert levels.alpha[0] == 0 and levels.sigma[0] == 1 and levels.t[0] == 1000
        assert levels.alpha[-1] == 1 and levels.sigma[-1] == 0 and levels.t[-1] == 0
        assert (levels.sigma.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps must be in 1\.\.1000 .* got {steps}"):
        discrete(*SD).trajectory(steps, "trailing")
    if steps < 1:
        with pytest.raises(ValueError, match="at least 1"):
            FlowSchedule().trajectory(steps, "trailing")


def test_unknown_words_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="did you mean 'trailing'"):
        discrete(*SD).trajectory(10, "trailling")
    with pytest.raises(ValueError, match="leading"):
        FlowSchedule().trajectory(10, "leading")
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        discrete("cosin", 1000, 0.1, 0.2)


@pytest.mark.parametrize("betas", [(0.0, 0.1), (0.2, 0.1), (0.1, 1.0)])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="0 < start <= end < 1"):
        discrete("linear", 1000, *betas)


def test_sample_covers_every_discrete_level_once():
    schedule = discrete(*SD)
    assert schedule.sample((torch.arange(1000) + 0.5) / 1000).t.tolist() == list(range(1000))
    ends = schedule.sample(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.t.tolist() == [0, 999] and ends.alpha.shape == (2,)


def test_shift_is_the_published_formula_and_at_agrees_with_sample():
    u = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = FlowSchedule(shift=3.0).sample(u)
    assert torch.allclose(level.sigma, 3 * u / (1 + 2 * u)) and torch.allclose(level.alpha, 1 - level.sigma)
    again = FlowSchedule(shift=3.0).at(level.t)
    assert torch.allclose(again.sigma, level.sigma)


def test_image_noise_depends_on_its_own_seed_alone():
    together, alone = ImageNoise([7, 3, 7], (4, 2, 2)), ImageNoise([3], (4, 2, 2))
    for _ in range(3):
        batch = together()
        assert torch.equal(batch[1:2], alone()) and torch.equal(batch[0], batch[2])
    assert not torch.equal(batch, together())


def test_zero_terminal_snr_against_the_published_algorithm():
    """Lin et al. 2024, algorithm 1, on betas as it is printed there."""
    schedule = discrete("scaled_linear", 1000, 0.00085, 0.012)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    moved = zero_terminal_snr(schedule).alpha_bar
    torch.testing.assert_close(moved, root**2, rtol=1e-12, atol=0)
    assert moved[-1] == 0 and torch.isclose(moved[0], schedule.alpha_bar[0], rtol=1e-12)
    levels = zero_terminal_snr(schedule).trajectory(7, "trailing")
    assert levels.alpha[0] == 0 and levels.sigma[0] == 1 and len(levels.t) == 8


def test_align_your_steps_gives_the_published_timesteps():
    """Sabour et al. 2024 list them beside their noise levels."""
    schedule = discrete(*SD)
    expected = {
        "ays": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0],
        "ays_sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0],
    }
    for spacing, steps in expected.items():
        levels = schedule.trajectory(10, spacing)
        assert (levels.t - torch.tensor(steps)).abs().max() < 1.0, spacing
        assert levels.sigma[-1] == 0
    with pytest.raises(ValueError, match="starts at sigma / alpha 700"):
        schedule.trajectory(10, "ays_video")
    with pytest.raises(ValueError, match="spacing of a flow 'ays'"):
        FlowSchedule().trajectory(10, "ays")


@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_ratio_spacings_against_their_formulas(steps):
    low, high, i = 0.03, 14.6, torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    expected = {
        "karras": (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": high * (low / high) ** i,
        "kl_optimal": torch.tan(i * torch.tensor(low).double().atan() + (1 - i) * torch.tensor(high).double().atan()),
    }
    for name, ratios in expected.items():
        torch.testing.assert_close(RATIO_SPACINGS[name](steps, low, high), ratios, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", [s for s in RATIO_SPACINGS if s != "ays_video"])
def test_levels_of_a_ratio_lie_on_the_schedule(spacing):
    """Told t, the schedule has the same level again, up to how it is interpolated between whole steps."""
    schedule = discrete(*SD)
    levels = schedule.trajectory(23, spacing)
    assert len(levels.t) == 24 and (levels.t[:-1].diff() <= 0).all()
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(24, dtype=torch.float64))
    between = levels.t > 1  # near t = 0 the two interpolations part
    torch.testing.assert_close(schedule.at(levels.t[between]).sigma, levels.sigma[between], rtol=2e-2, atol=0)
    for whole in (schedule, FlowSchedule()):
        ratios = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        level = whole.at_ratio(ratios)
        torch.testing.assert_close(level.sigma / level.alpha, ratios)


def test_beta_spacing_is_the_quantile_of_its_distribution():
    times = beta_times(50)
    samples = torch.distributions.Beta(0.6, 0.6).sample((400_000,)).double()
    shares = torch.stack([(samples <= t).double().mean() for t in times])
    torch.testing.assert_close(shares, 1 - torch.arange(50, dtype=torch.float64) / 50, rtol=0, atol=4e-3)
    assert times[0] == 1 and abs(float(beta_times(2)[1]) - 0.5) < 1e-7  # symmetric


def test_compvis_spacing_is_the_original_with_its_faults():
    schedule = discrete(*SD)
    assert schedule.trajectory(50, "compvis").t.tolist() == schedule.trajectory(50, "leading").t.tolist()
    assert len(schedule.trajectory(30, "compvis").t) == 32  # 31 steps, from 991
    assert schedule.trajectory(30, "compvis").t[0] == 991
    for steps in (3, 27, 101, 1000):
        with pytest.raises(ValueError, match="t = 1000"):
            schedule.trajectory(steps, "compvis")


def test_other_betas_against_their_formulas():
    line = torch.linspace(0.001, 0.02, 100, dtype=torch.float64)
    roots = discrete("sqrt", 100, 0.001, 0.02).alpha_bar
    torch.testing.assert_close(roots, (1 - line.sqrt()).cumprod(0))
    curve = 0.001 + 0.019 / (1 + torch.exp(-torch.linspace(-6, 6, 100, dtype=torch.float64)))
    torch.testing.assert_close(discrete("sigmoid", 100, 0.001, 0.02).alpha_bar, (1 - curve).cumprod(0))


def test_edm_levels_are_those_of_the_paper():
    """Ratios by eq. 5 with rho 7 from 80 to 0.002, told ln(ratio) / 4, drawn log-normally."""
    schedule = EDMSchedule()
    levels = schedule.trajectory(18, "karras")
    i = torch.arange(18, dtype=torch.float64)
    ratios = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close((levels.sigma / levels.alpha)[:-1], ratios)
    torch.testing.assert_close(levels.t[:-1], ratios.log() / 4)
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(19, dtype=torch.float64))
    torch.testing.assert_close(schedule.at(levels.t[:-1]).sigma, levels.sigma[:-1])
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = schedule.sample(u)
    logarithm = (drawn.sigma / drawn.alpha).log()
    assert abs(logarithm.mean() + 1.2) < 1e-6 and abs(logarithm.std() - 1.2) < 1e-3
    assert schedule.sample(torch.tensor([0.0, 1 - 2**-24])).sigma.isfinite().all()


def test_prediction_v_on_edm_levels_is_its_preconditioning():
    """D(x) = c_skip x + c_out F(c_in x) with unit data (Karras et al. 2022, table 1), F = -v."""
    level = EDMSchedule().at_ratio(torch.tensor([0.01, 0.5, 3.0, 70.0], dtype=torch.float64))
    sigma = level.sigma / level.alpha
    x, output = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = sigma.view(-1, 1, 1, 1)
    paper = x / (wide**2 + 1) + wide / (wide**2 + 1).sqrt() * -output
    torch.testing.assert_close(to_x0("v", output, x / (wide**2 + 1).sqrt(), level), paper)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "beta", "ays"])
def test_edm_has_no_spacing_of_other_schedules(spacing):
    with pytest.raises(ValueError, match="unknown spacing of edm"):
        EDMSchedule().trajectory(10, spacing)


PUBLISHED = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_video": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_tables_and_the_places_halfway(name):
    """Ten steps are the table but for its end; of twenty each second is the geometric mean of its neighbours."""
    table = torch.tensor(PUBLISHED[name], dtype=torch.float64)
    torch.testing.assert_close(RATIO_SPACINGS[name](10, 0.0, 0.0), table[:-1])
    twenty = RATIO_SPACINGS[name](20, 0.0, 0.0)
    torch.testing.assert_close(twenty[::2], table[:-1])
    torch.testing.assert_close(twenty[1::2], (table[:-1] * table[1:]).sqrt())


def test_the_usual_power_of_polyexponential_spacing():
    """At the middle step log ratio is at 0.5^1.5 of the way up: 1.5 unless told otherwise."""
    middle = RATIO_SPACINGS["polyexponential"](3, 0.01, 10.0)[1].log10()
    assert middle.item() == pytest.approx(-2 + 3 * 0.5**1.5)

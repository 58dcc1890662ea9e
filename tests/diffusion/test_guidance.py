import pytest
import torch

from ldm.diffusion.guidance import adaptive_projected, guided, plus_plus, thresholded
from ldm.diffusion.noise import EDMSchedule, FlowSchedule, discrete, zero_terminal_snr
from ldm.diffusion.prediction import PREDICTIONS, target, to_x0
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import ddim
from ldm.types import Conditioning

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
LEVEL = SD.at(600)
T = torch.full((4,), 600.0)


def cond(*values: float) -> Conditioning:
    return Conditioning(context=torch.tensor(values, dtype=torch.float64).view(-1, 1, 1))


COND, UNCOND = cond(1, 2, 3, 4), cond(-1)


class Network:
    """x0 = x times what it is told, said in any prediction; counts the rows it is given."""

    def __init__(self, prediction="eps"):
        self.prediction, self.rows = prediction, []

    def __call__(self, x, t, cond):
        self.rows.append(len(x))
        assert len(x) == len(t) == len(cond.context)
        x0 = x * cond.context.view(-1, 1, 1, 1)
        return target(self.prediction, x0, (x - LEVEL.alpha * x0) / LEVEL.sigma, LEVEL)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mixed_in_any_prediction_space_it_is_the_same(x, prediction):
    output = guided(Network(prediction), UNCOND, 7.5)(x, T, COND)
    without, wanted = -x, x * COND.context.view(-1, 1, 1, 1)
    expected = without + 7.5 * (wanted - without)
    assert (to_x0(prediction, output, x, LEVEL) - expected).abs().max() < 1e-12


def test_one_forward_of_both_halves_uncond_first(x):
    seen = []

    def network(x, t, cond):
        seen.append(cond.context.flatten().tolist())
        return x

    guided(network, UNCOND, 3.0)(x, T, COND)
    guided(network, cond(-1, -2, -3, -4), 3.0)(x, T, COND)
    assert seen == [[-1, -1, -1, -1, 1, 2, 3, 4], [-1, -2, -3, -4, 1, 2, 3, 4]]


def test_scale_one_needs_no_uncond():
    network = Network()
    assert guided(network, Conditioning(), 1.0) is network


def test_scale_zero_is_unconditional(x):
    network = Network()
    assert torch.allclose(guided(network, UNCOND, 0.0)(x, T, COND), network(x, T, cond(-1, -1, -1, -1)))


def test_rescale_brings_back_the_conditional_spread(x):
    network = Network()
    plain = guided(network, UNCOND, 9.0)(x, T, COND)
    full = guided(network, UNCOND, 9.0, rescale=1.0)(x, T, COND)
    part = guided(network, UNCOND, 9.0, rescale=0.7)(x, T, COND)
    wanted = network(x, T, COND)
    assert torch.allclose(full.flatten(1).std(1), wanted.flatten(1).std(1))
    assert torch.allclose(part, 0.7 * full + 0.3 * plain)


def test_rescale_of_a_silent_network_is_no_nan(x):
    output = guided(lambda x, t, cond: 0 * x, UNCOND, 9.0, rescale=0.7)(x, T, COND)
    assert torch.equal(output, 0 * x)


def test_interval_guides_only_inside_and_saves_the_forward_outside(x):
    network = Network()
    guide = guided(network, UNCOND, 5.0, interval=(200, 800))
    inside, outside = guide(x, T, COND), guide(x, T + 300, COND)
    assert network.rows == [8, 4]
    assert torch.equal(inside, guided(network, UNCOND, 5.0)(x, T, COND))
    assert torch.equal(outside, network(x, T, COND))
    mixed = guide(x, torch.tensor([200.0, 800.0, 199.0, 801.0]), COND)
    assert torch.equal(mixed[:2], inside[:2]) and torch.allclose(mixed[2:], outside[2:])


@pytest.mark.parametrize(
    ("scale", "settings", "message"),
    [
        (float("nan"), {}, "finite"),
        (2.0, {"rescale": 1.5}, r"0\.\.1"),
        (2.0, {"interval": (800, 200)}, "low <= high"),
    ],
)
def test_impossible_settings_are_refused(scale, settings, message):
    with pytest.raises(ValueError, match=message):
        guided(Network(), UNCOND, scale, **settings)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_output_and_estimate_are_each_others_inverse(x, prediction):
    diffusion = Diffusion.from_config(DiffusionConfig(prediction=prediction))
    x0 = torch.randn_like(x)
    output = diffusion.output_of(x0, x, T)
    assert (diffusion.x0_of(output, x, T) - x0).abs().max() < 1e-12
    assert (to_x0(prediction, output, x, LEVEL) - x0).abs().max() < 1e-12


def test_projected_guidance_without_its_changes_is_the_plain_one(x):
    for prediction in PREDICTIONS:
        space = Diffusion.from_config(DiffusionConfig(prediction=prediction))
        mix = adaptive_projected(space, 6.0, parallel=1.0, momentum=0.0, norm=0.0)
        network = Network(prediction)
        plain = guided(network, UNCOND, 6.0)(x, T, COND)
        assert (guided(network, UNCOND, 6.0, mix=mix)(x, T, COND) - plain).abs().max() < 1e-10


def test_projected_guidance_against_the_paper_on_one_image():
    """Estimate (2, 0), unconditional (1, -3): the difference (1, 3) has 1 along the estimate and 3 across."""
    space = Diffusion.from_config(DiffusionConfig(prediction="x0"))
    one, level = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.tensor([600.0])
    wanted, without = one + torch.tensor([2.0, 0.0]), one + torch.tensor([1.0, -3.0])
    mix = adaptive_projected(space, 3.0, parallel=0.5, momentum=0.0, norm=0.0)
    assert mix(one, level, without, wanted).flatten().tolist() == pytest.approx([2 + 2 * 0.5, 2 * 3.0])
    short = adaptive_projected(space, 3.0, parallel=0.5, momentum=0.0, norm=10**0.5 / 2)
    assert short(one, level, without, wanted).flatten().tolist() == pytest.approx([2 + 0.5, 3.0])
    heavy = adaptive_projected(space, 3.0, parallel=1.0, momentum=-0.5, norm=0.0)
    heavy(one, level, without, wanted)
    second = heavy(one, level, without, wanted)  # the difference is (1, 3) - (1, 3) / 2
    assert second.flatten().tolist() == pytest.approx([2 + 2 * 0.5, 2 * 1.5])


def test_autoguidance_extrapolates_from_the_weaker_network(x):
    def weak(x, t, cond):
        return 0.5 * Network()(x, t, cond)

    network = Network()
    output = guided(network, weak, 3.0)(x, T, COND)
    strong = network(x, T, COND)
    assert torch.allclose(output, 0.5 * strong + 3.0 * (strong - 0.5 * strong))


@pytest.mark.parametrize("schedule", [SD, FlowSchedule(), zero_terminal_snr(SD), EDMSchedule()])
def test_cfg_plus_plus_is_the_papers_algorithm(x, schedule):
    """Each DDIM step: the guided estimate of x0, and the noise of the network without the prompt."""
    levels = schedule.trajectory(7, "karras" if isinstance(schedule, EDMSchedule) else "trailing")
    space = Diffusion(schedule, DiffusionConfig(prediction="v"))
    x = x.double()

    def network(x, t, cond):
        level = schedule.at(t).like(x)
        x0 = torch.tanh(x * cond.context.view(-1, 1, 1, 1)) * 0.5
        return target("v", x0, (x - level.alpha * x0) / level.sigma, level)

    expected = x
    for index in range(7):
        level, below = levels[index], levels[index + 1]
        t = level.t.expand(4)
        without = space.x0_of(network(expected, t, cond(-1, -1, -1, -1)), expected, t)
        wanted = space.x0_of(network(expected, t, COND), expected, t)
        eps = (expected - level.alpha * without) / level.sigma
        expected = below.alpha * (without + 0.6 * (wanted - without)) + below.sigma * eps
    guide = guided(network, UNCOND, plus_plus(levels, 0.6))
    found = list(ddim(space.denoise(guide, COND), x, levels))[-1].x
    assert (found - expected).abs().max() < 2e-5  # the network is told t in float32


def test_cfg_plus_plus_between_levels_takes_the_upper_ones_scale():
    levels = SD.trajectory(4, "trailing")
    scale = plus_plus(levels, 0.5)
    at_levels = scale(levels.t[:-1])
    assert torch.equal(scale(levels.t[:-1] - 1), at_levels)
    assert at_levels[-1] == pytest.approx(0.5) and (at_levels[:-1] > 0.5).all()
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got 7"):
        plus_plus(levels, 7.0)


def test_a_perturbed_network_is_pushed_away_from(x):
    network = Network()
    wanted = network(x, T, COND)

    def weakened(x, t, cond):
        return 0.3 * wanted

    plain = guided(network, UNCOND, 4.0)(x, T, COND)
    pushed = guided(network, UNCOND, 4.0, perturbed=(weakened, 2.0))(x, T, COND)
    assert torch.allclose(pushed, plain + 2.0 * 0.7 * wanted)
    network.rows.clear()
    alone = guided(network, Conditioning(), 1.0, perturbed=(weakened, 2.0))(x, T, COND)
    assert network.rows == [4] and torch.allclose(alone, wanted + 2.0 * 0.7 * wanted)


def test_a_learned_variance_passes_through(x):
    space = Diffusion.from_config(DiffusionConfig(variance="learned_range", objective="hybrid"))

    def network(x, t, cond):
        told = cond.context.view(-1, 1, 1, 1)
        return torch.cat([x * told, x * 0 + told], dim=1)

    mix = adaptive_projected(space, 3.0)
    for guide in (guided(network, UNCOND, 3.0, rescale=0.5), guided(network, UNCOND, 3.0, mix=mix)):
        output = thresholded(guide, space, 0.99)(x, T, COND)
        assert output.shape == (4, 2, 4, 4)
        assert torch.equal(output[:, 1:], COND.context.view(-1, 1, 1, 1).expand_as(x))


def test_thresholding_brings_estimates_into_range_and_leaves_others(x):
    space = Diffusion.from_config(DiffusionConfig())
    wide, calm = torch.linspace(-4, 4, 16, dtype=torch.float64), torch.linspace(-0.9, 0.9, 16, dtype=torch.float64)
    x0 = torch.stack([wide, calm, wide, calm]).view(4, 1, 4, 4)

    def network(x, t, cond):
        return space.output_of(x0, x, t)

    found = space.x0_of(thresholded(network, space, 0.9)(x, T, COND), x, T)
    reach = torch.quantile(wide.abs(), 0.9)
    torch.testing.assert_close(found[0].flatten(), wide.clamp(-reach, reach) / reach, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], x0[1])
    with pytest.raises(ValueError, match="share in 0"):
        thresholded(network, space, 1.5)

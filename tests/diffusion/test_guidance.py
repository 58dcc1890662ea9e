import pytest
import torch

from ldm.diffusion.guidance import guided
from ldm.diffusion.noise import discrete
from ldm.diffusion.prediction import PREDICTIONS, target, to_x0
from ldm.types import Conditioning

LEVEL = discrete("scaled_linear", 1000, 0.00085, 0.012).at(600)
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

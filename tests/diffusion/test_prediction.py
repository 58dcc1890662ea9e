import pytest
import torch

from ldm.diffusion.noise import FlowSchedule, NoiseLevel, discrete
from ldm.diffusion.prediction import PREDICTIONS, target, to_eps, to_x0

VP = discrete("scaled_linear", 1000, 0.00085, 0.012)


def level(alpha: float, sigma: float) -> NoiseLevel:
    return NoiseLevel(*torch.tensor([0.0, alpha, sigma], dtype=torch.float64))


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("at", [VP.at(0), VP.at(500), VP.at(999), FlowSchedule().at(1), FlowSchedule().at(700)])
def test_predictions_invert(prediction, at):
    x0, eps = pair()
    x = at.alpha * x0 + at.sigma * eps
    output = target(prediction, x0, eps, at)
    assert (to_x0(prediction, output, x, at) - x0).abs().max() < 1e-11
    assert (to_eps(prediction, output, x, at) - eps).abs().max() < 1e-11


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_pure_noise_is_solvable(prediction):
    x0, eps = pair()
    at = level(0.0, 1.0)
    output = target(prediction, x0, eps, at)
    assert torch.allclose(to_x0(prediction, output, eps, at), x0, atol=1e-15)
    assert torch.allclose(to_eps(prediction, output, eps, at), eps, atol=1e-15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_level_is_solvable(prediction):
    x0, eps = pair()
    at = level(1.0, 0.0)
    assert torch.allclose(to_x0(prediction, target(prediction, x0, eps, at), x0, at), x0, atol=1e-15)


def test_targets_are_the_published_ones():
    x0, eps = pair()
    at = VP.at(321)
    assert torch.equal(target("eps", x0, eps, at), eps)
    assert torch.equal(target("x0", x0, eps, at), x0)
    assert torch.allclose(target("v", x0, eps, at), at.alpha * eps - at.sigma * x0)
    assert torch.allclose(target("flow", x0, eps, at), eps - x0)


def test_a_level_per_sample_equals_the_samples_one_by_one():
    x0, eps = pair()
    levels = VP.at(torch.tensor([10, 500, 990]))
    for prediction in PREDICTIONS:
        batch = target(prediction, x0, eps, levels)
        for i in range(3):
            assert torch.equal(batch[i : i + 1], target(prediction, x0[i : i + 1], eps[i : i + 1], levels[i]))


def test_scalar_levels_keep_the_type_of_x():
    x = torch.randn(1, 3, 2, 2, dtype=torch.bfloat16)
    assert to_x0("v", x, x, VP.at(500)).dtype == torch.bfloat16


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match=r"unknown prediction 'epsilon'.*eps"):
        target("epsilon", torch.zeros(1), torch.zeros(1), level(0.6, 0.8))

import json
import math
from dataclasses import asdict

import pytest
import torch

from ldm.diffusion.noise import STRIDES
from ldm.diffusion.prediction import PREDICTIONS, target
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.types import Conditioning

CASES = [
    (schedule, prediction)
    for schedule in ("scaled_linear", "linear", "cosine", "flow", "edm")
    for prediction in PREDICTIONS
    if (schedule, prediction) != ("flow", "eps")
]


def config_of(schedule, prediction):
    return DiffusionConfig(schedule, prediction, spacing="karras" if schedule == "edm" else "trailing")


def exact_network(diffusion, gaussian):
    """The network that training on Gaussian data converges to, in the prediction it is asked for."""

    def network(x, t, cond):
        level = diffusion.schedule.at(t.double()).like(x)
        x0 = gaussian.denoise(x, level)
        return target(diffusion.prediction, x0, (x - level.alpha * x0) / level.sigma, level)

    return network


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_loss_of_the_exact_denoiser_is_the_bayes_error(gaussian, schedule, prediction):
    diffusion = Diffusion.from_config(config_of(schedule, prediction))
    generator = torch.Generator().manual_seed(0)
    u = torch.tensor([0.02, 0.3, 0.6, 0.97], dtype=torch.float64)
    x0, noise = torch.randn(2, 4, 2, 200, 200, dtype=torch.float64, generator=generator)
    x0 = gaussian.mu + gaussian.s * x0
    loss = diffusion.loss(exact_network(diffusion, gaussian), x0, Conditioning(), noise=noise, u=u)
    level = diffusion.levels(u)
    factor = {
        "eps": (level.alpha / level.sigma) ** 2,
        "x0": 1.0,
        "v": ((level.alpha**2 + level.sigma**2) / level.sigma) ** 2,
        "flow": ((level.alpha + level.sigma) / level.sigma) ** 2,
    }[prediction]
    bayes = factor * gaussian.s**2 * level.sigma**2 / gaussian.spread(level) ** 2
    assert loss.shape == (4,)
    assert (loss / bayes - 1).abs().max() < 0.02  # 80,000 samples: standard error 0.5 %


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_denoise_solves_for_x0(gaussian, x, schedule, prediction):
    diffusion = Diffusion.from_config(config_of(schedule, prediction))
    denoise = diffusion.denoise(exact_network(diffusion, gaussian), Conditioning())
    level = diffusion.schedule.at(0.1 if schedule == "edm" else 400.0)
    assert (denoise(x, level) - gaussian.denoise(x, level)).abs().max() < 1e-12


def test_min_snr_weights_are_the_published_ones():
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    for prediction in ("eps", "x0", "v"):
        diffusion = Diffusion.from_config(DiffusionConfig(prediction=prediction, weighting="min_snr"))
        level = diffusion.levels(u)
        snr = (level.alpha / level.sigma) ** 2
        expected = snr.clamp(max=5) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
        assert torch.allclose(diffusion.weight(level), expected)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_min_snr_is_finite_where_there_is_no_noise(prediction):
    config = DiffusionConfig(schedule="flow", prediction=prediction, weighting="min_snr")
    diffusion = Diffusion.from_config(config)
    assert diffusion.weight(diffusion.levels(torch.zeros(1))).isfinite().all()


def test_loss_is_weighted_per_sample():
    plain = Diffusion.from_config(DiffusionConfig())
    weighted = Diffusion.from_config(DiffusionConfig(weighting="min_snr"))
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    u = torch.tensor([0.0, 0.5, 0.99])

    def loss(diffusion):
        return diffusion.loss(lambda x, t, cond: 0 * x, x0, Conditioning(), noise=noise, u=u)

    assert loss(plain).dtype == torch.float32
    assert torch.allclose(loss(weighted), loss(plain) * weighted.weight(weighted.levels(u)).float())


def test_the_network_is_told_t_in_full_precision():
    told = []

    def network(x, t, cond):
        told.append(t)
        return x

    diffusion = Diffusion.from_config(DiffusionConfig())
    x0 = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    diffusion.loss(network, x0, Conditioning(), noise=x0, u=torch.tensor([0.5, 0.9999]))
    diffusion.denoise(network, Conditioning())(x0, diffusion.trajectory(10)[0])
    assert [t.tolist() for t in told] == [[500, 999], [999, 999]]
    assert all(t.dtype == torch.float32 for t in told)


def test_logit_normal_draws_its_distribution():
    diffusion = Diffusion.from_config(DiffusionConfig(schedule="flow", prediction="flow", timesteps="logit_normal"))
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logit = diffusion.levels(u).sigma.logit()
    assert logit.mean().abs() < 1e-9 and logit.std() == pytest.approx(1, abs=1e-3)
    ends = diffusion.levels(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.sigma.isfinite().all() and ends.sigma.max() <= 1


@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
def test_config_survives_json(schedule):
    config = DiffusionConfig(schedule=schedule, prediction="v", shift=2.0, spacing="linspace")
    again = DiffusionConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    levels, expected = (Diffusion.from_config(c).trajectory(7) for c in (again, config))
    assert torch.equal(levels.alpha, expected.alpha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"prediction": "epsilon"}, "unknown prediction"),
        ({"timesteps": "logit-normal"}, "did you mean 'logit_normal'"),
        ({"weighting": "minsnr"}, "did you mean 'min_snr'"),
        ({"spacing": "quad"}, "unknown spacing"),
        ({"schedule": "flow"}, "'eps' cannot start from the pure noise of 'flow'"),
        ({"schedule": "flow", "prediction": "v", "spacing": "leading"}, "unknown spacing 'leading'"),
        ({"shift": 0.0}, "must be above 0"),
        ({"train_steps": 0}, "train_steps"),
        ({"huber": -1.0}, "huber must not be below 0"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"mode_scale": 3.0}, "mode_scale must be in"),
        ({"schedule": "edm"}, "unknown spacing 'trailing'"),
        ({"schedule": "edm", "spacing": "karras", "sigma_min": 90.0}, "sigma_min must be below sigma_max"),
        (
            {"schedule": "edm", "spacing": "karras", "zero_snr": True, "prediction": "v"},
            "zero_snr cannot be used with schedule 'edm'",
        ),
        ({"dynamic_shift": True}, "dynamic_shift cannot be used with schedule 'scaled_linear'"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_config(DiffusionConfig(**change))


def test_trajectory_takes_the_models_spacing_unless_told():
    diffusion = Diffusion.from_config(DiffusionConfig(spacing="leading"))
    assert diffusion.trajectory(50).t[0] == 981
    assert [diffusion.trajectory(50, s).t[0].item() for s in STRIDES] == [981, 999, 999]


def test_a_learned_variance_is_left_out_of_the_estimate():
    diffusion = Diffusion.from_config(DiffusionConfig())
    x, level = torch.randn(2, 3, 4, 4), diffusion.schedule.at(500.0)

    def plain(x, t, cond):
        return x * 0.3

    def doubled(x, t, cond):
        return torch.cat([x * 0.3, torch.full_like(x, 9.0)], dim=1)

    expected = diffusion.denoise(plain, Conditioning())(x, level)
    assert torch.equal(diffusion.denoise(doubled, Conditioning())(x, level), expected)


def test_dynamic_shift_is_that_of_the_published_flow_models():
    """exp(mu) with mu 0.5 at 256 patches and 1.15 at 4,096, on the line between: 1,024 px of f8 latents have 4,096."""
    config = DiffusionConfig(schedule="flow", prediction="flow", dynamic_shift=True)
    diffusion = Diffusion.from_config(config)
    for side, mu in ((32, 0.5), (128, 1.15), (64, 0.5 + 0.65 * (1024 - 256) / 3840)):
        assert diffusion.for_size(side, side).schedule.shift == pytest.approx(math.exp(mu))
    fixed = Diffusion.from_config(DiffusionConfig())
    assert fixed.for_size(64, 64) is fixed


def test_zero_terminal_snr_needs_a_prediction_that_can_start_from_noise():
    with pytest.raises(ValueError, match="pure noise of zero_snr"):
        Diffusion.from_config(DiffusionConfig(zero_snr=True))
    diffusion = Diffusion.from_config(DiffusionConfig(zero_snr=True, prediction="v"))
    levels = diffusion.trajectory(5, "trailing")
    x = torch.randn(1, 2, 4, 4)
    assert torch.isfinite(diffusion.denoise(lambda x, t, cond: x * 0.5, Conditioning())(x, levels[0])).all()

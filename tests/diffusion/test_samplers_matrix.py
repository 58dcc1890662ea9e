"""Every sampler on every schedule with every kind of prediction, through `Diffusion.denoise`, as pictures are made."""

from dataclasses import dataclass

import pytest
import torch

from ldm.diffusion.prediction import PREDICTIONS, target
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, sampler, traits
from ldm.types import Conditioning
from tests.diffusion.test_samplers_sde import DIFFUSIONS, last, moments, noise_like

SCHEDULES = {
    "scaled_linear": {},
    "linear": {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"schedule": "cosine"},
    "sqrt": {"schedule": "sqrt", "beta_start": 1e-8, "beta_end": 4e-4},
    "sigmoid": {"schedule": "sigmoid"},
    "zero_snr": {"zero_snr": True},
    "flow": {"schedule": "flow"},
    "flow_3": {"schedule": "flow", "shift": 3.0},
    "edm": {"schedule": "edm", "spacing": "karras"},
}
FROM_PURE_NOISE = ("zero_snr", "flow", "flow_3")  # where eps says nothing of x0
STEPS = 30


def diffusions(name):
    """The schedule with each prediction that it can have."""
    kinds = [kind for kind in PREDICTIONS if kind != "eps" or name not in FROM_PURE_NOISE]
    return [Diffusion.from_config(DiffusionConfig(**SCHEDULES[name], prediction=kind)) for kind in kinds]


def network(diffusion, gaussian):
    """What a perfect network says: told x and t alone, of the exact means of x0 and eps."""

    def say(x, t, cond):
        level = diffusion.schedule.at(t.double()).like(x.double())
        x0 = gaussian.denoise(x.double(), level)
        return target(diffusion.prediction, x0, (x.double() - level.alpha * x0) / level.sigma, level).to(x)

    return say


@dataclass(frozen=True)
class Seen:
    """The Gaussian as a sampler meets it through a network."""

    diffusion: Diffusion
    gaussian: object

    @property
    def mu(self):
        return self.gaussian.mu

    def spread(self, level):
        return self.gaussian.spread(level)

    def denoise(self, x, level):
        shaped = x if x.ndim == 4 else x[..., None, None]
        say = network(self.diffusion, self.gaussian)
        return self.diffusion.denoise(say, Conditioning())(shaped, level).view(x.shape)


def bounds(name):
    """How far the end may be from the exact one after STEPS steps, and from that of an exact estimate of x0.

    The second is rounding, but for samplers that step between the levels of a chain: told t alone, the network there
    takes alpha^2 for linear between whole t.
    """
    return 0.32 if traits(name).order == 1 else 0.23, 5e-3 if traits(name).between else 1e-10


ODE = [name for name in SAMPLERS if not traits(name).stochastic]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ODE)
def test_every_way_through_the_ode_ends_near_the_exact_end(gaussian, x, name, schedule):
    exact_within, same_within = bounds(name)
    direct = None
    for diffusion in diffusions(schedule):
        at, levels = diffusion.schedule.at_ratio, diffusion.trajectory(STEPS)
        if direct is None:
            direct = last(sampler(name)(gaussian.denoise, x, levels, at=at))
            assert (direct - gaussian.end(x, levels[0], levels[-1])).abs().max() < exact_within
        end = last(sampler(name)(Seen(diffusion, gaussian).denoise, x, levels, at=at))
        assert (end - direct).abs().max() < same_within, diffusion.prediction


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ODE])
def test_every_way_through_a_stochastic_equation_has_the_mean_and_spread_of_the_data(gaussian, name, schedule):
    """Exactly, not drawn. The consistency samplers want another network: of this one they make too little spread."""
    _, same_within = bounds(name)
    direct = None
    for diffusion in diffusions(schedule):
        at, levels = diffusion.schedule.at_ratio, diffusion.trajectory(STEPS)
        if direct is None:
            direct = moments(sampler(name), gaussian, levels, at)
            assert direct[0] == pytest.approx(gaussian.mu, abs=1e-12)
            low, high = (0.75, 1.25) if name in DIFFUSIONS else (0.5, 1.0)
            assert low < direct[1] / gaussian.s < high
        found = moments(sampler(name), Seen(diffusion, gaussian), levels, at)
        assert found == pytest.approx(direct, abs=same_within), diffusion.prediction


ADDS_UP = ("plms", "ipndm")  # the weights of their eps, up to 160 / 24 without the signs
UNEVEN = ("lms",)  # still more where the strides differ


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if traits(name).evaluations])  # at steps of its own choice
def test_half_precision_of_latents_costs_its_resolution(gaussian, x, name, schedule, dtype):
    """The network sees and says 100 times what is rounded to the type; each time that moves the end by less than it."""
    diffusion = Diffusion.from_config(DiffusionConfig(**SCHEDULES[schedule], prediction="v"))
    end, exact = halved(sampler(name), diffusion, gaussian, x, dtype)
    assert end.dtype == dtype
    bound = 10 if name in UNEVEN else 5 if name in ADDS_UP else 3
    assert (end.double() - exact).abs().max() < bound * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
@pytest.mark.parametrize("name", ["ddim", "heun", "flow_heun", "dpmpp_2m"])
def test_sums_in_half_precision_are_caught(gaussian, x, name, schedule, dtype):
    """The same samplers without `accurate` around them, given estimates in the type of x."""
    diffusion = Diffusion.from_config(DiffusionConfig(**SCHEDULES[schedule], prediction="v"))

    def careless(denoise, x, levels, **options):
        return sampler(name).__wrapped__(lambda x, level: denoise(x, level).to(x), x, levels, **options)

    end, exact = halved(careless, diffusion, gaussian, x, dtype)
    assert (end.double() - exact).abs().max() > 3 * torch.finfo(dtype).eps * exact.abs().max()


def halved(take, diffusion, gaussian, x, dtype):
    """The ends in a type of half precision, and in float64 from the same start and with the same noise."""
    at, levels = diffusion.schedule.at_ratio, diffusion.trajectory(100)
    denoise = diffusion.denoise(network(diffusion, gaussian), Conditioning())
    starts = x.to(dtype), x.to(dtype).double()
    end, exact = (last(take(denoise, start, levels, noise=noise_like(x), at=at)) for start in starts)
    return end, exact

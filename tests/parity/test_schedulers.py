"""Ours against diffusers' schedulers: the same made-up network, levels and noise, all in float64.

The references round their tables to float32. Here their modules see a `torch` and a `numpy` whose float32 is float64,
so that what is compared is the arithmetic.
"""

import importlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.diffusion.noise import FlowSchedule, NoiseLevel, discrete
from ldm.diffusion.samplers import ddim, multistep, sampler
from ldm.diffusion.samplers.base import weights_of
from ldm.diffusion.samplers.onestep import tcd
from tests.parity.reference import error

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
LIMIT = 1e-10

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, of how the references use it


class Double:
    """A module in which float32 means float64."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return self.module.float64 if name == "float32" else getattr(self.module, name)


def quad(f, low, high, **_):
    """scipy.integrate.quad, for the polynomials it is asked for here."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    places = (low + high) / 2 + (high - low) / 2 * nodes
    return sum(float(w) * f(float(p)) for w, p in zip(weights, places, strict=True)) * (high - low) / 2, 0.0


@pytest.fixture
def build(monkeypatch):
    """(module, class, settings) -> one of diffusers' schedulers, in float64."""

    def make(module: str, name: str, **settings: Any) -> Any:
        loaded = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
        monkeypatch.setattr(loaded, "torch", Double(torch))
        monkeypatch.setattr(loaded, "np", Double(np), raising=False)
        monkeypatch.setattr(loaded, "integrate", SimpleNamespace(quad=quad), raising=False)  # scipy may be missing
        return getattr(loaded, name)(**settings)

    return make


@pytest.fixture
def x():
    return torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(x, t):
    """A made-up eps network, as nonlinear as a real one."""
    return torch.sin(1.7 * x + t.double() / 300) + 0.1 * x.flip(-1)


def x0_of_network(x, level):
    return (x - level.sigma * network(x, level.t)) / level.alpha


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def reference(scheduler, x, steps, *, predict=network, **options):
    """The reference's own loop."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(seen, t), t, x, **options).prev_sample
    return x


def drawn():
    return {"generator": torch.Generator().manual_seed(1)}


def ours(take, x, levels, *, denoise=x0_of_network, **options):
    take = sampler(take) if isinstance(take, str) else take
    return list(take(denoise, x, levels, noise=noise_like(x), at=SD.at_ratio, **options))[-1].x


def joined(*levels):
    """One trajectory of levels and stretches of levels."""
    parts = [NoiseLevel(level.t.reshape(-1), level.alpha.reshape(-1), level.sigma.reshape(-1)) for level in levels]
    return NoiseLevel(*(torch.cat([getattr(p, f) for p in parts]) for f in ("t", "alpha", "sigma")))


IN_RATIO = [
    ("euler", "euler_discrete", "EulerDiscreteScheduler", {}),
    ("heun", "heun_discrete", "HeunDiscreteScheduler", {}),
    ("lms", "lms_discrete", "LMSDiscreteScheduler", {}),
    ("dpm2", "k_dpm_2_discrete", "KDPM2DiscreteScheduler", {}),
    ("dpm2_a", "k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", drawn()),
    ("euler_a", "euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", drawn()),
]


@pytest.mark.parametrize("steps", [3, 10, 24])
@pytest.mark.parametrize(("name", "module", "theirs", "options"), IN_RATIO)
def test_equal_to_the_schedulers_of_x_over_alpha(build, x, name, module, theirs, options, steps):
    levels = SD.trajectory(steps, "trailing")
    options = drawn() if options else {}
    expected = reference(build(module, theirs, **TRAILING), x / levels.alpha[0], steps, **options)
    assert error(ours(name, x, levels), expected) < LIMIT


PP = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTI = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
UNIPC = ("unipc_multistep", "UniPCMultistepScheduler")
IN_X = [
    ("dpmpp_2m", *MULTI, {**PP, "solver_order": 2}),
    ("dpmpp_2m_sde", *MULTI, {**SDE, "solver_order": 2}),
    ("dpmpp_2m_sde_heun", *MULTI, {**SDE, "solver_order": 2, "solver_type": "heun"}),
    ("unipc", *UNIPC, {"solver_order": 2}),
    ("unipc_3", *UNIPC, {"solver_order": 3}),
]


@pytest.mark.parametrize("steps", [3, 10, 24])
@pytest.mark.parametrize(("name", "module", "theirs", "settings"), IN_X)
def test_equal_to_the_schedulers_of_x(build, x, name, module, theirs, settings, steps):
    scheduler = build(module, theirs, **TRAILING, **settings, final_sigmas_type="zero")
    options = drawn() if "sde" in name else {}
    expected = reference(scheduler, x, steps, **options)
    assert error(ours(name, x, SD.trajectory(steps, "trailing")), expected) < LIMIT


def test_deis_is_equal_but_for_where_it_ends(build, x):
    """The reference stops at the first level of the chain, where order 3 still makes sense, and never at clean."""
    settings = {"solver_order": 3, "lower_order_final": False}
    expected = reference(build("deis_multistep", "DEISMultistepScheduler", **TRAILING, **settings), x, 20)
    levels = joined(SD.trajectory(20, "trailing")[:-1], SD.at(0.0))
    assert error(ours("deis", x, levels), expected) < LIMIT


def halved(places, decay):
    """The mean of a parabola with half the weight it should have on its curvature."""
    moments = [multistep._late_moment(k, decay) for k in range(min(len(places), 3))]
    if len(moments) == 3:
        moments[2] /= 2
    return weights_of(places[:3], moments)


def slipped(places, decay):
    """The same with the sign of two terms turned: a weight that tends to -1 as the step shrinks, where 0 is due."""
    moments = [multistep._late_moment(k, decay) for k in range(min(len(places), 3))]
    if len(moments) == 3:
        moments[2] = ((-math.expm1(-decay) - decay) / decay**2 - 0.5) / -math.expm1(-decay)
    return weights_of(places[:3], moments)


@pytest.mark.parametrize(("eta", "mean"), [(0.0, halved), (1.0, slipped)])
def test_the_third_order_multistep_references_are_wrong_in_the_curvature(build, x, eta, mean):
    """Ours is right. In phi_3 h^2 x0'' the second divided difference is x0'' / 2, and the reference lacks the 2.

    With it the method is of order 3, without it of order 2: tests/diffusion/test_samplers_order.py measures both.
    The reference's stochastic variant has a slip of signs besides.
    """
    settings = {"algorithm_type": "sde-dpmsolver++" if eta else "dpmsolver++", "lower_order_final": False}
    settings |= {"solver_order": 3, "solver_type": "heun"}
    expected = reference(build(*MULTI, **TRAILING, **settings), x, 20, **(drawn() if eta else {}))
    levels = SD.trajectory(20, "trailing")
    theirs = list(multistep._exponential(x0_of_network, x, levels, mean, eta, noise_like(x)))[-1].x
    assert error(theirs, expected) < LIMIT
    assert error(ours("dpmpp_3m_sde" if eta else "dpmpp_3m", x, levels), expected) > 1e-4


def timeless(x, t):
    return network(x, torch.tensor(0.0))


def x0_timeless(x, level):
    return (x - level.sigma * timeless(x, level.t)) / level.alpha


def single_step(build, **settings):
    """It rounds its t, and so is given a network that does not look at it."""
    settings |= {"use_exponential_sigmas": True}
    return build("dpmsolver_singlestep", "DPMSolverSinglestepScheduler", **BETAS, **settings)


def test_equal_to_the_single_step_scheduler_of_order_2(build, x):
    """It takes the middles from its own levels, so ours takes every other one."""
    scheduler = single_step(build, algorithm_type="dpmsolver++", solver_order=2)
    expected = reference(scheduler, x, 11, predict=timeless)
    levels = SD.trajectory(11, "exponential")
    levels = joined(levels[0:11:2], levels[11])
    assert error(ours("dpmpp_2s", x, levels, denoise=x0_timeless), expected) < LIMIT


@pytest.mark.parametrize("steps", [3, 10, 11, 12])
def test_equal_to_the_single_step_scheduler_of_order_3(build, x, steps):
    settings = {
        "algorithm_type": "dpmsolver",
        "solver_order": 3,
        "solver_type": "heun",
        "final_sigmas_type": "sigma_min",
    }
    scheduler = single_step(build, **settings)
    levels = SD.trajectory(steps, "exponential")
    scheduler.set_timesteps(steps)
    expected = x
    for t in scheduler.timesteps[:-1]:  # its last step goes nowhere, from the lowest level to the lowest level
        expected = scheduler.step(timeless(expected, t), t, expected).prev_sample
    found = list(sampler("dpm_fast")(x0_timeless, x, levels))[steps - 2].x
    assert error(found, expected) < LIMIT


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_equal_to_ddim(build, x, eta):
    scheduler = build("ddim", "DDIMScheduler", **TRAILING, clip_sample=False)
    expected = reference(scheduler, x, 20, eta=eta, **drawn())
    assert error(ours(ddim, x, SD.trajectory(20, "trailing"), eta=eta), expected) < LIMIT


def test_equal_to_ddpm_and_pndm(build, x):
    expected = reference(build("ddpm", "DDPMScheduler", **TRAILING, clip_sample=False), x, 20, **drawn())
    assert error(ours("ddpm", x, SD.trajectory(20, "trailing")), expected) < 1e-9  # its last step adds 1e-10 of noise
    settings = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    expected = reference(build("pndm", "PNDMScheduler", **BETAS, **settings), x, 20)
    assert error(ours("plms", x, SD.trajectory(20, "leading")), expected) < LIMIT


def test_equal_to_lcm(build, x):
    """With its boundary condition off: c_skip is for networks whose estimate at t = 0 is not the input."""
    scheduler = build("lcm", "LCMScheduler", **BETAS, timestep_scaling=1e12, clip_sample=False)
    expected = reference(scheduler, x, 4, **drawn())
    levels = joined(SD.at(scheduler.timesteps.double()), SD.trajectory(1, "trailing")[1])
    assert error(ours("lcm", x, levels), expected) < LIMIT
    usual = reference(build("lcm", "LCMScheduler", **BETAS, clip_sample=False), x, 4, **drawn())
    assert error(usual, expected) < 1e-4  # what the boundary condition is worth


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_equal_to_tcd(build, x, gamma):
    scheduler = build("tcd", "TCDScheduler", **BETAS, clip_sample=False)
    expected = reference(scheduler, x, 4, eta=gamma, **drawn())
    levels = joined(SD.at(scheduler.timesteps.double()), SD.at(0.0))
    assert error(ours(tcd, x, levels, gamma=gamma), expected) < LIMIT


@pytest.mark.parametrize(("name", "kind"), [("euler", "Euler"), ("flow_heun", "Heun")])
def test_equal_to_flow_matching(build, x, name, kind):
    scheduler = build(f"flow_match_{kind.lower()}_discrete", f"FlowMatch{kind}DiscreteScheduler")
    expected = reference(scheduler, x, 12)

    def x0_at(x, level):
        return x - level.sigma * network(x, level.t)

    levels = FlowSchedule().trajectory(12, "linspace")
    assert error(ours(name, x, levels, denoise=x0_at), expected) < LIMIT

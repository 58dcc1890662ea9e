"""Ours against k-diffusion's samplers: the same made-up denoiser, levels and noise, in float64.

Their x is our x / alpha and their sigma our ratio sigma / alpha. Of the package only `sampling` is loaded: the rest
wants wandb, kornia and a numpy before 2. What `sampling` imports of scipy and torchsde is either not used here or,
the integral of a cubic, done exactly. Not compared: their s_churn and s_noise, options that ours do not have.
"""

import importlib
import importlib.util
import itertools
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.noise import FlowSchedule, NoiseLevel, discrete
from ldm.diffusion.samplers import multistep, onestep, sampler
from ldm.diffusion.samplers.base import weights_of
from ldm.diffusion.spacings import exponential, karras, polyexponential
from tests.parity.reference import error

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
FLOW = FlowSchedule()
SHAPE = (1, 4, 4)
LIMIT = 1e-10


def quad(f, low, high, **_):
    """scipy.integrate.quad, exact for the cubics that it is asked for here."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    places = (low + high) / 2 + (high - low) / 2 * nodes
    return sum(w * f(p) for w, p in zip(weights, places, strict=True)) * (high - low) / 2, 0.0


@pytest.fixture(scope="module")
def theirs(importable_references):
    """`k_diffusion.sampling`."""
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None, "k-diffusion is missing: pip install --no-deps k-diffusion"
    package, scipy, ode, sde = (ModuleType(n) for n in ("k_diffusion", "scipy", "torchdiffeq", "torchsde"))
    package.__path__ = list(found.submodule_search_locations)
    scipy.integrate, ode.odeint = ModuleType("integrate"), None
    scipy.integrate.quad = quad
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, scipy, ode, sde):
            patch.setitem(sys.modules, module.__name__, module)
        yield importlib.import_module("k_diffusion.sampling")
    for name in ("k_diffusion.sampling", "k_diffusion.utils"):
        del sys.modules[name]


@pytest.fixture
def x():
    return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model(x, sigma):
    """A made-up estimate of x0 in their coordinates, as nonlinear as a real one; sigma [B]."""
    scale = sigma.view(-1, 1, 1, 1)
    return torch.sin(1.3 * x / (1 + scale)) / (1 + 0.2 * scale) + 0.1 * torch.tanh(x.flip(-1)) + 0.2


def denoise(x, level):
    return model(x / level.alpha, (level.sigma / level.alpha).expand(len(x)))


def ours(take, x, levels, schedule=SD, **options):
    """The end of our sampler from their x at the first level, in their coordinates."""
    take = sampler(take) if isinstance(take, str) else take
    *_, step = take(denoise, levels.alpha[0] * x, levels, at=schedule.at_ratio, **options)
    return step.x / levels.alpha[-1]


def sigmas(levels):
    return levels.sigma / levels.alpha


def path():
    """Our Brownian path as our source of noise, and as theirs."""
    noise = BrownianNoise([1, 2], SHAPE)
    return noise, lambda sigma, below: noise.between(float(sigma), float(below)).double()


ODE = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")
OUR_NAMES = {"dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a", "euler_ancestral": "euler_a"}
PLACES = [
    (SD, "trailing", 3),
    (SD, "karras", 4),
    (SD, "karras", 10),
    (SD, "linspace", 24),
    (FlowSchedule(3.0), "beta", 9),
]


def trajectory(schedule, spacing, steps):
    """With a start that has signal: at pure noise their sigma is infinite."""
    levels = schedule.trajectory(steps, spacing)
    return levels if levels.alpha[0] > 0 else NoiseLevel(levels.t[1:], levels.alpha[1:], levels.sigma[1:])


@pytest.mark.parametrize(("schedule", "spacing", "steps"), PLACES)
@pytest.mark.parametrize("name", ODE)
def test_equal_without_noise(theirs, x, name, schedule, spacing, steps):
    levels = trajectory(schedule, spacing, steps)
    x = sigmas(levels)[0] * x
    expected = getattr(theirs, f"sample_{name}")(model, x, sigmas(levels), disable=True)
    assert error(ours(OUR_NAMES.get(name, name), x, levels, schedule), expected) < LIMIT


def with_kind(kind):
    return lambda *args, **options: multistep.dpmpp_2m_sde(*args, kind=kind, **options)


SDE = [
    ("euler_ancestral", onestep.ddim, {}),
    ("dpm_2_ancestral", onestep.dpm2, {}),
    ("dpmpp_2s_ancestral", onestep.dpmpp_2s, {}),
    ("dpmpp_sde", onestep.dpmpp_sde, {}),
    ("dpmpp_2m_sde", with_kind("midpoint"), {"solver_type": "midpoint"}),
    ("dpmpp_2m_sde", with_kind("heun"), {"solver_type": "heun"}),
]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("schedule", "spacing", "steps"), PLACES)
@pytest.mark.parametrize(("name", "take", "settings"), SDE)
def test_equal_with_the_same_noise(theirs, x, name, take, settings, schedule, spacing, steps, eta):
    levels = trajectory(schedule, spacing, steps)
    x = sigmas(levels)[0] * x
    noise, sampled = path()
    options = {**settings, "eta": eta, "noise_sampler": sampled, "disable": True}
    expected = getattr(theirs, f"sample_{name}")(model, x, sigmas(levels), **options)
    assert error(ours(take, x, levels, schedule, noise=noise, eta=eta), expected) < LIMIT


def halved(places, decay):
    """The mean of a parabola with half the weight it should have on its curvature."""
    moments = [multistep._late_moment(k, decay) for k in range(min(len(places), 3))]
    if len(moments) == 3:
        moments[2] /= 2
    return weights_of(places[:3], moments)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 3), ("karras", 20)])
def test_their_third_order_has_half_the_curvature(theirs, x, monkeypatch, spacing, steps, eta):
    """Ours is right: the second divided difference is x0'' / 2, and theirs goes into phi_3 h^2 x0'' without the 2.

    That costs the third order, which tests/diffusion/test_samplers_order.py measures.
    """
    levels = SD.trajectory(steps, spacing)
    x = sigmas(levels)[0] * x
    noise, sampled = path()
    expected = theirs.sample_dpmpp_3m_sde(model, x, sigmas(levels), eta=eta, noise_sampler=sampled, disable=True)
    right = ours(multistep.dpmpp_3m_sde, x, levels, noise=noise, eta=eta)
    assert steps == 3 or error(right, expected) > 1e-4  # of 3 steps none but the last, to clean, has a parabola
    monkeypatch.setattr(multistep, "_parabola", halved)
    assert error(ours(multistep.dpmpp_3m_sde, x, levels, noise=noise, eta=eta), expected) < LIMIT


def fast_levels(evaluations, high=8.0, low=0.1):
    """The nodes of their dpm_fast: equal strides in log sigma, each of three evaluations, the last of one."""
    assert evaluations % 3 == 1
    nodes = torch.linspace(math.log(high), math.log(low), evaluations // 3 + 2, dtype=torch.float64)
    thirds = [torch.lerp(a, b, k / 3) for a, b in itertools.pairwise(nodes[:-1]) for k in range(3)]
    return FLOW.at_ratio(torch.stack([*thirds, *nodes[-2:]]).exp())


def fast(theirs, x, evaluations):
    """Their end, and the levels they went by."""
    levels = fast_levels(evaluations)
    ends = sigmas(levels)[-1].item(), sigmas(levels)[0].item()
    return theirs.sample_dpm_fast(model, x, *ends, evaluations, disable=True), levels


@pytest.mark.parametrize("evaluations", [4, 10, 22])
def test_dpm_fast_but_for_the_last_of_its_three_stages(theirs, x, monkeypatch, evaluations):
    """Theirs, DPM-Solver-3, draws a line through the first and the last eps; ours a parabola through all three.

    Neither is wrong, for both are of order 3. With 3 k evaluations, or 3 k + 2, theirs ends in other nodes than ours.
    """
    monkeypatch.setattr(torch, "linspace", double(torch.linspace))
    monkeypatch.setattr(torch, "tensor", double(torch.tensor))
    expected, levels = fast(theirs, 8 * x, evaluations)
    parabola = multistep._log_weights

    def line(ratios, to):
        if len(ratios) < 3:
            return parabola(ratios, to)
        first, last = parabola([ratios[0], ratios[2]], to)
        return [first, 0.0, last]

    monkeypatch.setattr(multistep, "_log_weights", line)
    assert error(ours("dpm_fast", 8 * x, levels), expected) < LIMIT


def test_the_two_dpm_fast_agree_to_third_order(theirs, x, monkeypatch):
    monkeypatch.setattr(torch, "linspace", double(torch.linspace))
    monkeypatch.setattr(torch, "tensor", double(torch.tensor))
    apart = []
    for evaluations in (3 * 40 + 1, 3 * 80 + 1):
        expected, levels = fast(theirs, 8 * x, evaluations)
        apart.append(error(ours("dpm_fast", 8 * x, levels), expected))
    assert math.log2(apart[0] / apart[1]) == pytest.approx(3, abs=0.3)


def double(make):
    """A maker of tensors whose floats are float64 from the start."""

    def made(*args, **options):
        return make(*args, **({"dtype": torch.float64} | options))

    return made


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_equal_spacings(theirs, monkeypatch, steps):
    monkeypatch.setattr(torch, "linspace", double(torch.linspace))
    low, high = 0.03, 14.6
    pairs = [
        (karras, theirs.get_sigmas_karras),
        (exponential, theirs.get_sigmas_exponential),
        (
            lambda *args: polyexponential(*args, rho=1.5),
            lambda *args: theirs.get_sigmas_polyexponential(*args, rho=1.5),
        ),
    ]
    for mine, other in pairs:
        assert error(mine(steps, low, high), other(steps, low, high)[:-1]) < LIMIT

"""The order of convergence of every sampler of the ODE, measured against the exact end for Gaussian data."""

import math

import pytest
import torch

from ldm.diffusion.noise import FlowSchedule, discrete, zero_terminal_snr
from ldm.diffusion.samplers import SAMPLERS, multistep, traits
from ldm.diffusion.samplers.base import weights_of
from ldm.diffusion.samplers.sa import sa_solver

FLOW = FlowSchedule()
SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
COSINE = discrete("cosine", 1000, 0.0, 0.0)  # starts at alpha = 5e-5
ODE = [name for name in SAMPLERS if not traits(name).stochastic]


def even(steps):
    """0 ... 1 in equal strides."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def ramped(steps):
    """0 ... 1 in strides that start at 1 / steps^2 and double up to equal ones.

    A multistep method starts at order 1, and in equal strides its first step alone would be an error of order 2.
    """
    strides = [steps**-2.0] * 3
    while sum(strides) + 2 * strides[-1] < 1 and 2 * strides[-1] < 1 / steps:
        strides.append(2 * strides[-1])
    left = 1 - sum(strides)
    count = math.ceil(left * steps)
    places = torch.tensor([0.0, *strides, *[left / count] * count], dtype=torch.float64).cumsum(0)
    return places / places[-1]


def in_log_ratio(places):
    return FLOW.at_ratio((math.log(5.0) + places * math.log(0.1 / 5.0)).exp())


def in_ratio(places):
    return FLOW.at_ratio(5.0 - 4.5 * places)


def in_time(places):
    return FLOW.at(900 - 850 * places)


def error(take, gaussian, x, levels):
    end = list(take(gaussian.denoise, x, levels, at=FLOW.at_ratio))[-1].x
    return (end - gaussian.end(x, levels[0], levels[-1])).abs().max().item()


def order(take, gaussian, x, levels, strides, steps=81):  # whole steps of dpm_fast
    coarse, fine = (error(take, gaussian, x, levels(strides(n))) for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


MEASURED = [
    ("ddim", in_time, even, 1),
    ("euler", in_time, even, 1),
    ("heun", in_time, even, 2),
    ("heun", in_log_ratio, even, 2),
    ("flow_heun", in_time, even, 2),
    ("plms", in_time, even, 2),
    ("plms", in_ratio, even, 4),
    ("ipndm", in_log_ratio, even, 2),
    ("ipndm", in_ratio, ramped, 4),
    ("lms", in_log_ratio, ramped, 4),
    ("lms", in_ratio, ramped, 4),
    ("deis", in_log_ratio, ramped, 3),
    ("deis", in_log_ratio, even, 2),  # by its start
    ("dpm_fast", in_log_ratio, even, 3),
    ("dpm2", in_log_ratio, even, 2),
    ("dpmpp_2s", in_log_ratio, even, 2),
    ("dpmpp_2m", in_log_ratio, even, 2),
    ("dpmpp_3m", in_log_ratio, ramped, 3),
    ("dpmpp_3m", in_log_ratio, even, 2),  # by its start
    ("unipc", in_log_ratio, even, 3),
    ("unipc_3", in_log_ratio, ramped, 4),
]


@pytest.mark.parametrize(("name", "levels", "strides", "expected"), MEASURED)
def test_order_of_convergence(gaussian, x, name, levels, strides, expected):
    """Halving the step divides the error by 2^order, on a smooth stretch of the flow away from both ends."""
    margin = 0.05 if levels is in_time else 0.2
    assert order(SAMPLERS[name], gaussian, x, levels, strides) == pytest.approx(expected, abs=margin)


def test_every_sampler_of_the_ode_is_measured_at_the_order_it_claims():
    claimed = {(name, traits(name).order) for name in ODE if traits(name).evaluations}  # the adaptive one apart
    assert claimed <= {(name, expected) for name, _, _, expected in MEASURED}


def test_half_the_curvature_costs_the_third_order(gaussian, x):
    """What diffusers and k-diffusion do in the multistep method of order 3: see tests/parity/test_schedulers.py."""

    def halved(places, decay):
        moments = [multistep._late_moment(k, decay) for k in range(min(len(places), 3))]
        moments[2:] = [moment / 2 for moment in moments[2:]]
        return weights_of(places[:3], moments)

    def take(denoise, x, levels, at):
        return multistep._exponential(denoise, x, levels, halved)

    assert order(take, gaussian, x, in_log_ratio, ramped) == pytest.approx(2, abs=0.2)


def test_sa_solver_without_noise_is_of_the_order_of_its_corrector(gaussian, x):
    def take(denoise, x, levels, at):
        return sa_solver(denoise, x, levels, tau=0.0, noise=lambda: torch.zeros_like(x))

    assert order(take, gaussian, x, in_log_ratio, even) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("schedule", [FLOW, FlowSchedule(3.0), SD, zero_terminal_snr(SD), COSINE])
def test_the_whole_way_ends_near_the_exact_end(gaussian, x, name, schedule):
    """From pure noise, or the chain's own start, to clean: what is lost by the first-order ends stays small."""
    levels = schedule.trajectory(40, "trailing")
    end = list(SAMPLERS[name](gaussian.denoise, x, levels, at=schedule.at_ratio))[-1].x
    assert (end - gaussian.end(x, levels[0], levels[-1])).abs().max() < 0.15

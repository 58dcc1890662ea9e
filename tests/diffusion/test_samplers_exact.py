"""Samplers where the answer can be written down by hand: ends, edges and what is drawn."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.noise import FlowSchedule, discrete
from ldm.diffusion.samplers import SAMPLERS, sampler, traits
from ldm.diffusion.samplers.onestep import _two_draws
from tests.diffusion.test_samplers_order import even, in_log_ratio, order
from tests.diffusion.test_samplers_sde import STOCHASTIC, last, noise_like

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
FLOW = FlowSchedule()


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_to_clean_is_the_estimate(gaussian, x, name):
    if not traits(name).evaluations:
        return  # it takes as many steps as it needs
    asked = []

    def denoise(x, level):
        asked.append(level.t.item())
        return gaussian.denoise(x, level)

    levels = SD.trajectory(1, "trailing")
    end = last(sampler(name)(denoise, x, levels, noise=noise_like(x), at=SD.at_ratio))
    assert (end - gaussian.denoise(x, levels[0])).abs().max() < 1e-12
    assert asked == [999.0]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_nothing_is_drawn_for_the_step_to_clean(gaussian, x, name):
    """One draw for each other step, two for dpmpp_sde."""
    drawn, fresh = [], noise_like(x)

    def noise():
        drawn.append(1)
        return fresh()

    last(sampler(name)(gaussian.denoise, x, SD.trajectory(8, "trailing"), noise=noise, at=SD.at_ratio))
    assert len(drawn) == {"dpmpp_sde": 14, "restart": 0}.get(name, 7)


OWN_START = ("flow_heun", "plms", "tcd", "dpm_adaptive")


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in OWN_START])
def test_the_first_step_from_pure_noise_is_the_estimate_with_less_noise(gaussian, x, name):
    """The same noise or, where noise is drawn, new noise: of the old none is left when x says nothing of x0."""
    levels, other = FLOW.trajectory(6, "trailing"), noise_like(x, 5)()
    step = next(sampler(name)(gaussian.denoise, x, levels, noise=lambda: other, at=FLOW.at_ratio))
    noise = other if traits(name).stochastic and name != "restart" else x
    expected = levels.alpha[1] * gaussian.denoise(x, levels[0]) + levels.sigma[1] * noise
    assert (step.x - expected).abs().max() < 1e-12


def test_flow_heun_and_plms_average_two_estimates_from_pure_noise(gaussian, x):
    levels = FLOW.trajectory(6, "trailing")
    x0 = gaussian.denoise(x, levels[0])
    guess = levels.alpha[1] * x0 + levels.sigma[1] * x
    x0_below = gaussian.denoise(guess, levels[1])
    eps_below = (guess - levels.alpha[1] * x0_below) / levels.sigma[1]
    means = (x0 + x0_below) / 2, (x + eps_below) / 2
    exact = x + levels.alpha[1] * means[0] + (levels.sigma[1] - levels.sigma[0]) * means[1]
    assert (next(sampler("flow_heun")(gaussian.denoise, x, levels)).x - exact).abs().max() < 1e-12
    exact = levels.alpha[1] * means[0] + levels.sigma[1] * x  # all that x / alpha could say of eps is infinite
    assert (next(sampler("plms")(gaussian.denoise, x, levels)).x - exact).abs().max() < 1e-12


DEFAULTS = {
    "ddim": {"eta": 0.0},
    "dpm2": {"eta": 0.0},
    "dpmpp_2s": {"eta": 0.0},
    "dpmpp_sde": {"eta": 1.0},
    "dpmpp_2m_sde": {"eta": 1.0, "kind": "midpoint"},
    "dpmpp_3m_sde": {"eta": 1.0},
    "sa_solver": {"tau": 1.0},
    "tcd": {"gamma": 0.3},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_by_its_name_a_sampler_has_the_options_of_its_paper(gaussian, x, name):
    levels, ends = SD.trajectory(6, "trailing"), []
    for options in ({}, DEFAULTS[name]):
        take = sampler(name)(gaussian.denoise, x, levels, noise=noise_like(x), at=SD.at_ratio, **options)
        ends.append(last(take))
    assert torch.equal(*ends)


def karras_ratios(count, high, low):
    """Karras et al. 2022, eq. 5, with rho 7."""
    shares = [k / (count - 1) for k in range(count)]
    return [(high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for share in shares]


@pytest.mark.parametrize(("steps", "times", "inner"), [(19, 0, 0), (20, 1, 9), (35, 1, 9), (36, 2, 9), (60, 2, 15)])
def test_restart_goes_up_from_a_tenth_to_two_and_down_again(gaussian, x, steps, times, inner):
    """Where it asks the network, and how often it draws, by the words of its docstring."""
    asked, drawn, fresh = [], [], noise_like(x)

    def denoise(x, level):
        asked.append((level.sigma / level.alpha).item())
        return gaussian.denoise(x, level)

    def noise():
        drawn.append(1)
        return fresh()

    levels = SD.trajectory(steps, "karras")
    last(sampler("restart")(denoise, x, levels, noise=noise, at=SD.at_ratio))
    ratios = (levels.sigma / levels.alpha).tolist()
    low = min(ratios[:-1], key=lambda ratio: abs(math.log(ratio / 0.1)))
    expected = []
    for start, end in itertools.pairwise(ratios):
        expected += [start, end] if end > 0 else [start]
        for _ in range(times if end == low else 0):
            for high, lower in itertools.pairwise(karras_ratios(inner + 1, 2.0, low)):
                expected += [high, lower]
    assert asked == pytest.approx(expected, rel=1e-9)
    assert len(drawn) == times


def test_restart_does_not_go_down_to_where_it_should_go_up_to(gaussian, x):
    levels, asked = FLOW.at_ratio(torch.linspace(9, 3, 31, dtype=torch.float64)), []

    def denoise(x, level):
        asked.append(level)
        return gaussian.denoise(x, level)

    last(sampler("restart")(denoise, x, levels, noise=noise_like(x), at=FLOW.at_ratio))
    assert len(asked) == 60


def test_restart_adds_the_noise_between_its_two_levels(gaussian, x):
    """Against the same run with none: what differs where the network is asked at ratio 2 is what was added there."""
    levels, drawn, seen = SD.trajectory(20, "karras"), noise_like(x)(), []
    ratios = (levels.sigma / levels.alpha)[:-1]
    low = ratios[(ratios / 0.1).log().abs().argmin()].item()

    for scale in (0.0, 1.0):

        def denoise(x, level):
            if abs(level.sigma / level.alpha - 2.0) < 1e-9:
                seen.append((x, level))
            return gaussian.denoise(x, level)

        last(sampler("restart")(denoise, x, levels, noise=lambda scale=scale: scale * drawn, at=SD.at_ratio))
    (without, level), (noised, _) = seen
    assert (noised - without - level.alpha * math.sqrt(2.0**2 - low**2) * drawn).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "options"), [("sa_solver", {"tau": 0.0}), ("dpmpp_2m_sde", {"eta": 0.0}), ("dpmpp_3m_sde", {"eta": 0.0})]
)
def test_without_a_share_of_noise_none_is_drawn(gaussian, x, name, options):
    def noise():
        raise AssertionError("drawn")

    last(sampler(name)(gaussian.denoise, x, SD.trajectory(6, "trailing"), noise=noise, **options))


def weights_by_quadrature(nodes, start, end, tau):
    """Of each value at a node, in the integral of e^(-tau^2 (end - l)) (1 + tau^2) e^l times their polynomial."""
    places, shares = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(30))
    places = (start + end) / 2 + (end - start) / 2 * places
    density = (end - start) / 2 * shares * (1 + tau**2) * (places - tau**2 * (end - places)).exp()
    lagrange = [
        math.prod((places - other) / (node - other) for other in nodes if other != node) * torch.ones_like(places)
        for node in nodes
    ]
    return [(density * polynomial).sum().item() for polynomial in lagrange]


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver_is_the_one_of_the_paper(x, tau):
    """Xue et al. 2023, algorithm 1, on the integral of eq. 10 as it stands: 2-step predictor, 2-step corrector."""
    levels = SD.trajectory(7, "trailing")[:-1]
    lambdas, fresh = (levels.alpha / levels.sigma).log().tolist(), noise_like(x)

    def denoise(x, level):
        return torch.sin(1.3 * x) / (1 + level.sigma) + 0.2

    def moved(x, values, k, noise):
        """x from level k to the next, by the estimates at the levels in `values`."""
        h = lambdas[k + 1] - lambdas[k]
        weights = weights_by_quadrature([lambdas[j] for j in values], lambdas[k], lambdas[k + 1], tau)
        mean = sum(weight * value for weight, value in zip(weights, values.values(), strict=True))
        kept = levels.sigma[k + 1] / levels.sigma[k] * math.exp(-(tau**2) * h)
        spread = math.sqrt(1 - math.exp(-2 * tau**2 * h))
        return kept * x + levels.sigma[k + 1] * (mean + spread * noise)

    known, corrected, predicted, noise = {}, x, x, 0.0
    for k in range(6):
        known[k] = denoise(predicted, levels[k])
        if k:
            corrected = moved(corrected, {j: known[j] for j in (k - 2, k - 1, k) if j in known}, k - 1, noise)
        noise = fresh() if tau else 0.0
        predicted = moved(corrected, {j: known[j] for j in (k - 1, k) if j in known}, k, noise)
    found = last(SAMPLERS["sa_solver"](denoise, x, levels, tau=tau, noise=noise_like(x)))
    assert (found - predicted).abs().max() < 1e-10


def drawn_by(seed, octave, node):
    """The normal numbers of one node of the tree, from a seed of their own."""
    digest = hashlib.blake2b(f"{seed} {octave} {node}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(5, dtype=torch.float64, generator=generator)


def test_a_seed_keeps_its_path():
    """Octave 64 is the clock from 1 to 2, 65 from 2 to 4; a middle is half its end, and noise of a bridge."""
    path = BrownianNoise([7], (5,))
    whole, next_whole, middle = drawn_by(7, 64, 0), drawn_by(7, 65, 0), drawn_by(7, 64, 1 << 23)
    halfway = whole / 2 + math.sqrt(1 / 4) * middle
    assert torch.allclose(path.between(1.0, 2**-0.5)[0].double(), whole, atol=1e-6)
    assert torch.allclose(path.between(1.0, 1.5**-0.5)[0].double(), halfway / math.sqrt(1 / 2), atol=1e-6)
    assert torch.allclose(path.between(1.5**-0.5, 2**-0.5)[0].double(), (whole - halfway) * math.sqrt(2), atol=1e-6)
    both = (whole + math.sqrt(2) * next_whole) / math.sqrt(3)
    assert torch.allclose(path.between(1.0, 0.5)[0].double(), both, atol=1e-6)
    quarter = halfway / 2 + math.sqrt(1 / 8) * drawn_by(7, 64, 1 << 22)
    assert torch.allclose(path.between(1.0, 1.25**-0.5)[0].double(), quarter / math.sqrt(1 / 4), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "of"), [("euler_a", "ddim"), ("ddpm", "ddim"), ("dpm2_a", "dpm2"), ("dpmpp_2s_a", "dpmpp_2s")]
)
def test_the_ancestral_ones_have_eta_1(gaussian, x, name, of):
    levels = SD.trajectory(6, "trailing")
    first = last(sampler(name)(gaussian.denoise, x, levels, noise=noise_like(x), at=SD.at_ratio))
    second = last(SAMPLERS[of](gaussian.denoise, x, levels, eta=1.0, noise=noise_like(x), at=SD.at_ratio))
    assert (first - second).abs().max() < 1e-12


def test_dpm_adaptive_is_of_its_order_when_nothing_makes_it_adapt(gaussian, x):
    """With any error allowed it takes one step from each level to the next."""

    def take(denoise, x, levels, at):
        return SAMPLERS["dpm_adaptive"](denoise, x, levels, rtol=0.0, atol=1e9, at=at)

    assert order(take, gaussian, x, in_log_ratio, even) == pytest.approx(traits("dpm_adaptive").order, abs=0.2)


def test_the_first_cut_of_an_octave_has_its_noise():
    path, clocks = BrownianNoise([7], (50,)), (2.0, 2.0 * (1 + 2**-24))
    step = path.between(*(clock**-0.5 for clock in clocks))
    assert 0.5 < step.std() < 2


def test_two_draws_without_a_path_are_of_one():
    """Of ratios 4, 2, 1 the clock 1 / ratio^2 is 1/16, 1/4, 1: the first draw has a fifth of the whole's variance."""
    level, middle, below = (FlowSchedule().at_ratio(torch.tensor(r, dtype=torch.float64)) for r in (4.0, 2.0, 1.0))
    draws = iter([torch.tensor([2.0]), torch.tensor([3.0])])
    first, whole = _two_draws(lambda: next(draws), level, middle, below, torch.zeros(1, dtype=torch.float64))
    assert first.item() == 2.0
    assert whole.item() == pytest.approx(math.sqrt(0.2) * 2.0 + math.sqrt(0.8) * 3.0, abs=1e-12)

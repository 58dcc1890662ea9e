"""Each image's own Brownian path."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.noise import ImageNoise, discrete
from ldm.diffusion.samplers import sampler

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)
SHAPE = (2, 8, 8)


def test_calls_are_those_of_image_noise():
    path, plain = BrownianNoise([3, 4], SHAPE), ImageNoise([3, 4], SHAPE)
    path.between(3.0, 2.0)
    assert torch.equal(path(), plain()) and torch.equal(path(), plain())


def test_an_increment_depends_on_its_seed_and_its_ends_alone():
    steps = [(math.inf, 14.6), (14.6, 3.0), (3.0, 2.0), (2.0, 0.1), (0.1, 1e-3)]
    together = BrownianNoise([5, 6, 7], SHAPE)
    drawn = {step: together.between(*step) for step in steps}
    for step in reversed(steps):
        assert torch.equal(BrownianNoise([6], SHAPE).between(*step)[0], drawn[step][1])
        assert drawn[step].dtype == torch.float32 and drawn[step].shape == (3, *SHAPE)
    assert torch.equal(together.between(2.0, 3.0), drawn[3.0, 2.0])


@pytest.mark.parametrize("ends", [(5.0, 4.0, 3.9), (14.6, 1.0, 0.03), (1.7, 1.5, 1.42), (300.0, 2.0, 1.0)])
def test_two_halves_add_up_to_the_whole(ends):
    path = BrownianNoise([1], SHAPE)

    def increment(a, b):
        return path.between(a, b).double() * math.sqrt(b**-2 - a**-2)

    a, b, c = ends
    assert (increment(a, b) + increment(b, c) - increment(a, c)).abs().max() < 1e-5 * c**-1


def test_increments_are_normal_and_independent():
    """At 5 standard errors: 11 checks, one false alarm in 10^5 runs."""
    path, count = BrownianNoise([1], (20_000,)), 20_000
    ratios = [14.6, 5.0, 4.9, 2.0, 0.3]
    steps = [path.between(a, b)[0].double() for a, b in itertools.pairwise(ratios)]
    for step in steps:
        assert abs(step.mean()) < 5 / math.sqrt(count)
        assert abs(step.var() - 1) < 5 * math.sqrt(2 / count)
    for one, other in itertools.pairwise(steps):
        assert abs((one * other).mean()) < 5 / math.sqrt(count)


def test_a_step_too_short_is_refused():
    with pytest.raises(ValueError, match="too short for the Brownian path"):
        BrownianNoise([1], SHAPE).between(2.0, 2.0)


@pytest.mark.parametrize(("name", "closer"), [("dpmpp_2m_sde", 1.6), ("dpmpp_sde", 1.6), ("euler_a", 1.2)])
def test_more_steps_refine_the_same_picture(gaussian, name, closer):
    """What makes the path worth its while: the picture converges, where with noise drawn per step it is another."""

    def end(steps, noise):
        # a float64 path: the last bits of float32 noise would be a floor
        ratios = torch.linspace(math.log(10), math.log(0.1), steps + 1, dtype=torch.float64).exp()
        x = noise().double()
        *_, step = sampler(name)(gaussian.denoise, x, SD.at_ratio(ratios), noise=noise, at=SD.at_ratio)
        return step.x

    reference = end(320, BrownianNoise([1, 2], SHAPE))
    far = (end(20, BrownianNoise([1, 2], SHAPE)) - reference).square().mean().sqrt()
    near = (end(80, BrownianNoise([1, 2], SHAPE)) - reference).square().mean().sqrt()
    assert near < far / closer**2
    other = (end(80, ImageNoise([1, 2], SHAPE)) - reference).square().mean().sqrt()
    assert near < other / 3


def test_a_step_may_end_at_the_last_cut_of_an_octave():
    """Where the clock 1 / ratio^2 is one cut of 2^24 short of 2: nothing of the next octave belongs to the step."""
    noise = BrownianNoise([3], (4,))
    edge, after = (2 - 2.0**-24) ** -0.5, 2.0**-0.5
    step, last, whole = noise.between(1.2, edge), noise.between(edge, after), noise.between(1.2, after)
    share = (edge**-2 - 1.2**-2) / (2 - 1.2**-2)
    assert torch.allclose(math.sqrt(share) * step + math.sqrt(1 - share) * last, whole, atol=1e-5)

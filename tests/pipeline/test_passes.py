"""Where passes begin and end, against closed forms."""

import math

import pytest
import torch

from ldm.diffusion.noise import SPACINGS
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.pipeline.inputs import reseeded
from ldm.pipeline.passes import handed_over, lowest, on_the_sphere, stretch
from ldm.types import Conditioning

CHAIN = Diffusion.from_config(DiffusionConfig(spacing="leading"))
FLOW = Diffusion.from_config(DiffusionConfig(schedule="flow", prediction="flow", shift=3.0))
EDM = Diffusion.from_config(DiffusionConfig(schedule="edm", prediction="v", spacing="karras"))


@pytest.mark.parametrize("spacing", [spacing for spacing in SPACINGS if spacing != "compvis"])
@pytest.mark.parametrize("strength", [0.1, 0.33, 0.75, 1.0])
def test_as_many_steps_as_asked_for(spacing, strength):
    for diffusion in (CHAIN, FLOW, EDM):
        try:
            whole = diffusion.trajectory(round(12 / strength), spacing)
        except ValueError:  # not for this schedule
            continue
        levels = lowest(diffusion, spacing, 12, strength)
        assert len(levels.t) == 13
        assert torch.equal(levels.sigma, whole.sigma[-13:]) and torch.equal(levels.alpha, whole.alpha[-13:])
        assert torch.equal(levels.t, whole.t[-13:])


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.5, 1.0])
def test_the_start_is_at_the_strength(strength):
    """On a flow with equal strides, whose time is the share of noise."""
    flow = Diffusion.from_config(DiffusionConfig(schedule="flow", prediction="flow"))
    assert float(lowest(flow, "trailing", 10, strength).sigma[0]) == pytest.approx(strength)


@pytest.mark.parametrize(("strength", "count"), [(0.29, 2), (0.75, 7), (0.99, 9), (1.0, 10)])
def test_a_part_of_the_steps(strength, count):
    levels, whole = lowest(CHAIN, None, 10, strength, part=True), CHAIN.trajectory(10)
    assert len(levels.t) == count + 1 and torch.equal(levels.t, whole.t[-1 - count :])


def test_too_few_levels_for_a_strength():
    with pytest.raises(
        ValueError, match=r"50 steps at strength 0\.01 are the last of 5000: steps must be in 1\.\.1000"
    ):
        lowest(CHAIN, None, 50, 0.01)
    with pytest.raises(ValueError, match=r"strength 0\.05 leaves none of 10 steps"):
        lowest(CHAIN, None, 10, 0.05, part=True)
    with pytest.raises(ValueError, match=r"^steps must be in 1\.\.1000"):
        lowest(CHAIN, None, 1001)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.55, 1.0), (0.1, 0.2)])
def test_a_stretch_of_the_steps(start, end):
    levels = CHAIN.trajectory(10)
    acts = stretch(levels, start, end)
    expected = [start <= i / 10 and (i + 1) / 10 <= end for i in range(10)]
    assert acts(levels.t[:-1].float()).tolist() == expected
    between = (levels.t[:-1] * 0.4 + levels.t[1:] * 0.6).float()  # belongs to the upper level
    assert acts(between).tolist() == expected
    with pytest.raises(ValueError, match=r"from share 0\.31 to share 0\.39 of 10 steps there is none"):
        stretch(levels, 0.31, 0.39)


def test_the_second_network_is_told_its_own_and_each_image_goes_by_its_own_time():
    def first(x, t, cond):
        return x + cond.context

    def second(x, t, cond):
        return x - cond.context

    late = stretch(CHAIN.trajectory(10), 0.5)
    joined = handed_over(first, second, Conditioning(context=torch.full((2, 1, 1, 1), 10.0)), late)
    told = Conditioning(context=torch.ones(2, 1, 1, 1))
    x = torch.zeros(2, 1, 1, 1)
    for t, expected in (([901.0, 701.0], [1, 1]), ([401.0, 1.0], [-10, -10]), ([901.0, 1.0], [1, -10])):
        assert joined(x, torch.tensor(t), told).flatten().tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_on_the_sphere(share):
    """Between unit vectors at a known angle: at that share of the angle, as long as they are."""
    for angle in (0.3, math.pi / 2, 2.5):
        a = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
        b = torch.tensor([[math.cos(angle), math.sin(angle), 0], [0, 2 * math.cos(angle), 2 * math.sin(angle)]])
        found = on_the_sphere(a, b, share)
        expected = torch.tensor([math.cos(share * angle), math.sin(share * angle)])
        torch.testing.assert_close(found[0, :2], expected)
        torch.testing.assert_close(found[1, 1:], 2 * expected)
    assert torch.equal(on_the_sphere(a, b, 0.0), a) and torch.equal(on_the_sphere(a, b, 1.0), b)
    torch.testing.assert_close(on_the_sphere(a, a, share), a)


def test_other_seeds_are_others_for_each_purpose():
    seeds = reseeded(range(1000), "a") + reseeded(range(1000), "b")
    assert len(set(seeds)) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert reseeded([7], "a") == reseeded(range(10), "a")[7:8]

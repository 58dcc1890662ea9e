"""Models that are told an aesthetic score, as SDXL's refiner is: of the prompts one, of the negative another."""

from dataclasses import replace

import pytest
import torch

from ldm.models.unet import UNet
from ldm.pipeline import Companions, Upscale
from ldm.types import Conditioning
from tests.pipeline.small import UNET, random, request, small

SIZED = replace(UNET, pooled_dim=8, pooled_layers=2, size_dim=4)


def telling(aesthetic=True, seed=1):
    """A small pipeline whose denoiser is told sizes, and the list of those that it was told."""
    pipeline = small()
    torch.manual_seed(seed)
    pipeline.denoiser = random(UNet(replace(SIZED, aesthetic=aesthetic)))
    pipeline.denoiser.pooled[0].weight *= 20  # so that what it is told is heard
    told = []
    original = pipeline.denoiser.forward
    pipeline.denoiser.forward = lambda x, t, cond: told.append(cond.sizes) or original(x, t, cond)
    return pipeline, told


@pytest.mark.parametrize("change", [{}, {"plain": True}, {"prompts": ("[a cat:a dog:0.5]",) * 3}])
def test_each_row_is_told_its_score(change):
    pipeline, told = telling()
    drawn = pipeline(request(aesthetic=(7.0, 1.5), **change))
    expected = torch.tensor([[16, 24, 0, 0, 1.5]] * 3 + [[16, 24, 0, 0, 7.0]] * 3)
    assert len(told) == 4 and all(torch.equal(sizes, expected) for sizes in told)
    for scores in ((6.0, 1.5), (7.0, 2.5)):
        assert (pipeline(request(aesthetic=scores, **change)) - drawn).abs().max() > 0.02


def test_the_negative_has_its_own_score_also_where_and_joins_prompts():
    """a :0.5 is half of what a says and half of what the negative does, without guidance too."""
    pipeline, told = telling()
    pipeline(request(prompts=("a cat :0.25",) * 3, guidance=1.0, steps=1))
    assert sorted(told[0][:, 4].tolist()) == [2.5] * 3 + [6.0] * 3


def test_a_second_pass_and_a_base_are_told_the_sizes_that_they_draw():
    pipeline, told = telling(aesthetic=False)
    pipeline(request(prompts=("a [cat|dog]",) * 3, upscale=Upscale(2.0, 0.5), steps=2))
    sizes = [[16, 24, 0, 0, 16, 24]] * 6, [[32, 48, 0, 0, 32, 48]] * 6
    assert [rows.tolist() for rows in told] == [sizes[0]] * 2 + [sizes[1]] * 2


def test_a_refiner_is_told_its_score_after_a_base_that_is_not():
    (base, of_base), (refiner, of_refiner) = telling(aesthetic=False), telling(seed=2)
    base.companions = Companions(refiner=refiner)
    drawn = base(request(switch=0.5, aesthetic=(7.0, 1.5)))
    assert [sizes.shape for sizes in of_base] == [(6, 6)] * 2
    assert [sizes[[0, 5], 4].tolist() for sizes in of_refiner] == [[1.5, 7.0]] * 2
    assert not torch.equal(base(request(switch=0.5)), drawn)
    settings = base.settings(request(aesthetic=(7.0, 1.5)), 0)
    assert (settings["Aesthetic score"], settings["Negative aesthetic score"]) == (7.0, 1.5)
    assert "Aesthetic score" not in small().settings(request(), 0)


def test_the_estimate_without_guidance_has_the_usual_score():
    pipeline, told = telling()
    level = pipeline.diffusion.trajectory(2)[0]
    pipeline.estimate(["a cat"], (4, 4, 6))(torch.zeros(1, 4, 4, 6), level)
    assert told[0].tolist() == [[16, 24, 0, 0, 6.0]]


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="neither this model nor its refiner is one"):
        small().stream(request(aesthetic=(7.0, 2.5)))
    for scores in ((6.0,), (6.0, float("nan"))):
        with pytest.raises(ValueError, match="aesthetic is two scores, of the prompts and of the negative"):
            request(aesthetic=scores)
    with pytest.raises(ValueError, match="aesthetic needs a size_dim"):
        replace(UNET, aesthetic=True)
    network = random(UNet(replace(SIZED, aesthetic=True)))
    cond = Conditioning(context=torch.zeros(1, 3, 16), pooled=torch.zeros(1, 8)).sized(16, 16)
    with pytest.raises(ValueError, match="this U-Net is told 5 sizes, and got 6"):
        network(torch.zeros(1, 4, 4, 4), torch.zeros(1), cond)

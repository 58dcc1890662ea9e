"""A T2I-adapter's maps: made once for each hint, in the right places, and refused where they have none."""

from dataclasses import replace

import pytest
import torch

from ldm.models import controlnet
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig, once
from ldm.models.unet import UNet
from ldm.pipeline import Control, Steering, Upscale
from ldm.types import Conditioning
from tests.pipeline.small import HINT, UNET, adapter, random, request, small

XL = T2IAdapterConfig((16, 32, 32, 32), 1, 3, 8, xl=True)
THREE = replace(UNET, multipliers=(1, 2, 2), depths=(0, 1, 1))


def counted(network):
    calls = []
    network.register_forward_hook(lambda module, args, made: calls.append(made))
    return network, calls


@pytest.mark.parametrize(
    ("change", "count"),
    [({}, 2), ({"guidance": 1.0}, 2), ({"upscale": Upscale()}, 4), ({"steering": Steering(perturb="mid")}, 4)],
)
def test_maps_are_made_once_in_a_pass_of_a_batch(change, count, monkeypatch):
    """Three images in two batches; and the picture is that of an adapter that makes them at every step.

    The network with its middle off is told the prompts alone: rows of its own, and so maps of its own.
    """
    (network, calls), pipeline = counted(adapter()), small()
    asked = request(controls=(Control(network, HINT, 0.7, end=0.75),), batch=2, **change)
    drawn = pipeline(asked)
    assert len(calls) == count
    monkeypatch.setattr(controlnet, "once", lambda network: network)
    assert torch.equal(pipeline(asked), drawn) and len(calls) > 2 * count


def test_each_hint_has_its_own_maps():
    network, calls = counted(adapter())
    make, t = once(network), torch.zeros(1)

    def maps(hint, dtype=torch.float32):
        network.to(dtype)
        with torch.no_grad():
            return make(torch.zeros(1, 4, 4, 6, dtype=dtype), t, Conditioning(control=(hint.to(dtype),)))

    first = maps(HINT)
    assert maps(HINT.clone()) is first and len(calls) == 1
    assert not torch.equal(maps(1 - HINT)[0], first[0]) and len(calls) == 2
    assert torch.equal(maps(HINT)[0], first[0]) and len(calls) == 3
    assert maps(HINT, torch.float64)[0].dtype == torch.float64 and len(calls) == 4
    with pytest.raises(ValueError, match="the hint must be 16x16 px, got 24x16"), torch.no_grad():
        make(torch.zeros(1, 4, 4, 4, dtype=torch.float64), t, Conditioning(control=(HINT.double(),)))


def test_gradients_reach_the_adapter_every_time():
    network = adapter().requires_grad_(True)
    make = once(network)
    for _ in range(2):
        sum(m.sum() for m in make(torch.zeros(1, 4, 4, 6), torch.zeros(1), Conditioning(control=(HINT,)))).backward()
        assert network.conv_in.weight.grad.any()
        network.zero_grad()


def test_the_maps_of_sdxls_go_behind_the_first_halving_into_two_levels_and_the_middle():
    """Against a U-Net with hooks in those places."""
    torch.manual_seed(0)
    unet, network = random(UNet(THREE)), random(T2IAdapter(XL))
    x, t, cond = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), Conditioning(context=torch.randn(2, 3, 16))
    maps = network(x, t, replace(cond, control=(torch.rand(2, 3, 32, 32),)))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 4, 4), (32, 4, 4), (32, 2, 2), (32, 2, 2)]
    found = unet(x, t, replace(cond, control=maps))
    places = (unet.down[0].resample, unet.down[1].layers[-1], unet.down[2].layers[-1], unet.middle_out)
    for place, extra in zip(places, maps, strict=True):
        place.register_forward_hook(lambda module, args, output, extra=extra: output + extra)
    expected = unet(x, t, cond)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_has_no_place_is_refused():
    unet, cond = UNet(THREE), Conditioning(context=torch.zeros(1, 3, 16), control=(torch.zeros(1, 16, 4, 4),) * 2)
    with pytest.raises(ValueError, match="a U-Net of 3 levels is told a map for each, got 2"):
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)
    for wrong in ({"channels": (16, 32, 32)}, {"channels": (16, 32, 32, 64)}, {"factor": 3}):
        with pytest.raises(ValueError, match="xl has 4 channels, the last twice, and an even factor"):
            replace(XL, **wrong)
    pipeline, xl = small(), Control(random(T2IAdapter(XL)), HINT)
    with pytest.raises(ValueError, match=r"made for another base model: widths \[16, 32, 32\], and this model's are"):
        pipeline.stream(request(controls=(xl,)))
    with pytest.raises(ValueError, match="SDXL's own and others, do not go together"):
        pipeline.stream(request(controls=(xl, Control(adapter(), HINT))))

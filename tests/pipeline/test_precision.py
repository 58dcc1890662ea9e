"""Pipelines whose parts compute in half precision, in every pairing with what steers them."""

from dataclasses import replace

import pytest
import torch

from ldm.models.controlnet import Controlled
from ldm.models.unet import UNet
from ldm.pipeline import Companions, Control, Steering
from ldm.types import Conditioning
from tests.pipeline.small import HINT, UNET, adapter, controlnet, random, request, small

TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("theirs", TYPES)
@pytest.mark.parametrize("ours", TYPES)
def test_controls_in_any_type_steer_a_network_in_any(ours, theirs):
    """Half precision moves what float32 draws by less than the controls do."""
    controls = [Control(controlnet(), HINT), Control(adapter(), HINT, end=0.5)]
    pipeline = small()
    plain, wanted = pipeline(request()), pipeline(request(controls=tuple(controls)))
    for part in (pipeline.denoiser, *(control.model for control in controls)):
        part.to(ours if part is pipeline.denoiser else theirs)
    drawn = pipeline(request(controls=tuple(controls)))
    assert (drawn - wanted).abs().mean() < 0.5 * (plain - wanted).abs().mean()
    perturbed = request(controls=tuple(controls), steering=Steering(perturb="mid"))
    assert pipeline(perturbed).isfinite().all()


@pytest.mark.parametrize("network", [controlnet, adapter])
def test_in_training_autocast_chooses_the_type_of_the_maps(network):
    """As for the network itself: no map is made wider than what it is added to."""
    torch.manual_seed(0)
    unet, control = random(UNet(UNET)), network()
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.extend(args[2].control))
    cond = Conditioning(context=torch.randn(1, 3, 16), control=(HINT,))
    args = torch.randn(1, 4, 4, 6), torch.tensor([500.0]), cond
    exact = Controlled(unet, control)(*args)
    assert {m.dtype for m in seen} == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = Controlled(unet, control)(*args)
    assert {m.dtype for m in seen} == {torch.bfloat16}
    assert (drawn.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("prompt", ["a cat", "a [cat:dog:0.5]", "a cat AND fog"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_weak_model_of_another_type_is_told_prompts_of_every_kind(prompt, dtype):
    pipeline = small()
    torch.manual_seed(9)
    weak = random(UNet(UNET))
    pipeline.companions = Companions(weak=weak)
    wanted = request(prompts=(prompt,) * 3)
    exact = pipeline(wanted)
    weak.to(dtype)
    assert (pipeline(wanted) - exact).abs().mean() < 0.1


@pytest.mark.parametrize("changes", [{"context_dim": 24}, {"in_channels": 5}, {"out_channels": 8}])
def test_a_weak_model_that_is_told_or_says_something_else_is_refused(changes):
    pipeline = small()
    pipeline.companions = Companions(weak=UNet(replace(UNET, **changes)))
    with pytest.raises(ValueError, match=f"the weak model has {next(iter(changes))} {next(iter(changes.values()))}, "):
        pipeline.stream(request())

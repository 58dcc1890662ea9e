"""What is found out before drawing, and what is not finite after it."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ldm.adapters.textual_inversion import teach
from ldm.checkpoints.model import LoadedModel, cast
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.typed import type_of
from ldm.models.unet import UNet
from ldm.nn.offload import offload
from ldm.pipeline import Companions, Control, Given, Pipeline, Steering, Upscale, Variation, control
from ldm.pipeline import pipeline as pipeline_module
from ldm.prompts.grammar import parse
from ldm.types import Conditioning
from tests.pipeline.small import HINT, MASK, PICTURE, UNET, adapter, random, request, small


class Unknown(torch.nn.Module):
    """A text encoder of no known kind: it reads plain prompts only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, prompts):
        return self.inner(prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a [cat|(dog:1..2)]",) * 3}, r"'1\.\.2' is no weight"),
        ({"prompts": ("a [cat:(dog:1..2):0.9]",) * 3, "steps": 1, "upscale": Upscale(steps=9)}, "is no weight"),
        ({"negative": "[fog:(rain:1..2):3]"}, r"'1\.\.2' is no weight"),
        ({"given": Given(PICTURE, shows="a (cat")}, "unbalanced prompt"),
        ({"given": Given(PICTURE, shows="a (cat:1..2)")}, "is no weight"),
        ({"given": Given(PICTURE, shows="a cat <lora:it>")}, "said without adapters"),
        ({"given": Given(PICTURE, shows="a cat"), "variation": Variation((1, 2, 3), 0.5)}, "a variation is of noise"),
    ],
)
def test_when_the_request_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        request(**changes)


@pytest.mark.parametrize("prompts", [("a cat", "a (cat:1.5)", "a cat"), ("[a|b|(cat)]",) * 3, ("a BREAK b",) * 3])
def test_prompts_that_the_encoder_cannot_read(prompts):
    pipeline = small()
    pipeline.text = Unknown(pipeline.text)
    assert pipeline(request(steps=1)).isfinite().all()
    with pytest.raises(ValueError, match="Unknown reads plain prompts, without weights or BREAK"):
        pipeline.stream(request(prompts=prompts, batch=1))
    pipeline = small()
    refiner = small(seed=1)
    refiner.text = Unknown(refiner.text)
    pipeline.companions = Companions(refiner=refiner)
    with pytest.raises(ValueError, match="Unknown reads plain prompts, without weights or BREAK"):
        pipeline.stream(request(prompts=prompts, switch=0.5))
    with pytest.raises(ValueError, match="clip skip is for CLIP text encoders, and this one is a Unknown"):
        pipeline.stream(request(clip_skip=0, switch=0.5))


def test_a_control_or_refiner_for_other_latents():
    pipeline, refiner = small(), small(seed=1)
    control = random(ControlNet(ControlNetConfig(replace(UNET, in_channels=9), hint_widths=(4, 8, 8))))
    with pytest.raises(ValueError, match="made for latents of 9 channels, and this model's have 4"):
        pipeline.stream(request(controls=(Control(control, HINT),)))
    refiner.denoiser = random(UNet(replace(UNET, multipliers=(1, 2, 2), depths=(1, 1, 1))))
    pipeline.companions = Companions(refiner=refiner)
    with pytest.raises(ValueError, match="the refiner draws multiples of 16 px, and this is to be 24x16"):
        pipeline.stream(request(switch=0.5))
    assert pipeline(request(switch=0.5, width=16)).isfinite().all()


def test_pictures_that_are_not_finite():
    pipeline = small()
    latent = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="the denoiser gave values that are not"):
        pipeline.decode(latent * torch.nan)
    pipeline.autoencoder.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="the autoencoder, which may need float32, gave values that are not"):
        pipeline.decode(latent)


def test_one_picture_is_filled_by_each_of_several_masks():
    pipeline = small()
    masks = torch.cat([MASK, MASK.flip(3), MASK.flip(2)])
    drawn = pipeline(request(given=Given(PICTURE, 0.6, mask=masks, fill="fill")))
    pictures = pipeline(request(given=Given(PICTURE.expand(3, -1, -1, -1), 0.6, mask=masks, fill="fill")))
    torch.testing.assert_close(drawn, pictures, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_controls_and_depths_are_cut_out_as_the_picture_is(rows):
    """Drawn by what is cut out beforehand: the same but for where it is put."""
    masks = torch.cat([MASK, MASK.flip(3), MASK.flip(2)])[:rows]
    given = Given(PICTURE, mask=masks, padding=2)
    hints = torch.cat([HINT, 1 - HINT, HINT.flip(3)])
    depth = hints[:, :1]
    asked = request(given=given, width=16, height=16, depth=depth, controls=(Control(adapter(), hints),))
    found = asked.at(16, 16)
    for i, (left, top, right, bottom) in enumerate(given.boxes(16, 16) * (3 // rows)):
        for cut, whole in ((found.depth, depth), (found.controls[0].image, hints)):
            part = whole[i, :, top:bottom, left:right]
            if part.shape[1:] == (16, 16):
                assert torch.equal(cut[i], part)
    drawn = small("depth")(asked)
    moved = replace(asked, depth=depth.flip(2), controls=())
    assert drawn.shape == (3, 3, 16, 24) and not torch.equal(drawn, small("depth")(moved))
    with pytest.raises(ValueError, match="the depth is 16x16 px, and must be 24x16"):
        small("depth").stream(replace(asked, depth=depth[..., :16]))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red:1.4) cat", "a red cat"),
        ("a [dog:cat:0.5], [fog|rain] <lora:x:0.5>", "a cat, rain"),
        ("a cat :1.2 AND fog :-0.5 AND  (rain) BREAK sun", "a cat rain sun"),
        (r"a \(cat\)", "a (cat)"),
    ],
)
def test_words_alone(prompt, words):
    assert parse(prompt).words(4).strip() == words


def test_controls_and_pictures_of_positions():
    """A U-Net that adds positions, and the copy of its encoder: an untrained ControlNet hears what the U-Net hears."""
    config = replace(UNET, positions=True)
    unet, control = random(UNet(config)), ControlNet(ControlNetConfig(config, hint_widths=(4, 8, 8))).eval()
    control.copy_encoder(unet)
    for conv in (*control.zero, control.zero_middle):
        torch.nn.init.dirac_(conv.weight)
    cond = Conditioning(context=torch.randn(1, 3, 16))
    x, t, heard = torch.randn(1, 4, 4, 6), torch.tensor([500.0]), []
    unet.middle_out.register_forward_hook(lambda module, args, output: heard.append(output))
    unet(x, t, cond)
    said = control(x, t, replace(cond, control=(HINT,)))[-1]
    torch.testing.assert_close(said, heard[0])


def test_a_refiner_that_rests_elsewhere_is_brought_to_work():
    pipeline, refiner = small(), small(seed=1)
    resting, seen = next(refiner.denoiser.parameters()), []
    offload(refiner.denoiser, "cpu")
    refiner.denoiser.register_forward_pre_hook(lambda module, args: seen.append(next(module.parameters())))
    pipeline.companions = Companions(refiner=refiner)
    pipeline(request(switch=0.5))
    assert len(seen) == 2 and all(parameter is not resting for parameter in seen)
    assert next(refiner.denoiser.parameters()) is resting


def test_clip_is_told_words_alone(monkeypatch):
    said = []
    monkeypatch.setattr(
        control, "clip_score", lambda clip, prompts, decode: said.append(prompts) or (lambda x0: x0.flatten(1).sum(1))
    )
    pipeline = small()
    pipeline.companions = Companions(clip=torch.nn.Identity())
    steering = Steering(clip_scale=1.0)
    prompts = ("a (red:1.4) cat", "[dog:cat:0.5]", "a cat :1.2 AND fog :-0.5")
    next(pipeline.stream(request(prompts=prompts, steering=steering)))
    assert said == [["a red cat", "cat", "a cat"]]


def test_learned_words_are_in_the_settings():
    pipeline = small()
    assert "TI hashes" not in pipeline.settings(request(), 0)
    vectors = torch.arange(32.0).view(2, 16)
    teach(pipeline.text, "Zorp", vectors)
    teach(pipeline.text, "other", vectors + 1)
    digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:12]
    assert pipeline.settings(request(negative="a ZORP, zorp"), 0)["TI hashes"] == f"zorp: {digest}"


@pytest.mark.parametrize("low_memory", [True, False])
def test_the_autoencoder_is_not_in_half_precision_with_low_memory(monkeypatch, low_memory):
    """On `meta` as the other device; a type that is asked for without low memory is what all parts get."""
    found = small()
    settings = {"diffusion": asdict(found.diffusion.config), "size": 16, "null_prompt": ""}
    parts = {"autoencoder": found.autoencoder, "text": found.text, "denoiser": found.denoiser}
    given = torch.float16 if not low_memory else None

    def loaded(path, names, *, prediction, ema, dtype):
        for part in parts.values():
            cast(part, dtype)
        return LoadedModel(parts, settings, "small", path)

    monkeypatch.setattr(pipeline_module, "load_tuned", loaded)
    device = "meta" if low_memory else "cpu"
    pipeline = Pipeline.load(Path("small"), device, low_memory=low_memory, dtype=given)
    assert type_of(pipeline.denoiser) == torch.float16 == type_of(pipeline.text)
    assert type_of(pipeline.autoencoder) == (torch.float32 if low_memory else torch.float16)

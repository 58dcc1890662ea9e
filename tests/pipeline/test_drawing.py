"""Every mode on small random models: what holds for all of them, and what each promises."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.samplers import SAMPLERS
from ldm.images import format_parameters, parse_parameters
from ldm.models.unet import UNet
from ldm.pipeline import Companions, Control, Given, Pipeline, Steering, Upscale, Variation, outpaint
from ldm.pipeline.canvas import softened
from ldm.pipeline.inputs import normalised_depth, reseeded
from tests.pipeline.small import (
    CHANNELS,
    DEPTH,
    HINT,
    MASK,
    PICTURE,
    PICTURES,
    UNET,
    adapter,
    controlnet,
    modes,
    random,
    request,
    small,
)

MODES = tuple(modes())


@pytest.fixture(scope="module")
def pipelines():
    return {kind: small(kind) for kind in CHANNELS}


@pytest.fixture(scope="module")
def asked():
    return modes()


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_the_same_alone_and_in_any_batch(pipelines, asked, mode):
    """To the byte at batch 1; torch sums in another order for another batch size, hence a tolerance below 1/255."""
    kind, changes = asked[mode]
    wanted = request(sampler="dpmpp_2m_sde", **changes)
    one_by_one = pipelines[kind](replace(wanted, batch=1))
    assert one_by_one.isfinite().all() and not torch.equal(one_by_one[0], one_by_one[2])
    assert torch.equal(pipelines[kind](replace(wanted, batch=1)), one_by_one)
    for batch in (2, 3):
        assert (pipelines[kind](replace(wanted, batch=batch)) - one_by_one).abs().max() < 1e-3
    alone = pipelines[kind](of_one(wanted, 1))
    assert torch.equal(alone[0], one_by_one[1])


def of_one(wanted, index):
    """The request for one of its images alone."""

    def row(value):
        return value if value is None or len(value) == 1 else value[index : index + 1]

    changes = {"prompts": wanted.prompts[index : index + 1], "seeds": wanted.seeds[index : index + 1]}
    if wanted.given is not None:
        changes["given"] = replace(wanted.given, image=row(wanted.given.image), mask=row(wanted.given.mask))
    if wanted.variation is not None:
        changes["variation"] = replace(wanted.variation, seeds=wanted.variation.seeds[index : index + 1])
    return replace(wanted, depth=row(wanted.depth), **changes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_starts_from_a_picture_and_goes_on_at_a_larger_size(pipelines, sampler):
    """A variation of a plain picture, drawn on at twice the size, in any batch."""
    wanted = request(
        sampler=sampler,
        guidance=1.0,
        given=Given(PICTURES, 0.6),
        variation=Variation((7, 8, 9), 0.3),
        upscale=Upscale(2.0),
    )
    one_by_one = pipelines["plain"](replace(wanted, batch=1))
    assert one_by_one.shape == (3, 3, 32, 48) and one_by_one.isfinite().all()
    assert (pipelines["plain"](wanted) - one_by_one).abs().max() < 1e-3
    assert torch.equal(pipelines["plain"](replace(of_one(wanted, 2), batch=1))[0], one_by_one[2])


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_counted_and_settings_written(pipelines, asked, mode):
    kind, changes = asked[mode]
    wanted, pipeline = request(batch=2, **changes), pipelines[kind]
    steps = list(pipeline.stream(wanted))
    assert [step.index for step in steps] == list(range(2 * pipeline.steps(wanted)))
    for step in steps:
        assert pipeline.decode(step.x0).isfinite().all()
    settings = pipeline.settings(wanted, 1)
    read = parse_parameters(format_parameters(settings))
    assert read == {key: str(value) for key, value in settings.items() if value != ""}


def test_the_words_of_automatic1111(pipelines, asked):
    def of(mode):
        kind, changes = asked[mode]
        return pipelines[kind].settings(request(**changes), 1)

    assert of("masked").items() >= {"Denoising strength": 0.6, "Mask blur": 1.0, "Masked content": "original"}.items()
    assert of("region").items() >= {"Inpaint area": "Only masked", "Masked area padding": 2}.items()
    assert of("variation").items() >= {"Variation seed": 8, "Variation seed strength": 0.3}.items()
    second = {
        "Denoising strength": 0.5,
        "Hires upscale": 1.5,
        "Hires steps": 3,
        "Hires upscaler": "Latent (bicubic antialiased)",
    }
    assert of("second pass").items() >= second.items()
    assert of("editing")["Image CFG scale"] == 1.5
    assert of("controls")["ControlNet 0"] == "Model: , Weight: 0.7, Guidance Start: 0.0, Guidance End: 0.5"


class Oracle(torch.nn.Module):
    """Says what the noise was, in eps, or of a flow which way it went: the picture comes back as it was."""

    def __init__(self, noise, known):
        super().__init__()
        self.noise, self.known = noise, known

    def forward(self, x, t, cond):
        return self.noise if self.known is None else self.noise - self.known


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc", "plms"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
def test_a_picture_is_noised_to_the_level_of_the_start_by_its_own_noise(sampler, schedule):
    """Whoever knows that noise draws the picture again, from any strength, in exactly as many steps as asked for."""
    flow = schedule == "flow"
    pipeline = small(schedule=schedule, prediction="flow" if flow else "eps")
    known, noise = pipeline.encode(PICTURES), ImageNoise((3, 4, 5), (4, 4, 6))()
    pipeline.denoiser = Oracle(noise, known if flow else None)
    for strength in (0.2, 0.75, 1.0):
        steps = list(pipeline.stream(request(sampler=sampler, guidance=1.0, given=Given(PICTURES, strength))))
        assert len(steps) == 4
        assert (steps[-1].x - known).abs().max() < 1e-4


def test_less_strength_stays_nearer(pipelines):
    known = pipelines["plain"].decode(pipelines["plain"].encode(PICTURE))

    def miss(strength):
        return float((pipelines["plain"](request(given=Given(PICTURE, strength))) - known).abs().mean())

    assert 0 < miss(0.05) < miss(0.4) < miss(1.0)
    plain = pipelines["plain"](request(given=Given(PICTURE)))
    assert torch.equal(plain, pipelines["plain"](request(given=Given(PICTURE, 0.75))))


@pytest.mark.parametrize("kind", ["plain", "inpainting"])
@pytest.mark.parametrize(
    "change", [{}, {"strength": 0.5}, {"mask_blur": 1.0}, {"padding": 3}, {"strength": 0.5, "fill": "noise"}]
)
def test_known_pixels_stay_to_the_byte(pipelines, kind, change):
    given = Given(PICTURES, mask=MASK, **change)
    drawn = pipelines[kind](request(given=given, width=16 if "padding" in change else 24))
    kept = (softened(MASK, given.mask_blur) == 0).expand_as(drawn)
    assert drawn.shape == PICTURES.shape and torch.equal(drawn[kept], PICTURES[kept])
    assert not torch.allclose(drawn[~kept], PICTURES[~kept], atol=0.05)


def test_what_the_mask_is_filled_with_is_where_drawing_starts(pipelines):
    drawn = [
        pipelines["plain"](request(given=Given(PICTURE, 0.5, mask=MASK, fill=fill)))
        for fill in ("original", "fill", "noise", "nothing")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_outpainting_keeps_the_picture(pipelines):
    given = outpaint(PICTURE, (8, 0, 0, 8), overlap=2, multiple=pipelines["plain"].multiple)
    drawn = pipelines["plain"](request(given=given, width=None, height=None))
    assert drawn.shape == (3, 3, 24, 32)
    assert torch.equal(drawn[..., :14, 10:], PICTURE[..., :14, 2:].expand(3, -1, -1, -1))


def test_depths_count_by_their_own_range(pipelines):
    assert normalised_depth(DEPTH * 40 - 3, (4, 4, 6)).amax((1, 2, 3)).sub(1).abs().max() < 1e-5
    assert torch.equal(normalised_depth(torch.full((1, 1, 16, 24), 5.0), (4, 4, 6)), torch.full((1, 1, 4, 6), -1.0))
    drawn = pipelines["depth"](request(depth=DEPTH))
    assert (pipelines["depth"](request(depth=DEPTH * 40 - 3)) - drawn).abs().max() < 1e-4
    assert not torch.allclose(pipelines["depth"](request(depth=-DEPTH)), drawn, atol=1e-2)


def test_an_edit_is_guided_by_text_and_by_picture(pipelines):
    """At guidance 1 and 1 the network is believed as it is; each of the two moves the picture."""
    pipeline, seen = pipelines["editing"], []
    original = pipeline.denoiser.forward

    def forward(x, t, cond):
        seen.append((len(x), cond.concat.flatten(1).any(1).tolist()))
        return original(x, t, cond)

    pipeline.denoiser.forward = forward
    try:
        drawn = pipeline(request(given=Given(PICTURES)))
    finally:
        del pipeline.denoiser.forward
    assert set(map(str, seen)) == {"(6, [False, False, False, True, True, True])", "(3, [True, True, True])"}
    for changes in ({"guidance": 4.0}, {"given": Given(PICTURES, image_guidance=3.0)}):
        assert not torch.allclose(pipeline(request(**{"given": Given(PICTURES)} | changes)), drawn, atol=1e-3)


def test_what_is_enlarged_is_four_times_the_size(pipelines):
    given = Given(PICTURES[..., ::4, ::4], noise_level=3)
    drawn = pipelines["enlarging"](request(given=given, width=None, height=None))
    assert drawn.shape == (3, 3, 16, 24)
    for changed in (replace(given, noise_level=4), replace(given, image=-given.image)):
        assert not torch.allclose(
            pipelines["enlarging"](request(given=changed, width=None, height=None)), drawn, atol=1e-3
        )


def test_controls_add_up_and_end_where_they_should(pipelines):
    net, pipeline = controlnet(), pipelines["plain"]
    plain, one = pipeline(request()), pipeline(request(controls=(Control(net, HINT),)))
    assert not torch.allclose(plain, one, atol=1e-2)
    assert torch.equal(pipeline(request(controls=(Control(net, HINT, weight=0.0),))), plain)
    halves = (Control(net, HINT, 0.5), Control(net, HINT, 0.5))
    assert (pipeline(request(controls=halves)) - one).abs().max() < 1e-4
    in_turn = (Control(net, HINT, end=0.5), Control(net, HINT, start=0.5))
    assert (pipeline(request(controls=in_turn)) - one).abs().max() < 1e-4
    early, late = (pipeline(request(controls=(control,))) for control in in_turn)
    assert not torch.allclose(early, one, atol=1e-3) and not torch.allclose(early, late, atol=1e-3)


def test_controls_go_with_perturbed_layers_and_with_a_weaker_model(pipelines):
    controls = (Control(controlnet(), HINT), Control(adapter(), HINT))
    pipeline = small()
    perturbed = request(controls=controls, steering=Steering(perturb="mid"))
    assert pipeline(perturbed).isfinite().all()
    assert not torch.equal(pipeline(perturbed), pipeline(request(controls=controls)))
    torch.manual_seed(9)
    pipeline.companions = Companions(weak=random(UNet(replace(UNET, blocks=2))))
    assert pipeline(request(controls=controls)).isfinite().all()


def test_a_variation_goes_from_one_noise_to_another(pipelines):
    pipeline, other = pipelines["plain"], (7, 8, 9)
    ends = [pipeline(request(variation=Variation(other, strength))) for strength in (0.0, 0.1, 1.0)]
    plain = pipeline(request())
    assert torch.equal(ends[0], plain) and torch.equal(ends[2], pipeline(request(seeds=other)))
    twice = pipeline(request(variation=Variation(other, 1.0), upscale=Upscale(1.5)))
    assert torch.equal(twice, pipeline(request(seeds=other, upscale=Upscale(1.5))))
    near, far = ((end - plain).abs().mean() for end in ends[1:])
    assert 0 < near < far


def test_a_second_pass_starts_from_the_first_with_noise_of_its_own():
    """Whoever knows the noise of both draws the same latents twice, the second time larger."""
    pipeline, sizes = small(prediction="eps"), []
    first = torch.rand(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    top = pipeline.diffusion.trajectory(4)[0]
    start = ImageNoise((3, 4, 5), (4, 4, 6))()
    noise = {
        (4, 6): ((start - top.alpha * first) / top.sigma).float(),
        (8, 12): ImageNoise(reseeded((3, 4, 5), "second pass"), (4, 8, 12))(),
    }

    class Knows(torch.nn.Module):
        def forward(self, x, t, cond):
            sizes.append(tuple(x.shape[2:]))
            return noise[sizes[-1]]

    pipeline.denoiser = Knows()
    steps = list(pipeline.stream(request(guidance=1.0, upscale=Upscale(2.0, 0.5, "nearest", 3))))
    assert sizes == [(4, 6)] * 4 + [(8, 12)] * 3 and len(steps) == 7
    assert (steps[3].x - first).abs().max() < 1e-4
    assert (steps[6].x - F.interpolate(first, scale_factor=2, mode="nearest")).abs().max() < 1e-4


def test_a_refiner_draws_the_last_steps():
    pipeline, refiner = small(), small(seed=1)
    plain, calls = pipeline(request()), []
    pipeline.companions = Companions(refiner=pipeline)
    assert torch.equal(pipeline(request(switch=0.5)), plain)  # by itself it is as if it were not there
    pipeline.companions = Companions(refiner=refiner)
    original = refiner.denoiser.forward
    refiner.denoiser.forward = lambda x, t, cond: calls.append(float(t[0])) or original(x, t, cond)
    both = {switch: pipeline(request(switch=switch)) for switch in (0.25, 0.5, 0.75)}
    assert calls == [749.0, 499.0, 249.0, 499.0, 249.0, 249.0]
    assert not torch.equal(both[0.25], both[0.5]) and not torch.equal(both[0.75], plain)
    assert pipeline.settings(request(), 0)["Refiner"] == "plain"
    controlled = request(controls=(Control(controlnet(), HINT),), steering=Steering(perturb="mid"), switch=0.5)
    assert pipeline(controlled).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("plain", {"depth": DEPTH}, "a depth is for models that are shown one"),
        ("depth", {}, "this model needs a depth"),
        ("depth", {"depth": DEPTH[..., 1:]}, "the depth is 23x16 px, and must be 24x16"),
        ("depth", {"depth": DEPTH, "given": Given(PICTURE, shows="a cat")}, "models of text alone"),
        ("editing", {}, "this model is for editing: give a picture"),
        ("editing", {"given": Given(PICTURE, mask=MASK)}, "this model is for editing: give a picture, without mask"),
        ("editing", {"given": Given(PICTURE), "upscale": Upscale()}, "no second pass"),
        ("editing", {"given": Given(PICTURE), "steering": Steering(perturb="mid")}, "no CFG|takes no CFG"),
        ("enlarging", {}, "this model is for enlarging: give a picture"),
        ("enlarging", {"given": Given(PICTURE, 0.5)}, "enlarged has no strength"),
        ("enlarging", {"given": Given(PICTURE, noise_level=30)}, r"noise_level must be in 0\.\.29"),
        ("enlarging", {"given": Given(PICTURE)}, "the given picture is 24x16 px, and must be 6x4"),
        ("plain", {"given": Given(PICTURE, image_guidance=2.0)}, "image_guidance is for models for editing"),
        ("plain", {"given": Given(PICTURE, noise_level=3)}, "noise_level is for models for enlarging"),
        ("inpainting", {"given": Given(PICTURE, mask=MASK, resample=2)}, "resample is for others"),
        ("inpainting", {"given": Given(PICTURE, measure="blur:2")}, "goes by a picture, with or without a mask"),
        ("plain", {"given": Given(PICTURE), "width": 16}, "the given picture is 24x16 px, and must be 16x16"),
        ("plain", {"given": Given(PICTURE, mask=0 * MASK, padding=1)}, "the mask is empty"),
        ("plain", {"given": Given(PICTURE, 0.001), "steps": 4}, r"4 steps at strength 0\.001 are the last of 4000"),
        ("plain", {"given": Given(PICTURE, 0.2, "part"), "steps": 4}, r"strength 0\.2 leaves none of 4 steps"),
        ("plain", {"controls": (Control(controlnet(), HINT[..., 1:]),)}, "picture of control 0 is 23x16 px, and"),
        ("plain", {"controls": (Control(controlnet(), HINT[:, :1]),)}, "control 0 .*its picture has 3 channels, not 1"),
        ("plain", {"controls": (Control(controlnet(), HINT, 1, 0.3, 0.4),)}, "control 0 .*of 4 steps there is none"),
        ("plain", {"controls": (Control(torch.nn.Linear(1, 1), HINT),)}, "a Linear is neither a ControlNet nor"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_before_any_work(pipelines, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        pipelines[kind].stream(request(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: request(variation=Variation((1,), 0.1)), "give 3 variation seeds, one an image, not 1"),
        (lambda: Variation((1,), 1.1), r"strength of a variation must be in 0\.\.1"),
        (lambda: Variation((-1,), 0.1), "variation seeds must be in"),
        (lambda: Upscale(0.5), "scale to upscale by must be at least 1"),
        (lambda: Upscale(2, 0.0), "strength after upscaling"),
        (lambda: Upscale(how="lanczo"), "did you mean 'lanczos'"),
        (lambda: Upscale(steps=0), "steps after upscaling"),
        (lambda: request(upscale=Upscale(), given=Given(PICTURE, mask=MASK)), "upscale goes with prompts and plain"),
        (lambda: request(switch=1.0), "switch to the refiner"),
        (lambda: request(depth=DEPTH[:2]), "give 1 depth, or one an image: 3, not 2"),
        (lambda: request(depth=HINT), r"a depth must be \[1 or N, 1, H, W\]"),
        (lambda: request(controls=(Control(None, HINT.expand(2, -1, -1, -1)),)), "give 1 picture for control 0"),
        (lambda: Control(None, HINT * 2), r"must be in 0\.\.1"),
        (lambda: Control(None, HINT[0]), r"must be \[1 or N, C, H, W\]"),
        (lambda: Control(None, HINT, float("inf")), "weight of a control must be a finite number"),
        (lambda: Control(None, HINT, 1.0, 0.5, 0.5), "from a share of the steps to a later one, got 0.5..0.5"),
    ],
)
def test_impossible_requests_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_a_control_for_another_model_is_refused(pipelines):
    torch.manual_seed(0)
    wide = replace(UNET, channels=32)
    net = controlnet().__class__(replace(controlnet().config, unet=wide))
    eight = controlnet().__class__(replace(controlnet().config, hint_widths=(4, 8)))
    for model, message in ((net, "made for another base model: widths"), (eight, "told 2 px a latent")):
        with pytest.raises(ValueError, match=message):
            pipelines["plain"].stream(request(controls=(Control(model, HINT),)))
    other = adapter().__class__(replace(adapter().config, channels=(16, 32, 32)))
    with pytest.raises(ValueError, match=r"another base model: widths \[16, 32, 32\]"):
        pipelines["plain"].stream(request(controls=(Control(other, HINT),)))


def test_a_refiner_of_other_latents_or_noise_is_refused():
    pipeline, moved = small(), small()
    moved.autoencoder.latent_std.mul_(2)
    for refiner, message in (
        (small(beta_end=0.02), r"was trained with beta_end=0\.02, the model with 0\.012"),
        (small(prediction="eps"), "was trained with prediction=eps"),
        (small("depth"), "is a model for depth"),
        (moved, "has other latents: its latent_std"),
    ):
        pipeline.companions = Companions(refiner=refiner)
        with pytest.raises(ValueError, match=message):
            pipeline.stream(request())
    pipeline.companions = Companions(refiner=small(seed=1))
    with pytest.raises(ValueError, match=r"from share 0\.8 to share 1\.0 of 4 steps there is none"):
        pipeline.stream(request())


def test_a_weak_model_has_no_part_in_editing():
    pipeline = small("editing")
    pipeline.companions = Companions(weak=pipeline.denoiser)
    with pytest.raises(ValueError, match="a weak model has no part in it"):
        pipeline.stream(request(given=Given(PICTURES)))


def test_a_number_of_channels_that_means_nothing_is_refused():
    parts = small()
    with pytest.raises(ValueError, match="its denoiser takes 6 channels and its latents have 4; known are"):
        Pipeline(parts.autoencoder, parts.text, UNet(replace(UNET, in_channels=6)), parts.diffusion, size=16)
    with pytest.raises(ValueError, match="is for depth: prompts alone do not make its estimate"):
        small("depth").estimate(["a cat"], (4, 4, 4))


def test_every_option_of_a_picture_is_in_the_settings_or_is_a_picture(pipelines):
    """No option of Given can be lost from what is written beside a picture."""
    changed = {
        "strength": 0.5, "strength_steps": "part", "mask_blur": 2.0, "padding": 3, "fill": "noise", "resample": 2,
        "jump": 3, "measure": "blur:1.0", "noise_std": 0.1, "measure_scale": 2.0, "shows": "a dog",
        "image_guidance": 2.0, "noise_level": 3, "image": None, "mask": None,
    }  # fmt: skip
    assert {field.name for field in fields(Given)} == set(changed)
    masked = Given(PICTURE, 0.5, "part", mask=MASK, mask_blur=2.0, padding=3, fill="noise", resample=2, jump=3)
    found = pipelines["plain"].settings(request(given=masked), 0)
    base = pipelines["plain"].settings(request(given=Given(PICTURE, 0.4, mask=MASK)), 0)
    assert {"Denoising strength", "Strength steps", "Mask blur", "Masked content", "Given"} <= {
        key for key in found if found[key] != base.get(key)
    }

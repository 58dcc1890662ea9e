"""What a request can do to the network and the sampler, on small random models of every part."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

import ldm.cli.generate
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS
from ldm.images import open_mask, open_picture, read_settings, save_png, to_pil
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.models.clip import CLIP, ImageConfig, ImageEncoder
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.cpu import for_cpu
from ldm.pipeline import Companions, Given, Pipeline, Request, Steering, pairs

UNET = UNetConfig(
    in_channels=4, out_channels=4, channels=16, multipliers=(1, 2), blocks=1, depths=(1, 1), context_dim=16, heads=2,
    norm_groups=4,
)  # fmt: skip


def random(module):
    """In evaluation mode, frozen, with no layer left at zero."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return for_cpu(module.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(channels=8, multipliers=(1, 1, 1), blocks=1, norm_groups=4)
    text = TextConfig(width=16, layers=1, heads=2, embed_dim=8, context_length=12)
    diffusion = Diffusion.from_config(DiffusionConfig(prediction="v"))
    parts = [random(part) for part in (AutoencoderKL(autoencoder), TextEncoder(text), UNet(UNET))]
    made = Pipeline(*parts, diffusion, size=16, name="tiny")
    classifier = NoisyClassifierConfig(("cat", "dog"), 4, 16, (1, 2), 1, (0, 1), 8, 4)
    image = ImageEncoder(ImageConfig(size=16, patch=8, width=16, layers=1, heads=2, embed_dim=8))
    made.companions = Companions(None, random(NoisyClassifier(classifier)), CLIP(made.text, random(image)).eval())
    return made


REQUEST = Request(*pairs(["a cat", "a dog"], seed=3), steps=4, guidance=3.0)
STEERING = {
    "rescale": {"rescale": 0.7},
    "interval": {"interval": (0.0, 500.0)},
    "projected": {"parallel": 0.0, "momentum": -0.5, "norm": 2.0},
    "thresholded": {"threshold": 0.9, "limit": 1.0},
    "perturbed": {"perturb": "mid", "perturb_scale": 2.0},
    "skipped": {"perturb": "down.1,up", "perturb_how": "skip", "perturb_scale": 2.0},
    "classifier": {"label": "dog", "label_scale": 5.0},
    "clip": {"clip_scale": 50.0},
}
PICTURE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
MASK = torch.zeros(1, 1, 16, 24)
MASK[..., 4:9, 10:20] = 1


@pytest.mark.parametrize("name", STEERING)
def test_each_way_to_steer_reaches_the_picture(pipeline, name):
    request = replace(REQUEST, steering=Steering(**STEERING[name]))
    steered = pipeline(request)
    assert steered.isfinite().all() and not torch.equal(steered, pipeline(REQUEST))
    assert torch.equal(steered, pipeline(request))
    alone = replace(request, prompts=request.prompts[1:], seeds=request.seeds[1:])
    assert (pipeline(alone) - steered[1:]).abs().max() < 1e-4
    written = {key for key in pipeline.settings(request, 0) if key.startswith("Steering")}
    assert written == {f"Steering {key.replace('_', ' ')}" for key in STEERING[name]}
    assert all(parameter.grad is None for parameter in pipeline.denoiser.parameters())


def test_all_ways_at_once(pipeline):
    every = {key: value for change in STEERING.values() for key, value in change.items() if key != "perturb_how"}
    for sampler in ("euler_a", "dpmpp_2m", "dpm2"):
        assert pipeline(replace(REQUEST, sampler=sampler, steering=Steering(**every))).isfinite().all()


def test_a_classifier_steers_towards_its_label(pipeline):
    """By its own opinion of the estimate at the end of the way."""

    def opinion(label):
        request = replace(REQUEST, steps=8, steering=Steering(label=label, label_scale=20.0))
        latent = list(pipeline.stream(request))[-1].x
        logits = pipeline.companions.classifier(latent, torch.zeros(2))
        return logits.log_softmax(1)[:, 1]

    assert (opinion("dog") > opinion("cat")).all()


def test_a_clip_steers_towards_the_prompt(pipeline):
    clip = pipeline.companions.clip

    def fit(scale):
        images = pipeline(replace(REQUEST, steps=8, steering=Steering(clip_scale=scale)))
        wanted = clip.text.features(clip.text.tokenize(list(REQUEST.prompts)))
        return (clip.image(images) * wanted).sum(1)

    assert (fit(300.0) > fit(0.0)).all()


def test_cfg_plus_plus_by_name_or_by_steering(pipeline):
    request = replace(REQUEST, guidance=0.6)
    named = pipeline(replace(request, sampler="DDIM CFG++"))
    assert torch.equal(named, pipeline(replace(request, steering=Steering(plus_plus=True))))
    assert not torch.equal(named, pipeline(request))
    with pytest.raises(ValueError, match=r"guidance of CFG\+\+ must be in 0\.\.1, got 3"):
        replace(REQUEST, sampler="euler cfg++")


def test_a_weaker_network_takes_the_place_of_the_negative(pipeline):
    weak = random(UNet(UNET))
    try:
        pipeline.companions = replace(pipeline.companions, weak=weak, weak_name="weaker")
        guided = pipeline(REQUEST)
        assert pipeline.settings(REQUEST, 0)["Weak model"] == "weaker"
        pipeline.companions = replace(pipeline.companions, weak=pipeline.denoiser)
        own = pipeline(REQUEST)
    finally:
        pipeline.companions = replace(pipeline.companions, weak=None)
    assert torch.allclose(own, pipeline(replace(REQUEST, guidance=1.0)), atol=1e-4)
    assert not torch.equal(guided, pipeline(REQUEST))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_land_exactly(pipeline, sampler):
    for spacing in ("trailing", "leading"):
        request = replace(REQUEST, sampler=sampler, spacing=spacing, given=Given(PICTURE, mask=MASK))
        drawn = pipeline(request)
        assert drawn.shape == (2, 3, 16, 24)
        kept = MASK.expand_as(drawn) == 0
        assert torch.equal(drawn[kept], PICTURE.expand_as(drawn)[kept])
        assert not torch.allclose(drawn[~kept], PICTURE.expand_as(drawn)[~kept], atol=0.05)


def test_a_mask_for_each_image_whatever_the_batch(pipeline):
    pictures, masks = torch.cat([PICTURE, -PICTURE]), torch.cat([MASK, MASK.flip(-1)])
    request = replace(REQUEST, given=Given(pictures, mask=masks, resample=3, jump=2), sampler="dpmpp_2m_sde")
    together = pipeline(request)
    kept = masks.expand_as(together) == 0
    assert torch.equal(together[kept], pictures[kept])
    assert (pipeline(replace(request, batch=1)) - together).abs().max() < 1e-4
    assert not torch.equal(together, pipeline(replace(request, given=replace(request.given, resample=1))))


def test_a_measured_picture_is_met_better_than_without(pipeline):
    measure = "downscale:4"
    given = Given(torch.zeros(1, 3, 4, 4), measure=measure)
    seen = given.operator()(PICTURE[..., :16] * 0.3)
    request = replace(REQUEST, steps=20, guidance=1.0, given=Given(seen, measure=measure, measure_scale=0.5))

    def miss(request):
        return (given.operator()(pipeline(request)) - seen).square().mean()

    assert miss(request) < 0.8 * miss(replace(request, given=None))
    blurred = Given(PICTURE[..., :16], measure="blur:1.5", noise_std=0.1)
    assert pipeline(replace(request, given=blurred)).isfinite().all()


def test_from_the_noise_of_a_picture_the_same_prompt_draws_it_again(pipeline):
    known = pipeline.decode(pipeline.encode(PICTURE))
    request = replace(
        REQUEST, prompts=("a dog",), seeds=(0,), steps=20, guidance=1.0, given=Given(PICTURE, shows="a dog")
    )
    assert (pipeline(request) - known).abs().max() < 1e-2
    assert (pipeline(replace(request, prompts=("a cat",))) - known).abs().max() > 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Given(PICTURE, strength=1.5), "strength must be above 0 and at most 1, got 1.5"),
        (lambda: Given(PICTURE, mask=MASK, shows="a"), "got 2 of them"),
        (lambda: Given(PICTURE, mask=MASK[..., 1:]), "the mask is 23x16 px and the picture 24x16"),
        (lambda: Given(PICTURE[0], mask=MASK), r"must be \[1 or N, 3, H, W\]"),
        (lambda: Given(PICTURE, measure="blurr:3"), "did you mean 'blur'"),
        (lambda: Given(PICTURE, measure="downscale:x"), "downscale:FACTOR"),
        (lambda: Given(PICTURE, mask=MASK, resample=0), "resample and jump must be at least 1, got 0 and 10"),
        (lambda: replace(REQUEST, given=Given(PICTURE.expand(3, -1, -1, -1), shows="a")), "one an image: 2, not 3"),
        (lambda: Given(PICTURE, mask=MASK[0]), r"a mask must be \[1 or N, 1, H, W\]"),
        (lambda: Given(PICTURE, mask=MASK * 255 + 1), r"a mask must be in 0\.\.1, got 1"),
        (lambda: Given(PICTURE, shows="a", resample=2), "resample=2 goes with a mask"),
        (lambda: Given(PICTURE, measure="blur:2", noise_std=-1), "noise_std 0 or more"),
        (lambda: replace(REQUEST, given=Given(PICTURE, mask=MASK.expand(3, -1, -1, -1))), "give 1 mask, or one an"),
        (lambda: Steering(clip_scale=float("nan")), "clip_scale must be a finite number, got nan"),
        (lambda: Steering(norm=-1), "norm must be 0"),
        (lambda: replace(REQUEST, sampler="dpm_adaptive", steering=Steering(momentum=-0.5)), "momentum remembers"),
        (lambda: Steering(threshold=2.0), r"threshold must be in 0\.\.1"),
        (lambda: Steering(limit=0.0), "limit must be above 0"),
        (lambda: Steering(perturb_how="skipp"), "did you mean 'skip'"),
        (lambda: replace(REQUEST, variance="large"), "for sampler 'ddpm' alone"),
    ],
)
def test_impossible_requests_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        change()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": Given(PICTURE, mask=MASK), "width": 32}, "the given picture is 24x16 px, and must be 32x16"),
        ({"given": Given(PICTURE, measure="downscale:4")}, "the given picture is 24x16 px, and must be 4x4"),
        ({"given": Given(PICTURE[..., :22], shows="a")}, "multiples of 8 px, got 22x16"),
        ({"steering": Steering(perturb="middle")}, "did you mean 'mid'"),
        ({"steering": Steering(label="cow")}, "unknown class 'cow'"),
        ({"sampler": "ddpm", "variance": "learned"}, "variance 'learned' needs a model that learned it"),
    ],
)
def test_what_this_model_cannot_do_is_refused_before_any_work(pipeline, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.stream(replace(REQUEST, **change))


def test_companions_that_are_not_there_are_named(pipeline):
    for steering, message in ((Steering(label="dog"), "needs a classifier"), (Steering(clip_scale=1), "needs a CLIP")):
        with pytest.raises(ValueError, match=message):
            Companions().check(replace(REQUEST, steering=steering))


def test_a_weak_model_without_effect_is_refused(pipeline):
    weak = Companions(weak=pipeline.denoiser)
    weak.check(replace(REQUEST, guidance=2.0))
    for change in ({"guidance": 1.0}, {"negative": "ugly", "guidance": 2.0}):
        with pytest.raises(ValueError, match="a weak model"):
            weak.check(replace(REQUEST, **change))


def test_companions_of_another_diffusion_are_refused(models):
    path = models["denoising"]
    own = Pipeline.load(path).diffusion
    assert Companions.load(weak=path, diffusion=own).weak_name == path.name
    other = Diffusion.from_config(replace(own.config, beta_end=0.02))
    with pytest.raises(ValueError, match=r"the denoiser of .* was trained with beta_end=0\.012, the model with 0\.02"):
        Companions.load(weak=path, diffusion=other)


def test_clip_and_measurement_act_together(pipeline):
    """Their scores add: with the one's scale at 0 the picture is that of the other alone."""
    request = replace(REQUEST, steps=2, width=24, given=Given(PICTURE, measure="blur:1"))
    alone = pipeline(request)
    assert not torch.equal(pipeline(replace(request, steering=Steering(clip_scale=50.0))), alone)
    none = replace(request, given=replace(request.given, measure_scale=0.0), steering=Steering(clip_scale=50.0))
    torch.testing.assert_close(pipeline(none), pipeline(replace(none, given=None)))


@pytest.fixture
def command(pipeline, monkeypatch, tmp_path):
    """`ldm generate` with the small pipeline, and the folder of its pictures."""
    monkeypatch.setattr(Pipeline, "load", lambda *args, **options: pipeline)
    monkeypatch.setattr(Companions, "load", lambda *args, **options: pipeline.companions)
    app = ldm.cli.generate.typer.Typer()
    app.command()(ldm.cli.generate.generate)

    def run(*words):
        out = tmp_path / "out"
        result = CliRunner().invoke(
            app, ["model", *map(str, words), "--steps", "2", "--device", "cpu", "--out", str(out)]
        )
        if result.exception:
            raise result.exception
        return out

    return run


def test_generate_with_a_mask_and_steering(command, tmp_path):
    save_png(to_pil(PICTURE[0]), tmp_path / "picture.png")
    Image.fromarray((MASK[0, 0].numpy() * 255).astype("uint8")).save(tmp_path / "mask.png")
    words = ["--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png", "--resample", 2]
    out = command("a cat", *words, "--steer", "rescale=0.5", "--steer", "interval=[0,900]")
    found, given = open_picture(out / "00000-0.png"), open_picture(tmp_path / "picture.png")
    kept = MASK.expand_as(found) == 0
    assert torch.equal(found[kept], given[kept]) and not torch.equal(found, given)
    settings = read_settings(out / "00000-0.png")
    assert settings["Steering interval"] == [0.0, 900.0] and settings["Given"] == "mask, 2 times by 10 steps"
    larger = command("a cat", *words, "--size", "48x32")
    with Image.open(larger / "00001-0.png") as image:
        assert image.size == (48, 32)


def test_generate_from_a_measurement_and_from_what_a_picture_shows(command, tmp_path):
    save_png(to_pil(F.avg_pool2d(PICTURE[..., :16], 4)[0]), tmp_path / "small.png")
    out = command("a cat", "--image", tmp_path / "small.png", "--measure", "downscale:4")
    assert read_settings(out / "00000-0.png")["Given"] == "downscale:4"
    save_png(to_pil(PICTURE[0]), tmp_path / "picture.png")
    out = command("a cat", "--image", tmp_path / "picture.png", "--shows", "a dog")
    assert read_settings(out / "00001-0.png")["Given"] == "shows a dog"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steer", "rescal=1"], "Did you mean: 'rescale'|rescal"),
        (["--mask", "mask.png"], "go with an --image"),
        (["--image", "nothing.png", "--shows", "a"], "no picture 'nothing.png'"),
        (["--sampler", "ddim", "--variance", "large"], "for sampler 'ddpm' alone"),
    ],
)
def test_generate_says_what_is_wrong(command, words, message):
    with pytest.raises(ValueError, match=message):
        command("a cat", *words)


def test_the_list_of_steering():
    app = ldm.cli.generate.typer.Typer()
    app.command()(ldm.cli.generate.generate)
    output = CliRunner().invoke(app, ["--list-steering"]).output
    assert "rescale=0.0" in output and "interval=None" in output and "clip_scale" in output


def test_masks_and_pictures_come_upright_and_in_range(tmp_path: Path):
    image = Image.new("RGB", (4, 2), "red")
    image.getexif()[0x0112] = 6  # stored lying on its side
    exif = image.getexif()
    image.save(tmp_path / "lying.jpg", exif=exif)
    assert open_picture(tmp_path / "lying.jpg").shape == (1, 3, 4, 2)
    Image.new("L", (4, 2), 255).save(tmp_path / "white.png")
    assert torch.equal(open_mask(tmp_path / "white.png", (2, 2)), torch.ones(1, 1, 2, 2))
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        open_picture(tmp_path / "text.png")

"""`ldm generate` with pictures: each option reaches the request, is written beside the result, or is refused."""

import inspect
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ldm.cli.generate
from ldm.checkpoints.files import commit
from ldm.checkpoints.load import save_model
from ldm.images import open_picture, read_settings, save_png, to_pil
from ldm.pipeline import Companions, Pipeline
from tests.pipeline.small import CHANNELS, DEPTH, HINT, MASK, PICTURE, controlnet, small
from tests.pipeline.test_aesthetic import telling


@pytest.fixture(scope="module")
def pipelines():
    return {kind: small(kind) for kind in CHANNELS} | {"refining": telling()[0]}


@pytest.fixture
def folder(tmp_path):
    """A picture, a mask, a depth of 16 bits, a hint and a ControlNet, in files."""
    save_png(to_pil(PICTURE[0]), tmp_path / "picture.png")
    save_png(to_pil(HINT[0] * 2 - 1), tmp_path / "hint.png")
    save_png(to_pil(PICTURE[0, :, ::4, ::4]), tmp_path / "little.png")
    Image.fromarray((MASK[0, 0].numpy() * 255).astype("uint8")).save(tmp_path / "mask.png")
    Image.fromarray((DEPTH[0, 0] * 60_000).numpy().astype("uint16")).save(tmp_path / "depth.png")
    with commit(tmp_path / "canny") as stage:
        save_model(stage, {"controlnet": controlnet()}, {}, "canny")
    return tmp_path


@pytest.fixture
def run(pipelines, folder, monkeypatch):
    """`ldm generate` with a small model named by its kind; -> the settings and the tensor of the first picture."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Pipeline, "load", lambda path, *args, **options: pipelines[path])
    app = ldm.cli.generate.typer.Typer()
    app.command()(ldm.cli.generate.generate)
    outs = iter(range(100))

    def run(kind, *words):
        out = folder / f"out{next(outs)}"
        pipelines[kind].companions = Companions()
        words = [kind, "a cat", *map(str, words), "--steps", "2", "--device", "cpu", "--out", str(out)]
        result = CliRunner().invoke(app, words)
        if result.exception:
            raise result.exception
        path = out / "00000-0.png"
        return read_settings(path), open_picture(path)

    return run


def kept(drawn, mask=MASK):
    return torch.equal(drawn[(mask == 0).expand_as(drawn)], open_picture("picture.png")[(mask == 0).expand_as(drawn)])


def test_from_a_picture(run):
    settings, drawn = run("plain", "--image", "picture.png", "--strength", 0.4)
    assert settings["Denoising strength"] == 0.4 and settings["Size"] == "24x16" and not kept(drawn)
    assert run("plain", "--image", "picture.png")[0]["Denoising strength"] == 0.75
    assert run("plain", "--image", "picture.png", "--size", "16x8")[0]["Size"] == "16x8"


def test_into_a_mask(run):
    words = ["--image", "picture.png", "--mask", "mask.png"]
    settings, drawn = run("plain", *words, "--strength", 0.5, "--mask-fill", "noise", "--mask-blur", 0.4)
    assert settings["Masked content"] == "noise" and settings["Mask blur"] == 0.4
    assert kept(drawn, torch.nn.functional.max_pool2d(MASK, 5, 1, 2))
    assert kept(run("inpainting", *words)[1])
    assert kept(run("plain", *words, "--mask-invert")[1], 1 - MASK)
    settings, drawn = run("plain", *words, "--mask-full-resolution", 3, "--size", 16)
    assert settings["Inpaint area"] == "Only masked" and settings["Size"] == "16x16" and kept(drawn)


def test_beyond_the_edges(run):
    settings, drawn = run("plain", "--image", "picture.png", "--outpaint", "0,8,0,8")
    assert settings["Size"] == "32x24" and drawn.shape == (1, 3, 24, 32)
    assert run("plain", "--image", "picture.png", "--outpaint", "0,5,0,0")[0]["Size"] == "32x16"


def test_models_that_are_shown_more(run):
    assert run("depth", "--depth", "depth.png", "--size", "24x16")[0]["Size"] == "24x16"
    settings, _ = run("editing", "--image", "picture.png", "--image-guidance", 2.0)
    assert settings["Image CFG scale"] == 2.0
    settings, drawn = run("enlarging", "--image", "little.png", "--noise-level", 3)
    assert settings["Noise level"] == 3 and drawn.shape == (1, 3, 16, 24)


def test_controls_are_scaled_to_the_size(run):
    settings, drawn = run("plain", "--control", "canny=hint.png:0.7:0-0.5", "--control", "canny=hint.png")
    assert settings["ControlNet 0"] == "Model: canny, Weight: 0.7, Guidance Start: 0.0, Guidance End: 0.5"
    assert settings["ControlNet 1"] == "Model: canny, Weight: 1.0, Guidance Start: 0.0, Guidance End: 1.0"
    assert not torch.equal(drawn, run("plain")[1])


def test_variations_of_one_seed(run, folder):
    settings, _ = run("plain", "--variation", "7:0.2", "--count", 3, "--seed", 0)
    assert (settings["Seed"], settings["Variation seed"], settings["Variation seed strength"]) == (0, 7, 0.2)
    second = read_settings(folder / "out0" / "00001-0.png")
    assert (second["Seed"], second["Variation seed"]) == (0, 8)


def test_a_second_pass_and_a_refiner(run):
    words = ["--upscale", 1.5, "--upscale-by", "lanczos", "--upscale-strength", 0.5, "--upscale-steps", 3]
    settings, drawn = run("plain", *words)
    assert drawn.shape == (1, 3, 24, 24) and settings["Hires upscaler"] == "Lanczos" and settings["Hires steps"] == 3
    settings, _ = run("plain", "--refiner", "plain", "--refiner-switch", 0.5)
    assert settings["Refiner"] == "plain" and settings["Refiner switch at"] == 0.5


def test_the_scores_that_a_refiner_is_told(run):
    words = ["--refiner", "refining", "--refiner-switch", 0.5]
    settings, usual = run("plain", *words)
    assert (settings["Aesthetic score"], settings["Negative aesthetic score"]) == (6.0, 2.5)
    settings, drawn = run("plain", *words, "--aesthetic", "8,1")
    assert (settings["Aesthetic score"], settings["Negative aesthetic score"]) == (8.0, 1.0)
    assert not torch.equal(drawn, usual)
    by_itself, _ = run("refining", "--image", "picture.png", "--strength", 0.5, "--aesthetic", "8,1")
    assert by_itself["Aesthetic score"] == 8.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", 0.5], "--strength and the like go with an --image"),
        (["--outpaint", "8,8,8,8"], "--outpaint and the like go with an --image"),
        (["--image", "picture.png", "--strength", 0], "strength must be above 0"),
        (["--image", "picture.png", "--mask-invert"], "--mask-invert goes with a --mask"),
        (["--image", "picture.png", "--mask-blur", 2], r"mask_blur=2\.0 goes with a mask"),
        (["--image", "picture.png", "--outpaint", "8,8,8"], "--outpaint must be LEFT,RIGHT,TOP,BOTTOM"),
        (["--image", "picture.png", "--outpaint", "8,0,0,0", "--mask", "mask.png"], "does not go with --mask"),
        (["--control", "canny"], r"--control must be MODEL=PICTURE\[:WEIGHT\[:START-END\]\]"),
        (["--control", "canny=nothing.png"], "no picture 'nothing.png'"),
        (["--control", "nowhere=hint.png"], "no model at 'nowhere'"),
        (["--control", "canny=hint.png:1:0.5-0.2"], "from a share of the steps to a later one"),
        (["--depth", "nothing.png"], "no picture 'nothing.png'"),
        (["--depth", "depth.png"], "a depth is for models that are shown one"),
        (["--variation", "7"], "--variation must be SEED:STRENGTH"),
        (["--upscale", 0.5], "scale to upscale by must be at least 1"),
        (["--refiner", "depth"], "is a model for depth"),
        (["--aesthetic", "7"], "--aesthetic must be SCORE,SCORE, such as 6,2.5, got '7'"),
        (["--aesthetic", "7,high"], "--aesthetic must be SCORE,SCORE"),
        (["--aesthetic", "7,2"], "aesthetic scores are for SDXL's refiner"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, words, message, folder):
    with pytest.raises(ValueError, match=message):
        run("plain", *words)
    assert not (folder / "out0").exists()


def test_the_options_are_all_there():
    """Nothing that the command takes is lost between it and what is made of it, and every default is said once."""
    from ldm.cli.options import Asked, Drawing, Models
    from ldm.cli.pictures import Pictures
    from ldm.cli.replay import DECIDE, PLAIN_KEYS

    taken = inspect.signature(ldm.cli.generate.generate).parameters
    for kind in (Models, Drawing, Pictures, Asked):
        for name, value in asdict(kind()).items():
            assert (taken[name].default or None) == (value or None), name
    assert {*DECIDE, *PLAIN_KEYS.values()} <= set(taken)
    theirs = {name for kind in (Models, Drawing, Pictures, Asked) for name in asdict(kind())}
    assert set(taken) - theirs == {"ctx", "from_", "list_samplers", "list_steering", "grid", "preview", "page", "out"}

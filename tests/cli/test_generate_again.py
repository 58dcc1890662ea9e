"""`ldm generate --from`: the same picture to the byte, what overrides what, and pictures of other programs."""

import json
import shutil

import pytest
from PIL import Image, PngImagePlugin

from ldm.cli.replay import BLOCKS, WHOLE_BYTES, defaults, fingerprint
from ldm.images import read_record, read_settings, save_png
from tests.cli.generating import generate, save, save_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    save_pictures(folder)
    save(folder / "plain"), save(folder / "inpainting", "inpainting"), save(folder / "other", seed=9)
    (folder / "colours").mkdir()
    (folder / "colours" / "colour.txt").write_text("red\ngreen\nblue\n")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


MODES = {
    "prompts": [],
    "picture": ["--image", "picture.png", "--strength", 0.5],
    "mask": ["--image", "picture.png", "--mask", "mask.png", "--mask-blur", 1, "--resample", 2],
    "control": ["--control", "canny=hint.png:0.7:0-0.5"],
    "variations": ["--variation", "7:0.3"],
    "second pass": ["--upscale", 1.5, "--upscale-strength", 0.5, "--upscale-steps", 2],
}
MORE_MODES = {
    "noisy sampler": ["--sampler", "Euler a", "--spacing", "karras"],
    "scheduled prompts": ["--negative", "[fog:snow:0.5]", "--clip-skip", 1],
    "region": ["--image", "picture.png", "--mask", "mask.png", "--mask-full-resolution", 3, "--size", 16],
    "outpainting": ["--image", "picture.png", "--outpaint", "8,0,0,0"],
    "second pass by pixels": ["--upscale", 1.5, "--upscale-by", "lanczos", "--steer", "rescale=0.5"],
    "refiner": ["--refiner", "other", "--refiner-switch", 0.5],
    "plain": ["--plain", "--negative", "(fog"],
    "wildcards": ["--wildcards", "colours"],
    "bf16": ["--dtype", "bf16"],
    "low memory": ["--low-memory"],
}


def same_again(words, out):
    """Three pictures in batches of two: each, drawn again from its file alone, is the same file."""
    words = ["plain", "a __colour__ cat, (sitting:1.2)", "--count", 3, "--seed", 5, "--steps", 3, "--batch", 2, *words]
    drawn, _ = generate(*words, "--out", out / "first")
    pictures = [path for path in drawn if not path.name.startswith("grid")]
    assert len({path.read_bytes() for path in pictures}) == 3
    for path in pictures[1:]:  # the second of a batch, and the only one of another
        (again,), _ = generate("--from", path, "--out", out / "again")
        assert again.read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("mode", MODES)
def test_the_same_picture_to_the_byte(mode, tmp_path):
    same_again(MODES[mode], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MORE_MODES)
def test_the_same_picture_to_the_byte_in_more_modes(mode, tmp_path):
    same_again(MORE_MODES[mode], tmp_path)


def test_a_model_for_inpainting(tmp_path):
    words = ["--image", "picture.png", "--mask", "mask.png", "--count", 2, "--steps", 2]
    drawn, _ = generate("inpainting", "a cat", *words, "--out", tmp_path)
    (again,), _ = generate("--from", drawn[1], "--out", tmp_path / "again")
    assert again.read_bytes() == drawn[1].read_bytes()


def first(out, *words):
    """The first picture."""
    drawn, said = generate(*words, "--out", out)
    return drawn[0], said


def test_options_override_what_the_picture_says(tmp_path):
    words = ["plain", "a cat", "--count", 3, "--steps", 3]
    drawn, _ = generate(*words, "--out", tmp_path / "first")
    finer, _ = first(tmp_path / "finer", "--from", drawn[2], "--steps", 4)
    straight, _ = generate(*words[:-1], 4, "--out", tmp_path / "straight")
    assert finer.read_bytes() == straight[2].read_bytes()
    seeded, _ = generate("--from", drawn[2], "--seed", 9, "--out", tmp_path / "seeded")
    alone, _ = first(tmp_path / "alone", "plain", "a cat", "--seed", 9, "--steps", 3)
    assert [path.read_bytes() for path in seeded] == [alone.read_bytes()]
    several, _ = generate("--from", drawn[2], "--count", 2, "--out", tmp_path / "several")
    assert [read_settings(path)["Seed"] for path in several[:2]] == [2, 3]
    other, _ = first(tmp_path / "other", "other", "--from", drawn[0])
    assert read_record(other)["options"]["model"] == "other" and other.read_bytes() != drawn[0].read_bytes()
    dog, _ = first(tmp_path / "dog", "plain", "a dog", "--from", drawn[1])
    assert (read_settings(dog)["Prompt"], read_settings(dog)["Seed"]) == ("a dog", 1)


def test_the_record_names_all_that_it_was_made_from(tmp_path):
    words = ["plain", "a cat", "--image", "picture.png", "--mask", "mask.png", "--refiner", "other", "--steps", 5]
    path, _ = first(tmp_path, *words, "--control", "canny=hint.png")
    record = read_record(path)
    named = {"plain", "picture.png", "mask.png", "other", "canny", "hint.png"}
    assert record["files"] == {name: fingerprint(tmp_path.__class__(name)) for name in named}
    assert record["torch"] and record["threads"] >= 1 and record["prompts"] == ["a cat"]
    assert "record" not in read_settings(path)
    with Image.open(path) as image:
        assert "threads" not in image.text["parameters"]


def test_what_changed_since_is_said(tmp_path, place, caplog):
    shutil.copytree(place / "plain", tmp_path / "model")
    path, _ = first(tmp_path / "first", tmp_path / "model", "a cat", "--steps", 2)
    assert not caplog.records
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(place / "other", tmp_path / "model")
    first(tmp_path / "again", "--from", path)
    assert "model changed since" in caplog.text and "will not come out the same" in caplog.text
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"was drawn with .*model; say where that is"):
        first(tmp_path / "none", "--from", path)


def test_the_checkpoint_of_a_run_is_recorded(tmp_path, place):
    run = tmp_path / "run"
    shutil.copytree(place / "plain", run / "checkpoints" / "step-00000001")
    path, _ = first(tmp_path / "first", run, "a cat", "--steps", 2)
    shutil.copytree(place / "other", run / "checkpoints" / "step-00000002")
    again, _ = first(tmp_path / "again", "--from", path)
    assert again.read_bytes() == path.read_bytes()


THEIRS = (
    "a (cat:1.2)\nNegative prompt: fog, rain\n"
    "Steps: 3, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 24x16, Model hash: 6ce0161689, "
    "Model: v1-5, Denoising strength: 0.6, Clip skip: 1, Variation seed: 8, Variation seed strength: 0.2, "
    "Hires upscale: 2, Hires steps: 2, Hires upscaler: Latent (bicubic antialiased), Version: v1.10.1"
)


def theirs(path, text=THEIRS):
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_pictures_of_automatic1111(tmp_path):
    path = theirs(tmp_path / "theirs.png")
    with pytest.raises(ValueError, match="was drawn with the model v1-5; say where that is: ldm generate MODEL --from"):
        first(tmp_path, "--from", path)
    drawn, said = first(tmp_path / "out", "plain", "--from", path)
    assert f"not used of what {path} says: Model hash, Model, Version\n" in said
    options = ["--negative", "fog, rain", "--steps", 3, "--sampler", "Euler a", "--spacing", "karras", "--clip-skip", 1]
    options += ["--guidance", 7.5, "--seed", 42, "--size", "24x16", "--variation", "8:0.2"]
    options += ["--upscale", 2, "--upscale-steps", 2, "--upscale-strength", 0.6]
    same, _ = first(tmp_path / "same", "plain", "a (cat:1.2)", *options)
    with Image.open(drawn) as image, Image.open(same) as expected:
        assert image.size == (48, 32) and image.tobytes() == expected.tobytes()


def test_a_strength_without_a_second_pass_is_that_of_a_picture(tmp_path):
    path = theirs(tmp_path / "a.png", "a cat\nSteps: 3, Sampler: DDIM, CFG scale: 2, Denoising strength: 0.4")
    assert defaults(path)[0]["strength"] == "0.4"
    with pytest.raises(ValueError, match="--strength and the like go with an --image"):
        first(tmp_path, "plain", "--from", path)
    drawn, _ = first(tmp_path / "out", "plain", "--from", path, "--image", "picture.png")
    assert read_settings(drawn)["Denoising strength"] == 0.4


def test_pictures_of_ours_without_a_record(tmp_path):
    """As an earlier version wrote them: what its settings say is taken."""
    words = ["plain", "a cat", "--eta", 0.5, "--spacing", "trailing", "--seed", 4, "--steps", 3, "--upscale", 1.5]
    drawn, _ = first(tmp_path / "first", *words)
    with Image.open(drawn) as image:
        save_png(image.copy(), tmp_path / "old.png", read_settings(drawn))
    again, said = first(tmp_path / "again", "plain", "--from", tmp_path / "old.png")
    assert read_settings(again) == read_settings(drawn) and "Model, RNG, Version" in said
    with Image.open(drawn) as image, Image.open(again) as other:
        assert image.tobytes() == other.tobytes()


def test_what_cannot_be_drawn_again(tmp_path):
    with pytest.raises(ValueError, match="does not say how it was drawn"):
        first(tmp_path, "--from", theirs(tmp_path / "none.png", ""))
    with pytest.raises(ValueError, match=r"no picture '.*nothing\.png'"):
        first(tmp_path, "--from", tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match="is not a PNG file"):
        first(tmp_path, "--from", tmp_path / "text.png")
    drawn, _ = first(tmp_path / "out", "plain", "a cat", "--steps", 2)
    record = read_record(drawn)
    for change in ({"row": 4}, {"options": {"new": 1}}, {"seeds": []}, {"prompts": "a"}, {"threads": 0}):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "altered.png", {"Prompt": "a"}, record=record | change)
        with pytest.raises(ValueError, match="that this version cannot read"):
            first(tmp_path, "--from", tmp_path / "altered.png")


def test_a_fingerprint_sees_changes(tmp_path):
    large = tmp_path / "large.bin"
    content = bytearray(WHOLE_BYTES + 4_096)
    seen = set()
    places = [0, len(content) - 1, *(4_096 * k // (BLOCKS - 1) + WHOLE_BYTES // BLOCKS * k for k in (5, 40))]
    for place in [None, *places]:
        if place is not None:
            content[place] ^= 1
        large.write_bytes(content)
        seen.add(fingerprint(large))
    assert len(seen) == 5 and all(digest.startswith("sampled ") for digest in seen)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    assert fingerprint(tmp_path / "folder") == "" == fingerprint(tmp_path / "nothing")
    (tmp_path / "folder" / "deep" / "a.txt").write_text("a")
    before = fingerprint(tmp_path / "folder")
    (tmp_path / "folder" / "deep" / "a.txt").rename(tmp_path / "folder" / "deep" / "b.txt")
    assert before and fingerprint(tmp_path / "folder") != before


def test_settings_and_record_are_one_json_object(tmp_path):
    drawn, _ = first(tmp_path, "plain", "a cat", "--steps", 2)
    with Image.open(drawn) as image:
        whole = json.loads(image.text["ldm"])
    assert whole.pop("record") == read_record(drawn) and whole == read_settings(drawn)

"""`ldm generate`: grids, previews, token counts and the HTML page."""

import html
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.contact import write_page
from ldm.cli.drawing import Preview
from ldm.cli.options import Drawing
from ldm.cli.pictures import Pictures
from ldm.cli.sheets import MARGIN, Axis, axes, cells, labelled, sheets
from ldm.cli.wishes import Wish
from ldm.diffusion.samplers import Step
from ldm.images import grid, read_settings, save_png, to_pil
from tests.cli.generating import generate, save, save_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    save(folder / "plain"), save_pictures(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def plain(colour, size=(20, 10)):
    return Image.new("RGB", size, colour)


COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black", "gray"]


def test_every_picture_stands_in_its_cell():
    sheet = labelled([plain(colour) for colour in COLOURS[:6]], ["a", "b", "c"], ["x", "y"], "title")
    pixels = np.array(sheet)
    for k, colour in enumerate(COLOURS[:6]):
        found = np.argwhere((pixels == np.array(plain(colour))[0, 0]).all(2))
        (top, left), (bottom, right) = found.min(0), found.max(0)
        assert (bottom - top + 1, right - left + 1) == (10, 20) and len(found) == 200
        assert (sheet.width - left, sheet.height - top) == (
            (24 * (3 - k % 3)) + 0, (14 * (2 - k // 3)) + 0,
        )  # fmt: skip
    assert MARGIN == 4
    bare = labelled([plain("red")], [""], [""])
    assert bare.size == (20 + 2 * MARGIN, 10 + 2 * MARGIN)  # labels take room where there are any
    assert sheet.width > 3 * 24 and sheet.height > 2 * 14 + 20


def test_pictures_of_several_sizes_stand_in_the_middle():
    sheet = labelled([plain("red", (20, 10)), plain("lime", (8, 4))], ["", ""], [""])
    assert sheet.size == (2 * 24 + 4, 18)
    found = np.argwhere((np.array(sheet) == (0, 255, 0)).all(2))
    assert tuple(found.min(0)) == (4 + 3, 28 + 6) and len(found) == 32
    with pytest.raises(ValueError, match="needs as many pictures, got 1"):
        labelled([plain("red")], ["a", "b"], ["c"])


def test_small_pictures_are_magnified_on_sheets():
    """32 px to 128, by a whole number, each pixel a square; 100 px stay as they are."""
    dots = Image.new("RGB", (32, 16), "black")
    dots.putpixel((3, 5), (255, 0, 0))
    (sheet,) = sheets([dots, dots], axes(["steps=1,2"]), 1)
    found = np.argwhere((np.array(sheet) == (255, 0, 0)).all(2))
    assert len(found) == 2 * 4 * 4 and sheet.width == 2 * (128 + MARGIN) + MARGIN
    (sheet,) = sheets([dots.resize((100, 100))] * 2, axes(["steps=1,2"]), 1)
    assert sheet.width == 2 * (100 + MARGIN) + MARGIN


def test_labels_are_drawn_and_wrapped():
    def ink(label):
        return int((np.array(labelled([plain("white", (60, 20))], [label], [""])) < 128).sum())

    assert ink("") == 0 < ink("steps: 1") < ink("steps: 1 1 1 1 1 1")
    assert labelled([plain("red", (60, 20))], ["word " * 20], [""]).width == 60 + 2 * MARGIN
    assert ink("猫") > 0  # a sign that the font lacks is still a sign


def test_cells_and_sheets_agree():
    """By three axes and two wishes: each sheet has the pictures of one wish and one z, x along rows."""
    wish = Wish(Drawing(), Pictures(), "red cat", 5)
    along = axes(["steps=1,2,3", "guidance=4,5", "seed=7,8"])
    found = cells([wish, Wish(Drawing(), Pictures(), "dog", 5, number=1)], along)
    assert len(found) == 24 and len(set(found)) == 24
    pictures = [plain((w.drawing.steps, int(w.drawing.guidance), w.seed)) for w in found]
    made = sheets(pictures, along, 2)
    assert len(made) == 4
    for number, sheet in enumerate(made):
        pixels = np.array(sheet)
        wanted = [(s, g, (7, 8)[number % 2] + number // 2) for g in (4, 5) for s in (1, 2, 3)]
        places = [np.argwhere((pixels == colour).all(2)).min(0) for colour in wanted]
        order = sorted(range(6), key=lambda k: tuple(places[k]))
        assert order == list(range(6))


def test_axes_change_what_they_name():
    wish = Wish(Drawing(negative="red fog"), Pictures(), "a red cat <lora:x:1>", 5, number=2)
    one = {key: value for key, value in [
        ("steps", "7"), ("guidance", "2.5"), ("sampler", "DPM++ 2M"), ("spacing", "karras"), ("eta", "0.5"),
        ("clip_skip", "2"), ("size", "24x16"),
    ]}  # fmt: skip
    for key, value in one.items():
        assert str(getattr(Axis(key, (value,)).apply(wish, value).drawing, key)) == value
    assert Axis("seed", ("9",)).apply(wish, "9").seed == 11  # the third image of a prompt stays the third
    assert Axis("strength", ("0.3",)).apply(wish, "0.3").pictures.strength == 0.3
    reworded = Axis("prompt", ("red", "blue")).apply(wish, "blue")
    assert (reworded.prompt, reworded.drawing.negative) == ("a blue cat <lora:x:1>", "blue fog")
    assert Axis("lora.x", ("0.5",)).apply(wish, "0.5").prompt == "a red cat <lora:x:0.5>"
    assert Axis("lora.y", ("0",)).apply(wish, "0").prompt.endswith("<lora:x:1> <lora:y:0>")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stpes=1,2"], "unknown --grid key 'stpes', did you mean 'steps'"),
        (["steps"], "--grid must be KEY=VALUE"),
        (["steps="], "--grid steps needs values"),
        (["steps=1,1"], "each once"),
        (["steps=1", "steps=2"], "is there twice"),
        (["steps=1", "eta=0", "seed=1", "size=8"], "at most 3 axes"),
    ],
)
def test_impossible_axes(texts, message):
    with pytest.raises(ValueError, match=message):
        axes(texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "steps=1,two"], "--grid steps=two: a whole number is needed"),
        (["--grid", "guidance=1,nan"], "--grid guidance=nan: a number is needed"),
        (["--grid", "sampler=ddim,dimm"], "unknown sampler 'dimm'"),
        (["--grid", "prompt=dog,cat"], "'dog' is not in the prompt 'a cat'"),
        (["--grid", "strength=0.5,1"], "--strength and the like go with an --image"),
        (["--grid", "size=16,big"], "--size must be N or WxH"),
        (["--grid", "lora.zorp=0,1"], "asks for the adapter 'zorp', and none was given"),
        (["--grid", "lora.zorp=0,1", "--plain"], "--plain prompts do not"),
        (["--grid", "steps=0,1"], "steps and batch must be at least 1"),
        (["--preview", "-1"], "N must be at least 1"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said_before_any_weights_are_read(words, message, tmp_path, monkeypatch):
    if "--preview" not in words:
        monkeypatch.setattr("ldm.checkpoints.load.load_component", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        generate("plain", "a cat", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grid_of_pictures(tmp_path):
    words = ["--steps", 2, "--grid", "steps=1,2,3", "guidance=1,4"]  # as several words, too
    drawn, _ = generate("plain", "a cat", *words, "--out", tmp_path / "out")
    assert [path.name for path in drawn] == [*(f"0000{k}-0.png" for k in range(6)), "grid-00000.png"]
    found = [(read_settings(path)["Steps"], read_settings(path)["CFG scale"]) for path in drawn[:6]]
    assert found == [(1, 1), (2, 1), (3, 1), (1, 4), (2, 4), (3, 4)]
    sheet = read_settings(drawn[6])
    assert (sheet["Script"], sheet["X Type"], sheet["X Values"]) == ("X/Y/Z plot", "steps", "1, 2, 3")
    (alone,), _ = generate("plain", "a cat", "--steps", 3, "--guidance", 4, "--out", tmp_path / "alone")
    assert alone.read_bytes() == drawn[5].read_bytes()
    (again,), _ = generate("--from", drawn[4], "--out", tmp_path / "again")
    assert again.read_bytes() == drawn[4].read_bytes()


def test_a_preview_shows_the_estimates(tmp_path):
    """Every second step; where the decoder is linear they are the decoded ones. Decoded are the 1st, 2nd, 4th, 8th."""
    decoded = []

    class Linear:
        def decode(self, latent):
            decoded.append(len(decoded))
            small = torch.einsum("bchw,kc->bkhw", latent, torch.ones(3, 4) / 8)
            return small.repeat_interleave(4, 2).repeat_interleave(4, 3)

    generator = torch.Generator().manual_seed(0)
    look = Preview(Linear(), tmp_path / "preview.png", 2)
    for index in range(20):
        x0 = torch.rand(3, 4, 8, 8, generator=generator)
        look(Step(index, x0, x0))
        assert (tmp_path / "preview.png").exists() == (index > 0)
    assert len(decoded) == 4  # of ten that were shown the 1st, 2nd, 4th and 8th
    expected = grid(Linear().decode(x0)[..., ::4, ::4], 2, scale=32)
    with Image.open(tmp_path / "preview.png") as image:
        difference = np.abs(np.array(image).astype(int) - np.array(expected).astype(int))
    assert difference.max() <= 1 and os.listdir(tmp_path) == ["preview.png"]
    look.learn(x0, -Linear().decode(x0))  # what was learned from pictures stays
    look(Step(31, x0, x0))
    with Image.open(tmp_path / "preview.png") as image:
        assert np.abs(255 - np.array(image).astype(int) - np.array(expected))[2:258, 2:258].max() <= 1


def test_a_preview_is_asked_for_and_changes_nothing(tmp_path):
    words = ["plain", "a cat", "--count", 2, "--steps", 4]
    drawn, _ = generate(*words, "--preview", 2, "--out", tmp_path / "seen")
    plainly, _ = generate(*words, "--out", tmp_path / "unseen")
    assert (tmp_path / "seen" / "preview.png").is_file() and not (tmp_path / "unseen" / "preview.png").exists()
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in plainly]


def test_a_page_of_all_that_is_in_the_folder(tmp_path):
    out = tmp_path / 'a "<b>'
    generate("plain", "an <i>earlier</i> cat", "--steps", 1, "--out", out)
    save_png(to_pil(torch.zeros(3, 8, 600)), out / "a & b #1.png", {"Prompt": "<script>alert(1)</script>", 'K"': "'<"})
    (out / "broken.png").write_bytes(b"no picture")
    drawn, _ = generate("plain", "a dog", "--steps", 1, "--preview", 1, "--page", "--out", out)
    assert drawn[-1] == out / "index.html"
    page = drawn[-1].read_text(encoding="utf-8")
    assert "<script" not in page and "<i>earlier" not in page and "default-src 'none'" in page
    assert html.escape("<script>alert(1)</script>") in page and "an &lt;i&gt;earlier" in page
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links == ["00000-0.png", "00001-0.png", "a%20%26%20b%20%231.png"]  # neither broken.png nor preview.png
    assert not re.search(r"https?:|src=\"(?!data:)|javascript", page)
    assert len(re.findall("<figure>", page)) == 3 and page.count("<dt>Steps</dt><dd>1</dd>") == 2
    assert write_page(out).read_text(encoding="utf-8") == page  # the same again


def test_tokens_are_counted_once_a_prompt(tmp_path):
    long = "a very long prompt, " * 5
    _, said = generate(
        "plain", "a cat", "a cat", long, "--count", 2, "--negative", "fog", "--steps", 1, "--out", tmp_path
    )
    lines = [line for line in said.splitlines() if " tokens" in line]
    assert lines == ["2/10 tokens: a cat", f"25/30 tokens: {long}", "1/10 tokens: fog"]
    _, said = generate("plain", long, "--plain", "--steps", 1, "--out", tmp_path)
    assert "25/10 tokens; what comes after the first 10 is cut" in said

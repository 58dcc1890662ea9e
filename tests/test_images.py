import os
import stat
import threading

import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.images import format_parameters, grid, parse_parameters, read_settings, save_png, to_pil, to_tensor

SETTINGS = {
    "Prompt": "a cat, sitting\nSteps: two",
    "Negative prompt": "blur: none",
    "Steps": 20,
    "Sampler": "ddim",
    "CFG scale": 7.5,
    "Seed": 1,
    "Size": "512x768",
    "Model": 'a "name", with: all',
}


def picture(size=(3, 2)) -> Image.Image:
    return to_pil(torch.rand(3, size[1], size[0], generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_every_byte_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).numpy().reshape(16, 16, 3)
    image = Image.fromarray(pixels)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert to_pil(tensor).tobytes() == image.tobytes()


def test_values_are_rounded_and_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.00391, 1.0, 3.0])
    image = to_pil(values.expand(3, 1, 6))
    assert [image.getpixel((k, 0))[0] for k in range(6)] == [0, 0, 128, 128, 255, 255]
    assert to_pil(torch.full((3, 1, 1), 2 * 77.4 / 255 - 1)).getpixel((0, 0)) == (77, 77, 77)


def test_other_modes_become_rgb():
    assert to_tensor(Image.new("L", (5, 4), 255)).shape == (3, 4, 5)


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), torch.full((3, 1, 1), float("nan"))])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"\[3, H, W\]|finite"):
        to_pil(image)


def test_grid_places_every_image():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    sheet = grid(images, columns=3, padding=1, scale=2)
    assert sheet.size == (3 * 9 + 1, 2 * 5 + 1)
    corners = [sheet.getpixel((1 + k % 3 * 9, 1 + k // 3 * 5))[0] for k in range(5)]
    assert corners == [0, 64, 128, 191, 255]
    assert sheet.getpixel((0, 0)) == sheet.getpixel((20, 7)) == (255, 255, 255)
    assert grid([picture()], columns=9, padding=0).tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        ([], {"columns": 1}),
        ([picture(), picture((4, 4))], {"columns": 1}),
        ([picture()], {"columns": 0}),
        ([picture()], {"columns": 1, "scale": 0}),
    ],
)
def test_impossible_grids_are_refused(images, settings):
    with pytest.raises(ValueError, match=r"grid needs images of one size|must be >= 1"):
        grid(images, **settings)


def test_settings_travel_in_the_file(tmp_path):
    path = tmp_path / "a.png"
    save_png(picture(), path, SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == picture().tobytes()
        assert image.text["parameters"] == format_parameters(SETTINGS)


def test_any_language_survives(tmp_path):
    settings = {**SETTINGS, "Prompt": "кот, 猫 🐈"}
    save_png(picture(), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings


def test_parameters_have_the_grammar_others_read():
    assert format_parameters(SETTINGS) == (
        "a cat, sitting\nSteps: two\nNegative prompt: blur: none\n"
        "Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 1, Size: 512x768, "
        'Model: "a \\"name\\", with: all"'
    )
    assert "Negative" not in format_parameters({**SETTINGS, "Negative prompt": ""})


def test_parameters_of_others_are_read(tmp_path):
    text = (
        "masterpiece, (cat:1.2)\nsecond line\nNegative prompt: dog\nbird\n"
        'Steps: 28, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512, Lora hashes: "x: 1, y: 2", Version: v1'
    )
    expected = {
        "Prompt": "masterpiece, (cat:1.2)\nsecond line",
        "Negative prompt": "dog\nbird",
        "Steps": "28",
        "Sampler": "Euler a",
        "CFG scale": "7",
        "Seed": "42",
        "Size": "512x512",
        "Lora hashes": "x: 1, y: 2",
        "Version": "v1",
    }
    assert parse_parameters(text) == expected
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    picture().save(tmp_path / "other.png", pnginfo=info)
    assert read_settings(tmp_path / "other.png") == expected


def test_parse_reverses_format():
    assert parse_parameters(format_parameters(SETTINGS)) == {k: str(v) for k, v in SETTINGS.items()}
    assert parse_parameters("a prompt: with, a colon") == {"Prompt": "a prompt: with, a colon"}
    assert parse_parameters("") == {}


def test_files_without_settings(tmp_path):
    save_png(picture(), tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == {}
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png is not a PNG file"):
        read_settings(tmp_path / "b.png")


def test_a_failed_write_leaves_nothing_and_harms_nothing(tmp_path):
    path = tmp_path / "a.png"
    save_png(picture(), path, SETTINGS)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_png(picture(), path, {"Prompt": object()})
    broken = picture()
    broken.save = lambda file, *_, **__: (file.write_bytes(b"half"), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(broken, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_png(picture(), tmp_path / "a.png")
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_overwrite_a_taken_name_stays(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    path = tmp_path / "a.png"
    save_png(picture(), path, overwrite=False)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_png(picture((9, 9)), path, overwrite=False)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_of_two_writers_one_gets_the_name(tmp_path):
    results = []

    def write(size):
        try:
            save_png(picture(size), tmp_path / "a.png", overwrite=False)
            results.append("written")
        except FileExistsError:
            results.append("taken")

    threads = [threading.Thread(target=write, args=((k + 1, 1),)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert sorted(results) == ["taken"] * 3 + ["written"]
    with Image.open(tmp_path / "a.png") as image:
        image.load()

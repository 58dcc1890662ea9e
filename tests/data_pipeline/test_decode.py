"""Pictures: every kind of file becomes the right RGB pixels or a named reason, and never a crash."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_files import orientation
from data_pipeline.images import MAX_BYTES, encode_image, read_image, to_rgb
from data_pipeline.sources import Rejected
from tests.data_pipeline import corpus
from tests.data_pipeline.corpus import EXIF, chunk, encode, noise, png, png16, profile, tiff_directory

REASONS = {
    "unreadable image", "truncated image", "too many pixels", "too many parts", "file too large",
    "unsupported image format", "unsupported pixel format",
}  # fmt: skip


def load_image(source: bytes | Path, *limits: int, **options: Any) -> Image.Image:
    return read_image(source, *limits, **options).image


def pixels(data: bytes) -> list[list[list[int]]]:
    image = load_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_exact_pixels(image_format: str, tmp_path: Path) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(noise(), image_format, **options)
    assert pixels(data) == np.asarray(noise()).tolist()
    (tmp_path / "picture.wrong-extension").write_bytes(data)
    assert load_image(tmp_path / "picture.wrong-extension").tobytes() == noise().tobytes()


def test_16_bit_gray_is_scaled() -> None:
    values = np.array([[0, 128, 129, 257, 30000, 65535]], dtype=np.uint16)
    gray = [row[0] for row in pixels(encode(Image.fromarray(values)))[0]]
    assert gray == [round(v / 257) for v in values[0].tolist()] == [0, 0, 1, 1, 117, 255]


def test_every_16_bit_gray_within_half_a_step() -> None:
    values = np.arange(65536).reshape(256, 256, 1)
    found = np.asarray(load_image(png16(values)))
    assert np.abs(found - values / 257).max() <= 0.5


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_is_less_than_one_step_off(channels: int) -> None:
    """Pillow keeps the high byte, v >> 8, of these: floor(v / 256) against v / 257."""
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, channels))
    if channels != 3:
        values[..., -1] = 65535
    found = np.asarray(load_image(png16(values))).astype(float)
    error = found - values[..., : 3 if channels > 2 else 1] / 257
    assert np.abs(error).max() < 1


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_alpha(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, channels))
    exact = (values[..., :-1] / 257) * (values[..., -1:] / 65535) + 255 * (1 - values[..., -1:] / 65535)
    assert np.abs(np.asarray(load_image(png16(values))) - exact).max() < 2.5  # of two bytes cut off and one rounding


def test_a_clear_gray_level() -> None:
    """tRNS in gray pictures, also where the level is stored in fewer, or more, than 8 bits."""
    values = np.array([[[0], [1], [257], [65535]]])
    assert [p[0] for p in pixels(png16(values, chunk(b"tRNS", b"\1\1")))[0]] == [0, 0, 255, 255]
    for depth, row, levels in ((1, b"\x40", [0, 255]), (2, b"\x1b", [0, 85, 170, 255]), (4, b"\x0f", [0, 255])):
        for clear, level in enumerate(levels):
            stored = round(level / 255 * (2**depth - 1))
            data = png(len(levels), 1, depth, 0, b"\0" + row, chunk(b"tRNS", bytes([0, stored])))
            seen = [p for p in np.asarray(load_image(data, background=(9, 9, 9)))[0, :, 0].tolist()]
            assert seen == [9 if i == clear else v for i, v in enumerate(levels)], (depth, clear)


def test_cmyk_by_exact_arithmetic() -> None:
    """Device CMYK: R = (255 - C)(255 - K) / 255. Pillow writes, as Adobe does, inverted values and a note of it."""
    inks = np.random.default_rng(0).integers(0, 256, (40, 4))
    for c, m, y, k in inks.tolist():
        data = encode(Image.new("CMYK", (8, 8), (c, m, y, k)), "JPEG", quality=100, subsampling=0)
        assert b"Adobe" in data
        stored = np.asarray(Image.open(io.BytesIO(data)))[0, 0].astype(int)  # after JPEG's own rounding
        exact = (255 - stored[:3]) * (255 - stored[3]) / 255
        assert np.abs(np.asarray(load_image(data))[0, 0] - exact).max() <= 1
        assert np.abs(stored - [c, m, y, k]).max() <= 2


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_alpha_by_exact_arithmetic(background: tuple[int, int, int]) -> None:
    """Every opacity with every level, to within half a step of c a + b (1 - a)."""
    level, opacity = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([level, 255 - level, level, opacity], -1).astype(np.uint8)
    found = np.asarray(load_image(encode(Image.fromarray(image)), background=background))
    a = opacity[..., None] / 255
    exact = image[..., :3] * a + np.array(background) * (1 - a)
    assert np.abs(found - exact).max() <= 0.5 + 1e-9


def test_seams_between_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 11, 4), dtype=np.uint8))
    whole = to_rgb(rgba).tobytes()
    for pixels_a_strip in (1, 11, 70):
        monkeypatch.setattr("data_pipeline.images._STRIP_PIXELS", pixels_a_strip)
        assert to_rgb(rgba).tobytes() == whole


def test_colour_profile_becomes_srgb() -> None:
    rgb = np.asarray(noise(30, 30))
    swapped = np.asarray(load_image(encode(noise(30, 30), icc_profile=profile()))).astype(int)
    assert np.abs(swapped - rgb[..., [1, 0, 2]]).max() <= 1
    light = np.arange(256) / 255
    exact = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    for data in (
        encode(ramp.convert("RGB"), icc_profile=profile(swap=False, linear=True)),
        encode(ramp.convert("RGBA"), icc_profile=profile(swap=False, linear=True)),
        encode(ramp, icc_profile=profile(gray=True)),
        encode(ramp.convert("LA"), icc_profile=profile(gray=True)),
    ):
        assert read_image(data).notes == ()
        assert np.abs(np.asarray(load_image(data))[0] - exact[:, None]).max() <= 1
    inks = encode(Image.new("CMYK", (8, 8), (90, 20, 10, 0)), "JPEG", icc_profile=corpus.cmyk_profile())
    assert np.abs(np.asarray(load_image(inks)).astype(int) - 119).max() <= 1


def test_srgb_profile_leaves_every_pixel() -> None:
    assert pixels(encode(noise(), icc_profile=profile(swap=False))) == np.asarray(noise()).tolist()


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (b"junk" * 100, "broken colour profile"),
        (profile()[:300], "broken colour profile"),
        (profile(gray=True), "broken colour profile"),
        (profile() + bytes(5 * 2**20), "colour profile too large"),
    ],
)
def test_useless_profiles_are_ignored_and_counted(given: bytes, note: str) -> None:
    plain = encode(noise(), "JPEG")
    found = read_image(encode(noise(), "JPEG", icc_profile=given))
    assert found.notes == (note,)
    assert found.image.tobytes() == load_image(plain).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([0, 0, 0, 0, 0, 0, 100, 100, 100])
        image.putdata([0, 1, 2])
        data = encode(image, transparency=bytes([0, 128, 255]))
    else:
        rgba = [(0, 0, 0, 0), (0, 0, 0, 128), (100, 100, 100, 255)]
        image = Image.new(mode, (3, 1))
        image.putdata(rgba if mode == "RGBA" else [(c[0], c[3]) for c in rgba])
        data = encode(image)
    assert pixels(data) == [[[255] * 3, [127] * 3, [100] * 3]]


def test_hidden_colour_does_not_leak() -> None:
    assert pixels(encode(Image.new("RGBA", (1, 1), (255, 0, 0, 0)))) == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes(mode: str) -> None:
    image = Image.new("RGB", (2, 2), "white").convert(mode)
    assert pixels(encode(image)) == [[[255] * 3] * 2] * 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = np.asarray(noise()).astype(int)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(turned.astype(np.uint8)), "PNG", exif=exif)
    assert pixels(data) == upright.tolist()


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_animations(image_format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[0][0] == [255, 0, 0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG"])
def test_exif_in_every_container(order: str, image_format: str) -> None:
    tiff = tiff_directory([(0x010F, 2, 4, 0x41414141), (0x0112, 3, 1, 6)])
    if order == ">":
        tiff = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0" + bytes(4)
    assert orientation(EXIF + tiff) == orientation(tiff) == 6
    assert load_image(encode(noise(10, 20), image_format, exif=EXIF + tiff)).size == (10, 20)


@pytest.mark.parametrize("tiff", [b"II*\0", b"XX*\0" + bytes(20), b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x09\0"])
def test_broken_exif_is_ignored_and_counted(tiff: bytes) -> None:
    with pytest.raises(ValueError):
        orientation(tiff)
    found = read_image(encode(noise(), "WEBP", lossless=True, exif=EXIF + tiff))
    assert found.image.tobytes() == noise().tobytes() and found.notes == ("broken EXIF",)


def test_what_is_read_and_its_hash(tmp_path: Path) -> None:
    data = encode(noise(), "JPEG")
    (tmp_path / "picture").write_bytes(data)
    for given in (data, tmp_path / "picture"):
        found = read_image(given)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert (found.format, found.notes, found.image.mode) == ("JPEG", (), "RGB")
    assert read_image(corpus.good()["several jpegs in one"]).format == "JPEG"


def test_nothing_private_is_written() -> None:
    canary = b"51.4778 N 0.0015 W"
    image = Image.Image.copy(noise())
    exif = EXIF + tiff_directory([(0x8825, 4, 1, 26)], canary)
    files = [
        encode(image, "JPEG", exif=exif, comment=canary, xmp=canary, icc_profile=profile() + canary),
        encode(image, "PNG", exif=exif, icc_profile=profile() + canary),
        encode(image, "WEBP", exif=exif, xmp=canary, icc_profile=profile() + canary),
        encode(image, "GIF", comment=canary),
    ]
    for data in files:
        assert canary in data or b"iCCP" in data
        loaded = load_image(data)
        assert loaded.info == {} and not loaded.getexif()
        foreign = loaded.copy()
        foreign.info = {"comment": canary, "icc_profile": canary, "exif": exif, "xmp": canary}
        for image_format in ("png", "jpg", "webp"):
            for written in (encode_image(loaded, image_format, 90), encode_image(foreign, image_format, 90)):
                assert not any(mark in written for mark in (canary, b"Exif", b"ICC_PROFILE", b"iCCP", b"eXIf", b"xmp"))


@pytest.mark.parametrize("name", corpus.refused())
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    data, reason = corpus.refused()[name]
    (tmp_path / "picture.jpg").write_bytes(data)
    for given in (data, tmp_path / "picture.jpg"):
        with pytest.raises(Rejected) as rejected:
            load_image(given)
        assert rejected.value.reason == reason


@pytest.mark.parametrize("name", corpus.good())
def test_read(name: str) -> None:
    found = read_image(corpus.good()[name])
    assert found.image.mode == "RGB" and type(found.image) is Image.Image
    assert found.notes == {"broken profile": ("broken colour profile",), "broken exif": ("broken EXIF",)}.get(name, ())


def test_interlaced_png_is_exact() -> None:
    picture = noise(21, 18)
    assert pixels(corpus.adam7(np.asarray(picture))) == np.asarray(picture).tolist()


@pytest.mark.parametrize("name", [n for n in corpus.good() if "20000" not in n])
def test_a_cut_file_is_refused_or_whole(name: str) -> None:
    """At every length: never a picture that misses its end."""
    data = corpus.good()[name]
    whole = load_image(data).tobytes()
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            assert load_image(data[:length]).tobytes() == whole
        except Rejected as rejected:
            assert rejected.reason in ("truncated image", "unreadable image")
            refused += 1
    assert refused >= 20


def test_too_large_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(encode(noise()) + bytes(MAX_BYTES))
    with pytest.raises(Rejected, match="file too large"):
        load_image(tmp_path / "large")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(Rejected, match="unreadable image"):
            load_image(path)
    for limit in (0, 10**9):
        with pytest.raises(ValueError, match=f"max_pixels={limit}: allowed are 1 to"):
            load_image(b"", limit)


def in_a_child(*arguments: str) -> dict:
    """Run the corpus program where no other library takes memory; a crash fails."""
    command = [sys.executable, "-m", "tests.data_pipeline.corpus", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_hostile_files_cost_little() -> None:
    costs = in_a_child("hand-made")
    expected = {
        **dict.fromkeys(corpus.good(), "read"),
        **{name: reason for name, (_, reason) in corpus.refused().items()},
        **{name: reason or "read" for name, (_, reason) in corpus.hostile().items()},
    }
    assert {name: cost[0] for name, cost in costs.items()} == expected
    assert len(costs) >= 30
    assert max(seconds for _, seconds, _ in costs.values()) <= 1
    assert max(megabytes for *_, megabytes in costs.values()) <= 450


@pytest.mark.parametrize("count", [pytest.param(1000), pytest.param(6000, marks=pytest.mark.long)])
def test_mutated_files_cost_little(count: int) -> None:
    found = in_a_child("mutated", str(count))
    assert sum(found["outcomes"].values()) == count
    assert found["outcomes"].keys() <= REASONS | {"read"}
    assert found["outcomes"]["read"] > count / 10
    assert found["slowest_s"] <= 1 and found["most_mb"] <= 450


def test_pixel_limit() -> None:
    assert load_image(encode(noise(10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(Rejected, match="too many pixels: 9 x 12, at most 100"):
        load_image(encode(noise(12, 9)), max_pixels=100)


@pytest.mark.long
def test_memory_of_the_largest_pictures() -> None:
    """512 MB with the interpreter and its libraries (40) and the largest file (64). Time is not bounded to 1 s here."""
    costs = in_a_child("limit")
    assert {cost[0] for cost in costs.values()} == {"read"}
    assert max(megabytes for *_, megabytes in costs.values()) <= 512 - 40 - MAX_BYTES / 2**20

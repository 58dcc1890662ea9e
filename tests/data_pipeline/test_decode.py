"""Pictures: every kind of file becomes the right RGB pixels or a named reason, and never a crash."""

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import load_image, resize_crop
from data_pipeline.sources import Rejected


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list[list[list[int]]]:
    image = load_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def noise(height: int = 12, width: int = 9) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(load_image(encode(image, "JPEG", quality=100, subsampling=0))).reshape(-1, 3).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3


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


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"this is text",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xff\xd8\xff\xe0",
        encode(noise(), "TIFF"),
        encode(noise(), "PPM"),
        encode(noise(200, 200))[:5000],
        encode(noise(200, 200), "JPEG")[:3000],
        png_header(100, 100),
    ],
)
def test_unreadable(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(data)
    for given in (data, tmp_path / "picture.jpg"):
        with pytest.raises(Rejected) as rejected:
            load_image(given)
        assert rejected.value.reason == "unreadable image"


@pytest.mark.parametrize("side", [9450, 13000, 30000, 2**31 - 1])
def test_too_many_pixels_are_refused_from_the_header(side: int) -> None:
    with pytest.raises(Rejected) as rejected:
        load_image(png_header(side, side))
    assert rejected.value.reason in ("too many pixels", "unreadable image")
    assert rejected.value.reason == "too many pixels" or side == 2**31 - 1


def test_pixel_limit() -> None:
    assert load_image(encode(noise(10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(Rejected, match="too many pixels: 9 x 12, at most 100"):
        load_image(encode(noise(12, 9)), max_pixels=100)


def test_mutated_files_never_crash() -> None:
    chance = random.Random(0)
    whole = [encode(noise(), f) for f in ("PNG", "JPEG", "WEBP", "BMP", "GIF")]
    for _ in range(600):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except Rejected as rejected:
            assert rejected.reason in ("unreadable image", "too many pixels")


def test_resize_crop_takes_the_centre() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert np.asarray(resize_crop(image, 10)).tolist() == [[[0, 0, 255]] * 10] * 10
    tall = image.transpose(Image.Transpose.ROTATE_90)
    whole = tall.resize((5, 15), Image.Resampling.LANCZOS)
    assert resize_crop(tall, 5).tobytes() == whole.crop((0, 5, 5, 10)).tobytes()
    square = noise(8, 8)
    assert resize_crop(square, 8).tobytes() == square.tobytes()


def test_resize_is_antialiased() -> None:
    checkers = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    inner = np.asarray(resize_crop(checkers, 8))[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() <= 2


def test_extreme_shapes_cost_little() -> None:
    assert resize_crop(Image.new("RGB", (1, 20000)), 64).size == (64, 64)
    with pytest.raises(ValueError, match="size=0"):
        resize_crop(noise(), 0)

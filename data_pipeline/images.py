"""Bytes or a file -> a clean RGB picture, or a named reason; writing without metadata."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from data_pipeline.image_files import PictureFile, examine, orientation
from data_pipeline.sources import Rejected

# Only raster formats whose decoders are small and well tested. Not EPS (runs Ghostscript) or PSD; not TIFF (most of
# the decoder faults of the last years, and kinds of pixels without one meaning); not AVIF: it is an optional part of
# Pillow, so the same row would be read on one machine and rejected on the next.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_PIXELS = 40_000_000  # with MAX_BYTES: less than 512 MB for any picture, the interpreter included
MAX_BYTES = 64 * 2**20
MAX_PROFILE_BYTES = 4 * 2**20
PILLOW_MAX_PIXELS = 89_478_485  # above it Pillow itself refuses
WHITE = (255, 255, 255)

_STRIP_PIXELS = 2**21
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # Pillow mode -> colour space of a profile that fits
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Colour = tuple[int, int, int]
Transform = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Decoded:
    """A picture as read: upright RGB without metadata, and what its file was.

    sha256: of the file's bytes, hex. format: one of FORMATS. notes: what was ignored on the way, as short stable
    phrases to count: "broken colour profile", "colour profile too large", "broken EXIF".
    """

    image: Image.Image
    sha256: str
    format: str
    notes: tuple[str, ...] = ()


def read_image(source: bytes | Path, max_pixels: int = MAX_PIXELS, background: Colour = WHITE) -> Decoded:
    """The first frame, upright, in sRGB, with transparency laid on `background`. Raises Rejected.

    Bounds before anything is decoded: MAX_BYTES, `max_pixels` by the header (half of it for WebP, whose decoder holds
    two more copies), the number of parts. Memory is at most about 8 bytes a pixel beside the file, time is linear in
    both. 16-bit gray is scaled exactly; of 16-bit colour and opacity
    Pillow keeps the high byte, which is less than 1/255 off (for half-transparent pixels both errors add up).
    What is not detected: flipped bytes in formats without checksums (all but PNG) that still decode.
    """
    if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
        raise ValueError(f"max_pixels={max_pixels}: allowed are 1 to {PILLOW_MAX_PIXELS}")
    data = source if isinstance(source, bytes) else _read(source)
    if len(data) > MAX_BYTES:
        raise Rejected("file too large", f"{len(data)} bytes, at most {MAX_BYTES}")
    file = examine(data)
    notes: list[str] = []

    def colours(opened: Image.Image) -> Image.Image:
        return to_rgb(opened, background, _to_srgb(opened.info.get("icc_profile", b""), opened.mode, notes))

    image, exif = _decode(file, max_pixels, colours)
    return Decoded(_upright(image, exif, notes), hashlib.sha256(data).hexdigest(), file.format, tuple(notes))


def read_opacity(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The opacity of a picture's first frame, upright, mode L: 255 where nothing shows through. Raises Rejected."""

    def opacity(opened: Image.Image) -> Image.Image:
        whole = Image.new("L", opened.size, 255)
        for box in _strips(*opened.size):
            if (alpha := _colour_and_alpha(opened.crop(box))[1]) is not None:
                whole.paste(alpha, box)
        return whole

    return _upright(*_decode(examine(data), max_pixels, opacity), [])


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Rejected("unreadable image", error.strerror or str(error)) from error


def _decode(file: PictureFile, max_pixels: int, take: Transform) -> tuple[Image.Image, bytes]:
    """-> (what `take` makes of the loaded picture, EXIF block); then the decoder and its memory are gone. Rejected."""
    with _open(file, max_pixels) as opened:
        try:
            opened.load()
            return take(opened), file.exif or opened.info.get("exif", b"")
        except (Rejected, MemoryError):  # the second says something of the machine, not of the picture
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise _unreadable(error) from error


def _open(file: PictureFile, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header, and no more. Raises Rejected."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(file.data), formats=[file.format])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too many pixels", f"more than {PILLOW_MAX_PIXELS}, at most {max_pixels}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error) from error
    width, height = opened.size
    limit = max_pixels // 2 if file.format == "WEBP" else max_pixels
    if width * height > limit:
        raise Rejected("too many pixels", f"{width} x {height}, at most {limit}")
    coders = {tile.codec_name for tile in opened.tile}
    raw_modes = {tile.args for tile in opened.tile if isinstance(tile.args, str)}
    if "bmp_rle" in coders:  # decoded in Python: seconds a picture
        raise Rejected("unsupported image format", "run-length coded BMP")
    if "transparency" in opened.info:
        if "RGB;16B" in raw_modes:
            raise Rejected("unsupported pixel format", "16-bit colour with a transparent colour")
        for raw_mode, scale in (("L;2", 85), ("L;4", 17)):  # Pillow scales the pixels, but not this value
            if raw_mode in raw_modes:
                opened.info["transparency"] *= scale
    return opened


def _unreadable(error: Exception) -> Rejected:
    text = str(error) or type(error).__name__
    return Rejected("truncated image" if "truncated" in text.lower() else "unreadable image", text)


def to_rgb(image: Image.Image, background: Colour = WHITE, transform: Transform | None = None) -> Image.Image:
    """Any Pillow mode -> a new RGB picture without metadata. Raises Rejected.

    Transparency is laid on `background`; `transform` turns the colours (mode RGB, L or CMYK) into sRGB before.
    Pillow's own convert("RGB") clips 16-bit values at 255 and shows the hidden colour of transparent pixels.
    """
    if image.mode in ("1", "L", "P", "RGB", "CMYK") and transform is None and not image.has_transparency_data:
        plain = image.convert("RGB")  # a copy in any case
        plain.info = {}
        return plain
    rgb = Image.new("RGB", image.size, background)
    for box in _strips(*image.size):  # the steps between exist for one strip at a time
        colour, alpha = _colour_and_alpha(image.crop(box))
        if transform is not None:
            colour = transform(colour)
        rgb.paste(colour.convert("RGB"), box, alpha)
    return rgb


def _strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield (0, top, width, min(top + rows, height))


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """-> (colour in mode RGB, L or CMYK; opacity in mode L, or None where all is opaque)."""
    if image.mode.startswith("I"):
        return _gray16(image)
    if image.mode == "F":
        raise Rejected("unsupported pixel format", "float gray")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        mode = _colour_mode(image.mode)
        return (rgba.getchannel("R") if mode == "L" else rgba.convert("RGB")), rgba.getchannel("A")
    return image.convert(_colour_mode(image.mode)), None


def _gray16(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """0..65535 -> 0..255, rounded: v / 257 since 65535 = 255 * 257."""
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise Rejected("unsupported pixel format", "32-bit gray")
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(table[values]), alpha


def _colour_mode(mode: str) -> str:
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


def _to_srgb(profile: bytes | None, mode: str, notes: list[str]) -> Transform | None:
    """The way from an embedded profile to sRGB; None without one, and (noted) for one that cannot be used."""
    if profile == b"":
        return None
    if profile is None or len(profile) > MAX_PROFILE_BYTES:  # Pillow gives None for one too large or damaged
        notes.append("broken colour profile" if profile is None else "colour profile too large")
        return None
    try:
        return _profile_transform(profile, _colour_mode(mode))
    except MemoryError:
        raise
    except Exception:  # ImageCms.PyCMSError, OSError, ValueError, TypeError
        notes.append("broken colour profile")
        return None


@lru_cache(maxsize=8)
def _profile_transform(profile: bytes, mode: str) -> Transform | None:
    """Perceptual intent. None when the profile is sRGB by effect: no probe colour moves by more than one step."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space != _SPACES[mode]:
        raise ValueError(f"a {source.profile.xcolor_space} profile on a {mode} picture")
    srgb = ImageCms.createProfile("sRGB")
    if mode == "L":  # all 256 answers, each computed in full: the optimised transform interpolates between few
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        exact = ImageCms.buildTransform(source, srgb, mode, "RGB", flags=ImageCms.Flags.NOOPTIMIZE)
        table = np.asarray(exact.apply(ramp))[0]  # [256, 3]
        return lambda image: Image.fromarray(table[np.asarray(image)])
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)  # [1, 729, 3]
    if mode == "RGB" and np.abs(np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe).max() <= 1:
        return None
    return transform.apply


def _upright(image: Image.Image, exif: bytes, notes: list[str]) -> Image.Image:
    try:
        turn = _UPRIGHT.get(orientation(exif)) if exif else None
    except ValueError:
        notes.append("broken EXIF")
        return image
    return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB on a white ground."""
    return to_rgb(image, WHITE)


def encode_image(image: Image.Image, image_format: str, quality: int) -> bytes:
    """RGB picture -> png (lossless), jpg or webp bytes; `quality` (1-100) counts for the last two.

    Nothing but pixels is written: no EXIF (GPS), XMP, colour profile, comment or text.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG"},
        "jpg": {"format": "JPEG", "quality": quality},
        "webp": {"format": "WEBP", "quality": quality},
    }
    if image_format not in options:
        raise ValueError(f"image_format={image_format!r}: allowed are {', '.join(options)}")
    bare = image
    if image.info:  # Pillow writes comments and profiles that it finds there
        bare = image.copy()
        bare.info = {}
    buffer = io.BytesIO()
    bare.save(buffer, **options[image_format])
    return buffer.getvalue()

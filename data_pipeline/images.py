"""Bytes or a file -> a clean RGB picture, or a named reason; resizing to a square."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.sources import Rejected

# Only raster formats whose decoders are small and well tested; never EPS (runs Ghostscript), PSD, TIFF, ...
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_PIXELS = 64_000_000


def load_image(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame, upright, as RGB with transparency laid on white. Raises Rejected.

    The pixel limit is checked from the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("unreadable image", f"not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise Rejected("unreadable image", str(error)) from error
    with opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise Rejected("too many pixels", f"{width} x {height}, at most {max_pixels}")
        try:
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
        except Rejected:
            raise
        except Exception as error:
            raise Rejected("unreadable image", str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: 16-bit gray is scaled, transparency is laid on white. Raises Rejected.

    Pillow's own convert("RGB") clips 16-bit values at 255 and shows the hidden colour of transparent pixels.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("unsupported pixel format", "32-bit gray")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("unsupported pixel format", "float gray")
    if image.has_transparency_data:
        return on_white(image.convert("RGBA"))
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB on a white ground."""
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, as size x size pixels (Lanczos, antialiased).

    Same as shortest side to `size`, then a centre crop, but a 1 x 20000 picture costs no more than others.
    """
    if size < 1:
        raise ValueError(f"size={size}: a picture needs at least 1 pixel a side")
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    # Whole pixels: a half-pixel offset would blur a picture that only needs cropping.
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def encode_image(image: Image.Image, image_format: str, quality: int) -> bytes:
    """RGB picture -> png (lossless), jpg or webp bytes; `quality` (1-100) counts for the last two."""
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG"},
        "jpg": {"format": "JPEG", "quality": quality},
        "webp": {"format": "WEBP", "quality": quality},
    }
    if image_format not in options:
        raise ValueError(f"image_format={image_format!r}: allowed are {', '.join(options)}")
    buffer = io.BytesIO()
    image.save(buffer, **options[image_format])
    return buffer.getvalue()

"""PIL <-> tensors in [-1, 1], grids, and PNG files that carry the settings they were made with."""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_RECORD = "record"


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of any mode -> RGB float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3]
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def open_picture(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture file, upright and scaled to size (width, height) px -> [1, 3, H, W] in [-1, 1]. Raises ValueError."""
    return to_tensor(_open(path, "RGB", size))[None]


def open_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """The same as a mask: [1, 1, H, W] in 0..1, 1 where it is white."""
    values = torch.from_numpy(np.array(_open(path, "L", size)))
    return values[None, None].float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> a picture, rounded to 8 bits, values outside clamped.

    Raises ValueError for another shape and for values that are no numbers.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be [3, H, W], got {list(image.shape)}")
    if not image.isfinite().all():
        raise ValueError("the image holds values that are not finite numbers; was the model run in float16?")
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(images: Tensor | Sequence[Image.Image], columns: int, padding: int = 2, scale: int = 1) -> Image.Image:
    """Pictures of one size in rows of `columns`, `padding` white pixels around each.

    images: [N, 3, H, W] in [-1, 1], or pictures. scale: whole magnification, with hard pixel edges.
    Raises ValueError for no images, several sizes or numbers below 1 (padding: below 0).
    """
    pictures = [to_pil(i) for i in images] if isinstance(images, Tensor) else list(images)
    sizes = sorted({p.size for p in pictures})
    if len(sizes) != 1:
        raise ValueError(f"a grid needs images of one size, got {sizes or 'no images'}")
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns and scale must be >= 1, padding >= 0, got {columns}, {scale}, {padding}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = sizes[0][0] * scale, sizes[0][1] * scale
    stride_x, stride_y = width + padding, height + padding
    sheet = Image.new("RGB", (columns * stride_x + padding, rows * stride_y + padding), "white")
    for k, picture in enumerate(pictures):
        place = padding + k % columns * stride_x, padding + k // columns * stride_y
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def legible(picture: Image.Image, least: int = 128) -> Image.Image:
    """The picture, magnified by a whole number with hard pixel edges if both its sides are below `least` px."""
    times = least // max(picture.size)
    return picture if times < 2 else ImageOps.scale(picture, times, Image.Resampling.NEAREST)


def save_png(
    image: Image.Image,
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a PNG that appears under its name only when it is complete.

    settings: kept in the file, as text that other tools read (chunk `parameters`) and as JSON (chunk `ldm`).
    record: all that is needed to draw it again, kept beside the settings in the JSON alone; `read_record` gives it.
    Raises FileExistsError if the name is taken and `overwrite` is off, even by another process meanwhile.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        chunks.add_text("parameters", format_parameters(settings))
        whole = dict(settings) if record is None else {**settings, _RECORD: record}
        chunks.add_text("ldm", json.dumps(whole, ensure_ascii=False))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        image.save(partial, "PNG", pnginfo=chunks)
        if overwrite:
            os.replace(partial, path)
        else:
            _place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings a PNG was made with: ours with their types, those of other tools as text, {} if none.

    Raises ValueError if the file is no PNG.
    """
    chunks = _text_of(path)
    if "ldm" not in chunks:
        return parse_parameters(chunks.get("parameters", ""))
    return {key: value for key, value in _ours(path, chunks).items() if key != _RECORD}


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record that `save_png` kept in a PNG, None if there is none. Raises ValueError if the file is no PNG."""
    chunks = _text_of(path)
    record = _ours(path, chunks).get(_RECORD) if "ldm" in chunks else None
    if record is not None and not isinstance(record, dict):
        raise ValueError(f"{path} has a record that is not a JSON object")
    return record


def format_parameters(settings: Mapping[str, Any]) -> str:
    """The text AUTOMATIC1111 puts into PNGs: prompt, negative prompt, then `Key: value, ...` on one line."""
    rest = {k: v for k, v in settings.items() if k not in ("Prompt", "Negative prompt")}
    lines = [str(settings.get("Prompt", ""))]
    if settings.get("Negative prompt"):
        lines.append(f"{_NEGATIVE} {settings['Negative prompt']}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in rest.items()))
    return "\n".join(lines)


def parse_parameters(text: str) -> dict[str, str]:
    """The reverse of `format_parameters`; all values are text.

    The last line counts as settings only with three or more of them: a prompt may end in a line with colons.
    """
    if not text.strip():
        return {}
    lines = text.strip().split("\n")
    pairs = _PAIR.findall(lines[-1])
    if len(pairs) >= 3:
        lines.pop()
    else:
        pairs = []
    negative = next((k for k, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    settings = {"Prompt": "\n".join(lines[:negative])}
    if negative < len(lines):
        settings["Negative prompt"] = "\n".join(lines[negative:])[len(_NEGATIVE) :].strip()
    return settings | {key: _unquote(value) for key, value in pairs}


def _open(path: str | Path, mode: str, size: tuple[int, int] | None) -> Image.Image:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert(mode)
    except FileNotFoundError as error:
        raise ValueError(f"no picture {str(path)!r}") from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
        raise ValueError(f"{path} is no picture that can be read ({error})") from error
    return image if size is None or size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _text_of(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(getattr(image, "text", {}))
    except FileNotFoundError as error:
        raise ValueError(f"no picture {str(path)!r}") from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoder raises
        raise ValueError(f"{path} is not a PNG file that can be read") from error


def _ours(path: str | Path, chunks: Mapping[str, str]) -> dict[str, Any]:
    try:
        return dict(json.loads(chunks["ldm"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has an 'ldm' chunk that is not a JSON object") from error


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def _unquote(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def _place(partial: Path, path: Path) -> None:
    """Give a finished file its name unless that is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: look, then rename, is the best it offers
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)

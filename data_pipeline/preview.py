"""A contact sheet: pictures of a shard folder with their captions, and those that filters turned away."""

import base64
import io

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.ledger import index_names, read_ledgers
from data_pipeline.shards import read_index
from data_pipeline.storage import StrPath
from data_pipeline.survey import THUMBNAIL_PX, Picture, kept_pictures, rejected_pictures

_GAP, _LINES, _LINE_PX, _FONT_PX = 12, 3, 14, 11
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_INK, _SOFT, _RED = (31, 41, 51), (97, 110, 124), (190, 70, 50)


def contact_sheet(folder: StrPath, count: int = 24, columns: int = 6) -> Image.Image:
    """`count` delivered pictures spread over the folder, and below them up to as many that filters turned away.

    Raises ValueError when there is no complete folder, or for a count or columns below 1; RuntimeError naming what
    is damaged.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"count={count}, columns={columns}: a sheet has at least 1 picture and 1 column")
    info = read_index(folder)
    kept = list(kept_pictures(folder, info, count))
    rejected: list[Picture] = []
    for _, ledger in read_ledgers(folder, index_names(folder, info)):
        rejected += rejected_pictures(ledger, count - len(rejected))
    cell = THUMBNAIL_PX + _GAP + _LINES * _LINE_PX
    groups = [(f"{info.samples:,} delivered", _INK, kept), ("turned away by filters", _RED, rejected)]
    groups = [group for group in groups if group[2]]
    heights = [2 * _GAP + _LINE_PX + -(-len(pictures) // columns) * (cell + _GAP) for _, _, pictures in groups]
    sheet = Image.new("RGB", (_GAP + columns * (THUMBNAIL_PX + _GAP), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    top = 0
    for (title, colour, pictures), height in zip(groups, heights, strict=True):
        draw.text((_GAP, top + _GAP), title, fill=colour, font=font)
        for i, picture in enumerate(pictures):
            left = _GAP + i % columns * (THUMBNAIL_PX + _GAP)
            _tile(sheet, (left, top + 2 * _GAP + _LINE_PX + i // columns * (cell + _GAP)), picture, font)
        top += height
    return sheet


def _tile(sheet: Image.Image, corner: tuple[int, int], picture: Picture, font: Font) -> None:
    left, top = corner
    with Image.open(io.BytesIO(base64.b64decode(picture.jpeg)), formats=("JPEG",)) as small:
        sheet.paste(small, (left + (THUMBNAIL_PX - small.width) // 2, top + (THUMBNAIL_PX - small.height) // 2))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(_wrapped(picture.text, draw, font)):
        draw.text((left, top + THUMBNAIL_PX + 4 + i * _LINE_PX), line, fill=_SOFT, font=font)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """The first lines of a text broken to a tile's width, within words where one alone is too long."""
    lines = [""]
    for character in text[:400]:
        if draw.textlength(lines[-1] + character, font=font) > THUMBNAIL_PX:
            head, space, tail = lines[-1].rpartition(" ")
            lines[-1:] = [head, tail] if space and character != " " else [lines[-1], ""]
            if len(lines) > _LINES:
                return lines[:_LINES]
        lines[-1] = (lines[-1] + character).lstrip()
    return lines

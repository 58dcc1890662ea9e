"""X/Y/Z grids: every image by several settings, on labelled sheets."""

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ldm.cli.wishes import Wish, tagged

if TYPE_CHECKING:
    from PIL import Image, ImageFont

DRAWING: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "guidance": float,
    "sampler": str,
    "spacing": str,
    "eta": float,
    "clip_skip": int,
    "size": str,
}
"""Axes that are an option of their own, and what their values are."""
AXES = (*DRAWING, "seed", "strength", "prompt", "lora.NAME")
MOST = 3
AXIS = re.compile(r"(lora\.[^=]+|[a-z_]+)=(.*)", re.DOTALL)
MARGIN, TEXT = 4, 14
"""Around labels, and their height, px."""


@dataclass(frozen=True)
class Axis:
    """A setting, and the values that it takes along one side of a grid, as they were typed."""

    key: str
    values: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What is written beside the pictures."""
        return self.values if self.key == "prompt" else tuple(f"{self.key}: {value}" for value in self.values)

    def apply(self, wish: Wish, value: str) -> Wish:
        """The wish with that value. Raises ValueError for one that it cannot have."""
        if self.key in DRAWING:
            return replace(wish, drawing=replace(wish.drawing, **{self.key: self._read(DRAWING[self.key], value)}))
        if self.key == "seed":
            offset = 0 if wish.variation is not None else wish.number
            return replace(wish, seed=self._read(int, value) + offset)
        if self.key == "strength":
            return replace(wish, pictures=replace(wish.pictures, strength=self._read(float, value)))
        if self.key == "prompt":
            return self._reworded(wish, value)
        if wish.drawing.plain:
            raise ValueError(f"--grid {self.key}: adapters are asked for in a prompt, and --plain prompts do not")
        return replace(wish, prompt=tagged(wish.prompt, self.key.removeprefix("lora."), self._read(float, value)))

    def _read(self, kind: Callable[[str], Any], value: str) -> Any:
        try:
            read = kind(value)
        except ValueError:
            read = math.nan
        if isinstance(read, float) and not math.isfinite(read):
            raise ValueError(f"--grid {self.key}={value}: a {'whole ' * (kind is int)}number is needed")
        return read

    def _reworded(self, wish: Wish, value: str) -> Wish:
        """The first value, wherever it stands in the prompts, replaced by this one."""
        first, negative = self.values[0], wish.drawing.negative
        if first not in wish.prompt and first not in negative:
            raise ValueError(f"--grid prompt={first},...: {first!r} is not in the prompt {wish.prompt!r}")
        drawing = replace(wish.drawing, negative=negative.replace(first, value))
        return replace(wish, drawing=drawing, prompt=wish.prompt.replace(first, value))


def axes(texts: Iterable[str]) -> tuple[Axis, ...]:
    """KEY=VALUE,VALUE,... of each axis: x, y, z. A value with a comma in it is put between double quotes.

    Raises ValueError for an unknown key, with the nearest, for none or a repeated value, and for more than three.
    """
    from ldm.names import known

    found: list[Axis] = []
    for text in texts:
        match = AXIS.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"--grid must be KEY=VALUE,VALUE,..., such as steps=10,20,30, got {text!r}")
        key = match[1]
        known("--grid key", "lora.NAME" if key.startswith("lora.") else key, AXES)
        values = tuple(value.strip() for value in next(csv.reader([match[2]], skipinitialspace=True), []))
        if not values or "" in values or len(set(values)) < len(values):
            raise ValueError(f"--grid {key} needs values, each once, such as {key}=a,b; got {match[2]!r}")
        if key in (axis.key for axis in found):
            raise ValueError(f"--grid {key} is there twice: give all its values at once")
        found.append(Axis(key, values))
    if len(found) > MOST:
        raise ValueError(f"--grid goes along at most {MOST} axes, got {', '.join(axis.key for axis in found)}")
    return tuple(found)


def is_axis(text: str) -> bool:
    """Whether a word reads as an axis with a known key."""
    match = AXIS.fullmatch(text)
    return match is not None and (match[1] in AXES or match[1].startswith("lora."))


def cells(wanted: Sequence[Wish], along: Sequence[Axis]) -> list[Wish]:
    """Every wish in every cell: sheet by sheet, row by row, column by column; of each cell all wishes."""
    found = []
    for values in product(*(axis.values for axis in reversed(along))):  # the last axis turns slowest
        changed = list(wanted)
        for axis, value in zip(reversed(along), values, strict=True):
            changed = [axis.apply(wish, value) for wish in changed]
        found += changed
    return found


def sheets(pictures: Sequence["Image.Image"], along: Sequence[Axis], wanted: int) -> list["Image.Image"]:
    """Pictures in the order of `cells`, `wanted` of each cell -> a labelled sheet for each wish and value of z."""
    from ldm.images import legible

    columns, rows, layers = (axis.labels for axis in (*along, *[Axis("prompt", ("",))] * (MOST - len(along))))
    found = []
    for wish in range(wanted):
        own = [legible(picture) for picture in pictures[wish::wanted]]
        for number, title in enumerate(layers):
            start = number * len(rows) * len(columns)
            found.append(labelled(own[start : start + len(rows) * len(columns)], columns, rows, title))
    return found


def labelled(
    pictures: Sequence["Image.Image"], columns: Sequence[str], rows: Sequence[str], title: str = ""
) -> "Image.Image":
    """Pictures row by row, with the name of each column above and of each row on the left; "" takes no room.

    Pictures of several sizes stand in the middle of cells of the largest. Raises ValueError for another number.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(pictures) != len(columns) * len(rows):
        raise ValueError(f"a sheet of {len(columns)} x {len(rows)} needs as many pictures, got {len(pictures)}")
    font = ImageFont.load_default(TEXT)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width, height = (max(picture.size[side] for picture in pictures) + MARGIN for side in (0, 1))
    columns = [_wrapped(draw, text, font, width - 2 * MARGIN) for text in columns]
    rows = [_wrapped(draw, text, font, max(width, 120)) for text in rows]
    title = _wrapped(draw, title, font, width * len(columns))
    sizes = {text: _size(draw, text, font) for text in (*columns, *rows, title)}
    top = sizes[title][1]
    left, head = max(sizes[text][0] for text in rows), max(sizes[text][1] for text in columns)
    width = max(width, *(sizes[text][0] for text in columns))  # of words wider than pictures
    whole = left + width * len(columns) + MARGIN, top + head + height * len(rows) + MARGIN
    sheet = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, x: int, y: int) -> None:
        """In the middle of a place."""
        draw.multiline_text((x, y), text, fill="black", font=font, anchor="mm", align="center")

    write(title, whole[0] // 2, top // 2)
    for i, text in enumerate(columns):
        write(text, left + width * i + width // 2, top + head // 2)
    for j, text in enumerate(rows):
        write(text, left // 2, top + head + height * j + height // 2)
    for k, picture in enumerate(pictures):
        j, i = divmod(k, len(columns))
        x, y = left + width * i + MARGIN, top + head + height * j + MARGIN
        spare = [cell - MARGIN - side for cell, side in zip((width, height), picture.size, strict=True)]
        sheet.paste(picture, (x + spare[0] // 2, y + spare[1] // 2))
    return sheet


def _wrapped(draw: Any, text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    """The text, in signs that the font has, in lines of that width, px, where its words allow it."""
    lines = [""]
    for word in text.encode("latin-1", "replace").decode("latin-1").split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _size(draw: Any, text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> tuple[int, int]:
    """Width and height, px, of a label and the margin around it; of none 0."""
    if not text:
        return 0, 0
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
    return math.ceil(right - left) + 2 * MARGIN, math.ceil(bottom - top) + 2 * MARGIN

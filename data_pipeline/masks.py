"""Random masks: what a model that fills in is to fill in, while it is trained.

Wide strokes and boxes are the mixture of LaMa (Suvorov et al. 2022, sec. 2.4), in which wide masks teach more than thin
ones; with ellipses, and with one side of the picture, which is what outpainting asks for. A quarter hides the whole
picture, as for Stable Diffusion's inpainting model (Rombach et al. 2022, model card), so that it can still draw alone.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MIXTURE: Mapping[str, float] = {"whole": 0.25, "strokes": 0.35, "boxes": 0.2, "ellipses": 0.1, "side": 0.1}
"""Kind -> its chance. Of a square they hide 1, 0.25, 0.25, 0.20 and 0.50 on average; the mixture 0.46 (measured)."""


def random_mask(height: int, width: int, rng: np.random.Generator, mixture: Mapping[str, float] = MIXTURE) -> Tensor:
    """-> [1, height, width] float32, 1 where the picture is hidden and 0 where it is known; never all 0.

    mixture: kind -> weight, more than 0. Raises ValueError for an unknown kind or weight, and for an empty picture.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a mask of {height} x {width} pixels: allowed are 1 x 1 and more")
    if not mixture or not set(mixture) <= set(MIXTURE) or not all(w > 0 for w in mixture.values()):
        raise ValueError(f"mixture={dict(mixture)}: allowed are weights above 0 for {', '.join(MIXTURE)}")
    weights = np.array(list(mixture.values()))
    kind = list(mixture)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    mask = Image.new("1", (width, height))
    draw = ImageDraw.Draw(mask)
    if kind == "whole":
        draw.rectangle((0, 0, width, height), fill=1)
    elif kind == "side":
        draw.rectangle(_side(width, height, rng), fill=1)
    elif kind == "strokes":
        _strokes(draw, width, height, rng)
    else:
        shape = draw.rectangle if kind == "boxes" else draw.ellipse
        for left, top, right, bottom in _boxes(width, height, rng):
            shape((left, top, right, bottom), fill=1)
            draw.point(((left + right) // 2, (top + bottom) // 2), fill=1)  # Pillow draws no ellipse of one pixel
    return torch.from_numpy(np.asarray(mask).astype(np.float32))[None]


def _side(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A quarter to three quarters of the picture from one of its four sides; both ends belong to the box."""
    share = rng.uniform(0.25, 0.75)
    columns, rows = max(1, round(share * width)), max(1, round(share * height))
    sides = (
        (0, 0, columns - 1, height - 1),
        (width - columns, 0, width - 1, height - 1),
        (0, 0, width - 1, rows - 1),
        (0, height - rows, width - 1, height - 1),
    )
    return sides[int(rng.integers(4))]


def _boxes(width: int, height: int, rng: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    """1 to 4 boxes inside the picture, each of 0.1 to 0.6 of its width and of its height; both ends belong to them."""
    for _ in range(int(rng.integers(1, 5))):
        w, h = (max(1, round(rng.uniform(0.1, 0.6) * side)) for side in (width, height))
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        yield left, top, left + w - 1, top + h - 1


def _strokes(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """1 to 4 bent lines of 1 to 5 pieces that begin in the picture and may leave it.

    They are 0.1 to 0.3 of the shorter side wide, and each piece 0.1 to 0.5 of it long.
    """
    side = min(width, height)
    for _ in range(int(rng.integers(1, 5))):
        thick = rng.uniform(0.1, 0.3) * side
        x, y, angle = rng.uniform(0, width - 1), rng.uniform(0, height - 1), rng.uniform(0, 2 * math.pi)
        points = [(x, y)]
        for _ in range(int(rng.integers(1, 6))):
            angle += rng.uniform(-math.pi / 2, math.pi / 2)
            length = rng.uniform(0.1, 0.5) * side
            points.append((points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)))
        draw.point(points[:1], fill=1)  # of the smallest pictures the rest may touch no pixel's centre
        draw.line(points, fill=1, width=max(1, round(thick)))
        for x, y in points:  # round ends and joints
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)

"""Reads pictures of drawn scenes with classical vision and judges whether they show what the caption says.

Colours are unmixed from the background pixel by pixel, objects are connected pixels of one colour, and a
shape is the template that covers the same pixels. Nothing is learned: a verdict means the same for every
model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.sources.shapes import (
    BACKGROUND,
    COLOURS,
    GRID,
    SHAPES,
    SIZES,
    VERTICAL,
    Scene,
    coverage,
    parse,
)

Floats = NDArray[np.floating[Any]]
Picture = NDArray[np.uint8] | Tensor

SOLID = 0.5  # a pixel belongs to an object when at least half of it is covered
STRANGE = 60.0  # RGB distance (of 255) beyond which a pixel is no blend of background and a known colour
SPECK = 6  # fewer pixels on the 32 x 32 grid are no object; the smallest drawn one has 18
MIN_FIT = 0.78  # overlap with the best template below which an object has no readable shape
SOFTNESSES = 4  # a template is tried crisp, and softened once, twice and three times
MIN_STEP = 4.0  # grid units that two objects must lie apart along the stated axis
# share of the bounding square that is covered, and height of the centroid from the top
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "zorp": 3 / 4}
CENTRE = {"circle": 0.5, "square": 0.5, "triangle": 2 / 3, "zorp": 5 / 9}


@dataclass(frozen=True)
class Reading:
    """One object found in a picture. `colour`, `shape` or `size` is "" where it is none of the drawn ones.

    x, y: centroid, and diameter: width of the fitted template, all in grid units (the picture is 32 wide).
    fit: overlap with that template in [0, 1].
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float
    fit: float


@dataclass(frozen=True)
class Verdict:
    """What is right about a picture of a scene.

    Shapes and sizes belong to colours: they are right when the one object of each stated colour has them.
    """

    count: bool
    colours: bool
    shapes: bool
    sizes: bool
    relations: bool

    @property
    def all(self) -> bool:
        """True if nothing is wrong."""
        return all(asdict(self).values())


def to_grid(image: Picture) -> Floats:
    """RGB uint8 [H, W, 3], or a tensor [3, H, W] in [-1, 1] -> [32, 32, 3] in [0, 255] by averaging blocks.

    Raises ValueError unless the picture is square and its side a multiple of 32.
    """
    if isinstance(image, Tensor):
        pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()
    else:
        pixels = np.asarray(image, np.float32)
    height, width, channels = pixels.shape
    if channels != 3 or height != width or height % GRID:
        raise ValueError(f"expected a square RGB picture, a multiple of {GRID} px wide, got {pixels.shape}")
    block = height // GRID
    return pixels.reshape(GRID, block, GRID, block, 3).mean((1, 3))


def unmix(pixels: Floats) -> tuple[NDArray[np.int64], Floats]:
    """[H, W, 3] in [0, 255] -> labels [H, W] and coverage by each colour [H, W, colours + 1] in [0, 1].

    A label is the index into COLOURS, len(COLOURS) for a strange colour, or -1 for background.
    """
    background = np.array(BACKGROUND, np.float32)
    lines = np.array(list(COLOURS.values()), np.float32) - background  # [C, 3]
    offset = pixels - background
    alpha = np.clip(offset @ lines.T / (lines * lines).sum(1), 0, 1)  # [H, W, C]
    missing = np.linalg.norm(offset[..., None, :] - alpha[..., None] * lines, axis=-1)  # [H, W, C]
    labels = missing.argmin(-1)
    covered = np.take_along_axis(alpha, labels[..., None], -1)[..., 0]
    labels[covered < SOLID] = -1
    strange = missing.min(-1) > STRANGE
    labels[strange] = len(COLOURS)
    return labels, np.concatenate([alpha, strange[..., None].astype(np.float32)], -1)


def components(labels: NDArray[np.int64]) -> list[tuple[int, NDArray[np.bool_]]]:
    """Connected regions (8 neighbours) of equal label other than -1: (label, mask [H, W]) each."""
    todo = labels >= 0
    found = []
    while todo.any():
        seed = np.unravel_index(todo.argmax(), todo.shape)
        same = labels == labels[seed]
        mask = np.zeros_like(todo)
        mask[seed] = True
        while (grown := dilate(mask) & same).sum() > mask.sum():
            mask = grown
        found.append((int(labels[seed]), mask))
        todo &= ~mask
    return found


def dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask [H, W] grown by one pixel to all eight sides."""
    padded = np.pad(mask, 1)
    wide = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return wide[:-2] | wide[1:-1] | wide[2:]


def is_object(mask: NDArray[np.bool_]) -> bool:
    """Whether a region is large enough to count, and more than a line such as a rim of odd colour."""
    block = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    return bool(mask.sum() >= SPECK and block.any())


def soften(cover: Floats) -> Floats:
    """One pass of the binomial 3 x 3 filter over [H, W]; the sum stays."""
    padded = np.pad(cover, 1)
    wide = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4


def overlap(cover: Floats, template: Floats, region: NDArray[np.bool_]) -> float:
    """Intersection over union of two soft masks [H, W] within the region: in [0, 1].

    The best over SOFTNESSES of the template, because a generated edge is never as crisp as a drawn one.
    """
    best = 0.0
    for _ in range(SOFTNESSES):
        seen = template * region
        best = max(best, float(np.minimum(cover, seen).sum() / np.maximum(cover, seen).sum()))
        template = soften(template)
    return best


def measure(label: int, region: NDArray[np.bool_], alpha: Floats, shapes: Sequence[str]) -> Reading:
    """Read one object from the region that it may reach [H, W] and the coverage by its colour [H, W]."""
    cover = alpha * region
    area = float(cover.sum())
    middle = np.arange(GRID) + 0.5
    x, y = float(cover.sum(0) @ middle) / area, float(cover.sum(1) @ middle) / area
    sides = {shape: (area / FILL[shape]) ** 0.5 for shape in shapes}
    fits = {}
    for shape, side in sides.items():
        template = coverage(shape, (x - side / 2, y - side * CENTRE[shape]), side, GRID)
        fits[shape] = overlap(cover, template, region)
    shape = max(fits, key=fits.__getitem__)
    return Reading(
        colour=[*COLOURS, ""][label],
        shape=shape if fits[shape] >= MIN_FIT else "",
        size=size_class(sides[shape]),
        x=x,
        y=y,
        diameter=sides[shape],
        fit=fits[shape],
    )


def size_class(diameter: float) -> str:
    """The size that a width in grid units stands for, or "" if it is a quarter off and more."""
    small, large = SIZES["small"], SIZES["large"]
    if not 0.75 * small <= diameter <= 1.25 * large:
        return ""
    return "small" if diameter < (small + large) / 2 else "large"


def read(image: Picture, shapes: Sequence[str] = SHAPES) -> list[Reading]:
    """The objects in a picture: RGB uint8 [H, W, 3] or tensor [3, H, W] in [-1, 1], 32 px wide or a multiple.

    shapes: those that an object may have; glyphs are looked for only where they are named. Regions under 6 px on the
    32 x 32 grid and lines one pixel wide are ignored; any larger one counts, whatever its colour or shape. Raises
    ValueError for another size of picture.
    """
    labels, alpha = unmix(to_grid(image))
    found = [(label, mask) for label, mask in components(labels) if is_object(mask)]
    near = [dilate(mask) for _, mask in found]
    taken = np.sum(near, axis=0) if near else 0  # [H, W]: how many objects claim a pixel
    # Two pixels around an object hold all of a soft edge, unless another object claims them.
    return [
        measure(label, mask | (dilate(around) & (taken == around)), alpha[..., label], shapes)
        for (label, mask), around in zip(found, near, strict=True)
    ]


def related(scene: Scene, found: dict[str, Reading]) -> bool:
    """Whether the objects, by colour, lie in the stated order: apart along the axis, less across it."""
    vertical = scene.relation in VERTICAL
    for first, second in pairwise(found[thing.colour] for thing in scene.objects):
        dx, dy = second.x - first.x, second.y - first.y
        along, across = (dy, dx) if vertical else (dx, dy)
        if along < MIN_STEP or along <= abs(across):
            return False
    return True


def by_colour(readings: Sequence[Reading]) -> dict[str, Reading]:
    """Those that alone have their colour, by it."""
    colours = [reading.colour for reading in readings]
    return {r.colour: r for r in readings if colours.count(r.colour) == 1}


def judge(scene: Scene, image: Picture, shapes: Sequence[str] = SHAPES) -> Verdict:
    """Compare a picture with the scene it should show, read as any of `shapes`. Raises ValueError as `read` does."""
    readings = read(image, shapes)
    colours = [reading.colour for reading in readings]
    found = by_colour(readings)
    complete = all(thing.colour in found for thing in scene.objects)
    return Verdict(
        count=len(readings) == len(scene.objects),
        colours=sorted(colours) == sorted(thing.colour for thing in scene.objects),
        shapes=complete and all(found[thing.colour].shape == thing.shape for thing in scene.objects),
        sizes=complete and all(found[thing.colour].size == thing.size for thing in scene.objects),
        relations=complete and related(scene, found),
    )


def score(scenes: Sequence[Scene | str], images: Iterable[Picture], shapes: Sequence[str] = SHAPES) -> dict[str, Any]:
    """Judge picture i by scene or caption i: the shares right in [0, 1], by attribute and in all.

    shapes: as `read` has them. `relations` counts the scenes of two and three objects only; None stands for no
    picture of that kind. Raises ValueError for a text that is no caption, or if there are not as many pictures as
    scenes.
    """
    wanted = [parse(scene) if isinstance(scene, str) else scene for scene in scenes]
    verdicts = [judge(scene, image, shapes) for scene, image in zip(wanted, images, strict=True)]
    counts = [len(scene.objects) for scene in wanted]
    result: dict[str, Any] = {"images": len(verdicts), "all": share([v.all for v in verdicts])}
    for name in (f.name for f in fields(Verdict)):
        least = 2 if name == "relations" else 1
        flags = [getattr(v, name) for v, n in zip(verdicts, counts, strict=True) if n >= least]
        result[name] = share(flags)
    result["by_objects"] = {
        str(n): {
            "images": counts.count(n),
            "all": share([v.all for v, c in zip(verdicts, counts, strict=True) if c == n]),
        }
        for n in sorted(set(counts))
    }
    return result


def share(flags: list[bool]) -> float | None:
    """The share of True in [0, 1], or None if there is nothing to count."""
    return sum(flags) / len(flags) if flags else None

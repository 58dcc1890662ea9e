"""Drawn scenes with exact captions: one to three coloured shapes whose every stated fact can be read back.

All geometry lives on a grid of 32 units, whatever the picture size: small shapes are 6 units across and large
ones 9, so that even three large ones fit in a row with gaps between them. Whole units keep edges crisp.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.sources import Sample

GRID = 32
BOX = 9  # an object lies in the middle of a box of this many units
# Left (or top) of the boxes along the axis, by number of objects, and across it. A whole scene may lie STEP units
# further along, where there is room, and across: a cell of a factor-4 autoencoder, so that an object has the same
# latents wherever it lies and a training of minutes is enough.
PLACES = {1: (9,), 2: (1, 17), 3: (0, 11, 22)}
LINE = 9
STEP = 4
BACKGROUND = (248, 246, 240)
# Black is the sixth colour because it keeps the distance to the other five and to their blends with the
# background (orange, cyan, pink and grey come closer, and brown's edges turn red).
COLOURS = {
    "red": (225, 50, 50),
    "green": (45, 172, 78),
    "blue": (45, 95, 225),
    "yellow": (250, 200, 30),
    "purple": (155, 60, 190),
    "black": (38, 38, 44),
}
SHAPES = ("circle", "square", "triangle")
# Shapes that no model is trained on, for fine-tuning to teach with their word. A zorp is a trapezium, the top half as
# wide as the base: the demo's autoencoder, which never saw one, keeps it at both sizes, as it does few other outlines,
# and the reader tells it well from the three.
GLYPHS = ("zorp",)
SIZES = {"small": 6, "large": 9}  # width and height in grid units
HELD_OUT = (("red", "square"), ("blue", "triangle"), ("yellow", "circle"))
SPLITS = ("train", "heldout", "all")
MIX = {1: 0.4, 2: 0.4, 3: 0.2}  # share of scenes with that many objects

# relation -> its captions, the canonical one first; `{}` stands for "small red circle" and the like.
# The same table writes captions and parses them.
CAPTIONS = {
    "alone": ("a {}", "one {}", "a picture of a {}"),
    "left of": (
        "a {} to the left of a {}",
        "a {} left of a {}",
        "a {} on the left and a {} on the right",
    ),
    "above": ("a {} above a {}", "a {} over a {}", "a {} at the top and a {} at the bottom"),
    "row": (
        "a {}, a {} and a {} from left to right",
        "from left to right: a {}, a {} and a {}",
        "a {}, then a {}, then a {}, left to right",
    ),
    "column": (
        "a {}, a {} and a {} from top to bottom",
        "from top to bottom: a {}, a {} and a {}",
        "a {}, then a {}, then a {}, top to bottom",
    ),
}
RELATIONS = {1: ("alone",), 2: ("left of", "above"), 3: ("row", "column")}
VERTICAL = ("above", "column")


@dataclass(frozen=True)
class Object:
    """One thing in a scene. Raises ValueError for a word outside COLOURS, SHAPES and GLYPHS, or SIZES."""

    colour: str
    shape: str
    size: str

    def __post_init__(self) -> None:
        for word, allowed in ((self.colour, COLOURS), (self.shape, (*SHAPES, *GLYPHS)), (self.size, SIZES)):
            if word not in allowed:
                raise ValueError(f"unknown word {word!r}; allowed: {', '.join(allowed)}")

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """True for what never occurs in the train split: a colour with a shape, or with the size of a glyph.

        Of a glyph every other pair of colour and size is held out, so that each colour and size is shown.
        """
        if self.shape in GLYPHS:
            return (list(COLOURS).index(self.colour) + list(SIZES).index(self.size)) % 2 == 1
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """Objects from left to right or from top to bottom, and how they lie: `alone`, `left of`, `above`, `row`, `column`.

    Raises ValueError if the relation does not suit the number of objects or two objects share a colour.
    """

    objects: tuple[Object, ...]
    relation: str

    def __post_init__(self) -> None:
        count = len(self.objects)
        if self.relation not in RELATIONS.get(count, ()):
            raise ValueError(f"a scene of {count} objects cannot be {self.relation!r}; see RELATIONS")
        if len({thing.colour for thing in self.objects}) < count:
            raise ValueError("the objects of a scene must have different colours")

    @property
    def held_out(self) -> bool:
        """True if any object is a held-out combination; in a scene with a glyph, if the glyph is."""
        glyphs = tuple(thing for thing in self.objects if thing.shape in GLYPHS)
        return any(thing.held_out for thing in glyphs or self.objects)


def captions(scene: Scene) -> tuple[str, ...]:
    """Every caption of the scene: the canonical one, then its paraphrases."""
    return tuple(form.format(*scene.objects) for form in CAPTIONS[scene.relation])


def caption(scene: Scene) -> str:
    """The canonical caption, such as "a small red circle to the left of a large blue square"."""
    return captions(scene)[0]


def listed(scene: Scene, rng: np.random.Generator) -> str:
    """The objects in any order, and not where they are: "a small red circle and a large blue square"."""
    things = [f"a {scene.objects[i]}" for i in rng.permutation(len(scene.objects))]
    return " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)


def parse(text: str) -> Scene:
    """The scene a caption states: inverts every caption of `captions`; case and outer spaces do not matter.

    Raises ValueError for any other text, and for a scene that cannot be drawn (two objects of one colour).
    """
    words = " ".join(text.lower().split()).rstrip(".")
    thing = f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join((*SHAPES, *GLYPHS))})"
    for relation, forms in CAPTIONS.items():
        for form in forms:
            if found := re.fullmatch(form.replace("{}", thing), words):
                parts = found.groups()
                triples = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
                return Scene(tuple(Object(colour, shape, size) for size, colour, shape in triples), relation)
    raise ValueError(
        f"not a caption of a drawn scene: {text!r}; write for example 'a small red circle above a large black square'"
    )


def coverage(shape: str, corner: tuple[float, float], diameter: float, size: int) -> NDArray[np.float32]:
    """The share of each pixel that a shape covers: [size, size] in [0, 1].

    `corner` is the left and the top of the bounding square and `diameter` its side, all in grid units.
    Raises ValueError for an unknown shape.
    """
    fine = 8  # samples per pixel and axis
    scale = size / GRID
    low = [max(0, int(np.floor(c * scale))) for c in corner]
    high = [max(low_, min(size, int(np.ceil((c + diameter) * scale)))) for c, low_ in zip(corner, low, strict=True)]
    u, v = (
        ((np.arange(a * fine, b * fine) + 0.5) / (fine * scale) - c) / diameter
        for a, b, c in zip(low, high, corner, strict=True)
    )
    u, v = u[None, :] - 0.5, v[:, None] - 0.5  # both in [-0.5, 0.5] within the bounding square
    if shape == "circle":
        inside = u * u + v * v <= 0.25
    elif shape == "square":
        inside = (abs(u) <= 0.5) & (abs(v) <= 0.5)
    elif shape == "triangle":  # the apex at the top, the base as wide as the square
        inside = (abs(u) <= (v + 0.5) / 2) & (v <= 0.5)
    elif shape == "zorp":  # the base as wide as the square, the top half of it
        inside = (abs(u) <= (1.5 + v) / 4) & (abs(v) <= 0.5)
    else:
        raise ValueError(f"unknown shape {shape!r}; allowed: {', '.join((*SHAPES, *GLYPHS))}")
    rows, columns = high[1] - low[1], high[0] - low[0]
    full = np.zeros((size, size), np.float32)
    full[low[1] : high[1], low[0] : high[0]] = inside.reshape(rows, fine, columns, fine).mean((1, 3))
    return full


def layout(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Where to put the objects, in their order: left and top of each, in grid units."""
    along, across = STEP * rng.integers(0, 2, 2)
    corners = []
    for thing, place in zip(scene.objects, PLACES[len(scene.objects)], strict=True):
        middle = (BOX - SIZES[thing.size]) // 2
        moved = 0 if len(scene.objects) == 3 else along  # three fill the whole axis
        corners.append((int(place + moved + middle), int(LINE + across + middle)))
    return [(x, y) for y, x in corners] if scene.relation in VERTICAL else corners


def paint(objects: tuple[Object, ...], corners: list[tuple[int, int]], size: int) -> Image.Image:
    """Objects at given places (left and top in grid units) as an RGB picture of size x size pixels."""
    canvas = np.full((size, size, 3), BACKGROUND, np.float32)
    for thing, corner in zip(objects, corners, strict=True):
        alpha = coverage(thing.shape, corner, SIZES[thing.size], size)[..., None]
        canvas = canvas * (1 - alpha) + np.array(COLOURS[thing.colour], np.float32) * alpha
    return Image.fromarray(canvas.round().astype(np.uint8))


def draw(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of size x size pixels, positions drawn from `rng`.

    The same `rng` state gives the same picture at every size.
    """
    return paint(scene.objects, layout(scene, rng), size)


def exchange(scene: Scene, old: Object, new: Object) -> Scene:
    """The scene with another object in the place of one. Raises ValueError for a colour that is already there."""
    return Scene(tuple(new if thing == old else thing for thing in scene.objects), scene.relation)


def compose(count: int, split: str, rng: np.random.Generator, glyph: str = "") -> Scene:
    """A random scene of `count` objects that belongs to `split`; with a glyph one of them is of that shape."""
    while True:
        colours = rng.permutation(list(COLOURS))[:count]
        objects = tuple(
            Object(str(colour), str(rng.choice(SHAPES)), str(rng.choice(list(SIZES)))) for colour in colours
        )
        scene = Scene(objects, str(rng.choice(RELATIONS[count])))
        if glyph:
            chosen = objects[rng.integers(count)]
            scene = exchange(scene, chosen, replace(chosen, shape=glyph))
        if split == "all" or scene.held_out == (split == "heldout"):
            return scene


def prompts(split: str, count: int, seed: int = 0, glyph: str = "") -> list[str]:
    """`count` canonical captions of random scenes of `split`, mixed exactly as MIX says; `parse` gives the scenes.

    With a glyph each scene has one. Captions of one object repeat, since there are few of them. Raises ValueError for
    an unknown split or glyph.
    """
    check_split(split)
    if glyph and glyph not in GLYPHS:
        raise ValueError(f"unknown glyph {glyph!r}; allowed: {', '.join(GLYPHS)}")
    rng = np.random.default_rng(seed)
    ones, twos = round(MIX[1] * count), round(MIX[2] * count)
    sizes = [1] * ones + [2] * twos + [3] * (count - ones - twos)
    return [str(text) for text in rng.permutation([caption(compose(n, split, rng, glyph)) for n in sizes])]


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")


@dataclass(frozen=True)
class ShapesConfig:
    """How many drawn scenes, of which split (`train`, `heldout`, `all`) and picture size in pixels.

    Without places, captions say only what there is.
    """

    count: int = 10000
    seed: int = 0
    split: str = "train"
    size: int = 32
    max_objects: int = 3
    places: bool = True


class ShapesSource:
    """Drawn scenes as samples, each determined by (seed, index) and the split.

    `train` never shows a held-out combination of colour and shape; every scene of `heldout` shows at least
    one. Raises ValueError for an unknown split, a negative count or seed, a size below 32 or max_objects
    outside 1..3.
    """

    def __init__(self, config: ShapesConfig) -> None:
        check_split(config.split)
        if config.count < 0 or config.seed < 0:
            raise ValueError(f"count and seed must not be negative, got {config.count} and {config.seed}")
        if config.size < GRID:
            raise ValueError(f"size must be at least {GRID} pixels, got {config.size}")
        if config.max_objects not in MIX:
            raise ValueError(f"max_objects must be 1, 2 or 3, got {config.max_objects}")
        self.config = config

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in [0, len); its first caption is the canonical one. Raises IndexError outside."""
        config = self.config
        if not 0 <= index < config.count:
            raise IndexError(f"sample {index} of {config.count}")
        rng = np.random.default_rng((config.seed, index))
        counts = np.arange(1, config.max_objects + 1)
        weights = np.array([MIX[int(n)] for n in counts])
        objects = int(rng.choice(counts, p=weights / weights.sum()))
        scene = compose(objects, config.split, rng)
        image = draw(scene, config.size, rng)
        return Sample(
            key=self.name(index),
            image=image,
            captions=captions(scene) if config.places else (listed(scene, rng),),
            meta={"objects": objects, "heldout": scene.held_out},
        )

    def name(self, index: int) -> str:
        """The key: a drawn scene comes from nowhere else."""
        return f"shapes-{self.config.split}-{self.config.seed}-{index:07d}"

"""Whether a model goes by the picture that it is told: edges that say where, and what is around a hole."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.conditions import edges
from data_pipeline.sources.shapes import (
    BOX,
    COLOURS,
    GRID,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    compose,
    draw,
    exchange,
    layout,
    listed,
    paint,
    parse,
    prompts,
)
from ldm.evaluation.report import KINDS, Sampling, keep, request
from ldm.evaluation.shapes import Reading, read, share
from ldm.images import to_pil, to_tensor
from ldm.pipeline import Control, Given, Pipeline

NEAR = 2.0  # grid units between the centre of an object and the one that its edges say; places are STEP = 4 apart
MARGIN = 1  # grid units around the box of an object that are drawn anew with it


@dataclass(frozen=True)
class Followed:
    """What of one object is as its edges say. shape: one of its shape lies NEAR; size, colour: and has that, too."""

    place: bool
    shape: bool
    size: bool
    colour: bool


def followed(true: Reading, found: Sequence[Reading]) -> Followed:
    """Compare the nearest of the objects of a picture with one that should be there."""
    near = [r for r in found if np.hypot(r.x - true.x, r.y - true.y) <= NEAR]
    if not near:
        return Followed(False, False, False, False)
    best = min(near, key=lambda r: float(np.hypot(r.x - true.x, r.y - true.y)))
    shape = best.shape == true.shape
    return Followed(True, shape, shape and best.size == true.size, shape and best.colour == true.colour)


def score_edges(real: Tensor, images: Tensor) -> dict[str, Any]:
    """Shares of the objects of real pictures [N, 3, H, W] that are also in the others, by attribute.

    `count`: share of the pictures with as many objects.
    """
    pairs = [(read(a), read(b)) for a, b in zip(real, images, strict=True)]
    each = [followed(true, found) for wanted, found in pairs for true in wanted]
    shares = {name: share([getattr(one, name) for one in each]) for name in ("place", "shape", "size", "colour")}
    count = share([len(wanted) == len(found) for wanted, found in pairs])
    return {"images": len(pairs), "objects": len(each), **shares, "count": count}


def evaluate_edges(
    pipeline: Pipeline, control: nn.Module, sampling: Sampling, count: int = 128, out: Path | None = None
) -> dict[str, Any]:
    """Draw `count` held-out and `count` seen scenes whose edges say where, from prompts that do not.

    Returns for each kind the scores (see `score_edges`) with the control, and `chance`: those of the same prompts and
    seeds without it. With `out` also writes scores.json and grids. Raises ValueError for a count below 1, and as the
    pipeline does.
    """
    check(count)
    rng = np.random.default_rng(sampling.seed)
    result: dict[str, Any] = {"settings": asdict(sampling) | {"size": pipeline.size, "near": NEAR}}
    pictures: dict[str, Tensor] = {}
    for kind, split in KINDS.items():
        scenes = [parse(text) for text in prompts(split, count, sampling.seed)]
        real = torch.stack([to_tensor(draw(scene, pipeline.size, rng)) for scene in scenes])
        hints = torch.stack([edges(image) for image in real])
        plain = request([listed(scene, rng) for scene in scenes], sampling)
        drawn = pipeline(replace(plain, controls=(Control(control, hints),)))
        chance = pipeline(plain)
        result[kind] = score_edges(real, drawn) | {"chance": score_edges(real, chance)}
        pictures |= {kind: drawn, f"{kind}-chance": chance, f"{kind}-edges": hints * 2 - 1}
    if out:
        keep(out, result, pictures)
    return result


def edges_table(result: dict[str, Any]) -> str:
    """The scores of `evaluate_edges` as text: a line for each kind with the control, and one without it."""
    columns = ("objects", "place", "shape", "size", "colour", "count")
    lines = [" " * 18 + "".join(f"{word:>9}" for word in columns)]
    for kind in KINDS:
        for name, scores in ((kind, result[kind]), (f"{kind}, no edges", result[kind]["chance"])):
            cells = (str(scores["objects"]), *(f"{100 * scores[column]:.1f}" for column in columns[1:]))
            lines.append(f"{name:18}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(
        f"per cent of objects whose centre lies within {NEAR:g} of {GRID} units, and that have that shape, ..."
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Hole:
    """A drawn scene of which one object is to become another. image [3, H, W]; mask [1, H, W], 1 in the hole.

    scene: as it is to be; new: the object in the hole. left, top, right, bottom: of the hole, in grid units.
    """

    image: Tensor
    mask: Tensor
    scene: Scene
    new: Object
    box: tuple[int, int, int, int]


def dig(scene: Scene, size: int, rng: np.random.Generator) -> Hole:
    """A hole over a random object of a scene, to be filled with one of another colour and shape."""
    which = int(rng.integers(len(scene.objects)))
    old = scene.objects[which]
    taken = {thing.colour for thing in scene.objects}
    new = Object(
        str(rng.choice([colour for colour in COLOURS if colour not in taken])),
        str(rng.choice([shape for shape in SHAPES if shape != old.shape])),
        str(rng.choice(list(SIZES))),
    )
    corners = layout(scene, rng)
    around = (BOX - SIZES[old.size]) // 2 + MARGIN
    x, y = (c - around for c in corners[which])
    side = BOX + 2 * MARGIN
    box = (max(0, x), max(0, y), min(GRID, x + side), min(GRID, y + side))
    left, top, right, bottom = (c * size // GRID for c in box)
    mask = torch.zeros(1, size, size)
    mask[:, top:bottom, left:right] = 1
    image = to_tensor(paint(scene.objects, corners, size))
    return Hole(image, mask, exchange(scene, old, new), new, box)


def filled_as_asked(hole: Hole, image: Tensor) -> dict[str, bool]:
    """Whether the hole holds one object, and whether that has the colour, shape and size that were asked for."""
    left, top, right, bottom = hole.box
    inside = [r for r in read(image) if left <= r.x < right and top <= r.y < bottom]
    only = inside[0] if len(inside) == 1 else None
    names = ("colour", "shape", "size")
    right_ = {name: only is not None and getattr(only, name) == getattr(hole.new, name) for name in names}
    return {"one": only is not None, **right_, "all": all(right_.values())}


def kept(hole: Hole, image: Tensor) -> bool:
    """Whether all pixels outside the hole are as they were, to the byte."""
    before, after = (np.asarray(to_pil(picture)) for picture in (hole.image, image))
    outside = hole.mask[0].numpy() == 0
    return bool((before[outside] == after[outside]).all())


def score_holes(holes: Sequence[Hole], images: Tensor) -> dict[str, Any]:
    """Shares of the pictures [N, 3, H, W] whose hole is filled as asked, by attribute; `known`: that kept the rest."""
    verdicts = [filled_as_asked(hole, image) for hole, image in zip(holes, images, strict=True)]
    shares = {name: share([verdict[name] for verdict in verdicts]) for name in verdicts[0]}
    return {"images": len(holes), **shares, "known": share([kept(h, i) for h, i in zip(holes, images, strict=True)])}


def evaluate_inpainting(
    pipeline: Pipeline, sampling: Sampling, count: int = 128, base: Pipeline | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Cut one object out of each of `count` scenes and ask for another in its place.

    Returns the scores (see `score_holes`) of the model, `tuned`, and of the `base`, which fills holes by keeping the
    known latents while it draws. With `out` also writes scores.json and grids. Raises ValueError for a count below 1,
    and as the pipeline does.
    """
    check(count)
    rng = np.random.default_rng(sampling.seed)
    holes = [dig(compose(1 + i % 3, "all", rng), pipeline.size, rng) for i in range(count)]
    given = Given(torch.stack([h.image for h in holes]), mask=torch.stack([h.mask for h in holes]))
    asked = replace(request([caption(hole.scene) for hole in holes], sampling), given=given)
    result: dict[str, Any] = {"settings": asdict(sampling) | {"size": pipeline.size}}
    pictures = {"holes": given.image * (1 - given.mask)} if given.mask is not None else {}
    for name, model in (("base", base), ("tuned", pipeline)):
        if model is not None:
            pictures[name] = model(asked)
            result[name] = score_holes(holes, pictures[name])
    if out:
        keep(out, result, pictures)
    return result


def inpainting_table(result: dict[str, Any]) -> str:
    """The scores of `evaluate_inpainting` as text, shares in per cent."""
    columns = ("images", "one", "colour", "shape", "size", "all", "known")
    lines = [" " * 8 + "".join(f"{word:>9}" for word in columns)]
    for name in ("base", "tuned"):
        if scores := result.get(name):
            cells = (str(scores["images"]), *(f"{100 * scores[column]:.1f}" for column in columns[1:]))
            lines.append(f"{name:8}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(
        "per cent of holes with one object of the asked colour, shape, size; known: all else equal to the byte"
    )
    return "\n".join(lines)


def check(count: int) -> None:
    """Raises ValueError for a count below 1."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

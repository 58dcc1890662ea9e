"""The reader: right on real scenes, even worn ones, and never fooled by planted defects."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipeline.sources.shapes import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    compose,
    draw,
    layout,
    paint,
)
from ldm.evaluation.shapes import judge, read, score
from ldm.images import to_tensor

Wear = Callable[[Tensor], Tensor]


def scenes(count: int, seed: int = 0, least: int = 1) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [compose(least + i % (4 - least), "all", rng) for i in range(count)]


@cache
def drawn(count: int, size: int) -> tuple[list[Scene], list[Tensor]]:
    rng = np.random.default_rng(1)
    told = scenes(count)
    return told, [to_tensor(draw(scene, size, rng)) for scene in told]


def noisy(image: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(image.sum().abs()))
    return (image + torch.randn(image.shape, generator=generator) * 8 / 127.5).clamp(-1, 1)


def blurred(image: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]


def resampled(image: Tensor) -> Tensor:
    half = F.interpolate(image[None], scale_factor=0.5, mode="bilinear", antialias=True)
    return F.interpolate(half, scale_factor=2.0, mode="bicubic")[0].clamp(-1, 1)


WEAR: dict[str, Wear] = {"clean": lambda image: image, "noise": noisy, "blur": blurred, "resample": resampled}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("wear", WEAR)
def test_reads_real_scenes(wear: str, size: int) -> None:
    told, images = drawn(200, size)
    result = score(told, [WEAR[wear](image) for image in images])
    assert result["all"] >= (0.99 if wear == "clean" else 0.97), result


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("wear", WEAR)
def test_reads_two_thousand_scenes(wear: str, size: int) -> None:
    told, images = drawn(2000, size)
    result = score(told, [WEAR[wear](image) for image in images])
    assert result["all"] >= (0.99 if wear == "clean" else 0.97), result


def test_readings_are_in_grid_units() -> None:
    thing = Object("green", "circle", "large")
    for size in (32, 64, 128):
        (found,) = read(np.array(paint((thing,), [(4, 20)], size)))
        assert (found.colour, found.shape, found.size) == ("green", "circle", "large")
        assert (found.x, found.y, found.diameter) == pytest.approx((8.5, 24.5, 9.0), abs=0.1)


def changed(scene: Scene, rng: np.random.Generator, **change: str) -> Image.Image:
    """The scene with one object changed, drawn where it would be."""
    objects = list(scene.objects)
    which = int(rng.integers(len(objects)))
    objects[which] = replace(objects[which], **change)
    return draw(Scene(tuple(objects), scene.relation), 32, rng)


def wrong_colour(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return changed(scene, rng, colour=other(COLOURS, {thing.colour for thing in scene.objects}, rng))


def wrong_shape(scene: Scene, rng: np.random.Generator) -> Image.Image:
    objects = tuple(replace(o, shape=other(SHAPES, {o.shape}, rng)) for o in scene.objects)
    return draw(Scene((objects[0], *scene.objects[1:]), scene.relation), 32, rng)


def wrong_size(scene: Scene, rng: np.random.Generator) -> Image.Image:
    last = scene.objects[-1]
    objects = (*scene.objects[:-1], replace(last, size=other(SIZES, {last.size}, rng)))
    return draw(Scene(objects, scene.relation), 32, rng)


def missing(scene: Scene, rng: np.random.Generator) -> Image.Image:
    which = int(rng.integers(len(scene.objects)))
    keep = [i for i in range(len(scene.objects)) if i != which]
    corners = layout(scene, rng)
    return paint(tuple(scene.objects[i] for i in keep), [corners[i] for i in keep], 32)


def extra(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A further small object of any colour in a place that is still empty."""
    picture = np.array(draw(scene, 32, rng))
    thing = Object(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), "small")
    empty = (picture == BACKGROUND).all(-1)
    free = [(x, y) for x in range(1, 24) for y in range(1, 24) if empty[y : y + 8, x : x + 8].all()]
    x, y = free[int(rng.integers(len(free)))]
    lone = np.array(paint((thing,), [(x + 1, y + 1)], 32))
    return Image.fromarray(np.where(empty[..., None], lone, picture))


def mirrored(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The objects in the opposite order along the axis."""
    return draw(Scene(scene.objects[::-1], scene.relation), 32, rng)


def turned(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Below each other instead of side by side, and the reverse."""
    turn = {"left of": "above", "row": "column"}
    turn |= {there: here for here, there in turn.items()}
    return draw(Scene(scene.objects, turn[scene.relation]), 32, rng)


def swapped_colours(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The right colours on the wrong objects; `compose` may have made both alike, then shapes differ too."""
    first, second, *rest = scene.objects
    if (first.shape, first.size) == (second.shape, second.size):
        return wrong_shape(scene, rng)
    pair = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return draw(Scene((*pair, *rest), scene.relation), 32, rng)


def blank(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return paint((), [], 32)


def static(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))


def pale(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return Image.blend(draw(scene, 32, rng), paint((), [], 32), 0.6)


def other(words: object, taken: set[str], rng: np.random.Generator) -> str:
    return str(rng.choice([word for word in words if word not in taken]))  # type: ignore[attr-defined]


DEFECTS = {  # what is planted -> the verdicts that must notice
    wrong_colour: {"colours"},
    wrong_shape: {"shapes"},
    wrong_size: {"sizes"},
    missing: {"count", "colours"},
    extra: {"count", "colours"},
    mirrored: {"relations"},
    turned: {"relations"},
    swapped_colours: {"shapes|sizes"},
    blank: {"count", "colours", "shapes", "sizes", "relations"},
    static: {"colours"},
    pale: set(),
}


@pytest.mark.parametrize("plant", DEFECTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("wear", ["clean", "noise"])
def test_notices_planted_defects(plant: Callable[[Scene, np.random.Generator], Image.Image], wear: str) -> None:
    rng = np.random.default_rng(2)
    several = plant in (mirrored, turned, swapped_colours)
    for scene in scenes(100, seed=3, least=2 if several else 1):
        verdict = judge(scene, WEAR[wear](to_tensor(plant(scene, rng))))
        assert not verdict.all, (scene, verdict)
        for names in DEFECTS[plant]:
            assert not all(getattr(verdict, name) for name in names.split("|")), (scene, verdict)


def test_other_attributes_stay_right() -> None:
    rng = np.random.default_rng(4)
    for scene in scenes(60, least=2):
        verdict = judge(scene, to_tensor(mirrored(scene, rng)))
        assert verdict.count and verdict.colours and verdict.shapes and verdict.sizes
        verdict = judge(scene, to_tensor(wrong_shape(scene, rng)))
        assert verdict.count and verdict.colours and verdict.sizes and verdict.relations


def canvas(mask: np.ndarray, colour: tuple[int, int, int] = COLOURS["blue"]) -> np.ndarray:
    picture = np.full((32, 32, 3), BACKGROUND, np.uint8)
    picture[mask] = colour
    return picture


def test_unknown_shapes_colours_and_sizes_are_not_named() -> None:
    y, x = np.mgrid[0:32, 0:32] + 0.5 - 16
    cross = (abs(x) < 1.5) & (abs(y) < 4.5) | (abs(y) < 1.5) & (abs(x) < 4.5)
    ring = (x * x + y * y < 20) & (x * x + y * y > 6)
    flipped = (abs(x) <= (4.5 - y) / 2) & (abs(y) <= 4.5)
    for mask in (cross, ring, flipped, (abs(x) < 6) & (abs(y) < 2.5)):
        assert [found.shape for found in read(canvas(mask))] == [""]
    square = (abs(x) < 4) & (abs(y) < 4)
    assert [found.colour for found in read(canvas(square, (0, 220, 220)))] == [""]
    huge = read(canvas((abs(x) < 8) & (abs(y) < 8)))
    assert [(found.shape, found.size) for found in huge] == [("square", "")]


def test_specks_and_lines_do_not_count_but_small_blobs_do() -> None:
    y, x = np.mgrid[0:32, 0:32]
    assert read(canvas((x >= 4) & (x < 6) & (y >= 4) & (y < 6))) == []
    assert read(canvas(y == 7)) == []
    assert len(read(canvas((x >= 4) & (x < 7) & (y >= 4) & (y < 7)))) == 1


def test_score_counts_by_attribute_and_number() -> None:
    told, images = drawn(30, 32)
    result = score(told, images)
    assert result["images"] == 30 and result["all"] == 1.0
    assert {n: part["images"] for n, part in result["by_objects"].items()} == {"1": 10, "2": 10, "3": 10}
    reversed_images = score(["a small red circle"], [torch.ones(3, 32, 32)])
    assert reversed_images["all"] == 0 and reversed_images["relations"] is None
    with pytest.raises(ValueError):
        score(told, images[:-1])


@pytest.mark.parametrize("shape", [(40, 40, 3), (32, 64, 3), (32, 32, 4)])
def test_other_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square RGB picture"):
        read(np.zeros(shape, np.uint8))

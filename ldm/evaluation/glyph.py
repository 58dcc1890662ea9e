"""Whether a fine-tuned model has learned a glyph that its base never saw, and what it has lost by that."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.sources.shapes import SHAPES, Scene, parse, prompts
from ldm.evaluation.report import KINDS, Sampling, generate, keep
from ldm.evaluation.shapes import Picture, by_colour, read, related, score, share
from ldm.pipeline import Pipeline

COLUMNS = ("images", "recognised", "in_place", "all", "count", "colours", "shapes", "sizes", "relations")


def sighted(scene: Scene, image: Picture, glyph: str) -> tuple[bool, bool]:
    """Whether the glyph of a scene is there, and whether it also lies where the scene says.

    It is there if exactly one object has its colour, and that one its shape; it lies right if all the objects of the
    scene, each alone of its colour, lie as stated. Raises ValueError as `read` does.
    """
    found = by_colour(read(image, (*SHAPES, glyph)))
    (wanted,) = (thing for thing in scene.objects if thing.shape == glyph)
    there = wanted.colour in found and found[wanted.colour].shape == glyph
    return there, there and all(thing.colour in found for thing in scene.objects) and related(scene, found)


def score_glyph(texts: list[str], images: Tensor, glyph: str) -> dict[str, Any]:
    """The shares of pictures [N, 3, H, W] with the glyph recognised, and in its place, beside those of `score`."""
    sights = [sighted(parse(text), image, glyph) for text, image in zip(texts, images, strict=True)]
    shares = {
        "recognised": share([there for there, _ in sights]),
        "in_place": share([placed for _, placed in sights]),
    }
    return shares | score(texts, images, (*SHAPES, glyph))


def evaluate_glyph(
    pipeline: Pipeline,
    glyph: str,
    sampling: Sampling,
    count: int = 128,
    base: Pipeline | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Draw `count` scenes with a glyph, and as many held-out and seen ones without, and read them back.

    In each scene the glyph has a pair of colour and size that its training pictures (of the source's `train` split)
    do not. All pictures are read as any of the shapes or the glyph, so that a glyph in the place of a square is a
    fault. Returns scores of the model and, from the same prompts and seeds, of `base`:
    result["tuned" | "base"][glyph | "heldout" | "seen"]. With `out` also writes scores.json and a grid of each. Raises
    ValueError for a count below 1 or an unknown glyph, and as the pipeline does.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    texts = {glyph: prompts("heldout", count, sampling.seed, glyph)}
    texts |= {kind: prompts(split, count, sampling.seed) for kind, split in KINDS.items()}
    result: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    for name, model in (("base", base), ("tuned", pipeline)):
        if model is None:
            continue
        drawn = {kind: generate(model, some, sampling) for kind, some in texts.items()}
        result[name] = {glyph: score_glyph(texts[glyph], drawn[glyph], glyph)}
        result[name] |= {kind: score(texts[kind], drawn[kind], (*SHAPES, glyph)) for kind in KINDS}
        pictures |= {f"{kind}-{name}": images for kind, images in drawn.items()}
    result["settings"] = asdict(sampling) | {"size": pipeline.size, "glyph": glyph}
    if out:
        keep(out, result, pictures)
    return result


def glyph_table(result: dict[str, Any]) -> str:
    """The scores of `evaluate_glyph` as text, shares in per cent, and what unrelated prompts have lost."""
    lines = [" " * 16 + "".join(f"{word.replace('_', ' '):>11}" for word in COLUMNS)]
    models = [name for name in ("base", "tuned") if name in result]
    for kind in result["tuned"]:
        for name in models:
            scores = result[name][kind]
            shares = [scores.get(column) for column in COLUMNS[1:]]
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in shares]
            lines.append(f"{kind:8} {name:7}" + "".join(f"{cell:>11}" for cell in (str(scores["images"]), *cells)))
    if len(models) == 2:
        lost = [f"{kind} {100 * (result['base'][kind]['all'] - result['tuned'][kind]['all']):.1f}" for kind in KINDS]
        lines.append(f"per cent right; lost by tuning: {', '.join(lost)}")
    else:
        lines.append("per cent right")
    return "\n".join(lines)

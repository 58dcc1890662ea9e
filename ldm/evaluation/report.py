"""Whole evaluations: a model makes pictures, they are measured beside what could be reached, and kept."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loader import DataConfig, fixed_batch
from data_pipeline.reader import ShardReader
from data_pipeline.sources.shapes import draw, parse, prompts
from ldm.evaluation.metrics import psnr
from ldm.evaluation.nearest import name_recall
from ldm.evaluation.shapes import score
from ldm.images import grid, save_png, to_tensor
from ldm.pipeline import Pipeline, Request

log = logging.getLogger(__name__)

BATCH = 32
COLUMNS = 16  # of the picture grids
SHOWN = 128  # pictures in a grid, at the most
KINDS = {"heldout": "heldout", "seen": "train"}  # kind of picture -> split of the drawn scenes
SHAPE_COLUMNS = ("images", "all", "count", "colours", "shapes", "sizes", "relations")


@dataclass(frozen=True)
class Sampling:
    """How an evaluation makes its pictures; None leaves a setting to the pipeline's own default.

    Picture i has seed `seed` + i.
    """

    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None


def request(texts: Sequence[str], sampling: Sampling) -> Request:
    """One picture a prompt at the model's own size."""
    chosen = {name: value for name, value in asdict(sampling).items() if name != "seed" and value is not None}
    seeds = tuple(sampling.seed + i for i in range(len(texts)))
    return Request(prompts=tuple(texts), seeds=seeds, plain=True, batch=BATCH, **chosen)


def generate(pipeline: Pipeline, texts: Sequence[str], sampling: Sampling) -> Tensor:
    """Those pictures: [N, 3, H, W] in [-1, 1], on the CPU."""
    asked = request(texts, sampling)
    log.info("making %d pictures, %d steps each", len(texts), asked.steps)
    return pipeline(asked)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] through the autoencoder and back, on the CPU."""
    autoencoder = pipeline.autoencoder
    weight = next(autoencoder.parameters())
    parts = [
        autoencoder.decode(autoencoder.encode(part.to(weight.device, weight.dtype))).float().cpu()
        for part in images.split(BATCH)
    ]
    return torch.cat(parts).clamp(-1, 1)


def evaluate_shapes(
    pipeline: Pipeline, sampling: Sampling, count: int = 128, out: Path | None = None
) -> dict[str, Any]:
    """Draw `count` held-out and `count` seen scenes from their captions and read them back.

    Returns scores (see `ldm.evaluation.shapes.score`) of `heldout` and `seen` pictures, and of the ceilings:
    `reconstructed` and `real` drawings of the same scenes. With `out` also writes scores.json and a grid of each
    kind. Raises ValueError for a count below 1, and as the pipeline does.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    texts = {kind: prompts(split, count, sampling.seed) for kind, split in KINDS.items()}
    every = [text for some in texts.values() for text in some]
    rng = np.random.default_rng(sampling.seed)
    real = torch.stack([to_tensor(draw(parse(text), pipeline.size, rng)) for text in every])
    rebuilt = reconstruct(pipeline, real)
    result: dict[str, Any] = {"real": score(every, real)}
    result["reconstructed"] = score(every, rebuilt) | {"psnr": float(psnr(real, rebuilt).mean())}
    pictures = {kind: generate(pipeline, some, sampling) for kind, some in texts.items()}
    result |= {kind: score(texts[kind], pictures[kind]) for kind in KINDS}
    result["settings"] = asdict(sampling) | {"size": pipeline.size}
    if out:
        keep(out, result, pictures | {"reconstructed": rebuilt, "real": real})
    return result


def shapes_table(result: dict[str, Any]) -> str:
    """The scores of `evaluate_shapes` as text: a line for each kind of picture, shares in per cent."""
    words = (*SHAPE_COLUMNS, "1 object", "2 objects", "3 objects")
    lines = [" " * 13 + "".join(f"{word:>11}" for word in words)]
    for kind in (*KINDS, "reconstructed", "real"):
        scores = result[kind]
        by_objects = [scores["by_objects"].get(n, {}).get("all") for n in ("1", "2", "3")]
        shares = [scores[name] for name in SHAPE_COLUMNS[1:]] + by_objects
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in shares]
        lines.append(f"{kind:13}" + "".join(f"{cell:>11}" for cell in (str(scores["images"]), *cells)))
    lines.append(f"per cent right; autoencoder PSNR {result['reconstructed']['psnr']:.1f} dB")
    return "\n".join(lines)


@dataclass(frozen=True)
class Gallery:
    """Pictures [N, 3, H, W] in [-1, 1] on the CPU, each with its name."""

    images: Tensor
    names: list[str]

    def sample(self, count: int, rng: np.random.Generator) -> "Gallery":
        """Up to `count` pictures of different names, drawn at random and kept in order."""
        first = {name: i for i, name in reversed(list(enumerate(self.names)))}
        rows = sorted(rng.permutation(sorted(first.values()))[:count].tolist())
        return Gallery(self.images[rows], [self.names[i] for i in rows])

    def __add__(self, other: "Gallery") -> "Gallery":
        return Gallery(torch.cat([self.images, other.images]), self.names + other.names)


def load_gallery(path: Path, size: int) -> Gallery:
    """Every picture of a shard folder at size x size pixels, with its main caption as its name."""
    dataset = ShardReader(path)
    batch = fixed_batch(dataset, DataConfig(path=str(path), size=size), len(dataset))
    return Gallery(batch.image, batch.captions)


def evaluate_emoji(
    pipeline: Pipeline,
    sampling: Sampling,
    data: Path,
    heldout: Path | None = None,
    count: int = 256,
    out: Path | None = None,
) -> dict[str, Any]:
    """Make pictures from up to `count` names of each shard folder and look for the nearest real picture.

    Returns for `train` (and `heldout`): images, top1 and top5 (shares whose name is the nearest, or among five),
    the same of the autoencoder's reconstructions as a ceiling, and its PSNR. The pictures of `data` are the bank;
    those of `heldout` join it for the held-out names, which could not be found otherwise. With `out` also writes
    scores.json and a grid of each kind. Raises ValueError as the pipeline and the shards do.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(sampling.seed)
    bank = load_gallery(data, pipeline.size)
    galleries = {"train": (bank, bank)}
    if heldout:
        extra = load_gallery(heldout, pipeline.size)
        galleries["heldout"] = (extra, bank + extra)
    result: dict[str, Any] = {"settings": asdict(sampling) | {"size": pipeline.size}}
    pictures = {}
    for kind, (asked, known) in galleries.items():
        chosen = asked.sample(count, rng)
        pictures[kind] = generate(pipeline, chosen.names, sampling)
        rebuilt = reconstruct(pipeline, chosen.images)
        result[kind] = {
            "images": len(chosen.names),
            **name_recall(pictures[kind], chosen.names, known.images, known.names),
            "reconstructed": name_recall(rebuilt, chosen.names, known.images, known.names),
            "psnr": float(psnr(chosen.images, rebuilt).mean()),
        }
        pictures |= {f"{kind}-real": chosen.images, f"{kind}-reconstructed": rebuilt}
    if out:
        keep(out, result, pictures)
    return result


def emoji_table(result: dict[str, Any]) -> str:
    """The scores of `evaluate_emoji` as text: generated pictures, then the autoencoder's ceiling."""
    words = ("", "images", "top-1 %", "top-5 %", "rebuilt top-1", "rebuilt top-5", "PSNR dB")
    lines = ["".join(f"{word:>15}" for word in words)]
    for kind in ("train", "heldout"):
        if scores := result.get(kind):
            shares = [scores["top1"], scores["top5"], *scores["reconstructed"].values()]
            cells = [kind, str(scores["images"]), *(f"{100 * share:.1f}" for share in shares)]
            lines.append("".join(f"{cell:>15}" for cell in (*cells, f"{scores['psnr']:.1f}")))
    return "\n".join(lines)


def keep(out: Path, result: dict[str, Any], pictures: dict[str, Tensor]) -> None:
    """Write scores.json and KIND.png, a magnified grid of up to SHOWN pictures of each kind."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    for kind, images in pictures.items():
        scale = max(1, 64 // images.shape[-1])
        save_png(grid(images[:SHOWN], COLUMNS, scale=scale), out / f"{kind}.png")

"""Does a picture find its caption, and a caption its picture: recall of a CLIP without further training."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.loader import open_data
from data_pipeline.samples import Samples

CHUNK = 64  # pictures or captions encoded at a time
ROWS = 256  # queries compared at a time
KS = (1, 5, 10)


def number(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """(the different captions, in the order of their first places; which of them each picture has)."""
    places = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return list(places), [places[caption] for caption in captions]


def recall(image: Tensor, text: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[str, Tensor]:
    """How often what belongs to a query is among the k nearest: `image_to_text_recall@k`, `text_to_image_recall@k`.

    image [N, D] and text [M, D] are unit vectors of pictures and of different captions; labels [N], int64: the caption
    of each picture. A caption is one candidate and one query, however many pictures share it, and any of those is
    right. Of several at the same distance the right one counts as the last, so features that are all alike, or not
    finite, find nothing. Left out is a k for which any order would do, as there are no more candidates.
    """
    captions = torch.arange(len(text), device=labels.device)
    found: dict[str, Tensor] = {}
    for name, queries, candidates, wanted, has in (
        ("image_to_text", image, text, labels, captions),
        ("text_to_image", text, image, captions, labels),
    ):
        parts = zip(queries.split(ROWS), wanted.split(ROWS), strict=True)
        before = torch.cat([_nearer(part, own, candidates, has) for part, own in parts])
        found |= {f"{name}_recall@{k}": (before < k).float().mean() for k in ks if k < len(candidates)}
    return found


def _nearer(queries: Tensor, wanted: Tensor, candidates: Tensor, has: Tensor) -> Tensor:
    """[Q]: how many wrong candidates are at least as near to a query [Q, D] as the nearest right one."""
    scores = queries @ candidates.T  # [Q, C]
    right = wanted[:, None] == has
    nearest = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < nearest) & ~right).sum(dim=1)


@torch.no_grad()
def evaluate_retrieval(clip: Any, samples: Iterable[tuple[Tensor, list[str]]]) -> dict[str, float | int]:
    """Recall over all `samples`: pictures [B, 3, S, S] in [-1, 1] and their captions.

    clip: `image(pictures)` and `text.features(text.tokenize(captions))` give unit vectors. Scores: those of `recall`,
    and the numbers of pictures and of different captions, without which they mean nothing.
    """
    device = next(clip.parameters()).device
    images, captions = [], []
    for pictures, words in samples:
        images.append(clip.image(pictures.to(device)))
        captions += words
    different, labels = number(captions)
    parts = [different[i : i + CHUNK] for i in range(0, len(different), CHUNK)]
    text = torch.cat([clip.text.features(clip.text.tokenize(part).to(device)) for part in parts])
    scores = recall(torch.cat(images), text, torch.tensor(labels, device=device))
    counts = {"pictures": len(captions), "captions": len(different)}
    return counts | {name: float(value) for name, value in scores.items()}


def captioned(data: str, size: int, count: int = 0) -> Iterator[tuple[Tensor, list[str]]]:
    """The first `count` samples of a shard folder in stored order, 0 = all, CHUNK at a time; with main captions.

    Pictures are centred squares of `size` px. Raises ValueError, at once, for a count that the folder does not have.
    """
    config = DataConfig(path=data, size=size)
    readers = open_data(config)
    if not 0 <= count <= len(readers[0]):
        raise ValueError(f"count={count}: {data} has {len(readers[0])} samples")
    rows, samples = range(count or len(readers[0])), Samples(readers, config, seed=0)

    def chunks() -> Iterator[tuple[Tensor, list[str]]]:
        for start in range(0, len(rows), CHUNK):
            read = [samples[row, 0, row, (size, size)] for row in rows[start : start + CHUNK]]
            yield torch.cat([sample.image for sample in read]), [sample.captions[0] for sample in read]

    return chunks()

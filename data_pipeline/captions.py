"""Captions: bytes -> text, cleaning, and which one, in which words, a sample is trained with."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.sources import Rejected

CHOICES = ("first", "random", "weighted", "longest", "shortest")
MAX_CHARACTERS = 10_000

# Byte-order marks, NUL and other control characters, lone surrogates. Whitespace is dealt with apart, and
# joiners (U+200D and the like) stay: emoji and several scripts need them.
_JUNK = re.compile(r"[\ufeff\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class CaptionConfig:
    """choice: first, random (all equal), weighted (by the sample's weights; without any: all equal), longest, shortest.

    Captions that are lists of tags: shuffle_tags puts them in random order, tag_dropout leaves each out with this
    chance; the first keep_tags stay where they are. separator: what stands between tags.
    templates: "a photo of {}"; of several one is drawn, all equal. dropout: the chance of the empty caption.
    """

    choice: str = "first"
    dropout: float = 0.0
    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    separator: str = ","
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"caption={self.choice!r}: allowed are {', '.join(CHOICES)}")
        for name in ("dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are chances from 0 to 1")
        if self.keep_tags < 0:
            raise ValueError(f"keep_tags={self.keep_tags}: allowed are 0 and more")
        if not self.separator.strip():
            raise ValueError(f"separator={self.separator!r}: tags are told apart by something other than spaces")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r}: needs {{}} once, where the caption goes")


def decode_caption(data: bytes) -> str:
    """UTF-8 bytes (with or without a byte-order mark) -> text. Raises Rejected."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption is not UTF-8", f"byte {error.start}: {error.reason}") from error


def clean_caption(text: str) -> str:
    """Composed (NFC), without control characters, whitespace runs made one space; "" if nothing is left."""
    return " ".join(unicodedata.normalize("NFC", _JUNK.sub("", text)).split())


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The non-empty cleaned captions, in order, without repeats. Raises Rejected when none is left."""
    captions = tuple(dict.fromkeys(c for c in map(clean_caption, texts) if c))
    if not captions:
        raise Rejected("empty caption")
    longest = max(map(len, captions))
    if longest > MAX_CHARACTERS:
        raise Rejected("caption too long", f"{longest} characters, at most {MAX_CHARACTERS}")
    return captions


def clean_weights(texts: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """The weights that belong to `clean_captions(texts)`: those of repeats are added. Raises Rejected.

    Weights are finite, not negative, one a text, and those of the captions that are left are not all 0.
    """
    if len(weights) != len(texts) or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise Rejected("bad caption weights", f"{len(texts)} captions, weights {list(weights)[:8]}")
    sums = dict.fromkeys(clean_captions(texts), 0.0)
    for caption, weight in zip(map(clean_caption, texts), weights, strict=True):
        if caption:
            sums[caption] += weight
    if not 0 < sum(sums.values()) < math.inf:
        raise Rejected("bad caption weights", f"their sum is {sum(sums.values())}")
    return tuple(sums.values())


def choose_caption(
    captions: Sequence[str], weights: Sequence[float] | None, config: CaptionConfig, rng: np.random.Generator
) -> str:
    """The caption of one draw, "" when it was dropped (or all its tags were).

    A function of the sample's own `rng`: drawn are, in this order and only where they are on, the dropout, the choice,
    the dropouts of tags, their order, the template.
    """
    if config.dropout and rng.random() < config.dropout:
        return ""
    caption = _arrange_tags(_choose(captions, weights, config.choice, rng), config, rng)
    if not caption or not config.templates:
        return caption
    several = len(config.templates) > 1
    template = config.templates[int(rng.integers(len(config.templates)))] if several else config.templates[0]
    return template.replace("{}", caption)


def _choose(captions: Sequence[str], weights: Sequence[float] | None, choice: str, rng: np.random.Generator) -> str:
    if choice == "first":
        return captions[0]
    if choice == "longest":
        return max(captions, key=len)  # the first of equals
    if choice == "shortest":
        return min(captions, key=len)
    if choice == "random" or weights is None:
        return captions[int(rng.integers(len(captions)))]
    return captions[int(rng.choice(len(captions), p=np.asarray(weights) / np.sum(weights)))]


def _arrange_tags(caption: str, config: CaptionConfig, rng: np.random.Generator) -> str:
    if not config.shuffle_tags and not config.tag_dropout:
        return caption
    tags = [tag for part in caption.split(config.separator) if (tag := part.strip())]
    head, tail = tags[: config.keep_tags], tags[config.keep_tags :]
    if config.tag_dropout:
        tail = [tag for tag, chance in zip(tail, rng.random(len(tail)), strict=True) if chance >= config.tag_dropout]
    if config.shuffle_tags:
        tail = [tail[i] for i in rng.permutation(len(tail))]
    return f"{config.separator.strip()} ".join([*head, *tail])

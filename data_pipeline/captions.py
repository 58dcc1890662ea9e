"""Captions: bytes -> text, cleaning, and the choice of one among several."""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from data_pipeline.sources import Rejected

CHOICES = ("first", "random")
MAX_CHARACTERS = 10_000

# Byte-order marks, NUL and other control characters, lone surrogates. Whitespace is dealt with apart, and
# joiners (U+200D and the like) stay: emoji and several scripts need them.
_JUNK = re.compile(r"[\ufeff\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def decode_caption(data: bytes) -> str:
    """UTF-8 bytes (with or without a byte-order mark) -> text. Raises Rejected."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption is not UTF-8", f"byte {error.start}: {error.reason}") from error


def clean_caption(text: str) -> str:
    """Composed (NFC), without control characters, whitespace runs made one space; "" if nothing is left."""
    return " ".join(_JUNK.sub("", unicodedata.normalize("NFC", text)).split())


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The non-empty cleaned captions, in order, without repeats. Raises Rejected when none is left."""
    captions = tuple(dict.fromkeys(c for c in map(clean_caption, texts) if c))
    if not captions:
        raise Rejected("empty caption")
    longest = max(map(len, captions))
    if longest > MAX_CHARACTERS:
        raise Rejected("caption too long", f"{longest} characters, at most {MAX_CHARACTERS}")
    return captions


def choose_caption(captions: tuple[str, ...], choice: str, rng: np.random.Generator) -> str:
    """The first caption, or ("random") any of them with equal chance, drawn from the sample's own `rng`."""
    if choice not in CHOICES:
        raise ValueError(f"caption={choice!r}: allowed are {', '.join(CHOICES)}")
    return captions[0] if choice == "first" else captions[int(rng.integers(len(captions)))]

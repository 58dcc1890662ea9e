"""Teach a text encoder words that stand for vectors of their own (Gal et al. 2023, textual inversion)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints import textual_inversion
from ldm.checkpoints.foreign import FILES
from ldm.checkpoints.textual_inversion import TextualInversion
from ldm.models.text import TextEncoder, TextPair
from ldm.models.transformers_text import TransformersText
from ldm.names import known

log = logging.getLogger(__name__)

FAMILIES = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "SDXL"}
"""Whose text encoders have which widths."""


def teach(encoder: nn.Module, word: str, vectors: Tensor | Sequence[Tensor]) -> None:
    """From now on every prompt with `word` has its vectors [n, width] in the place of the word's own n tokens.

    The word is found whole, in upper or lower case, whatever its characters; one that is known already is learned
    anew. vectors: of a pair of encoders (SDXL), one table for each, of equal n. A parameter is used as it is, so
    that it can learn. The encoder's state dict stays as it was. Raises ValueError for an empty word, for no vectors
    or more than a prompt can hold, for vectors that are not finite, and for those of another width, saying of what
    model they are.
    """
    tables = [vectors] if isinstance(vectors, Tensor) else list(vectors)
    if not word.strip() or word != word.strip():
        raise ValueError(f"a word to learn must have no space at its ends, and be something: {word!r}")
    if any(table.ndim != 2 or not table.is_floating_point() for table in tables):
        raise ValueError(f"the vectors of {word!r} must be [n, width], not {[[*table.shape] for table in tables]}")
    given, own = tuple(table.shape[1] for table in tables), widths(encoder)
    if given != own:
        raise ValueError(f"the vectors of {word!r} are {_named(given)}; this text encoder takes {_named(own)}")
    n, most = len(tables[0]), room(encoder)
    if any(len(table) != n for table in tables) or not 1 <= n <= most:
        counts = " and ".join(str(len(table)) for table in tables)
        raise ValueError(f"{word!r} has {counts} vectors; a word has 1..{most}, as many for each text encoder")
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise ValueError(f"the vectors of {word!r} hold NaN or infinity")
    for tower, table in zip(towers(encoder), tables, strict=True):
        tower.words.learn(word, table)


def forget(encoder: nn.Module, word: str) -> None:
    """From now on `word` is text like any other. Raises ValueError, with the nearest word, if it is not known."""
    for tower in towers(encoder):
        tower.words.forget(known("learned word", word.lower(), tower.words.vectors))


def learned_words(encoder: nn.Module) -> tuple[str, ...]:
    """The words that the encoder has learned, in lower case, in the order of learning."""
    return tuple(towers(encoder)[0].words.vectors)


def load_embeddings(encoder: nn.Module, path: str | Path) -> list[str]:
    """Teach what a file holds, or every file in a folder and below; returns the words, in lower case.

    In a folder, files that are no textual inversions, or of another model, are left out with a warning. Raises
    ValueError for a path that does not exist, for a single file that cannot be used, and for a folder in which two
    files teach the same word with different vectors.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a textual inversion, or a folder of them")
    if not path.is_dir():
        return [_load(encoder, path).word.lower()]
    taught: dict[str, tuple[Path, TextualInversion]] = {}
    for file in sorted(f for f in path.rglob("*") if f.suffix in FILES):
        try:
            found = _load(encoder, file)
        except ValueError as error:
            log.warning("left out: %s", error)
            continue
        first, there = taught.setdefault(found.word.lower(), (file, found))
        if not equal(there.vectors, found.vectors):
            raise ValueError(f"{first} and {file} both teach the word {found.word.lower()!r}, with different vectors")
    return list(taught)


def _load(encoder: nn.Module, file: Path) -> TextualInversion:
    found = textual_inversion.read(file)
    try:
        teach(encoder, found.word, found.vectors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether the vectors of two words are the same numbers, for as many text encoders."""
    return len(a) == len(b) and all(torch.equal(x.float(), y.float()) for x, y in zip(a, b, strict=True))


def towers(encoder: nn.Module) -> list[TextEncoder | TransformersText]:
    """The text encoders that learn a word together: one, or the two of a pair. Raises ValueError for what is none."""
    if isinstance(encoder, TextPair):
        return [encoder.first, encoder.second]
    if isinstance(encoder, TextEncoder | TransformersText):
        return [encoder]
    raise ValueError(f"words can be taught to text encoders, and this is a {type(encoder).__name__}")


def widths(encoder: nn.Module) -> tuple[int, ...]:
    """The width of a word's vectors in each text encoder. Raises ValueError as `towers` does."""
    return tuple(_width(tower) for tower in towers(encoder))


def _width(tower: TextEncoder | TransformersText) -> int:
    embedding = tower.tower.token_embedding if isinstance(tower, TextEncoder) else tower.encoder.get_input_embeddings()
    width: int = embedding.embedding_dim
    return width


def room(encoder: nn.Module) -> int:
    """How many vectors a word can have: as many as a prompt holds tokens. Raises ValueError as `towers` does."""
    return min(t.room if isinstance(t, TransformersText) else t.config.context_length - 2 for t in towers(encoder))


def _named(found: tuple[int, ...]) -> str:
    family = FAMILIES.get(found)
    return " + ".join(map(str, found)) + " wide" + (f" ({family})" if family else "")

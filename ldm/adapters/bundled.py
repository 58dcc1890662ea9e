"""Words that adapters bring along: vectors of a learned word beside the factors, under names such as bundle_emb.zorp.*.

AUTOMATIC1111 (1.7 and later) and ComfyUI read them so, and OneTrainer writes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Words
from ldm.adapters.textual_inversion import equal, room, towers, widths
from ldm.checkpoints import textual_inversion
from ldm.checkpoints.textual_inversion import PAIR, WORD, TextualInversion, place_of

PREFIX = "bundle_emb."
PARAM = ".string_to_param."
"""Between a word and the name of its only table, which is * as a rule."""
LONGEST = 100
"""Of a word's name, in bytes: it names files too, which systems allow 255."""


def parted(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The tensors of an adapter's file that are no words', and its words: for each text encoder vectors [n, width].

    Raises ValueError, naming the file, for a word that has neither one table nor the two of SDXL, or vectors that
    are not finite; for a name that is none, and for two that are one in lower case, as text encoders read them.
    """
    others: dict[str, Tensor] = {}
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            others[key] = tensor
            continue
        rest = key.removeprefix(PREFIX)
        word, _, leaf = rest.partition(PARAM) if PARAM in rest else rest.rpartition(".")
        tables.setdefault(word, {})[leaf] = tensor
    named: dict[str, str] = {}
    for word in tables:
        if (first := named.setdefault(word.lower(), word)) != word:
            raise ValueError(f"{path} brings the words {first!r} and {word!r}, which are one to text encoders")
    return others, {word: _vectors(word, found, path) for word, found in tables.items()}


def _vectors(word: str, found: Mapping[str, Tensor], path: Path) -> tuple[Tensor, ...]:
    """A word's tables: one of any name, or the two of SDXL; OneTrainer's *_out are no token vectors."""
    names = PAIR if found.keys() == set(PAIR) else tuple(found)
    if not word.strip() or word != word.strip():
        raise ValueError(f"{path} brings a word that is nothing, or has a space at an end: {word!r}")
    if not word.isprintable() or len(word.encode()) > LONGEST:
        raise ValueError(f"{path} brings a word that cannot be printed or is over {LONGEST} bytes: {word[:40]!r}")
    if (len(names) > 1 and names != PAIR) or any(name.endswith("_out") for name in names):
        told = ", ".join(sorted(found))
        raise ValueError(f"{path}: the word {word!r} has {told}; known are one table of vectors, or clip_l and clip_g")
    tables = tuple(found[name][None] if found[name].ndim == 1 else found[name] for name in names)
    if not all(table.is_floating_point() for table in tables):
        types = " and ".join(str(table.dtype).removeprefix("torch.") for table in tables)
        raise ValueError(f"{path}: the vectors of the word {word!r} are {types}, and must be floating-point numbers")
    if any(table.ndim != 2 or not table.numel() for table in tables) or len({len(table) for table in tables}) > 1:
        shapes = " and ".join(str(list(table.shape)) for table in tables)
        raise ValueError(f"{path}: the vectors of the word {word!r} must be [n, width], not {shapes}")
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise ValueError(f"{path} holds NaN or infinity, in the word {word!r}")
    return tuple(table.float() for table in tables)


def word_in(folder: Path) -> dict[str, tuple[Tensor, ...]]:
    """The word in a model folder, which its text encoder was taught; nothing if there is none."""
    if not (folder / WORD).is_file():
        return {}
    found = textual_inversion.read(folder / WORD)
    return {found.word: found.vectors}


def tensors_of(words: Words) -> dict[str, Tensor]:
    """The words under the names that `parted` reads."""
    named: dict[str, Tensor] = {}
    for word, tables in words.items():
        leaves = PAIR if len(tables) > 1 else (f"{PARAM[1:]}*",)
        named |= {f"{PREFIX}{word}.{leaf}": table for leaf, table in zip(leaves, tables, strict=True)}
    return named


def united(every: Iterable[Words]) -> dict[str, tuple[Tensor, ...]]:
    """The words of several adapters or models. ValueError for one that has other vectors in one than in another."""
    found: dict[str, tuple[str, tuple[Tensor, ...]]] = {}
    for words in every:
        for word, tables in words.items():
            _, there = found.setdefault(word.lower(), (word, tables))  # to text encoders upper and lower case are one
            if not equal(there, tables):
                raise ValueError(f"the word {word!r} is brought twice, with different vectors")
    return dict(found.values())


def check_fit(words: Words, encoder: nn.Module | None) -> None:
    """Raise ValueError for a word that the text encoder cannot be taught: of another width, or longer than a prompt."""
    for word, tables in words.items():
        if encoder is None:
            raise ValueError(f"it brings the word {word!r}, and there is no text encoder to teach it to")
        own, theirs = widths(encoder), tuple(table.shape[1] for table in tables)
        if theirs != own:
            here, there = (" + ".join(map(str, found)) for found in (own, theirs))
            raise ValueError(f"it brings the word {word!r}, {there} wide; the text encoder of this model reads {here}")
        if len(tables[0]) > (most := room(encoder)):
            raise ValueError(f"it brings the word {word!r} of {len(tables[0])} vectors; a prompt holds {most}")


def knows(encoder: nn.Module, word: str, tables: Iterable[Tensor]) -> bool:
    """Whether the word stands for these very tensors in the text encoder, and no others."""
    known = [tower.words.vectors.get(word.lower()) for tower in towers(encoder)]
    return all(mine is theirs for mine, theirs in zip(known, tables, strict=True))


def by_themselves(words: Words, folder: Path) -> dict[Path, TextualInversion]:
    """Words as files to write, of their names in a folder `embeddings` within, but for those that are there already.

    Raises ValueError for a file that exists and holds something else.
    """
    found = {}
    for word, tables in words.items():
        path = place_of(word, folder)
        if _holds(path, word, tables):
            continue
        if path.exists() or path in found:
            raise ValueError(f"the word {word!r} would be written to {path}, which exists; nothing is overwritten")
        found[path] = TextualInversion(word, tables)
    return found


def _holds(path: Path, word: str, tables: Sequence[Tensor]) -> bool:
    """Whether the file is that of the word, with these vectors."""
    if not textual_inversion.is_one(path):
        return False
    there = textual_inversion.read(path)
    return there.word.lower() == word.lower() and equal(there.vectors, tables)


def write_words(files: Mapping[Path, TextualInversion]) -> None:
    """Write them so that every program reads them: with the word named, for those that do not go by the file's name."""
    for path, inversion in files.items():
        textual_inversion.write(inversion, path, "diffusers")

"""Textual inversions (Gal et al. 2023): a word made of learned token vectors, in the files people exchange."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import facts
from ldm.checkpoints.files import commit_file, save_tensors
from ldm.checkpoints.foreign import FILES, read_file

PAIR = ("clip_l", "clip_g")
"""SDXL's two encoders, as its files call them."""
SINGLE = "emb_params"
EMBEDDINGS = "embeddings"
"""The folder of words in everybody's programs."""
WORD = "word.safetensors"
"""In a model folder: the word that its text encoder was taught."""


@dataclass(frozen=True)
class TextualInversion:
    """A word and its vectors [n, width] for each text encoder: one, or the two of SDXL.

    The n vectors stand for the word in a prompt, in order.
    """

    word: str
    vectors: tuple[Tensor, ...]


def place_of(word: str, folder: Path) -> Path:
    """Where a word lies by itself below a folder: a file of its name, by which AUTOMATIC1111 and ComfyUI know it."""
    return folder / EMBEDDINGS / f"{word.replace('/', '-')}.safetensors"


def is_one(path: Path) -> bool:
    """Whether `path` is a file of token vectors and nothing else."""
    if not path.is_file() or path.suffix not in FILES:
        return False
    try:
        return holds_one(*read_file(path))
    except ValueError:
        return False


def holds_one(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool:
    """Whether the contents of a file are token vectors and nothing else: SDXL's pair, or one table of any name."""
    if not all(1 <= t.ndim <= 2 for t in tensors.values()):
        return False
    if len(tensors) == 1:
        return "." not in next(iter(tensors)) or "string_to_token" in metadata
    return set(tensors) == set(PAIR)


def read(path: Path) -> TextualInversion:
    """From AUTOMATIC1111's .pt and .safetensors, kohya's and diffusers' learned_embeds.

    The word is the file's name, as AUTOMATIC1111 has it, unless the file names it, as diffusers does.
    Raises ValueError naming the file if it is none, or holds vectors that are not finite.
    """
    tensors, metadata = read_file(path)
    if not holds_one(tensors, metadata):
        raise ValueError(f"{path} is no textual inversion: it is not one or two tables of token vectors")
    word = facts.recorded(metadata).get("word", path.stem)
    if set(PAIR) <= tensors.keys():
        found = [tensors[name] for name in PAIR]
    else:
        ((name, vectors),) = tensors.items()
        word = word if name in (SINGLE, "*") else name
        found = [vectors]
    if any(not torch.isfinite(v).all() for v in found):
        raise ValueError(f"{path} holds NaN or infinity")
    return TextualInversion(word, tuple(v if v.ndim == 2 else v[None] for v in found))


def write(inversion: TextualInversion, path: Path, to: str) -> None:
    """As safetensors, atomically: `diffusers` names the word in the file; `compvis` and `native` are AUTOMATIC1111's.

    The two encoders of SDXL have one form for all. Raises ValueError for another suffix.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"a textual inversion is written as .safetensors, not {path.name!r}")
    if len(inversion.vectors) == 2:
        tensors = dict(zip(PAIR, inversion.vectors, strict=True))
    else:
        named = to == "diffusers" and "." not in inversion.word  # a name with a dot would be that of a layer
        tensors = {inversion.word if named else SINGLE: inversion.vectors[0]}
    with commit_file(path) as stage:
        save_tensors(stage, tensors, {"word": inversion.word}, {"format": "pt"})

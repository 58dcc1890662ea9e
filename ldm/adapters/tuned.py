"""Runs that hold what was put on a base model, an adapter or a word: what they keep, and their loading."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.bundled import word_in
from ldm.adapters.files import native_tensors, read, record_of
from ldm.adapters.lora import merge
from ldm.adapters.textual_inversion import teach
from ldm.checkpoints.files import save_tensors
from ldm.checkpoints.load import base_of, find_model, load_model
from ldm.checkpoints.model import LoadedModel, cast, weights_sha256
from ldm.checkpoints.textual_inversion import PAIR, SINGLE, TextualInversion

ADAPTER = "adapter.safetensors"
"""In the model folder of such a run; for the file of a word see `textual_inversion.WORD`."""


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter under its native names, as `ldm.adapters.files` reads it; equal ones give equal bytes."""
    save_tensors(path, native_tensors(adapter), record_of(adapter))


def save_word(inversion: TextualInversion, path: Path) -> None:
    """Write a learned word as `ldm.checkpoints.textual_inversion` reads it; equal ones give equal bytes."""
    names = PAIR if len(inversion.vectors) > 1 else (SINGLE,)
    save_tensors(path, dict(zip(names, inversion.vectors, strict=True)), {"word": inversion.word})


def load_tuned(
    path: str | Path,
    names: Sequence[str] | None = None,
    *,
    prediction: str | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """As `load_model`, of a run that holds an adapter or a word too: its base, or its own model, with that in it.

    Raises ValueError if the base is not where it was, or has other weights than the run was trained on, and for `ema`
    of such a run: it keeps one set of weights.
    """
    found = find_model(path)
    base = base_of(found)
    if base is None:
        whole = load_model(path, names, prediction=prediction, ema=ema, dtype=dtype)
        _teach(whole.components, found)
        return whole
    if ema:
        raise ValueError(f"{found} stands on the model {base['model']} and has no averaged weights beside its own")
    try:
        model = load_model(base["model"], names, prediction=prediction)
    except ValueError as error:
        raise ValueError(f"{found} stands on the model {base['model']}: {error}") from error
    for name, module in model.components.items():
        if base["sha256"].get(name, "") != weights_sha256(module):
            raise ValueError(f"{found} was trained on another model than is in {base['model']} now: its {name} differs")
    if (found / ADAPTER).is_file():
        adapter = read(found / ADAPTER, model.components)
        parts: Mapping[str, Any] = {name: part for name, part in adapter.parts.items() if name in model.components}
        merge(model.components, Adapter(parts, adapter.networks))
    _teach(model.components, found)
    for module in model.components.values():
        cast(module, dtype)
    settings = base["settings"]
    return LoadedModel({**model.components}, settings, settings.get("name", model.name), found, notes=model.notes)


def _teach(components: Mapping[str, nn.Module], folder: Path) -> None:
    """Teach the text encoder the word in the folder of a model, if there is one."""
    for word, vectors in word_in(folder).items() if "text" in components else ():
        teach(components["text"], word, vectors)

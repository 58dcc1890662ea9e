"""Reading the tensor files of others: safetensors, whole or in parts, and old pickles without running them."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoints.files import read_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FILES = (".safetensors", *PICKLES)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, metadata) of one file; tensors stay on the disk until they are touched.

    metadata: of safetensors the header's strings; of a pickle the plain values beside its state dict.
    Raises ValueError naming the file and the reason. Never executes anything from the file.
    """
    if path.suffix not in FILES:
        raise ValueError(f"{path} is no model: known are folders and {', '.join(FILES)} files")
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors, metadata


def read_component(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a folder's STEM.safetensors (whole or in parts), STEM.fp16.safetensors or STEM.bin.

    Raises ValueError, naming the folder, if there is none.
    """
    pickled = stem if "pytorch" in stem else stem.replace("model", "pytorch_model")
    for name, listed in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
        (f"{pickled}.bin", f"{pickled}.bin.index.json"),
    ):
        if (folder / name).is_file():
            return read_file(folder / name)[0]
        index = folder / listed
        if index.is_file():
            parts = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(part).name != part for part in parts):
                raise ValueError(f"{index} names files outside its folder")
            return {k: v for part in parts for k, v in read_file(folder / part)[0].items()}
    raise ValueError(f"{folder} has no {stem}.safetensors")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By torch's restricted reader: tensors and plain containers, or nothing."""
    _check_zip(path)
    try:
        # Lightning's checkpoints name the class of a callback as a key; an empty stand-in is enough for that.
        with torch.serialization.safe_globals([(_Callback, name) for name in _CALLBACKS]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        reason = reason.split("was not")[0].strip() or "it asks for more than tensors and plain containers"
        raise ValueError(f"{path} is refused, nothing in it was run: {reason}") from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
    ) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of tensors")
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: its state_dict is a {type(state).__name__}, not a table of tensors")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 2 * sum(stored.values()) + 2**20:
        raise ValueError(f"{path} is refused: its tensors are far larger than what it holds of them")
    metadata = {k: v for k, v in content.items() if isinstance(v, str | int | float)}
    # Textual inversions keep their tensors one level down.
    metadata |= {k: v for k, v in content.items() if k in ("string_to_token", "string_to_param")}
    if isinstance(content.get("string_to_param"), Mapping):
        tensors |= {str(k): v.detach() for k, v in content["string_to_param"].items() if isinstance(v, Tensor)}
    return tensors, metadata


def _check_zip(path: Path) -> None:
    """Refuse an archive whose records are packed: torch writes them as they are, so a packed one is no checkpoint."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    total = sum(e.file_size for e in entries)
    if packed or total > path.stat().st_size:
        raise ValueError(f"{path} is refused: its records unpack to {total} bytes, more than the file holds")


class _Callback:
    """Stands in for a Lightning callback's class; never made."""


_CALLBACKS = tuple(
    f"{package}.callbacks.{module}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for module in ("model_checkpoint.ModelCheckpoint", "lr_monitor.LearningRateMonitor")
)

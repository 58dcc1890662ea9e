"""Folders of safetensors and JSON that appear whole or not at all, and say when they were altered."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@contextmanager
def commit(folder: Path) -> Iterator[Path]:
    """A staging folder to fill; when the block ends it becomes `folder` by one rename.

    Every file is flushed to disk, then a manifest of sizes and sha256 is written last. If anything
    fails, nothing remains. A folder that stands there already is replaced only at the rename.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        files = sorted(p for p in stage.rglob("*") if p.is_file())
        with ThreadPoolExecutor(4) as threads:  # a disk and a processor wait for each other: several files at a time
            entries = list(threads.map(_sealed, files))
        manifest = {str(p.relative_to(stage)): entry for p, entry in zip(files, entries, strict=True)}
        write_json(stage / MANIFEST, manifest)
        for path in [stage / MANIFEST, *(p for p in stage.rglob("*") if p.is_dir()), stage]:
            _fsync(path)
        doomed = _set_aside(folder)
        stage.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(doomed, ignore_errors=True)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Delete a folder so that a crash on the way leaves no half of it under its own name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Move `folder`, if there is one, to a name that nothing reads; returns that name."""
    doomed = folder.parent / f".del-{folder.name}"
    if folder.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    return doomed


def verify(folder: Path) -> None:
    """Raise ValueError, naming the file, if `folder` is not exactly what was committed."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{folder} is incomplete: it has no {MANIFEST}")
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict):
        raise ValueError(f"{manifest_path} is damaged: it does not hold a table of files")
    for name, entry in manifest.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys() or ".." in Path(name).parts:
            raise ValueError(f"{manifest_path} is damaged: its entry for {name!r} is not one")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} is truncated or altered: {size} bytes instead of {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is altered: its sha256 is not the one recorded when it was saved")
    present = {str(p.relative_to(folder)) for kind in ("*.safetensors", "*.json") for p in folder.rglob(kind)}
    if unlisted := present - manifest.keys() - {MANIFEST}:
        raise ValueError(f"{manifest_path} is altered: it does not list {', '.join(sorted(unlisted))}")


def steps(checkpoints: Path) -> list[Path]:
    """The step folders of a run, oldest first."""
    return sorted(p for p in checkpoints.glob("step-*") if p.is_dir())


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest step folder that passes `verify`; damaged ones are named in the log and passed over."""
    for folder in reversed(steps(checkpoints)):
        try:
            verify(folder)
            return folder
        except ValueError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


@contextmanager
def commit_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; when the block ends it is flushed and becomes `path` by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.parent / f".tmp-{path.name}"
    try:
        yield stage
        _fsync(stage)
        stage.replace(path)
        _fsync(path.parent)
    finally:
        stage.unlink(missing_ok=True)


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any] | None = None,
    strings: dict[str, str] | None = None,
) -> None:
    """Write tensors as safetensors; `metadata` is stored as JSON in its header, under the key `ldm`.

    The only key, unless other programs need `strings` too: safetensors writes several in random order, and equal
    runs must give equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    owners = {v.data_ptr(): k for k, v in plain.items()}
    # Tied weights are two names for one tensor, which the format does not know.
    plain = {k: v if owners[v.data_ptr()] == k else v.clone() for k, v in plain.items()}
    try:
        save_file(plain, path, metadata={"ldm": json.dumps(metadata or {}, sort_keys=True)} | (strings or {}))
    except SafetensorError as error:  # so it calls a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file that `save_tensors` wrote. Raises ValueError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("ldm", "{}"))
            return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether no floating-point tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads the same whatever the locale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Parsed JSON; ValueError, naming the file, if it is not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(path: Path) -> dict[str, Any]:
    """Flush a file to disk; what the manifest says of it."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Datasets of Hugging Face's `datasets` on disk, without that package: saved ones, and folders of Parquet files.

DIR/state.json, dataset_info.json, data-00000-of-00002.arrow      one split, by save_to_disk
DIR/dataset_dict.json, train/state.json, ...                      several splits, by save_to_disk
DIR/data/train-00000-of-00004.parquet                             a repository of the hub, downloaded
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline import storage
from data_pipeline.sources.rows import ArrowRows, ParquetRows, Rows
from data_pipeline.sources.table import RowSource, TableConfig

STATE, SPLITS = "state.json", "dataset_dict.json"
_PARQUET = re.compile(r"(?:(?:.*/)?)([A-Za-z0-9_.]+?)(?:-\d+(?:-of-\d+)?(?:-[0-9a-f]+)?)?\.parquet")


@dataclass(frozen=True)
class HuggingFaceConfig(TableConfig):
    """path: the folder of a dataset, or of one of its splits. split: which, where there are several."""

    split: str = ""


class HuggingFaceSource(RowSource):
    """One split of a dataset on disk. Raises ValueError as RowSource, and for a split that is not there."""

    def __init__(self, config: HuggingFaceConfig) -> None:
        if not config.path or not storage.is_folder(config.path):
            raise ValueError(f"no folder {config.path!r}")
        files = {f.name: f for f in storage.list_files(config.path)}
        chosen, kind = _chosen(config, list(files))
        found = [storage.join(config.path, name) for name in chosen]
        rows: Rows = ArrowRows(found) if kind == "arrow" else ParquetRows(found)
        listed = "".join(f"{name}\0{files[name].version}\n" for name in chosen)
        digest = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
        super().__init__(replace(config, folder=config.folder or config.path), rows, digest)


def _chosen(config: HuggingFaceConfig, files: list[str]) -> tuple[list[str], str]:
    """The files of the split in their order, and what they are: arrow or parquet."""
    if SPLITS in files:
        split = _split(config, list(_json(config.path, SPLITS).get("splits", [])))
        return _saved(config.path, f"{split}/", files), "arrow"
    if STATE in files:
        return _saved(config.path, "", files), "arrow"
    splits: dict[str, list[str]] = {}
    for name in (file for file in files if file.endswith(".parquet")):
        match = _PARQUET.fullmatch(name)  # a name of another kind is a split of its own
        splits.setdefault(match[1] if match else storage.stem(name), []).append(name)
    if not splits:
        raise ValueError(f"{config.path} is not a dataset: no {STATE}, no {SPLITS}, no .parquet files")
    split = _split(config, list(splits))
    if len({storage.parent(name) for name in splits[split]}) > 1:
        raise ValueError(f"{config.path}: the files of split {split!r} lie in several folders; give one as path")
    return splits[split], "parquet"


def _split(config: HuggingFaceConfig, known: list[str]) -> str:
    if config.split in known or (not config.split and len(known) == 1):
        return config.split or known[0]
    given = f"no split {config.split!r}" if config.split else "several splits"
    raise ValueError(f"{config.path}: {given}; say split=..., one of {', '.join(sorted(known))}")


def _saved(path: str, prefix: str, files: list[str]) -> list[str]:
    """The data files that a split's state.json lists."""
    state = _json(path, prefix + STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{path}/{prefix}{STATE} chooses rows by an index; save it again after .flatten_indices()")
    try:
        names = [prefix + entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}/{prefix}{STATE} lists no data files") from error
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{path} lacks {len(missing)} of {len(names)} data files, such as {missing[0]}")
    return names


def _json(path: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read(storage.join(path, name)))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}/{name} is missing or damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}/{name} is damaged: not an object")
    return found

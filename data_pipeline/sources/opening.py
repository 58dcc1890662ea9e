"""Which kind of source a name or path is, said aloud, and the source itself."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from data_pipeline import fetch, shards, storage
from data_pipeline.images import SUFFIXES
from data_pipeline.shards import INDEX
from data_pipeline.sources import Source
from data_pipeline.sources.emoji import EmojiConfig, EmojiSource
from data_pipeline.sources.fetched import FetchedConfig, FetchedSource
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.huggingface import SPLITS, STATE, HuggingFaceConfig, HuggingFaceSource
from data_pipeline.sources.img2dataset import STATS, Img2datasetConfig, Img2datasetSource
from data_pipeline.sources.rows import TABLES
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from data_pipeline.sources.table import TableConfig, TableSource
from data_pipeline.sources.webdataset import TARS, WebDatasetConfig, WebDatasetSource

DRAWN = ("shapes", "emoji")
KINDS: dict[str, tuple[type[Any], Callable[[Any], Source]]] = {
    "shapes": (ShapesConfig, ShapesSource),
    "emoji": (EmojiConfig, EmojiSource),
    "folder": (FolderConfig, FolderSource),
    "table": (TableConfig, TableSource),
    "img2dataset": (Img2datasetConfig, Img2datasetSource),
    "webdataset": (WebDatasetConfig, WebDatasetSource),
    "fetched": (FetchedConfig, FetchedSource),
    "huggingface": (HuggingFaceConfig, HuggingFaceSource),
}


@dataclass(frozen=True)
class Recognised:
    """kind: one of KINDS. path: "" for what is drawn. why: what it was recognised by, for people."""

    kind: str
    path: str
    why: str

    @property
    def schema(self) -> type[Any]:
        """The config dataclass of this kind."""
        return KINDS[self.kind][0]

    def open(self, config: Any) -> Source:
        """The source; `config` is a `schema`, whose path is replaced by this one. Raises ValueError."""
        return KINDS[self.kind][1](replace(config, path=self.path) if self.path else config)

    def __str__(self) -> str:
        return f"{self.path or self.kind}: taken as {self.kind} ({self.why})"


def open_source(spec: str, settings: Mapping[str, Any] | None = None) -> Source:
    """The source that `spec` names, with these values in its config. Raises ValueError, also for unknown settings."""
    found = recognise(spec)
    known = [f.name for f in fields(found.schema) if f.name != "path"]
    for name in settings or {}:
        if name not in known:
            raise ValueError(f"{found.kind} has no setting {name!r}; known: {', '.join(known)}")
    return found.open(found.schema(**(settings or {})))


def recognise(spec: str) -> Recognised:
    """What `spec` is: shapes, emoji, KIND:PATH, or a path whose kind is seen by what is there.

    Raises ValueError when nothing is there, and when it might be two things, with how to say which.
    """
    if spec in DRAWN:
        return Recognised(spec, "", "by name")
    kind, colon, path = spec.partition(":")
    if colon and kind in KINDS and kind not in DRAWN and not path.startswith("//"):
        return Recognised(kind, path, "as told")
    if "{" in spec and spec.endswith(".tar"):
        return Recognised("webdataset", spec, "a pattern of tars")
    if not storage.exists(spec):
        near = get_close_matches(spec, DRAWN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown source {spec!r}, and nothing is there: {hint}sources: {', '.join(DRAWN)}, a path, KIND:PATH"
        )
    if storage.is_folder(spec):
        kind, why = _folder(spec, [f.name for f in storage.list_files(spec)])
        return Recognised(kind, spec, why)
    if spec.lower().endswith(TABLES):
        return Recognised("table", spec, f"a {spec.rpartition('.')[2]} file")
    if spec.lower().endswith(TARS):
        return Recognised("webdataset", spec, "a tar")
    raise ValueError(
        f"source {spec!r}: a file is a table ({', '.join(TABLES)}) or a tar; anything else lies in a folder"
    )


def _folder(path: str, names: Sequence[str]) -> tuple[str, str]:
    """Kind and reason for a folder that holds these files."""
    if INDEX in names:
        made_by = _format(storage.join(path, INDEX))
        if made_by == fetch.FORMAT:
            return "fetched", "the index of ldm data fetch"
        if made_by == shards.FORMAT:
            raise ValueError(f"{path} is a finished shard folder; ldm data merge and split make others from it")
    if STATE in names or SPLITS in names:
        return "huggingface", STATE if STATE in names else SPLITS
    tables = [n for n in names if n.lower().endswith(TABLES)]
    tars = [n for n in names if n.lower().endswith(TARS)]
    stats = [n for n in names if n.endswith(STATS)]
    pictures = [n for n in names if n.lower().endswith(SUFFIXES)]
    if pictures and tars:
        raise _ambiguous(path, f"{len(pictures)} pictures and {len(tars)} tars", "folder", "webdataset")
    if stats and tars:
        return "img2dataset", f"{len(tars)} tars with {STATS}"
    if tars:
        return "webdataset", f"{len(tars)} tars"
    # img2dataset's form of loose files has a table of all rows beside each folder of pictures.
    other = [n for n in tables if storage.stem(n) != "metadata" and not stats]
    if pictures and other:
        raise _ambiguous(path, f"pictures and the table {other[0]}", "folder", f"table:{storage.join(path, other[0])}")
    if pictures:
        kinds = Counter(n.rpartition(".")[2].lower() for n in pictures)
        return "folder", ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    if tables and all(n.endswith(".parquet") for n in tables):
        return "huggingface", f"{len(tables)} parquet files"
    if len(tables) == 1:
        raise ValueError(f"{path} has no pictures, but a table: say table:{storage.join(path, tables[0])}")
    raise ValueError(f"{path} has no pictures ({', '.join(SUFFIXES)}), no tars and no dataset")


def _format(index: str) -> str:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(storage.read(index))["format"])
    return ""


def _ambiguous(path: str, what: str, first: str, second: str) -> ValueError:
    other = second if ":" in second else f"{second}:{path}"
    return ValueError(f"{path} has {what}: say {first}:{path} or {other}")

"""What became of every row: the index beside each shard, and the index of the folder made from them all.

A shard's index names each row of its part of the source exactly once, among `samples` or among `rejected`:

    samples    key, row, members, size [width, height] as stored, captions (how many) and words (of the main one),
               content (sha256 of the picture as it came), phash (16 hex digits);
               name (of the row in its source, unless it is the key), original (size, unless it is the stored one), url
    rejected   row, name, reason, detail; of a picture turned away by a filter also key and sometimes a thumbnail

A shard that is written anew (ledger rows only ever move from samples to rejected) gets a new generation of its name,
00003-1.tar beside 00003.tar, so that the folder's index is right before, and after it was replaced, at any moment.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import shards, storage
from data_pipeline.durable import staged_for
from data_pipeline.report import Report
from data_pipeline.shards import Info, LedgerInfo, ShardInfo
from data_pipeline.storage import StrPath, join

REPORT = "report.json"
PAGE = "report.html"  # shows pictures of the folder as it was, also such as are removed later
_NAME = re.compile(r"(\d{5,})(?:-(\d+))?")


@dataclass(frozen=True)
class Ledger:
    """One shard's index: what became of the rows from `first` up to `stop`. `bytes`, `sha256`: those of its tar."""

    first: int
    stop: int
    bytes: int
    sha256: str
    samples: list[dict[str, Any]]
    rejected: list[dict[str, Any]]

    @property
    def report(self) -> Report:
        """Its counts."""
        report = Report.of(self.samples, self.rejected)
        report.bytes = self.bytes
        return report


@dataclass(frozen=True)
class Contents:
    """What a complete list of shards holds together."""

    shards: tuple[ShardInfo, ...]
    empty: tuple[LedgerInfo, ...]
    report: Report
    rows: int


def shard_name(number: int, generation: int = 0) -> str:
    """The stem of a shard's files."""
    return f"{number:05d}" + (f"-{generation}" if generation else "")


def number_of(name: str) -> tuple[int, int] | None:
    """(number, generation) of a stem that `shard_name` made; None for other names."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def files_in(folder: StrPath) -> list[str]:
    """The names of the files in it, hidden ones too where it is on a disk."""
    return [f.name for f in storage.list_files(folder)] if storage.is_remote(folder) else os.listdir(folder)


def newest_names(folder: StrPath) -> dict[int, str]:
    """Shard number -> stem of its newest index, by the names of files alone."""
    found: dict[int, tuple[int, str]] = {}
    for file in files_in(folder):
        stem, dot, suffix = file.partition(".")
        numbers = number_of(stem)
        if numbers and dot + suffix == ".json":
            number, generation = numbers
            found[number] = max(found.get(number, (-1, "")), (generation, stem))
    return {number: stem for number, (_, stem) in sorted(found.items())}


def write_ledger(folder: StrPath, name: str, ledger: Ledger) -> None:
    """Write the index beside `name`.tar: the shard is complete."""
    check_rows(ledger, name)
    index = {
        "version": shards.VERSION,
        "rows": [ledger.first, ledger.stop],
        "bytes": ledger.bytes,
        "sha256": ledger.sha256,
        "samples": ledger.samples,
        "rejected": ledger.rejected,
        "report": ledger.report.to_json(),
    }
    storage.write(join(folder, f"{name}.json"), shards.seal(index))


def read_ledger(path: StrPath, first: int = 0) -> Ledger:
    """A shard's index. Raises ValueError when it is missing or damaged.

    Version 1 counted the rejected rows by reason, with some names: here they follow the samples, from row `first`.
    """
    index = shards.unseal(path)
    if "rows" in index:
        start, stop = index["rows"]
        return Ledger(start, stop, index["bytes"], index["sha256"], index["samples"], index["rejected"])
    samples = [{**sample, "row": first + i} for i, sample in enumerate(index["samples"])]
    named = [
        (reason, (r["examples"][i : i + 1] or ["not named by version 1"])[0])
        for reason, r in index["report"]["rejected"].items()
        for i in range(r["count"])
    ]
    rejected = [
        {"row": first + len(samples) + i, "name": name, "reason": reason, "detail": ""}
        for i, (reason, name) in enumerate(named)
    ]
    return Ledger(first, first + len(samples) + len(rejected), index["bytes"], index["sha256"], samples, rejected)


def removed_row(row: int, name: str, key: str, reason: str, detail: str) -> dict[str, Any]:
    """The line of a picture that was taken out after it had been delivered."""
    return {"row": row, "name": name, "key": key, "reason": reason, "detail": detail}


def check_rows(ledger: Ledger, name: str) -> None:
    """Raises RuntimeError unless every row of the part is there exactly once: delivered + rejected = rows."""
    rows = sorted(entry["row"] for entry in (*ledger.samples, *ledger.rejected))
    if rows != list(range(ledger.first, ledger.stop)):
        raise RuntimeError(
            f"shard {name}: {len(ledger.samples)} delivered and {len(ledger.rejected)} rejected rows are not "
            f"the rows {ledger.first} to {ledger.stop - 1} of the source, each once"
        )


def is_whole(folder: StrPath, name: str) -> bool:
    """Whether the shard is there, whole and unchanged; reads all of it on a disk, asks its size of a service."""
    tar = join(folder, f"{name}.tar")
    try:
        index = shards.unseal(join(folder, f"{name}.json"))
        if storage.is_remote(tar):
            return not index["samples"] or storage.info(tar).size == index["bytes"]
        return not index["samples"] or shards.file_sha256(tar) == index["sha256"]
    except (OSError, ValueError, KeyError):
        return False


def index_names(folder: StrPath, info: Info) -> list[str]:
    """The stems of all parts of a complete folder, in the order of their rows."""
    if info.rows is None:  # version 1 did not list the parts without a usable sample
        return list(newest_names(folder).values())
    parts: list[ShardInfo | LedgerInfo] = [*info.shards, *info.empty]
    names = [Path(part.index).stem for part in parts]
    return sorted(names, key=lambda name: number_of(name) or (0, 0))


def read_ledgers(folder: StrPath, names: Iterable[str]) -> Iterator[tuple[str, Ledger]]:
    """(stem, its index) one after the other."""
    stop = 0
    for name in names:
        ledger = read_ledger(join(folder, f"{name}.json"), stop)
        stop = ledger.stop
        yield name, ledger


def collect(folder: StrPath, names: list[str]) -> Contents:
    """Add up the shards of these stems, in order.

    Raises ValueError when a key repeats or an index is damaged; RuntimeError when a row is missing or there twice.
    """
    infos: list[ShardInfo] = []
    empty: list[LedgerInfo] = []
    report, rows = Report(), 0
    digests = array("Q")
    for name, ledger in read_ledgers(folder, names):
        check_rows(ledger, name)
        if ledger.first != rows:
            raise RuntimeError(f"shard {name} begins with row {ledger.first}; the one before ends with row {rows - 1}")
        rows = ledger.stop
        report.add(ledger.report)
        digests.extend(key_digest(sample["key"]) for sample in ledger.samples)
        index, digest = f"{name}.json", shards.file_sha256(join(folder, f"{name}.json"))
        if ledger.samples:
            count = len(ledger.samples)
            infos.append(ShardInfo(f"{name}.tar", count, ledger.bytes, ledger.sha256, index, digest))
        else:
            empty.append(LedgerInfo(index, digest))
    check_unique(
        digests, ((f"{n}.tar", sample["key"]) for n, part in read_ledgers(folder, names) for sample in part.samples)
    )
    return Contents(tuple(infos), tuple(empty), report, rows)


def publish(folder: StrPath, names: list[str], like: Info, *, seconds: float = 0.0, kept: int = 0) -> Report:
    """Write the folder's report and index over these shards, and clear away what no index names any more.

    `like` says what the shards do not: size, image_format, source, and how many rows there must be (None: any
    number). Raises ValueError when not one sample is usable, or what `collect` raises.
    """
    contents = collect(folder, names)
    report = contents.report
    if like.rows is not None and contents.rows != like.rows:
        raise RuntimeError(f"{folder}: the shards hold {contents.rows} rows of {like.rows}")
    report.seconds, report.kept_shards = seconds, kept
    storage.write(join(folder, REPORT), shards.to_json(report.to_json()))
    if report.delivered == 0:
        raise ValueError(f"not one of {contents.rows} samples is usable ({report.reasons})")
    info = Info(
        samples=report.delivered,
        bytes=report.bytes,
        size=like.size,
        image_format=like.image_format,
        source=like.source,
        shards=contents.shards,
        rows=contents.rows,
        empty=contents.empty,
    )
    shards.write_index(folder, info)
    _clear(folder, set(names))
    return report


def _clear(folder: StrPath, names: set[str]) -> None:
    """Remove other generations of the shards, what was prepared and never took its name, and the outdated page."""
    for file in files_in(folder):
        stem = file.partition(".")[0]
        if file == PAGE or staged_for(file) or (number_of(stem) and stem not in names):
            storage.remove(join(folder, file))


def key_digest(key: str) -> int:
    """8 bytes that stand for a key where many millions must be held at once."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def check_unique(digests: "array[int]", located: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError naming a key that is there twice.

    digests: of all keys. located: (where, key) of all, which is only gone through when two digests are equal.
    """
    values = np.sort(np.frombuffer(digests, np.uint64)) if digests else np.empty(0, np.uint64)
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    seen: dict[str, str] = {}
    for where, key in located if suspects else ():
        if key_digest(key) in suspects:
            if key in seen:
                raise ValueError(f"duplicate key {key!r} in {seen[key]} and {where}: keys must be unique")
            seen[key] = where

"""Taking pictures out of shards that are already built: on request, or as duplicates.

What is to go is written down first (removals.json), so that the work can be taken up again after a kill and a shard
that is built anew leaves it out, too. Then the affected shards are written under new names, the folder's index is
replaced, and the old files go. Until that replacement the folder is as before; after it, as asked.
"""

from dataclasses import replace
from typing import Any

from data_pipeline import shards, storage
from data_pipeline.copying import copy_tar
from data_pipeline.duplicates import DropList, HashedRow, find_duplicates
from data_pipeline.ledger import (
    Ledger,
    index_names,
    number_of,
    publish,
    read_ledgers,
    removed_row,
    shard_name,
    write_ledger,
)
from data_pipeline.report import Report
from data_pipeline.shards import Info, read_index
from data_pipeline.storage import StrPath, join

REMOVALS = "removals.json"
ON_REQUEST = "removed on request"
DUPLICATE = "duplicate"
Removals = dict[str, tuple[str, str]]  # key -> (reason, detail)


def read_removals(folder: StrPath) -> Removals:
    """key -> (reason, detail) of all that was ever taken out of this folder. Raises ValueError for a damaged list."""
    path = join(folder, REMOVALS)
    if not storage.exists(path):
        return {}
    return {key: (reason, detail) for key, (reason, detail) in shards.unseal(path)["keys"].items()}


def find(folder: StrPath, wanted: DropList) -> tuple[Removals, list[str]]:
    """What a request means here: the removals, and the names on the list that mean no picture here.

    A hash is that of a picture as it came, or as it is stored. Pictures that filters turned away count as well, for
    the ledger may show them small.
    """
    removals: Removals = {}
    found: set[str] = set()
    for _, ledger in read_ledgers(folder, index_names(folder, read_index(folder))):
        for row in (*ledger.samples, *(r for r in ledger.rejected if "key" in r)):
            stored = {place[2] for place in row.get("members", {}).values()}
            matched = {
                "key": {row["key"]} & wanted.keys,
                "url": {row.get("url"), row.get("name")} & wanted.urls,
                "hash": {row.get("content"), *stored} & wanted.hashes,
            }
            if any(matched.values()):
                removals[row["key"]] = (ON_REQUEST, "by " + ", ".join(kind for kind, names in matched.items() if names))
                found.update(*matched.values())
    return removals, sorted((wanted.keys | wanted.urls | wanted.hashes) - found)


def find_twice(folder: StrPath, against: StrPath | None = None, near: int | None = None) -> Removals:
    """The samples that repeat an earlier one of the folder, or any of the folder `against`; `near` in bits of 64.

    Raises ValueError for samples without hashes, which version 1 did not keep.
    """
    folders = [f for f in (against, folder) if f is not None]
    rows = [
        HashedRow(f"{place}/{sample['key']}", sample["content"], sample.get("phash", ""))
        for place, f in enumerate(folders)
        for _, ledger in read_ledgers(f, index_names(f, _with_hashes(f)))
        for sample in ledger.samples
    ]
    removals: Removals = {}
    for twice in find_duplicates(rows, near):
        place, _, key = twice.key.partition("/")
        other, _, first = twice.duplicate_of.partition("/")
        if int(place) == len(folders) - 1:
            where = "" if other == place else f" in {folders[0]}"
            how = "same bytes as" if twice.kind == "exact" else f"{twice.distance} bits from"
            removals[key] = (DUPLICATE, f"{how} {first}{where}")
    return removals


def _with_hashes(folder: StrPath) -> Info:
    info = read_index(folder)
    if info.rows is None:
        raise ValueError(f"{folder} was built by version 1, which kept no hashes; build it again")
    return info


def take_out(folder: StrPath, removals: Removals) -> Report:
    """Take the samples of these keys out of a complete folder, and those of an earlier call that was interrupted.

    Their rows move to the rejected ones; shards without any of them stay as they are. Raises ValueError when the
    folder is not complete or nothing would be left; RuntimeError when a shard that must be copied is damaged.
    """
    info = read_index(folder)
    before = read_removals(folder)
    every = {**removals, **before}  # what was taken out once keeps its first reason
    left = info.samples - sum(1 for _, ledger in read_ledgers(folder, index_names(folder, info))
                              for sample in ledger.samples if sample["key"] in every)  # fmt: skip
    if left < 1:
        raise ValueError(f"this would take all {info.samples} samples out of {folder}: delete the folder instead")
    if every != before:
        storage.write(join(folder, REMOVALS), shards.seal({"keys": every}))
    names = [
        _rewrite(folder, name, ledger, every) if _concerns(ledger, every) else name
        for name, ledger in read_ledgers(folder, index_names(folder, info))
    ]
    return publish(folder, names, info)


def _concerns(ledger: Ledger, removals: Removals) -> bool:
    """Whether a shard still holds something of a picture that has to go."""
    return any(s["key"] in removals for s in ledger.samples) or any(
        r.get("key") in removals and r != _removed(r, removals) for r in ledger.rejected
    )


def _removed(row: dict[str, Any], removals: Removals) -> dict[str, Any]:
    reason, detail = removals[row["key"]]
    return removed_row(row["row"], row.get("name", row["key"]), row["key"], reason, detail)


def _rewrite(folder: StrPath, name: str, ledger: Ledger, removals: Removals) -> str:
    """Write the shard again without them, as a new generation; returns its name."""
    number, generation = number_of(name) or (0, 0)
    new = shard_name(number, generation + 1)
    kept = [s for s in ledger.samples if s["key"] not in removals]
    gone = [_removed(s, removals) for s in ledger.samples if s["key"] in removals]
    others = [_removed(r, removals) if r.get("key") in removals else r for r in ledger.rejected]
    tar = copy_tar(((join(folder, f"{name}.tar"), s) for s in kept), join(folder, f"{new}.tar"))
    rejected = sorted([*others, *gone], key=lambda row: row["row"])
    write_ledger(
        folder, new, replace(ledger, bytes=tar.bytes, sha256=tar.sha256, samples=tar.samples, rejected=rejected)
    )
    return new

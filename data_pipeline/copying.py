"""Stored samples from shard to shard, without decoding a picture: copies, folders joined, folders divided."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from data_pipeline import shards, storage
from data_pipeline.assembly import Progress, assemble
from data_pipeline.ledger import Ledger, check_unique, index_names, key_digest, read_ledgers, shard_name, write_ledger
from data_pipeline.report import Report
from data_pipeline.shards import Entry, Info, read_index
from data_pipeline.storage import StrPath, join

Row = tuple[str, dict[str, Any]]  # (a shard's tar, a line among its samples), or ("", a line among the rejected)


def copy_tar(samples: Iterable[Row], out: StrPath) -> shards.Tar:
    """A new tar of stored samples, each checked against its hashes, under the key that its line says.

    Raises RuntimeError naming shard and key when its bytes changed.
    """
    return shards.write_tar(out, _entries(samples))


def _entries(samples: Iterable[Row]) -> Iterator[Entry]:
    opened, file = "", None
    try:
        for path, sample in samples:
            if path != opened or file is None:
                if file is not None:
                    file.close()
                file, opened = storage.open_read(path), path
            about = {k: v for k, v in sample.items() if k not in ("key", "members")}
            members = {ext: read_member(file, path, sample, ext) for ext in shards.members_in_order(sample)}
            yield Entry(sample["key"], members, about)
    finally:
        if file is not None:
            file.close()


def read_member(file: BinaryIO, path: str, sample: dict[str, Any], extension: str) -> bytes:
    """One member of a sample in the open tar `path`. Raises RuntimeError when its bytes changed."""
    offset, size, digest = sample["members"][extension]
    file.seek(offset)
    data = file.read(size)
    if shards.sha256(data) != digest:
        raise RuntimeError(f"shard {path} is damaged at {sample['key']}.{extension}; build the folder again")
    return data


def merge(folders: list[StrPath], out: StrPath, *, rename: bool = False, progress: Progress | None = None) -> Report:
    """Join shard folders of one picture size and format into `out`; every row of theirs is a row there.

    rename: keys get the number of their folder in front (0-, 1-, ...), for folders that share keys. Raises
    ValueError when folders differ in size or format, share a key (without rename), or a new key is too long.
    """
    infos = [read_index(folder) for folder in folders]
    kinds = [(i.size or "original size", *_members(f, i)) for f, i in zip(folders, infos, strict=True)]
    if len(folders) < 2 or len(set(kinds)) > 1:
        held = "; ".join(f"{f}: {' '.join(map(str, kind))}" for f, kind in zip(folders, kinds, strict=True))
        raise ValueError(f"merging takes 2 folders or more of one size and one image format ({held})")

    def rows() -> Iterator[Row]:
        for number, (folder, info) in enumerate(zip(folders, infos, strict=True)):
            for tar, row in stored_rows(folder, info):
                if rename and "key" in row:
                    row = {**row, "key": f"{number}-{row['key']}"}
                    if tar and len(row["key"]) > 80:
                        raise ValueError(f"key {row['key']!r} would be longer than 80 characters")
                yield tar, row

    origin = {"kind": "merge", "settings": {"folders": [str(f) for f in folders], "rename": rename}}
    return _repack(rows, infos, out, origin, progress)


def split(
    folder: StrPath,
    outs: tuple[StrPath, StrPath],
    *,
    share: float | None = None,
    count: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Report, Report]:
    """Divide a shard folder in two: `outs` = (most of it, the part held out).

    A sample is held out by a hash of (seed, key): with `share` (0 to 1) each with that chance, so that a sample keeps
    its side when others come or go; with `count` exactly so many. Rows that were rejected go to the first part.
    Raises ValueError for other numbers and when one part would be empty.
    """
    info = read_index(folder)
    if (share is None) == (count is None):
        raise ValueError("a split takes either a share or a count")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share={share}: allowed is more than 0 and less than 1")
    if count is not None and not 0 < count < info.samples:
        raise ValueError(f"count={count}: allowed are 1 to {info.samples - 1}, for {folder} has {info.samples} samples")
    if count is None:
        limit = int((share or 0.0) * 2**64)
    else:
        draws = sorted(_draw(seed, row["key"]) for tar, row in stored_rows(folder, info) if tar)
        limit = draws[count]

    def part(held_out: bool) -> Callable[[], Iterator[Row]]:
        return lambda: (
            (tar, row)
            for tar, row in stored_rows(folder, info)
            if (bool(tar) and _draw(seed, row["key"]) < limit) == held_out
        )

    if not all(any(tar for tar, _ in part(side)()) for side in (False, True)):
        raise ValueError(f"share={share} of {info.samples} samples leaves one part empty; choose another, or a count")
    made = []
    for out, held_out in zip(outs, (False, True), strict=True):
        settings = {"folder": str(folder), "share": share, "count": count, "seed": seed, "held_out": held_out}
        made.append(_repack(part(held_out), [info], out, {"kind": "split", "settings": settings}, progress))
    return made[0], made[1]


def _members(folder: StrPath, info: Info) -> list[str]:
    """What a folder holds of each sample beside its captions: the picture, and maybe a condition and a mask."""
    first = next(row for tar, row in stored_rows(folder, info) if tar)
    return [member for member in shards.members_in_order(first) if member not in ("txt", "json")]


def stored_rows(folder: StrPath, info: Info) -> Iterator[Row]:
    """Every row of a folder, in order: (its tar, its line among the samples), or ("", its line among the rejected)."""
    for name, ledger in read_ledgers(folder, index_names(folder, info)):
        tar = join(folder, f"{name}.tar")
        rows = [*((tar, sample) for sample in ledger.samples), *(("", row) for row in ledger.rejected)]
        yield from sorted(rows, key=lambda located: located[1]["row"])


def _draw(seed: int, key: str) -> int:
    """A number below 2**64 that is uniform over keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")


def _repack(
    rows: Callable[[], Iterator[Row]],
    infos: list[Info],
    out: StrPath,
    origin: dict[str, Any],
    progress: Progress | None,
) -> Report:
    """These rows as a new shard folder, its shards as large as the largest before; restartable like a build."""
    size = max(shard.samples for info in infos for shard in info.shards)
    total, content, keys = 0, hashlib.sha256(), array("Q")
    for tar, row in rows():
        total += 1
        content.update(shards.to_json(row))
        if tar:
            keys.append(key_digest(row["key"]))
    check_unique(keys, ((tar, row["key"]) for tar, row in rows() if tar))
    plan = {
        "size": infos[0].size,
        "image_format": infos[0].image_format,
        "source": {**origin, "of": [info.source for info in infos]},
        "samples": total,
        "shards": -(-len(keys) // size),
        "samples_per_shard": size,
        "version": shards.VERSION,
        "content": content.hexdigest(),
    }

    def run(numbers: list[int]) -> Iterator[int]:
        wanted, first = set(numbers), 0
        for number, part in enumerate(_packed(rows(), size)):
            if number in wanted:
                _write(out, number, first, part)
                yield number
            first += len(part)

    report = assemble(out, plan, run, progress=progress)
    assert report is not None  # not made in parts
    return report


def _packed(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in order, in lists that hold `size` samples each, the last one fewer."""
    part: list[Row] = []
    held = 0
    for tar, row in rows:
        if tar and held == size:
            yield part
            part, held = [], 0
        part.append((tar, row))
        held += bool(tar)
    yield part


def _write(out: StrPath, number: int, first: int, part: list[Row]) -> None:
    name = shard_name(number)
    numbered = [(tar, {**row, "row": first + i}) for i, (tar, row) in enumerate(part)]
    tar = copy_tar([(tar, row) for tar, row in numbered if tar], join(out, f"{name}.tar"))
    rejected = [row for tar, row in numbered if not tar]
    write_ledger(out, name, Ledger(first, first + len(part), tar.bytes, tar.sha256, tar.samples, rejected))

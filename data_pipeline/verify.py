"""Reading every byte of a shard folder, and saying what is not as it was written: file, row and member."""

import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, BinaryIO

from data_pipeline import shards, storage
from data_pipeline.ledger import Ledger, check_rows, read_ledger
from data_pipeline.shards import LedgerInfo, ShardInfo
from data_pipeline.storage import StrPath, join


def verify(folder: StrPath, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """One line for each damage; [] when all is as it was written. `progress(done, total)` counts shards.

    Raises ValueError when the folder's own index cannot be trusted: then nothing else can be told for sure.
    """
    info = shards.read_index(folder)
    lines: list[str] = []
    samples = rows = 0
    parts: list[ShardInfo | LedgerInfo] = [*info.shards, *info.empty]
    for done, part in enumerate(parts, start=1):
        ledger, said = _ledger(folder, part.index, part.index_sha256)
        lines += said
        if isinstance(part, ShardInfo):
            lines += _check_tar(folder, part, ledger)
        if ledger is not None:
            samples += len(ledger.samples)
            rows += ledger.stop - ledger.first
        if progress:
            progress(done, len(parts))
    if not lines and samples != info.samples:
        lines.append(f"{shards.INDEX}: says {info.samples} samples; the shards hold {samples}")
    if not lines and info.rows is not None and rows != info.rows:
        lines.append(f"{shards.INDEX}: says {info.rows} rows; the shards account for {rows}")
    return lines


def _ledger(folder: StrPath, index: str, digest: str) -> tuple[Ledger | None, list[str]]:
    path = join(folder, index)
    try:
        if shards.file_sha256(path) != digest:
            return None, [f"{index}: is damaged"]
        ledger = read_ledger(path)
        check_rows(ledger, index)
    except FileNotFoundError:
        return None, [f"{index}: is missing"]
    except (OSError, ValueError, RuntimeError) as error:
        return None, [f"{index}: {error}"]
    return ledger, []


def _check_tar(folder: StrPath, shard: ShardInfo, ledger: Ledger | None) -> list[str]:
    path = join(folder, shard.file)
    try:
        size = storage.info(path).size
        with storage.open_read(path) as file:
            damaged = list(_damaged_rows(file, ledger, shard.bytes)) if ledger else []
        if ledger is None and shards.file_sha256(path) != shard.sha256:
            damaged = ["is damaged"]
    except FileNotFoundError:
        return [f"{shard.file}: is missing"]
    except OSError as error:
        return [f"{shard.file}: cannot be read: {error}"]
    if size != shard.bytes:
        damaged = [f"has {size} bytes instead of {shard.bytes}", *damaged]
    return [f"{shard.file}: {what}" for what in damaged]


def _damaged_rows(file: BinaryIO, ledger: Ledger, size: int) -> Iterator[str]:
    """Goes through a tar member by member: what differs, one line a sample."""
    wrong = list(_damaged_members(file, ledger.samples, size))
    for (row, key), members in groupby(wrong, key=lambda found: found[:2]):
        named = ", ".join(member for _, _, member in members)
        yield f"row {row}, {key}: {named} damaged" if key else f"{named} damaged"


def _damaged_members(file: BinaryIO, samples: list[dict[str, Any]], size: int) -> Iterator[tuple[int, str, str]]:
    """(row, key, member) of all that differs; headers and padding follow from the names and sizes of members."""
    at = padding = 0
    for sample in samples:
        for extension in shards.members_in_order(sample):
            offset, length, digest = sample["members"][extension]
            between = bytes(padding) + shards.tar_header(f"{sample['key']}.{extension}", length)
            if file.read(offset - at) != between:
                yield sample["row"], sample["key"], f"header of {extension}"
            if shards.sha256(file.read(length)) != digest:
                yield sample["row"], sample["key"], extension
            at, padding = offset + length, -length % tarfile.BLOCKSIZE
    if file.read() != bytes(size - at):
        yield -1, "", "the end, after the last sample, is"

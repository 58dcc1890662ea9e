"""One part of a fetched folder: a range of rows, its tars, its ledger, and a journal of what is not yet in them.

    00012.tar          000012003.jpg, 000012003.json (url, captions, ...) for each file that was fetched
    00012-1.tar        what a later run fetched of the rows that had failed; a tar never changes
    00012.json         the ledger, sealed: the tars, and of every row of the part where its bytes lie, or why nowhere
    .00012.journal     while the part is being fetched: each outcome as it comes, a line of JSON and then the bytes

The ledger is the last word: a tar that it does not name does not count. The journal is removed after the ledger is
written, so a kill at any moment loses at most the rows that were on their way.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.download import Outcome
from data_pipeline.durable import operate, remove, write_atomically
from data_pipeline.fetch_rows import Row
from data_pipeline.shards import Entry, seal, sha256, to_json, unseal, write_tar

_LINE = 1 << 20  # bytes; no line of a journal is longer
# First bytes -> file name extension; what is none of these is `bin`, and the decoder says what it thinks of it.
_MAGIC = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp"),
    (0, b"BM", "bmp"),
)


@dataclass(frozen=True)
class PartInfo:
    """What a committed part holds: the hash of its ledger, and counts of its rows."""

    sha256: str
    delivered: int
    bytes: int
    rejected: dict[str, int]
    retryable: int


def extension(data: bytes) -> str:
    """The file name extension that the first bytes of a file call for."""
    return next((name for at, magic, name in _MAGIC if data[at : at + len(magic)] == magic), "bin")


class Part:
    """Part `number`, these rows of the table, as the folder has it now; a damaged journal is cut back to what is whole.

    Rows in a ledger or journal that is damaged, or in a tar that is missing or cut short, count as never fetched.
    """

    def __init__(self, folder: Path, number: int, rows: range) -> None:
        self.rows = rows
        self.ledger_path = folder / f"{number:05d}.json"
        self._journal = folder / f".{number:05d}.journal"
        self._tars: list[dict[str, Any]] = []
        self._samples: dict[int, dict[str, Any]] = {}
        self._rejected: dict[int, dict[str, Any]] = {}
        self._new: dict[int, tuple[int, dict[str, Any]]] = {}  # row -> where its bytes begin, the journal's line
        if self.ledger_path.exists():
            self._read_ledger()
        self._clear_unnamed()
        if self._journal.exists():
            self._replay()

    def todo(self) -> list[int]:
        """The rows that are missing, or failed in a way that may pass."""
        return [row for row in self.rows if row not in self._samples and self._open(row)]

    def _open(self, row: int) -> bool:
        state = self._new[row][1] if row in self._new else self._rejected.get(row)
        return state is None or bool(state["retryable"])

    def record(self, row: int, outcome: Outcome) -> None:
        """Note how a row ended. Raises OSError when the disk is full."""
        about = {k: v for k, v in asdict(outcome).items() if k != "data"}
        line = {"row": row, **about, "size": len(outcome.data), "sha256": sha256(outcome.data)}
        begin = self._journal.stat().st_size if self._journal.exists() else 0
        header = seal(line) + b"\n"
        try:
            operate("append", _append, self._journal, header + outcome.data)
        except OSError:
            if self._journal.exists():
                os.truncate(self._journal, begin)  # what comes after a record that is not whole could not be read
            raise
        self._new[row] = (begin + len(header), line)

    def commit(self, rows: list[Row]) -> PartInfo:
        """Write the tar of what is new, then the ledger, then forget the journal. `rows`: all of the part."""
        if self._new:
            fetched = [row for row in rows if row.number in self._new and not self._new[row.number][1]["reason"]]
            path = self._tar_path(len(self._tars))
            tar = write_tar(path, self._entries(fetched))
            if tar.samples:
                self._tars.append({"file": path.name, "bytes": tar.bytes, "sha256": tar.sha256})
            self._samples.update({sample["row"]: sample for sample in tar.samples})
            self._rejected.update(self._rejections(rows))
            for row in self._samples:
                self._rejected.pop(row, None)
            self._write_ledger()
        remove(self._journal)
        return self._info()

    def _write_ledger(self) -> None:
        if sorted([*self._samples, *self._rejected]) != list(self.rows):
            raise RuntimeError(f"{self.ledger_path}: fetched and failed rows are not the rows {self.rows}, each once")
        ledger = {
            "rows": [self.rows.start, self.rows.stop],
            "tars": self._tars,
            "samples": [self._samples[row] for row in sorted(self._samples)],
            "rejected": [self._rejected[row] for row in sorted(self._rejected)],
        }
        write_atomically(self.ledger_path, seal(ledger))

    def _entries(self, rows: list[Row]) -> Iterator[Entry]:
        with self._journal.open("rb") as file:
            for row in rows:
                offset, line = self._new[row.number]
                file.seek(offset)
                data = file.read(line["size"])
                if sha256(data) != line["sha256"]:
                    raise RuntimeError(f"{self._journal} is damaged at row {row.number}; run the same command again")
                content = {
                    "row": row.number,
                    "key": row.key,
                    "url": row.url,
                    "found_at": line["url"],
                    "captions": row.captions,
                    "meta": row.meta,
                    "status": line["status"],
                    "content_type": line["content_type"],
                    "sha256": line["sha256"],
                }
                about = {"row": row.number, "name": row.name, "tar": len(self._tars), "tries": line["tries"]}
                yield Entry(f"{row.number:09d}", {extension(data): data, "json": to_json(content)}, about)

    def _rejections(self, rows: list[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            line = self._new[row.number][1] if row.number in self._new else {}
            if line.get("reason"):
                said = {name: line[name] for name in ("reason", "detail", "retryable", "tries")}
                yield row.number, {"row": row.number, "name": row.name, **said}

    def _info(self) -> PartInfo:
        reasons: dict[str, int] = {}
        for row in self._rejected.values():
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
        return PartInfo(
            sha256=sha256(self.ledger_path.read_bytes()),
            delivered=len(self._samples),
            bytes=sum(tar["bytes"] for tar in self._tars),
            rejected=reasons,
            retryable=sum(row["retryable"] for row in self._rejected.values()),
        )

    def _tar_path(self, generation: int) -> Path:
        return self.ledger_path.with_name(self.ledger_path.stem + (f"-{generation}" if generation else "") + ".tar")

    def _read_ledger(self) -> None:
        try:
            ledger = unseal(self.ledger_path)
        except ValueError:
            for path in self.ledger_path.parent.glob(f"{self.ledger_path.stem}-*.tar"):
                remove(path)
            return
        self._tars = ledger["tars"]
        paths = [self.ledger_path.with_name(tar["file"]) for tar in self._tars]
        sizes = [path.stat().st_size if path.exists() else -1 for path in paths]
        whole = [size == tar["bytes"] for size, tar in zip(sizes, self._tars, strict=True)]
        for path in (path for path, good in zip(paths, whole, strict=True) if not good):
            remove(path)
        self._samples = {sample["row"]: sample for sample in ledger["samples"] if whole[sample["tar"]]}
        self._rejected = {row["row"]: row for row in ledger["rejected"]}

    def _clear_unnamed(self) -> None:
        """Remove the tar that a killed run wrote and no ledger names."""
        generation = len(self._tars)
        while (path := self._tar_path(generation)).exists():
            remove(path)
            generation += 1

    def _replay(self) -> None:
        """Read the journal up to the first record that is not whole, and cut the rest off."""
        good = 0
        with self._journal.open("rb") as file:
            while (line := _parse(file.readline(_LINE))) is not None:
                offset = file.tell()
                data = file.read(line["size"])
                if len(data) != line["size"] or sha256(data) != line["sha256"]:
                    break
                good = file.tell()
                if line["row"] not in self._samples:
                    self._new[line["row"]] = (offset, line)
        os.truncate(self._journal, good)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of the journal, which carries its own hash; None when it is not whole."""
    try:
        value: dict[str, Any] = json.loads(line)
        del value["seal"]
        return value if line == seal(value) + b"\n" else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None

"""A table of URLs with captions -> a folder of downloaded files that `ldm data build` makes shards from.

    OUT/fetch.json      what was asked: the table's fingerprint and the settings that decide what OUT holds
    OUT/00000.tar ...   the bytes, and OUT/00000.json: the outcome of every row of the part (fetch_part.py)
    OUT/index.json      written last: the fetch has been through the whole table

Every row ends either among the delivered or, with a reason, among the rejected. Stopped or killed at any moment and
started again, a fetch asks only for what is missing or failed in a way that may pass.
"""

import asyncio
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.download import Downloader, FetchConfig, Outcome
from data_pipeline.durable import remove, staged_for, write_atomically
from data_pipeline.fetch_part import Part, PartInfo
from data_pipeline.fetch_rows import Row, UrlTable
from data_pipeline.shards import INDEX, seal, unseal
from data_pipeline.sources.columns import plain

log = logging.getLogger(__name__)

FORMAT = "ldm-fetched"
VERSION = 1
PLAN = "fetch.json"
_PARTS_AT_ONCE = 4  # so that the slowest rows of one part do not leave the connections idle
_THREADS = 32  # for looking up names, which blocks, and for writing tars


@dataclass
class FetchReport:
    """delivered + all of `rejected` (reason -> rows) = rows. kept: rows that were already settled when the run began.

    retryable: rejected rows that the next run will try again. bytes: of the tars.
    """

    rows: int
    delivered: int = 0
    kept: int = 0
    retryable: int = 0
    bytes: int = 0
    seconds: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)

    def add(self, part: PartInfo) -> None:
        """Take in the numbers of one part."""
        self.delivered += part.delivered
        self.retryable += part.retryable
        self.bytes += part.bytes
        for reason, count in part.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count

    def __str__(self) -> str:
        reasons = sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))
        lines = [f"{self.delivered} of {self.rows} rows fetched, {self.kept} settled before, {self.bytes} bytes"]
        lines += [f"  {count:>8}  {reason}" for reason, count in reasons]
        if self.retryable:
            lines.append(f"{self.retryable} may succeed later: run the same command again")
        return "\n".join(lines)


def fetch(
    table: str,
    out: Path,
    config: FetchConfig,
    progress: Callable[[int, int], None] | None = None,
) -> FetchReport:
    """Download what a table names into the folder `out`; `progress(done, total)` counts rows.

    Raises ValueError for a table that cannot be read, a setting that is not allowed, an `out` that holds anything
    else (another table, other settings) or in which another fetch is running; RuntimeError when the disk is full.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ValueError("fetching needs aiohttp: pip install 'ldm[data]'") from error
    began = time.monotonic()
    rows = UrlTable(str(table), config)
    report = FetchReport(len(rows))
    with _claimed(out, _plan(rows, config)):
        remove(out / INDEX)
        parts = asyncio.run(_Run(rows, out, config, report, progress).run())
        report.seconds = time.monotonic() - began
        index = {"format": FORMAT, "version": VERSION, "rows": len(rows), "rows_per_part": config.rows_per_part}
        write_atomically(out / INDEX, seal({**index, "parts": [part.sha256 for part in parts]}))
    log.info("%s: %s", out, report)
    return report


@dataclass
class _Run:
    """One pass over the table."""

    table: UrlTable
    out: Path
    config: FetchConfig
    report: FetchReport
    progress: Callable[[int, int], None] | None
    done: int = 0

    async def run(self) -> list[PartInfo]:
        """Fetch every part, a few at a time; what they hold, in order. RuntimeError when a disk fails."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
        room = asyncio.Semaphore(_PARTS_AT_ONCE)
        size = self.config.rows_per_part
        tasks: list[asyncio.Task[PartInfo]] = []
        try:
            async with Downloader(self.config) as downloader, asyncio.TaskGroup() as group:
                for number in range(-(-len(self.table) // size)):
                    await room.acquire()
                    rows = await asyncio.to_thread(self.table.part, number, size)
                    tasks.append(group.create_task(self._part(number, rows, downloader)))
                    tasks[-1].add_done_callback(lambda _: room.release())
        except ExceptionGroup as group_of_errors:
            error = _first(group_of_errors)
            if not isinstance(error, OSError):
                raise error from None
            raise RuntimeError(
                f"reading the table or writing to {self.out} failed ({error.strerror or error}); "
                "what was fetched is kept: when the cause is gone (is the disk full?), run the same command again"
            ) from error
        return [task.result() for task in tasks]

    async def _part(self, number: int, rows: list[Row], downloader: Downloader) -> PartInfo:
        first = rows[0].number
        part = await asyncio.to_thread(Part, self.out, number, range(first, first + len(rows)))
        todo = [rows[row - first] for row in part.todo()]
        self.report.kept += len(rows) - len(todo)
        self._advance(len(rows) - len(todo))
        async with asyncio.TaskGroup() as group:
            for row in todo:
                group.create_task(self._row(row, part, downloader))
        info = await asyncio.to_thread(part.commit, rows)
        self.report.add(info)
        return info

    async def _row(self, row: Row, part: Part, downloader: Downloader) -> None:
        if row.rejected:
            outcome = Outcome(tries=0, reason=row.rejected.reason, detail=str(plain(row.rejected.detail)))
        else:
            outcome = await downloader.download(row.number, row.url)
        part.record(row.number, outcome)
        self._advance(1)

    def _advance(self, rows: int) -> None:
        self.done += rows
        if self.progress:
            self.progress(self.done, len(self.table))


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error in a group, however deep."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _plan(table: UrlTable, config: FetchConfig) -> dict[str, Any]:
    """What decides the rows and which of them may be fetched; how fast and how patiently does not."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "rows_per_part": config.rows_per_part,
        "max_bytes": config.max_bytes,
        "max_redirects": config.max_redirects,
        "honour_robots": config.honour_robots,
        "allow_private": config.allow_private,
        "ports": list(config.ports),
        "table": table.fingerprint,
    }


@contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Make `out` the folder of this plan, for this process alone. Raises ValueError: it is someone else's."""
    if re.match(r"[a-z0-9]+:/", str(out)):
        raise ValueError(f"{out}: a fetch writes to a folder on a disk; the shards made from it can go elsewhere")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another fetch is running in {out}") from error
        for leftover in (name for name in os.listdir(out) if staged_for(name)):
            remove(out / leftover)
        _check_plan(out, plan)
        yield
    finally:
        os.close(folder)


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    path = out / PLAN
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty and no fetch started there; choose another folder")
        write_atomically(path, seal(plan))
        return
    found = unseal(path)
    for name in sorted(plan.keys() | found.keys(), key=lambda name: (name == "table", name)):
        if plan.get(name) != found.get(name):
            what = (
                "another table, or other columns of it"
                if name == "table"
                else f"{name}={found.get(name)}, not {plan.get(name)}"
            )
            raise ValueError(f"{out} was fetched with {what}; choose another folder, or delete that one")

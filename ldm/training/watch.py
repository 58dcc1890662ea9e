"""A run whose processes wait for one that is dead, stopped or stuck ends, and says which one that is."""

import json
import logging
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from ldm.checkpoints.files import read_json
from ldm.training.state import TrainState

log = logging.getLogger(__name__)

HUNG = 70
"""Exit status of a process that ended because the run had stopped getting anywhere: EX_SOFTWARE of sysexits.h."""

FIRST = 2
"""The first step may take so many times as long: it compiles, and measures."""

SILENT = 3
"""A process that was not heard of for so many ticks is dead or stopped."""

CONNECTION = re.compile(r"gloo|nccl|connection|timed out|broken pipe", re.IGNORECASE)
"""What errors say that are another process's doing."""


@dataclass(frozen=True)
class Report:
    """Where a process is. pulse: ticks of its watch; marks: how far its loop is; ended: by which error."""

    rank: int
    host: str
    pid: int
    pulse: int
    marks: int
    step: int
    doing: str
    ended: str = ""

    def __str__(self) -> str:
        who = f"rank {self.rank} (host {self.host}, process {self.pid})"
        where = f"{self.doing} at step {self.step}"
        return f"{who}, which ended {where}: {self.ended}" if self.ended else f"{who}, last heard of {where}"


class Watch:
    """Within the block a thread ends this process when no process of the run gets on for `timeout` seconds.

    Every process's thread writes how far its loop is to `out/.ranks/N.json`, which all must see, a few seconds apart;
    a loop that waits for another process stands still, and so in the end do all. Time is counted in ticks of the
    thread, so that what passes while a process is suspended (or a laptop asleep) does not count.
    """

    def __init__(self, state: TrainState, out: Path, timeout: float) -> None:
        self.state, self.timeout = state, timeout
        self.folder = out / ".ranks"
        self.tick = min(5.0, timeout / 10)
        self.first = state.step
        self._pulse = 0
        self._ended = ""
        self._silence: dict[int, int] = {}  # ticks since each process was heard of
        self._heard: dict[int, Report] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._tell()
        self.state.ranks.largest(0)  # all have told: what an earlier run left is gone
        self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say whose doing an error is, if it is another process's."""
        several = self.state.ranks.count > 1
        if several and isinstance(error, RuntimeError) and CONNECTION.search(str(error)):
            for _ in range(SILENT + 2):
                if lost := self._lost():
                    log.error("this run was left by %s", "; ".join(map(str, lost)))
                    break
                self._over.wait(self.tick)
        elif error is not None:
            self._ended = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._over.set()
        self._thread.join()
        if error is not None:
            self._tell()
        elif several:
            with suppress(OSError):
                self._file(self.state.ranks.rank).unlink(missing_ok=True)

    def _run(self) -> None:
        standing, before = 0, None
        while not self._over.wait(self.tick):
            self._pulse += 1
            self._tell()
            self._listen()
            now = {rank: report.marks for rank, report in self._heard.items()}
            standing = standing + 1 if now == before else 0
            before = now
            allowed = self.timeout * (FIRST if self.state.step == self.first else 1)
            if standing * self.tick >= allowed:
                self._end(allowed)

    def _end(self, waited: float) -> None:
        behind = min(report.marks for report in self._heard.values())
        slowest = self._lost() or [report for report in self._heard.values() if report.marks == behind]
        guard = threading.Timer(5.0, os._exit, (HUNG,))  # the log may be on a disk that hangs, too
        guard.daemon = True
        guard.start()
        log.error("no progress for %.4g s; waiting for %s", waited, "; ".join(map(str, slowest)))
        os._exit(HUNG)

    def _lost(self) -> list[Report]:
        """Processes that have ended by an error of their own; or else those that were not heard of for a while."""
        heard = list(self._heard.values())
        failed = [r for r in heard if r.ended]
        return failed or [r for r in heard if self._silence.get(r.rank, 0) >= SILENT]

    def _here(self) -> Report:
        state = self.state
        rank, host, pid = state.ranks.rank, socket.gethostname(), os.getpid()
        return Report(rank, host, pid, self._pulse, state.marks, state.step, state.doing, self._ended)

    def _tell(self) -> None:
        if self.state.ranks.count == 1:
            return
        path = self._file(self.state.ranks.rank)
        stage = path.with_suffix(".tmp")
        with suppress(OSError):  # on a full disk; the others still have their own progress to go by
            path.parent.mkdir(parents=True, exist_ok=True)
            stage.write_text(json.dumps(asdict(self._here())), encoding="utf-8")
            stage.replace(path)

    def _listen(self) -> None:
        self._heard[self.state.ranks.rank], self._silence[self.state.ranks.rank] = self._here(), 0
        for rank in set(range(self.state.ranks.count)) - {self.state.ranks.rank}:
            try:
                report = Report(**read_json(self._file(rank)))
            except (ValueError, TypeError):
                continue  # it has not begun, or has finished
            same = rank in self._heard and report.pulse == self._heard[rank].pulse
            self._silence[rank] = self._silence.get(rank, 0) + 1 if same else 0
            self._heard[rank] = report

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

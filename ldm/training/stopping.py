"""Stopping a run from outside, at a place from which it can go on."""

import os
import signal
import threading
import time
from types import FrameType

from ldm.training.ranks import Ranks

STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "run it again"."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks: schedulers, a keyboard, and SLURM's --signal=USR1."""

TOGETHER = 1.0
"""Signals within so many seconds are one: a terminal and a launcher both pass on what was typed once."""


class StopSignal:
    """Within the block, signals ask the run to stop after the step under way; a second one ends the process at once."""

    def __init__(self) -> None:
        self.since: float | None = None  # when the first signal came
        self._before: list[tuple[int, object]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = [(number, signal.signal(number, self._handle)) for number in SIGNALS]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]

    def asked(self, ranks: Ranks) -> bool:
        """Whether any process was asked; the same answer on all, which must all call it, between two steps."""
        return bool(ranks.largest(self.since is not None))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
        elif now - self.since > TOGETHER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

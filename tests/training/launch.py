"""Starting the processes of a run, and looking at what became of them."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """Exit status and words of each process (None: it had to be killed), and seconds from the fault to the last end."""

    statuses: list[int | None]
    said: list[str]
    seconds: float


def launch(out: Path, fault: str, *words: str, limit: float = 120) -> Ended:
    """Two processes that train the planted task; no launcher, so that each is left to itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, "-m", "tests.training.planted", str(out), fault, *words]
    start, mark = time.time(), out.parent / f"{out.name}-fault"
    mark.unlink(missing_ok=True)
    running, logs = [], [out.parent / f"{out.name}-rank{rank}.txt" for rank in range(2)]
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with logs[rank].open("w") as log:
            running.append(subprocess.Popen(command, env=os.environ | address | own, cwd=ROOT, stdout=log, stderr=log))
    statuses: list[int | None] = [None, None]
    last = start
    while None in statuses and time.time() - start < limit:
        time.sleep(0.05)
        before, statuses = statuses, [process.poll() for process in running]
        if statuses != before:
            last = time.time()
            limit = min(limit, last - start + 15)  # for the other; one that is stopped stays so
    for process in running:
        process.kill()
        process.wait()
    seconds = last - mark.stat().st_mtime if mark.exists() else last - start
    return Ended(statuses, [log.read_text() for log in logs], seconds)

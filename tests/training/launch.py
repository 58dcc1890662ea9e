"""Starting the processes of a run, and looking at what became of them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.config import to_yaml
from ldm.training.run import RunConfig, run

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


def two_processes(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What torchrun starts by these words, in two processes, with what they said."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def by_one_and_by_two(config_of: Callable[[Path], RunConfig], folder: Path) -> dict[int, dict[str, Tensor]]:
    """The trained weights, and what the task remembers, of the run in one process and of the same in two."""
    found = {}
    for processes in (1, 2):
        out = folder / str(processes)
        if processes == 1:
            run(config_of(out))
        else:
            file = folder / "two.yaml"
            file.write_text(to_yaml(config_of(out)))
            ended = two_processes("-m", "ldm", "train", str(file))
            assert ended.returncode == 0, ended.stderr
        newest = newest_valid(out / "checkpoints")
        assert newest is not None
        files = [newest / "train" / f"{name}.safetensors" for name in ("weights", "remembered")]
        found[processes] = {k: v for file in files if file.exists() for k, v in read_tensors(file)[0].items()}
    assert found[1].keys() == found[2].keys()
    return found

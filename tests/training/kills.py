"""Kill a run at random moments, or at each of its file operations, and go on until it is through.

    python -m tests.training.kills random|every KIND WORK SHARDS COUNT SEED [key=value ...]

Prints JSON: kills, those that struck, and what was found wrong (nothing, one hopes). Children are forked by a process
that has never computed anything, which is safe and saves the seconds that importing takes.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.checkpoints.files import newest_valid, steps, verify
from ldm.training.run import run
from ldm.training.stopping import STOPPED
from tests.conftest import tiny_config

KILLED = 9


def forked(act: Callable[[], Any]) -> int:
    """The process id of a child that does it, and ends with the status of the command."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        import torch

        torch.set_num_threads(1)
        status = STOPPED if act().stopped else 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def ended(child: int) -> int:
    """Its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint but those that hold the run's name, and the numbers of its log."""
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    found = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.json", "model.json")
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            found[f"losses of step {line['step']}"] = json.dumps(line["loss"]).encode()
    return found


def wrong(out: Path, before: int) -> str:
    """What is wrong with the checkpoints after a kill; "" if nothing. before: the newest step that was there."""
    folders = steps(out / "checkpoints")
    for folder in folders:
        try:
            verify(folder)
        except ValueError as error:
            return f"committed and not whole: {error}"
    newest = int(folders[-1].name.removeprefix("step-")) if folders else 0
    return f"step {newest} after step {before}" if newest < before else ""


def newest_step(out: Path) -> int:
    folders = steps(out / "checkpoints")
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


class Dying:
    """Ends the process before the k-th operation on files that can be seen from outside."""

    NAMES = (("rename", os), ("replace", os), ("fsync", os), ("unlink", os), ("rmdir", os), ("mkdir", os), ("open", os))

    def __init__(self, k: int) -> None:
        self.left = k
        for name, module in self.NAMES:
            setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:  # files are flushed in several threads
                os._exit(KILLED)
            self.left -= 1
            return real(*args, **kwargs)

        return operation


def through(work: Path, name: str, begin: Callable[[Path], Any]) -> tuple[Path, dict[str, bytes]]:
    """A run that nothing disturbs."""
    out = work / name
    assert ended(forked(lambda: begin(out))) == 0
    return out, bytes_of(out)


def at_random(work: Path, begin: Callable[[Path], Any], count: int, seed: int) -> dict[str, Any]:
    """`count` kills, of a run that is taken up again after each, and begun anew once it is through."""
    rng = random.Random(seed)
    started = time.monotonic()
    _, whole = through(work, "whole", begin)
    length = time.monotonic() - started
    found: dict[str, Any] = {"kills": 0, "struck": 0, "saved": 0, "runs": 0, "wrong": []}
    out = work / "0"
    while found["kills"] < count:
        before = newest_step(out)
        child = forked(lambda out=out: begin(out))
        time.sleep(rng.uniform(0, length))
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        os.kill(child, number)
        status = ended(child)
        found["kills"] += 1
        found["struck"] += status != 0
        found["saved"] += status == STOPPED
        if status not in (0, STOPPED, -number):
            found["wrong"].append(f"status {status} after signal {number}")
        if said := wrong(out, before):
            found["wrong"].append(said)
        if status == 0:
            _compare(found, out, whole)
            shutil.rmtree(out)
            out = work / str(found["runs"])
    assert ended(forked(lambda: begin(out))) == 0
    _compare(found, out, whole)
    return found


def at_every_operation(work: Path, begin: Callable[[Path], Any], stride: int, first: int) -> dict[str, Any]:
    """A run that ends before operation k, for every `stride`-th k from `first` on, and is taken up again."""
    _, whole = through(work, "whole", begin)
    found: dict[str, Any] = {"kills": 0, "struck": 0, "runs": 0, "wrong": []}
    k = first
    while True:
        out = work / str(k)

        def dying(out: Path = out, k: int = k) -> Any:
            Dying(k)
            return begin(out)

        status = ended(forked(dying))
        found["kills"] += 1
        if said := wrong(out, 0):
            found["wrong"].append(f"operation {k}: {said}")
        if status != 0:
            found["struck"] += 1
            assert ended(forked(lambda out=out: begin(out))) == 0
        _compare(found, out, whole)
        shutil.rmtree(out)
        if status == 0:
            return found
        k += stride


def _compare(found: dict[str, Any], out: Path, whole: dict[str, bytes]) -> None:
    found["runs"] += 1
    now = bytes_of(out)
    if now != whole:
        differ = [name for name in whole.keys() | now.keys() if whole.get(name) != now.get(name)]
        found["wrong"].append(f"{out.name}: differs in {', '.join(sorted(differ))}")
    left = [p.name for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]
    if left:
        found["wrong"].append(f"{out.name}: {left} left behind")


def main(words: list[str]) -> None:
    how, kind, work, shards, count, seed, *more = words
    logging.disable(logging.CRITICAL)

    # a run of 4 steps and saves; of 2 where it is to be run a hundred times, with a checkpoint to delete
    length = {"random": ["samples=32"], "every": ["samples=16", "keep=1"]}[how]

    def begin(out: Path) -> Any:
        return run(tiny_config(kind, out, Path(shards), *length, "save_steps=1", "preview_steps=0", *more))

    kill = {"random": at_random, "every": at_every_operation}[how]
    sys.stdout.write(json.dumps(kill(Path(work), begin, int(count), int(seed))))


if __name__ == "__main__":
    main(sys.argv[1:])

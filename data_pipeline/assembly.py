"""A folder of shards made part by part: claimed by a plan, filled in any order, indexed when all is there."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline import shards, storage
from data_pipeline.durable import staged_for
from data_pipeline.ledger import files_in, is_whole, newest_names, number_of, publish, shard_name
from data_pipeline.report import Report
from data_pipeline.storage import StrPath, join

log = logging.getLogger(__name__)

PLAN = "build.json"
Progress = Callable[[int, int], None]  # (done, total)
Runner = Callable[[list[int]], Iterable[int]]  # makes the shards of these numbers; gives each number when it is done


def assemble(
    out: StrPath, plan: dict[str, Any], run: Runner, part: tuple[int, int] = (1, 1), progress: Progress | None = None
) -> Report | None:
    """Make the shards of `plan` in `out` that are not there yet, and the folder's index.

    part (i, n): only every n-th shard, from the i-th on, so that n machines can share the work; the one that
    completes the set writes the index, the others get None. `plan` says what decides the bytes, and besides
    shards (how many), samples (rows of the source), size, image_format and source; `progress` counts shards.
    Raises ValueError when `out` is anything else, and what `run` and `publish` raise.
    """
    began = time.monotonic()
    mine = range(part[0] - 1, plan["shards"], part[1])
    claim(out, plan, mine)
    names = newest_names(out)
    kept = {number for number in mine if is_whole(out, names.get(number, shard_name(number)))}
    done = len(kept)
    if progress:
        progress(done, len(mine))
    for _ in run([number for number in mine if number not in kept]):
        done += 1
        if progress:
            progress(done, len(mine))
    if part[1] > 1 and len(newest_names(out)) < plan["shards"]:
        return None
    return _index(out, plan, seconds=time.monotonic() - began, kept=len(kept))


def index(out: StrPath) -> Report:
    """Write the index of a folder whose shards are all there.

    Every byte of them is read on a disk; of shards far away only the sizes are asked.
    Raises ValueError that names the shards which are missing or damaged.
    """
    if not storage.exists(join(out, PLAN)):
        raise ValueError(f"{out} has no {PLAN}: no build of shards started there; make one with: ldm data build")
    plan = shards.unseal(join(out, PLAN))
    names = newest_names(out)
    wanted = [names.get(number, shard_name(number)) for number in range(plan["shards"])]
    broken = [name for name in wanted if not is_whole(out, name)]
    if broken:
        shown = ", ".join(broken[:8]) + (", ..." if len(broken) > 8 else "")
        raise ValueError(
            f"{len(broken)} of {len(wanted)} shards in {out} are missing or damaged ({shown}); "
            "run the command that builds the folder again"
        )
    return _index(out, plan)


def claim(out: StrPath, plan: dict[str, Any], numbers: Iterable[int]) -> None:
    """Make `out` the folder of this plan, and clear what an earlier attempt left of these shards.

    Raises ValueError when `out` is a file or holds something else. Several may claim at once for the same plan.
    """
    if not storage.is_folder(out):
        if storage.exists(out):
            raise ValueError(f"{out} is a file; choose a folder")
        if not storage.is_remote(out):
            Path(out).mkdir(parents=True, exist_ok=True)
    path = join(out, PLAN)
    if not storage.exists(path):
        if any(not staged_for(file) for file in files_in(out)) and not storage.exists(path):
            raise ValueError(f"{out} is not empty and no build started there; choose another folder")
        storage.write(path, shards.seal(plan))
    _check_same(out, plan, shards.unseal(path))
    mine = set(numbers)
    for file in files_in(out):
        final = number_of((staged_for(file) or "").partition(".")[0])
        if final and final[0] in mine:
            storage.remove(join(out, file))


def _check_same(out: StrPath, plan: dict[str, Any], found: dict[str, Any]) -> None:
    for name in sorted((plan.keys() | found.keys()) - {"content"}):
        if plan.get(name) != found.get(name):
            raise ValueError(
                f"{out} holds a different build ({name}: {found.get(name)} there, {plan.get(name)} asked); "
                "choose another folder, or delete that one"
            )
    if plan.get("content") != found.get("content"):
        raise ValueError(f"the source changed since the build in {out} began; delete that folder, or choose another")


def _index(out: StrPath, plan: dict[str, Any], *, seconds: float = 0.0, kept: int = 0) -> Report:
    like = shards.Info(0, 0, plan["size"], plan["image_format"], plan["source"], (), plan["samples"])
    report = publish(out, list(newest_names(out).values()), like, seconds=seconds, kept=kept)
    log.info("%s: %d samples; rejected: %s", out, report.delivered, report.reasons)
    return report

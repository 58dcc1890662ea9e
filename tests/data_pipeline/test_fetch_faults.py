"""A fetch that is killed, or runs out of disk, at random moments and at every operation, goes on where it was."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import durable, fetch_part
from data_pipeline.download import Outcome
from data_pipeline.fetch import fetch
from data_pipeline.fetch_part import Part
from tests.data_pipeline.hostile_server import Request, Server, picture, serving
from tests.data_pipeline.test_fetch import QUICK, check_complete, members, number, outcomes, respond, write_table


@pytest.fixture
def counting() -> Iterator[Server]:
    with serving({"/p/": five}) as made:
        yield made


def settled(out: Path) -> set[int]:
    """Rows that need not be asked for again, read from ledgers and journals without the code under test."""
    found: dict[int, bool] = {}
    for path in out.glob("[0-9]*.json"):
        ledger = json.loads(path.read_bytes())
        found |= {s["row"]: True for s in ledger["samples"]}
        found |= {r["row"]: not r["retryable"] for r in ledger["rejected"]}
    for path in out.glob(".*.journal"):
        data = path.read_bytes()
        while (end := data.find(b"\n")) >= 0:
            line = json.loads(data[:end])
            if len(data) < end + 1 + line["size"]:
                break
            found[line["row"]] = not line["retryable"]
            data = data[end + 1 + line["size"] :]
    return {row for row, final in found.items() if final}


def kill_at_random(table: str, out: Path, server: Server, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kill a fetch at random moments, starting it again each time, from nothing whenever it gets to its end.

    Returns how many kills hit, and how many of them hit a fetch that had done something and not yet all.
    """
    context = multiprocessing.get_context("fork")
    hit = midway = 0
    asked: dict[int, int] = {}
    config = replace(QUICK, per_host=3)
    while hit < kills:
        child = context.Process(target=fetch, args=(table, out, config))
        at = sum(server.hits.values()) + rng.randint(0, 20)  # by requests, not by time: machines differ
        child.start()
        while sum(server.hits.values()) < at and child.exitcode is None:
            time.sleep(0.001)
        child.join(rng.uniform(0, 0.01))
        if child.exitcode is None:
            child.kill()
            child.join()
            hit += 1
        else:
            assert child.exitcode == 0
        time.sleep(0.02)  # what the server still reads of the dead child's requests
        assert all(server.hits[f"/p/{row}"] == count for row, count in asked.items()), "asked for again"
        done = settled(out) if out.exists() else set()
        assert asked.keys() <= done, "lost"
        asked = {row: server.hits[f"/p/{row}"] for row in done}
        midway += 0 < len(done) < 58
        if child.exitcode == 0:
            check_complete(out, 60)
            shutil.rmtree(out)
            asked, server.hits = {}, type(server.hits)()
    fetch(table, out, config)
    assert all(server.hits[f"/p/{row}"] == count for row, count in asked.items())
    check_complete(out, 60)
    return hit, midway


def slowly(request: Request) -> None:
    time.sleep(0.002)
    respond(request)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_moments_nothing_is_lost_or_twice_or_asked_again(tmp_path: Path, kills: int) -> None:
    with serving({"/p/": slowly}) as server:
        table = write_table(tmp_path / "t.jsonl", server, 60)
        hit, midway = kill_at_random(table, tmp_path / "out", server, kills, random.Random(kills))
    assert hit == kills and midway >= kills // 4


def failing_at(point: int, action: Callable[[str, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """`operate` that does `action` instead of operation number `point`."""
    count = itertools.count()

    def operate(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if next(count) == point:
            action(name, arguments)
        return function(*arguments)

    return operate


def no_room(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "append":
        path, data = arguments
        with path.open("ab") as file:
            file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def die(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "append":
        path, data = arguments
        with path.open("ab") as file:
            file.write(data[:-1])
    os._exit(9)


FIVE = {0: "ok", 1: "http 404", 2: "http 503", 3: "ok", 4: "ok"}
TWO_PARTS = replace(QUICK, rows_per_part=3, tries=1)


def five(request: Request) -> None:
    n = number(request)
    request.answer("200 OK", picture(n)) if FIVE[n] == "ok" else request.answer(FIVE[n][5:] + " No")


def check_going_on(table: str, out: Path, server: Server, expected: dict[int, str]) -> None:
    """A fetch goes on from what `out` holds, asks for none of it again, and leaves nothing else behind."""
    before, kept = server.hits.copy(), settled(out) if out.exists() else set()
    fetch(table, out, TWO_PARTS)
    assert not {int(path[3:]) for path in server.hits - before} & kept
    assert outcomes(out) == expected
    delivered = [row for row, outcome in expected.items() if outcome == "ok"]
    assert set(members(out)) == {f"{row:09d}.{ext}" for row in delivered for ext in ("png", "json")}
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    shutil.rmtree(out)


@pytest.mark.slow
def test_a_full_disk_at_every_operation_leaves_a_folder_to_go_on_with(
    counting: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = write_table(tmp_path / "t.jsonl", counting, 5), tmp_path / "out"
    for point in itertools.count():
        with monkeypatch.context() as patch:
            broken = failing_at(point, no_room)
            patch.setattr(durable, "operate", broken)
            patch.setattr(fetch_part, "operate", broken)
            try:
                fetch(table, out, TWO_PARTS)
                break  # fewer operations than that
            except (RuntimeError, OSError) as error:
                assert "No space left" in str(error)
        check_going_on(table, out, counting, FIVE)
    assert point > 25


@pytest.mark.slow
def test_death_at_every_operation_leaves_a_folder_to_go_on_with(
    counting: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a second run, which adds a tar to a part that was complete."""
    table, once, out = write_table(tmp_path / "t.jsonl", counting, 5), tmp_path / "once", tmp_path / "out"
    fetch(table, once, TWO_PARTS)
    counting.routes["/p/2"] = lambda r: r.answer("200 OK", picture(2))
    context = multiprocessing.get_context("fork")
    for start in (None, once):
        for point in itertools.count():
            if start:
                shutil.copytree(start, out)
            with monkeypatch.context() as patch:
                broken = failing_at(point, die)
                patch.setattr(durable, "operate", broken)
                patch.setattr(fetch_part, "operate", broken)
                child = context.Process(target=fetch, args=(table, out, TWO_PARTS))
                child.start()
                child.join()
            check_going_on(table, out, counting, FIVE | {2: "ok"})
            if child.exitcode == 0:
                break
            assert child.exitcode == 9
        assert point > (10 if start else 25)


def test_a_journal_cut_or_flipped_anywhere_gives_back_what_is_before(tmp_path: Path) -> None:
    part = Part(tmp_path, 3, range(30, 40))
    for row in range(30, 40):
        ok = row % 3 != 0
        part.record(row, Outcome(1, data=picture(row)) if ok else Outcome(2, reason="http 404", detail="é"))
    journal = tmp_path / ".00003.journal"
    whole = journal.read_bytes()
    ends = []
    rest = whole
    while rest:
        end = rest.index(b"\n") + 1 + json.loads(rest[: rest.index(b"\n")])["size"]
        ends.append((ends[-1] if ends else 0) + end)
        rest = rest[end:]
    rng = random.Random(0)
    for _ in range(60):
        at = rng.randrange(len(whole))
        journal.write_bytes(whole[:at])
        complete = sum(end <= at for end in ends)
        assert Part(tmp_path, 3, range(30, 40)).todo() == list(range(30 + complete, 40))
        assert journal.stat().st_size == ([0] + ends)[complete]
        flipped = bytearray(whole)
        body = rng.choice([e for e, row in zip(ends, range(30, 40), strict=True) if row % 3]) - 1
        flipped[body] ^= 1
        journal.write_bytes(flipped)
        assert Part(tmp_path, 3, range(30, 40)).todo() == list(range(30 + ends.index(body + 1), 40))


def test_a_journal_line_that_is_damaged_is_where_it_is_cut(tmp_path: Path) -> None:
    part = Part(tmp_path, 0, range(4))
    for row in range(3):
        part.record(row, Outcome(1, data=b"data"))
    journal = tmp_path / ".00000.journal"
    whole = journal.read_bytes()
    first = whole.index(b"data") + 4
    for bad in (b"3\n", b"{}\n", b"[]\n", b'"x"\n', whole[first:].replace(b'"row": 1', b'"row": 3', 1)):
        journal.write_bytes(whole[:first] + bad + whole[first:])
        assert Part(tmp_path, 0, range(4)).todo() == [1, 2, 3]
        assert journal.read_bytes() == whole[:first]

"""A table of URLs into a folder: nothing lost, nothing twice, nothing asked for again, whatever happens on the way."""

import csv
import fcntl
import json
import math
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.build import BuildConfig, build
from data_pipeline.download import FetchConfig
from data_pipeline.fetch import fetch
from data_pipeline.reader import ShardReader
from data_pipeline.shards import sha256, unseal
from data_pipeline.sources import Rejected
from data_pipeline.sources.fetched import FetchedConfig, FetchedSource
from tests.data_pipeline.hostile_server import Request, Server, picture, serving

QUICK = FetchConfig(
    allow_private=True, ports=(), rows_per_part=10, per_host=8, delay_s=0, tries=2, backoff_s=0.005, read_s=5, total_s=9
)  # fmt: skip


def number(request: Request) -> int:
    return int(request.path.rpartition("/")[2])


def respond(request: Request) -> None:
    """Of 20 rows: one is gone, one wants to be asked twice, one is closed for maintenance, one is no picture."""
    n = number(request)
    if n % 20 == 3:
        request.answer("404 Not Found")
    elif n % 20 == 7 and request.count == 1:
        request.answer("500 Oops")
    elif n % 20 == 11:
        request.answer("503 Maintenance")
    elif n % 20 == 15:
        request.answer("200 OK", b"<html>no picture")
    else:
        request.answer("200 OK", picture(n), "Content-Type: image/png")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({"/p/": respond}) as made:
        yield made


def write_table(path: Path, server: Server, rows: int) -> str:
    lines = [{"url": server.url(f"/p/{i}"), "caption": f"number {i}", "id": i} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def members(out: Path) -> dict[str, bytes]:
    """Every file in every tar, by the tar's own account. A name that is there twice fails."""
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found, f"{member.name} twice"
                file = tar.extractfile(member)
                assert file
                found[member.name] = file.read()
    return found


def outcomes(out: Path) -> dict[int, str]:
    """Row -> "ok" or the reason, by the ledgers; each row once."""
    found: dict[int, str] = {}
    for path in sorted(out.glob("[0-9]*.json")):
        ledger = unseal(path)
        for entry in (*ledger["samples"], *ledger["rejected"]):
            assert entry["row"] not in found
            found[entry["row"]] = entry.get("reason", "ok")
    return found


def wanted(rows: int) -> dict[int, str]:
    failures = {3: "http 404", 11: "http 503", 15: "not a picture"}
    return {i: failures.get(i % 20, "ok") for i in range(rows)}


def check_complete(out: Path, rows: int) -> None:
    assert outcomes(out) == wanted(rows)
    files = members(out)
    delivered = [i for i, outcome in wanted(rows).items() if outcome == "ok"]
    assert set(files) == {f"{i:09d}.{ext}" for i in delivered for ext in ("png", "json")}
    assert all(files[f"{i:09d}.png"] == picture(i) for i in delivered)
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_every_row_ends_in_the_ledger_and_every_byte_in_a_tar(server: Server, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.jsonl", server, 45), tmp_path / "out"
    told: list[tuple[int, int]] = []
    report = fetch(table, out, QUICK, lambda done, total: told.append((done, total)))
    check_complete(out, 45)
    assert report.rejected == {"http 404": 3, "http 503": 2, "not a picture": 2}
    assert (report.rows, report.delivered, report.kept, report.retryable) == (45, 38, 0, 2)
    assert report.bytes == sum(p.stat().st_size for p in out.glob("*.tar"))
    assert "38 of 45 rows fetched" in str(report) and "http 503" in str(report)
    assert told[-1] == (45, 45) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert max(server.most.values()) <= QUICK.per_host
    about = json.loads(members(out)["000000007.json"])
    assert about == {
        "row": 7, "key": "t-000000007", "url": server.url("/p/7"), "found_at": server.url("/p/7"),
        "captions": ["number 7"], "meta": {"columns": {"id": 7}}, "status": 200, "content_type": "image/png",
        "sha256": sha256(picture(7)),
    }  # fmt: skip
    ledger = unseal(out / "00000.json")
    (row,) = (s for s in ledger["samples"] if s["row"] == 7)
    assert row["tries"] == 2 and row["name"] == server.url("/p/7")
    rejected = {r["row"]: (r["reason"], r["retryable"], r["tries"], r["name"]) for r in ledger["rejected"]}
    assert rejected == {3: ("http 404", False, 1, server.url("/p/3"))}
    read = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
    assert [sample["png"] for sample in read] == [picture(json.loads(sample["json"])["row"]) for sample in read]


def test_a_second_run_asks_only_for_what_may_succeed_now(server: Server, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.jsonl", server, 45), tmp_path / "out"
    fetch(table, out, QUICK)
    before, tars = server.hits.copy(), {p.name: p.read_bytes() for p in out.glob("*.tar")}
    assert fetch(table, out, QUICK).kept == 43
    assert server.hits - before == {"/p/11": 2, "/p/31": 2}  # two tries each
    check_complete(out, 45)

    def open_again(request: Request) -> None:
        request.answer("200 OK", picture(number(request)))

    server.routes["/p/11"] = server.routes["/p/31"] = open_again
    before = server.hits.copy()
    report = fetch(table, out, QUICK)
    assert server.hits - before == {"/p/11": 1, "/p/31": 1}
    assert (report.delivered, report.kept, report.retryable) == (40, 43, 0)
    after = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    assert set(after) - set(tars) == {"00001-1.tar", "00003-1.tar"}
    assert all(after[name] == data for name, data in tars.items())
    before = server.hits.copy()
    assert fetch(table, out, QUICK).kept == 45 and server.hits == before
    assert {i for i, outcome in outcomes(out).items() if outcome == "ok"} == {int(n[:9]) for n in members(out)}


def test_lost_and_damaged_files_are_fetched_again_and_nothing_else(server: Server, tmp_path: Path) -> None:
    server.routes["/p/"] = lambda r: r.answer("200 OK", picture(number(r)))
    table, out = write_table(tmp_path / "t.jsonl", server, 30), tmp_path / "out"
    fetch(table, out, QUICK)
    good = members(out)

    def damage(name: str, how: Callable[[Path], object]) -> set[int]:
        how(out / name)
        before = server.hits.copy()
        fetch(table, out, QUICK)
        assert members(out) == good and set(outcomes(out).values()) == {"ok"}
        return {int(path[3:]) for path in server.hits - before}

    assert damage("00001.tar", Path.unlink) == set(range(10, 20))
    assert damage("00002.tar", lambda p: p.write_bytes(p.read_bytes()[:-512])) == set(range(20, 30))
    assert damage("00000.json", Path.unlink) == set(range(10))
    assert damage(
        "00002.json", lambda p: p.write_bytes(p.read_bytes().replace(b'"tries": 1', b'"tries": 2', 1))
    ) == set(range(20, 30))
    assert damage("index.json", Path.unlink) == set()
    assert damage("00000-1.tar", lambda p: p.write_bytes((out / "00000.tar").read_bytes())) == set()
    assert damage(".00001.json.0123abcd.tmp", lambda p: p.write_bytes(b"left over")) == set()


ROWS: list[dict[str, Any]] = [
    {"URL": "/p/0", "TEXT": "plain", "punsafe": 0.25, "similarity": math.nan, "note": "a, \"b\"\nc"},
    {"URL": "/p/1", "TEXT": " spaced\u00a0 out ", "punsafe": 1.0, "similarity": 0.5, "note": ""},
    {"URL": "/p/2", "TEXT": "", "punsafe": 0.0, "similarity": 0.5, "note": "x"},
    {"URL": "", "TEXT": "no address", "punsafe": 0.0, "similarity": 0.5, "note": "x"},
    {"URL": "/p/4", "TEXT": "né 🎈", "punsafe": 0.0, "similarity": 0.5, "note": "ü"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_give_the_same(kind: str, server: Server, tmp_path: Path) -> None:
    rows = [{**row, "URL": row["URL"] and server.url(row["URL"])} for row in ROWS]
    path = tmp_path / f"laion.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
    report = fetch(str(path), tmp_path / "out", QUICK)
    assert report.rejected == {"no url": 1, "empty caption": 1}
    assert server.hits == {"/p/0": 1, "/p/1": 1, "/p/4": 1}
    found = {k[:9]: json.loads(v) for k, v in members(tmp_path / "out").items() if k.endswith("json")}
    assert [about["captions"] for about in found.values()] == [["plain"], ["spaced out"], ["né 🎈"]]
    assert [about["meta"] for about in found.values()] == [
        {"scores": {"unsafe": 0.25}, "columns": {"note": 'a, "b"\nc'}},
        {"scores": {"unsafe": 1.0, "similarity": 0.5}, "columns": {"note": ""}},
        {"scores": {"unsafe": 0.0, "similarity": 0.5}, "columns": {"note": "ü"}},
    ]


def test_rows_that_are_none_are_in_the_ledger(server: Server, tmp_path: Path) -> None:
    good = json.dumps({"url": server.url("/p/1"), "caption": ["one", "two"], "x": "a\ud800"})
    lines = [
        good, "{broken", "[1, 2]", '{"url": 5, "caption": "c"}', '{"caption": "c"}',
        '{"url": "\\ud800", "caption": "c"}',
        json.dumps({"url": server.url("/p/2"), "caption": 7}), '{"url": "x", "caption": "c", "\\ud800": 1}',
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"url": "\xff", "caption": "c"}\n')
    report = fetch(str(path), tmp_path / "out", QUICK)
    assert report.rows == 9 and report.delivered == 1 and sum(report.rejected.values()) == 8 and not report.retryable
    assert sorted(outcomes(tmp_path / "out")) == list(range(9))
    (about,) = (json.loads(v) for k, v in members(tmp_path / "out").items() if k.endswith("json"))
    assert about["captions"] == ["one", "two"]


def test_another_table_or_other_rules_are_refused_in_one_line(server: Server, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.jsonl", server, 3), tmp_path / "out"
    fetch(table, out, QUICK)
    fetch(table, out, replace(QUICK, tries=5, per_host=1, user_agent="other/1", seed=3, connect_s=3))  # how, not what
    moved = tmp_path / "moved.jsonl"
    shutil.copy(table, moved)
    for config in (
        replace(QUICK, max_bytes=5), replace(QUICK, honour_robots=False), replace(QUICK, allow_private=False),
        replace(QUICK, ports=(80,)), replace(QUICK, rows_per_part=7), replace(QUICK, max_redirects=0),
        replace(QUICK, caption_columns=("id",)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"was fetched with [^\n]*; choose another folder, or delete that one$"):
            fetch(table, out, config)
    Path(table).write_text(Path(table).read_text().replace("number 2", "number two"))
    with pytest.raises(ValueError, match="was fetched with another table"):
        fetch(table, out, QUICK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and no fetch started there"):
        fetch(str(moved), tmp_path / "other", QUICK)
    with pytest.raises(ValueError, match="is a file"):
        fetch(str(moved), moved, QUICK)


def test_two_fetches_do_not_share_a_folder(server: Server, tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.jsonl", server, 3), tmp_path / "out"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another fetch is running in"):
        fetch(table, out, QUICK)
    os.close(folder)
    assert fetch(table, out, QUICK).rows == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.txt", "url,caption\n", "is not a table"),
        ("t.csv", "url,caption\n", "no rows"),
        ("t.csv", "link,caption\na,b\n", "no url column.*link, caption"),
        ("t.csv", "url,title\na,b\n", "no caption column.*url, title"),
        ("t.parquet", "no parquet", "cannot be read"),
        ("missing", "", "is not a table"),
    ],
)
def test_tables_that_are_none(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        fetch(str(tmp_path / name), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def real_picture(n: int) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_fetched_folder_is_a_source_and_builds_into_shards(server: Server, tmp_path: Path) -> None:
    def route(request: Request) -> None:
        n = number(request)
        bodies = {4: b"\x89PNG\r\n\x1a\n but broken", 5: b"neither this nor that"}
        request.answer("404 Not Found") if n == 3 else request.answer("200 OK", bodies.get(n) or real_picture(n))

    server.routes["/p/"] = route
    table, out = write_table(tmp_path / "t.jsonl", server, 25), tmp_path / "out"
    with pytest.raises(ValueError, match="no finished fetch"):
        FetchedSource(FetchedConfig(str(out)))
    fetch(table, out, QUICK)
    source = FetchedSource(FetchedConfig(str(out)))
    assert len(source) == 25 and source.name(3) == server.url("/p/3")
    for i in (*range(3), *range(6, 25)):
        sample = pickle.loads(pickle.dumps(source))[i]
        assert np.array_equal(np.asarray(sample.image), np.asarray(Image.open(BytesIO(real_picture(i)))))
        assert (sample.key, sample.captions) == (f"t-{i:09d}", (f"number {i}",))
        assert sample.meta["url"] == server.url(f"/p/{i}") and sample.meta["sha256"] == sha256(real_picture(i))
        assert sample.meta["columns"] == {"id": i}
    for i, reason in ((3, "http 404"), (4, "image"), (5, "image")):
        with pytest.raises(Rejected, match=reason):
            source[i]
    with pytest.raises(IndexError):
        source[25]
    report = build(source, BuildConfig(size=16), tmp_path / "shards")
    assert report.delivered == 22 and sum(r.count for r in report.rejected.values()) == 3
    assert report.rejected["http 404"].count == 1
    assert [sample.key for sample in map(ShardReader(tmp_path / "shards").__getitem__, range(22))] == [
        f"t-{i:09d}" for i in range(25) if i not in (3, 4, 5)
    ]

    tar = out / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    tar.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"00001.tar is missing or damaged; delete it and run"):
        source[10]
    tar.unlink()
    fetch(table, out, QUICK)
    fresh = FetchedSource(FetchedConfig(str(out)))
    assert fresh[10].key == "t-000000010" and fresh.fingerprint != source.fingerprint
    with pytest.raises(RuntimeError, match=r"00001.json is missing or not as the fetch left it"):
        FetchedSource(FetchedConfig(str(out))) and pickle.loads(pickle.dumps(source))[10]

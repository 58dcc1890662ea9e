"""Shards that others wrote: the grammar as webdataset has it, and every kind of damage named."""

import gzip
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset import TarWriter

from data_pipeline import storage
from data_pipeline.sources import tars
from data_pipeline.sources.shard_scan import scan
from data_pipeline.sources.webdataset import WebDatasetConfig, WebDatasetSource, expand
from tests.data_pipeline.makers import check_random_access, described, png, verdicts

COUNT = 10
BLOCK = 512


def write(path: Path, keys: list[str], **more: bytes) -> Path:
    """A shard by webdataset's own writer: key.json, key.png, key.txt (it sorts them), and more members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for i, key in enumerate(keys):
            about = {"caption": f"json {i}", "url": f"http://h/{i}", "width": 6, "AESTHETIC_SCORE": 5.5}
            writer.write({"__key__": key, "png": png(i), "txt": f"caption {i}".encode(), "json": about, **more})
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A shard of ten samples."""
    return write(tmp_path_factory.mktemp("good") / "a.tar", [f"{i:04d}" for i in range(COUNT)]).read_bytes()


def source(path: Path | str, **settings: object) -> WebDatasetSource:
    return WebDatasetSource(WebDatasetConfig(path=str(path), **settings))


def judged(folder: Path, data: bytes) -> dict[str, object]:
    """Name within the shard -> main caption, or the reason."""
    (folder / "x.tar").write_bytes(data)
    found = verdicts(source(folder / "x.tar"))
    return {name.removeprefix("x.tar/"): v if isinstance(v, str) else v[0] for name, v in found.items()}


def whole(numbers: range) -> dict[str, object]:
    return {f"{i:04d}": f"caption {i}" for i in numbers}


def member(data: bytes, name: str) -> tarfile.TarInfo:
    return tarfile.open(fileobj=io.BytesIO(data)).getmember(name)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def archive(entries: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in entries:
            add(tar, name, data)
    return buffer.getvalue()


def test_a_good_folder(tmp_path: Path) -> None:
    """Two shards with the same keys, one further down: what webdataset's own reader gives, and nothing rejected."""
    write(tmp_path / "one.tar", ["a", "sub/B c"], cls=b"3")
    write(tmp_path / "down/one.tar", ["a", "b"])
    opened = source(tmp_path)
    rows = described(opened)
    assert [r[0] for r in rows] == ["down/one.tar/a", "down/one.tar/b", "one.tar/a", "one.tar/sub/B c"]
    assert [r[2] for r in rows] == [("caption 0",), ("caption 1",)] * 2
    assert len({r[1] for r in rows}) == 4
    _, key, _, meta, pixels = rows[3]
    assert key.startswith("one-sub-b-c-") and meta["scores"] == {"aesthetic": 5.5} and meta["url"] == "http://h/1"
    assert meta["columns"] == {"width": 6} and meta["unused_members"] == ["cls"] and meta["member"] == "sub/B c"
    both = [str(tmp_path / t) for t in ("down/one.tar", "one.tar")]
    theirs = list(webdataset.WebDataset(both, shardshuffle=False))
    assert [s["__key__"] for s in theirs] == ["a", "b", "a", "sub/B c"]
    assert [s["txt"].decode() for s in theirs] == [r[2][0] for r in rows]
    assert pixels == webdataset.autodecode.imagehandler("pil")("x.png", theirs[3]["png"]).tobytes()
    check_random_access(opened, tmp_path)


def test_json_captions_and_patterns(tmp_path: Path) -> None:
    for number in range(3):
        with TarWriter(str(tmp_path / f"part-{number:02d}.tar")) as writer:
            writer.write({"__key__": "k", "png": png(), "json": {"text": ["one", "two", " "], "p": float(number)}})
    assert list(expand("a{08..10}b{0..1}")) == ["a08b0", "a08b1", "a09b0", "a09b1", "a10b0", "a10b1"]
    rows = described(source(f"{tmp_path}/part-{{01..02}}.tar"))
    assert [(r[0], r[2], r[3]["columns"]) for r in rows] == [
        (f"part-{n:02d}.tar/k", ("one", "two"), {"p": float(n)}) for n in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"^2 of 3 shards of .* are missing, such as part-03\.tar$"):
        source(f"{tmp_path}/part-{{02..04}}.tar")
    for bad, message in (("{3..1}", "runs backwards"), ("{a,b}", "a range of numbers")):
        with pytest.raises(ValueError, match=message):
            source(f"{tmp_path}/part-{bad}.tar")
    (tmp_path / "d").mkdir()
    for path, message in (
        ("", "no shards at ''"),
        (tmp_path / "no.tar", "no shards at"),
        (tmp_path / "d", r"no \.tar"),
    ):
        with pytest.raises(ValueError, match=message):
            source(path)


def cut(where: str) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        picture, next_first = member(data, "0005.png"), member(data, "0006.json")
        places = {
            "data": picture.offset_data + 10,
            "header": picture.offset + 100,
            "at header": picture.offset,
            "between": next_first.offset,
        }
        return data[: places[where]]

    return damaged


def flip(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[at(data)] ^= 1
        return bytes(changed)

    return damaged


def zeros(data: bytes) -> bytes:
    at = member(data, "0005.json").offset
    return data[:at] + bytes(1024) + data[at:]


def overwritten(data: bytes) -> bytes:
    at = member(data, "0005.png").offset_data - BLOCK
    return data[:at] + bytes(BLOCK) + data[at + BLOCK :]


HEADER = "damaged tar"
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], dict[str, object]]] = {
    "cut inside data": (cut("data"), {**whole(range(5)), "0005": "cut short", "@": HEADER}),
    "cut inside a header": (cut("header"), {**whole(range(5)), "0005": HEADER, "@": HEADER}),
    "cut at a header": (cut("at header"), {**whole(range(5)), "0005": HEADER, "@": HEADER}),
    "cut between samples": (cut("between"), {**whole(range(6)), "@": HEADER}),
    "flipped header byte": (
        flip(lambda d: member(d, "0005.png").offset_data - BLOCK + 3),
        {**whole(range(10)), "0005": HEADER, "@": HEADER},
    ),
    "flipped byte of an extended header": (
        flip(lambda d: member(d, "0005.png").offset + 3),
        {**whole(range(10)), "@": HEADER},
    ),
    "flipped size": (
        flip(lambda d: member(d, "0009.txt").offset_data - BLOCK + 134),
        {**whole(range(9)), "0009": HEADER, "@": HEADER},
    ),
    "zero bytes inserted": (zeros, {**whole(range(10)), "@": HEADER}),
    "zero bytes over a header": (overwritten, {**whole(range(10)), "0005": HEADER, "@": HEADER}),
    "flipped payload byte": (
        flip(lambda d: member(d, "0005.png").offset_data + 50),
        {**whole(range(10)), "0005": "unreadable image"},
    ),
    "end mark cut": (lambda d: d[: member(d, "0009.txt").offset_data + 2 * BLOCK], {**whole(range(10)), "@": HEADER}),
    "no end mark": (lambda d: d[: member(d, "0009.txt").offset_data + BLOCK], {**whole(range(10)), "@": HEADER}),
    "bytes of another length inserted": (
        lambda d: d[: (at := member(d, "0005.json").offset)] + b"?" * 333 + d[at:],
        {**whole(range(10)), "@": HEADER},
    ),
    "gzip named .tar": (gzip.compress, {"@": HEADER}),
    "empty file": (lambda d: b"", {"x.tar": "empty tar"}),
    "empty tar": (lambda d: bytes(10240), {"x.tar": "empty tar"}),
    "text named .tar": (lambda d: b"<html>not found</html>" * 100, {"@": HEADER}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_rest_is_delivered(kind: str, good: bytes, tmp_path: Path) -> None:
    damage, expected = DAMAGE[kind]
    found = {re.sub("^@.*", "@", name): verdict for name, verdict in judged(tmp_path, damage(good)).items()}
    assert found == expected


def test_damage_says_where(good: bytes, tmp_path: Path) -> None:
    at = member(good, "0005.png").offset_data - BLOCK
    (tmp_path / "x.tar").write_bytes(overwritten(good))
    rows = {r[0]: r for r in described(source(tmp_path))}
    assert rows[f"x.tar/@{at}"][2] == f"zero bytes inside: {member(good, '0005.txt').offset - at} bytes passed over"
    assert rows["x.tar/0005"][2] == "beside damage, and without png"
    (tmp_path / "x.tar").write_bytes(gzip.compress(good))
    assert described(source(tmp_path)) == [("x.tar/@0", "damaged tar", "compressed with gzip: unpack it first")]


def sample(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(number)), (f"{key}.txt", f"caption {number}".encode())]


NAMES: dict[str, tuple[list[tuple[str, bytes]], dict[str, object]]] = {
    "keys x x y x": (
        [*sample("x", 0), *sample("x", 1), *sample("y", 2), *sample("x", 3)],
        {"x": "caption 0; duplicate key; duplicate key", "y": "caption 2"},
    ),
    "members not adjacent": (
        [*(sample(k)[0] for k in "abc"), *(sample(k)[1] for k in "abc")],
        dict.fromkeys("abc", "members not adjacent"),
    ),
    "dotted names": (
        [*sample("v1.5_a", 0), *sample("v1.5_b", 1), *sample("plain", 2)],
        {"plain": "caption 2", "v1.5_a": "dotted name", "v1.5_b": "dotted name"},
    ),
    "path traversal": (
        [*sample("../../etc/x"), *sample("/abs/y"), *sample("C:\\z"), *sample("a/../b"), *sample("ok/k.")[:0]],
        dict.fromkeys(("../../etc/x", "/abs/y", "C:\\z", "a/../b"), "unsafe name"),
    ),
    "Latin-1": (
        [("a.png", png()), ("a.txt", "né".encode("latin-1")), *sample("b", 1)],
        {"a": "caption is not UTF-8", "b": "caption 1"},
    ),
    "half samples": (
        [("a.png", png()), ("b.txt", b"x"), ("c.png", png()), ("c.jpg", png()), ("c.txt", b"x"), ("README", b"x")],
        {"a": "no caption", "b": "missing image", "c": "several images", "README": "not a sample"},
    ),
    "metadata": (
        [("a.png", png()), ("a.json", b"{oops"), ("b.png", png()), ("b.json", b"[1]"), ("c.png", b""), ("c.txt", b"x")],
        {"a": "unreadable metadata", "b": "unreadable metadata", "c": "unreadable image"},
    ),
    "a nested tar": ([("a.tar", archive(sample("inner"))), *sample("b", 1)], {"a": "missing image", "b": "caption 1"}),
}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("kind", NAMES)
def test_names_and_members(kind: str, form: int, tmp_path: Path) -> None:
    entries, expected = NAMES[kind]
    (tmp_path / "x.tar").write_bytes(archive(entries, form))
    found: dict[str, object] = {}
    for name, *rest in described(source(tmp_path)):
        key, verdict = name.removeprefix("x.tar/"), rest[1][0] if len(rest) == 4 else rest[0]
        found[key] = f"{found[key]}; {verdict}" if key in found else verdict
    assert found == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(form: int, tmp_path: Path) -> None:
    """Long names and ones that are not ASCII are names like others, however the tar writes them."""
    ustar = form == tarfile.USTAR_FORMAT
    long, other = "d" * 90 + "/" + "k" * (90 if ustar else 200), "ne" if ustar else "né"
    found = judged(tmp_path, archive([*sample(long, 0), *sample(other, 1), *sample("./dot/z", 2)], form))
    assert found == {long: "caption 0", other: "caption 1", "dot/z": "caption 2"}


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        kinds = {"a": tarfile.SYMTYPE, "b": tarfile.LNKTYPE, "c": tarfile.CHRTYPE, "d": tarfile.FIFOTYPE, "e": b"Z"}
        for key, kind in kinds.items():
            add(tar, f"{key}.png", type=kind, linkname="/etc/passwd")
            add(tar, f"{key}.txt", b"caption")
        add(tar, "f.png", png(), pax_headers={"GNU.sparse.major": "1"})
        add(tar, "f.txt", b"caption")
        for name, data in sample("g"):
            add(tar, name, data)
    found = judged(tmp_path, buffer.getvalue())
    assert found == {**dict.fromkeys("abcdef", "not a plain file"), "g": "caption 0"}


def test_old_sparse_files_and_large_sizes() -> None:
    """GNU's old sparse header has further header blocks; sizes of 8 GB and more are binary numbers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.png", b"x" * 700)
    block = bytearray(buffer.getvalue()[:BLOCK])
    block[156:157], block[482] = b"S", 1
    block[148:156] = f"{sum(block[:148]) + 256 + sum(block[156:]):06o}\0 ".encode()
    data = bytes(block) + bytes(504) + b"\1" + bytes(7) + bytes(512) + buffer.getvalue()[BLOCK:]
    found = list(tars.members(io.BytesIO(data), len(data)))
    assert found == [tars.Member("a.png", 3 * BLOCK, 700, "sparse file")]
    info = tarfile.TarInfo("b.png")
    info.size = 9 << 30
    data = info.tobuf(tarfile.GNU_FORMAT)
    first, second = tars.members(io.BytesIO(data), len(data))
    assert first == tars.Member("b.png", 512, 9 << 30, "cut short") and isinstance(second, tars.Damage)


def test_an_extended_header_that_lies(tmp_path: Path) -> None:
    """A PAX record with a wrong length or size is named; what follows is read as if it were not there."""
    for record in (b"99 path=zz.png\n", b"x path=zz.png\n", b"16 size=-1000000\n", b"0 path=zz.png\n"):
        header = tarfile.TarInfo("pax")
        header.type, header.size = b"x", len(record)
        body = header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % BLOCK)
        assert judged(tmp_path, body + archive(sample("a", 1))) == {"@0": HEADER, "a": "caption 1"}


def test_mutations_are_all_accounted_for(good: bytes, tmp_path: Path) -> None:
    """300 random byte flips, cuts and insertions (seeded): no wrong picture, and nothing lost without a name.

    What may pass unseen are changes inside a caption or JSON, or in bytes that mean nothing (padding).
    """
    rng = np.random.default_rng(0)
    (tmp_path / "x.tar").write_bytes(good)
    truth = {r[0]: r for r in described(source(tmp_path))}
    assert len(truth) == COUNT
    for _ in range(300):
        at, kind = int(rng.integers(len(good))), int(rng.integers(3))
        changed = bytearray(good)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[at:]
        else:
            changed[at:at] = rng.bytes(int(rng.integers(1, 1500)))
        (tmp_path / "x.tar").write_bytes(changed)
        rows = described(source(tmp_path))
        delivered = {r[0]: r for r in rows if len(r) == 5}
        assert delivered.keys() <= truth.keys(), (kind, at)
        assert all(row[4] == truth[name][4] for name, row in delivered.items()), (kind, at)
        named = [r[1] for r in rows if len(r) == 3]
        assert delivered.keys() == truth.keys() or named, (kind, at)
        assert truth.keys() <= {r[0] for r in rows} or {"damaged tar", "empty tar"} & set(named), (kind, at)
        assert kind != 1 or named or at > member(good, "0009.txt").offset_data + 3 * BLOCK, at  # a cut is always seen


def test_scans_are_kept(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tar").write_bytes(cut("data")(good))
    plain = described(source(tmp_path))
    index = tmp_path / "index"
    assert described(source(tmp_path / "x.tar", index=str(index))) == plain
    (kept,) = index.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.sources.webdataset.scan", None)
        assert described(source(tmp_path / "x.tar", index=str(index))) == plain
    for rubbish in (b"", b"[]x", b'[{"key": 1, "oops": 2}]', b"[1]"):
        kept.write_bytes(rubbish)
        assert described(source(tmp_path / "x.tar", index=str(index))) == plain
    (tmp_path / "x.tar").write_bytes(good)
    assert len(described(source(tmp_path / "x.tar", index=str(index)))) == COUNT


def test_a_tar_that_changes(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(good)
    opened = source(tmp_path)
    fresh = pickle.loads(pickle.dumps(opened))
    (tmp_path / "x.tar").write_bytes(good + bytes(512))
    assert source(tmp_path).fingerprint != opened.fingerprint
    with pytest.raises(RuntimeError, match=r"x\.tar changed while"):
        fresh[0]


def test_far_away(good: bytes) -> None:
    storage.write("memory://shards/d/x.tar", cut("data")(good))
    rows = described(source("memory://shards/d"))
    assert [r[2] for r in rows[:5]] == [(f"caption {i}",) for i in range(5)]
    assert [r[1] for r in rows[5:]] == ["cut short", "damaged tar"]
    storage.write("memory://shards/e/01.tar", good)
    assert len(described(source("memory://shards/e/{01..01}.tar"))) == COUNT


def test_scanning_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive([(f"{i}.png", bytes(1_000_000)) for i in range(5)]))
    read: list[int] = []
    original = tars._at
    monkeypatch.setattr(tars, "_at", lambda f, o, n: (d := original(f, o, n), read.append(len(d)))[0])
    assert len(scan(str(path))) == 5
    assert sum(read) < 50_000, json.dumps(read)

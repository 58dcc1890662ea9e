"""Removal, deduplication, merging and splitting: what stays is untouched, what goes is accounted for."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import copying
from data_pipeline.build import BuildConfig, build
from data_pipeline.duplicates import DropList
from data_pipeline.filters import FilterConfig
from data_pipeline.ledger import index_names, read_ledgers
from data_pipeline.reader import ShardReader
from data_pipeline.remove import find, find_twice, read_removals, take_out
from data_pipeline.shards import RawSample, read_index, seal, unseal
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from data_pipeline.verify import verify

SETTINGS = BuildConfig(size=16, samples_per_shard=10)


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "copy"))


def samples(folder: Path) -> dict[str, RawSample]:
    dataset = ShardReader(folder)
    return {dataset[i].key: dataset[i] for i in range(len(dataset))}


def outcomes(folder: Path) -> list[tuple[int, str]]:
    """(row, reason or "") of every row of the ledger, in order."""
    found = []
    for _, ledger in read_ledgers(folder, index_names(folder, read_index(folder))):
        found += [(e["row"], e.get("reason", "")) for e in (*ledger.samples, *ledger.rejected)]
    return sorted(found)


def test_removal_by_key_and_hash(copy: Path, shard_folder: Path, pictures: Path) -> None:
    before = samples(copy)
    keys = list(before)
    third = copy_of_source_hash(pictures, before[keys[3]])
    stored = hashlib.sha256(before[keys[14]].image_bytes).hexdigest()
    wanted = DropList(keys=frozenset({keys[12], "nobody"}), hashes=frozenset({third, stored}))
    removals, missing = find(copy, wanted)
    assert set(removals) == {keys[3], keys[12], keys[14]} and missing == ["nobody"]
    report = take_out(copy, removals)
    assert report.delivered == 34 and report.rejected["removed on request"].count == 3
    assert samples(copy) == {k: v for k, v in before.items() if k not in removals}
    assert verify(copy) == []
    assert outcomes(copy) == [(i, "removed on request" if i in (3, 12, 14) else "") for i in range(37)]
    names = {p.name for p in copy.glob("0*")}
    assert names == {f"{n}.{x}" for n in ("00000-1", "00001-1", "00002", "00003") for x in ("tar", "json")}
    for untouched in ("00002.tar", "00002.json", "00003.tar", "00003.json"):
        assert (copy / untouched).read_bytes() == (shard_folder / untouched).read_bytes()


def copy_of_source_hash(pictures: Path, sample: RawSample) -> str:
    return hashlib.sha256((pictures / sample.meta["file"]).read_bytes()).hexdigest()


def test_a_rewritten_shard_is_what_a_build_would_make(copy: Path, source: FolderSource, tmp_path: Path) -> None:
    """A shard lost after a removal is built again without what was removed, byte for byte."""
    gone = list(samples(copy))[11]
    take_out(copy, {gone: ("removed on request", "by key")})
    tar, ledger = (copy / "00001-1.tar").read_bytes(), (copy / "00001-1.json").read_bytes()
    (copy / "00001-1.tar").write_bytes(tar[:-1] + b"x")
    report = build(source, SETTINGS, copy)
    assert report is not None and report.kept_shards == 3 and verify(copy) == []
    assert {p.name for p in copy.glob("00001*")} == {"00001-1.tar", "00001-1.json"}
    assert (copy / "00001-1.tar").read_bytes() == tar and (copy / "00001-1.json").read_bytes() == ledger
    assert gone not in samples(copy)


def test_removing_again_changes_nothing(copy: Path) -> None:
    gone = next(iter(samples(copy)))
    take_out(copy, {gone: ("removed on request", "by key")})
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert find(copy, DropList(keys=frozenset({gone})))[0] == {gone: ("removed on request", "by key")}
    take_out(copy, {gone: ("duplicate", "something else")})
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert read_removals(copy) == {gone: ("removed on request", "by key")}
    second = next(iter(samples(copy)))
    take_out(copy, {second: ("duplicate", "of another")})
    assert {p.name for p in copy.glob("00000*")} == {"00000-2.tar", "00000-2.json"}
    assert outcomes(copy)[:3] == [(0, "removed on request"), (1, "duplicate"), (2, "")]


def test_a_whole_shard_and_never_the_whole_folder(copy: Path) -> None:
    keys = list(samples(copy))
    take_out(copy, {key: ("removed on request", "by key") for key in keys[30:]})
    assert not (copy / "00003.tar").exists() and read_index(copy).empty[0].index == "00003-1.json"
    assert verify(copy) == [] and len(outcomes(copy)) == 37
    with pytest.raises(ValueError, match="would take all 30 samples"):
        take_out(copy, {key: ("removed on request", "by key") for key in keys})
    assert len(ShardReader(copy)) == 30


def test_a_damaged_shard_is_not_copied(copy: Path) -> None:
    keys = list(samples(copy))
    tar = bytearray((copy / "00000.tar").read_bytes())
    tar[600] ^= 1
    (copy / "00000.tar").write_bytes(tar)
    with pytest.raises(RuntimeError, match=r"00000\.tar is damaged at"):
        take_out(copy, {keys[5]: ("removed on request", "by key")})
    assert (copy / "00000.tar").read_bytes() == tar


def test_thumbnails_of_the_rejected_go_on_request(pictures: Path, tmp_path: Path) -> None:
    settings = BuildConfig(size=16, samples_per_shard=10, filters=FilterConfig(min_side_px=22))
    build(FolderSource(FolderConfig(str(pictures))), settings, tmp_path)
    rows = [r for _, part in read_ledgers(tmp_path, ["00000"]) for r in part.rejected if "thumbnail" in r]
    removals, missing = find(tmp_path, DropList(hashes=frozenset({rows[0]["content"]})))
    assert missing == [] and set(removals) == {rows[0]["key"]}
    take_out(tmp_path, removals)
    assert rows[0]["thumbnail"].encode() not in (tmp_path / "00000-1.json").read_bytes()
    assert rows[1]["thumbnail"].encode() in (tmp_path / "00000-1.json").read_bytes()
    assert verify(tmp_path) == []


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """15 pictures: 2 are copies of number 0, and 1 is number 1 in one gray level more."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "twins"
    folder.mkdir()
    for i in range(12):
        blocks = rng.integers(0, 250, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"a{i:02d}.png")
    for name in ("b0", "b1"):
        shutil.copy(folder / "a00.png", folder / f"{name}.png")
    with Image.open(folder / "a01.png") as picture:
        Image.fromarray(np.minimum(np.asarray(picture), 254) + 1).save(folder / "c0.png")
    for picture_file in folder.glob("*.png"):
        picture_file.with_suffix(".txt").write_text("a picture")
    return folder


def test_duplicates_are_found_and_taken_out(twins: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(FolderSource(FolderConfig(str(twins))), SETTINGS, out)
    exact, near = find_twice(out), find_twice(out, near=3)
    assert sorted(k.rpartition("-")[0] for k in exact) == ["b0", "b1"]
    assert sorted(k.rpartition("-")[0] for k in near) == ["b0", "b1", "c0"]
    first = next(k for k in samples(out) if k.startswith("a00"))
    assert set(exact.values()) == {("duplicate", f"same bytes as {first}")}
    report = take_out(out, near)
    assert report.rejected["duplicate"].count == 3 and len(ShardReader(out)) == 12
    assert find_twice(out, near=3) == {} and verify(out) == []
    build(FolderSource(FolderConfig(str(twins))), SETTINGS, tmp_path / "again")
    again = tmp_path / "again"
    assert len(find_twice(again, against=out)) == 14 and len(find_twice(again, against=out, near=3)) == 15


def shapes(folder: Path, count: int, seed: int, samples_per_shard: int = 8) -> Path:
    build(ShapesSource(ShapesConfig(count=count, seed=seed)), BuildConfig(32, 0, samples_per_shard), folder)
    return folder


def test_merging_loses_nothing_and_encodes_nothing(tmp_path: Path) -> None:
    first, second = shapes(tmp_path / "1", 20, 0), shapes(tmp_path / "2", 9, 1, 5)
    report = copying.merge([first, second], tmp_path / "both")
    assert report.delivered == 29 and verify(tmp_path / "both") == []
    assert samples(tmp_path / "both") == samples(first) | samples(second)
    assert outcomes(tmp_path / "both") == [(i, "") for i in range(29)]
    assert [s.samples for s in read_index(tmp_path / "both").shards] == [8, 8, 8, 5]


def test_keys_that_meet(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "1", 9, 0)
    with pytest.raises(ValueError, match=r"duplicate key 'shapes-train-0-0000000'"):
        copying.merge([folder, folder], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    copying.merge([folder, folder], tmp_path / "both", rename=True)
    assert set(samples(tmp_path / "both")) == {f"{n}-{key}" for n in (0, 1) for key in samples(folder)}


def test_new_keys_that_are_too_long(tmp_path: Path) -> None:
    name = "a" * 99
    Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    (tmp_path / f"{name}.txt").write_text("a caption")
    build(FolderSource(FolderConfig(str(tmp_path))), SETTINGS, tmp_path / "77")
    copying.merge([tmp_path / "77"] * 2, tmp_path / "79", rename=True)
    assert {len(key) for key in samples(tmp_path / "79")} == {79}
    with pytest.raises(ValueError, match=r"key '0-0-a.*' would be longer than 80 characters"):
        copying.merge([tmp_path / "79"] * 2, tmp_path / "81", rename=True)
    assert not (tmp_path / "81").exists()


def test_merging_unlike_folders(shard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one size and one image format .*: 16 png; .*: 32 png"):
        copying.merge([shard_folder, shapes(tmp_path / "1", 9, 0)], tmp_path / "both")
    with pytest.raises(ValueError, match="2 folders or more"):
        copying.merge([shard_folder], tmp_path / "both")


def test_splitting(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "all", 200, 0, 50)
    train, val = copying.split(folder, (tmp_path / "train", tmp_path / "val"), share=0.2)
    assert train.delivered + val.delivered == 200
    assert 20 <= val.delivered <= 60  # 40 expected, deviation 5.7: a false alarm in 2,000; and seeded
    assert samples(tmp_path / "train") | samples(tmp_path / "val") == samples(folder)
    assert verify(tmp_path / "train") == verify(tmp_path / "val") == []
    assert [s.samples for s in read_index(tmp_path / "train").shards][:-1] == [50] * (train.delivered // 50)
    # A sample keeps its side when others come.
    more = shapes(tmp_path / "more", 300, 0, 50)
    copying.split(more, (tmp_path / "train2", tmp_path / "val2"), share=0.2)
    assert set(samples(tmp_path / "val2")) & set(samples(folder)) == set(samples(tmp_path / "val"))
    copying.split(folder, (tmp_path / "train3", tmp_path / "val3"), count=7, seed=3)
    assert len(ShardReader(tmp_path / "val3")) == 7 and len(ShardReader(tmp_path / "train3")) == 193


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "either a share or a count"),
        ({"share": 0.5, "count": 1}, "either a share or a count"),
        ({"share": 1.0}, "more than 0 and less than 1"),
        ({"count": 37}, "1 to 36"),
        ({"share": 1e-9}, "leaves one part empty"),
    ],
)
def test_splits_that_make_no_sense(shard_folder: Path, tmp_path: Path, chosen: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copying.split(shard_folder, (tmp_path / "a", tmp_path / "b"), **chosen)
    assert not list(tmp_path.iterdir())


def to_version_1(folder: Path) -> None:
    """What an earlier version of this program wrote: no rows, no ledger."""
    index = unseal(folder / "index.json")
    for shard in index["shards"]:
        path = folder / shard["index"]
        part = unseal(path)
        kept = {name: part[name] for name in ("sha256", "bytes", "report")}
        kept["samples"] = [{"key": s["key"], "members": s["members"]} for s in part["samples"]]
        path.write_bytes(seal(kept))
        shard["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    old = {k: v for k, v in index.items() if k not in ("rows", "empty")}
    (folder / "index.json").write_bytes(seal({**old, "version": 1}))


@pytest.mark.parametrize("act", ["read", "remove", "merge"])
def test_folders_of_version_1(copy: Path, tmp_path: Path, act: str) -> None:
    before = samples(copy)
    to_version_1(copy)
    assert read_index(copy).rows is None and samples(copy) == before and verify(copy) == []
    assert [row for row, _ in outcomes(copy)] == list(range(37))
    if act == "remove":
        gone = list(before)[20]
        take_out(copy, {gone: ("removed on request", "by key")})
        del before[gone]
        assert samples(copy) == before and verify(copy) == [] and read_index(copy).rows == 37
    if act == "merge":
        copying.merge([copy, copy], tmp_path / "two", rename=True)
        assert len(samples(tmp_path / "two")) == 74 and verify(tmp_path / "two") == []
    if act == "read":
        with pytest.raises(ValueError, match="built by version 1, which kept no hashes"):
            find_twice(copy)

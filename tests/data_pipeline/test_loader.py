"""Loading pictures of all shapes, from several folders, here and far away: the same for any ranks and workers."""

import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data_pipeline import samples, shards, storage
from data_pipeline.batch import Batch
from data_pipeline.buckets import assign, bucket_shapes
from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, Loader, fixed_batch, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.samples import Samples, open_folder
from data_pipeline.sources.folder import FolderConfig, FolderSource

SIDES = [(48, 48), (70, 40), (40, 70), (110, 40), (60, 50)]
BUCKETED = DataConfig(
    path="", size=32, buckets=True, bucket_step=8, max_aspect=3.0, crops=0, flip=True, caption="random"
)


def pictures(folder: Path, count: int, shift: int = 0, meta: dict[str, Any] | None = None) -> FolderSource:
    """`count` noise pictures of five shapes, two captions each."""
    rng = np.random.default_rng(shift)
    folder.mkdir()
    for i in range(count):
        width, height = SIDES[(i + shift) % 5]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}\nalso {i}")
    return FolderSource(FolderConfig(str(folder)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """62 and 13 pictures of their own sizes."""
    root = tmp_path_factory.mktemp("sized")
    for name, count, shift in (("many", 62, 0), ("few", 13, 2)):
        build(pictures(root / f"{name}-pictures", count, shift), BuildConfig(samples_per_shard=10), root / name)
    return [root / "many", root / "few"]


def both(folders: list[Path]) -> DataConfig:
    return replace(BUCKETED, path=[str(f) for f in folders], weights=(3.0, 1.0))


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def load(config: DataConfig, count: int, **more: Any) -> list[Batch]:
    return take(Loader(open_data(config), config, **{"batch_size": 12, "seed": 7, **more}), count)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    tensors = ("image", "positions", "weights", "sizes")
    return len(ours) == len(theirs) and all(
        (a.captions, a.keys) == (b.captions, b.keys) and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)
        for a, b in zip(ours, theirs, strict=True)
    )


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    return [Batch.cat(list(parts)) for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def reference(folders: list[Path]) -> list[Batch]:
    return load(both(folders), 20)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_elastic_over_ranks(folders: list[Path], reference: list[Batch], world: int) -> None:
    ranks = [load(both(folders), 20, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1 and same(joined(ranks), reference)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_elastic_over_workers(folders: list[Path], reference: list[Batch], world: int, workers: int) -> None:
    config = replace(both(folders), workers=workers)
    ours = load(config, 4, rank=world - 1, world=world, start=60)
    assert same(ours, [b.split(world)[-1] for b in reference[5:9]])


@pytest.mark.parametrize("batches", [1, 4, 5, 6, 13, 19])
def test_resumes_inside_an_epoch_of_buckets(folders: list[Path], reference: list[Batch], batches: int) -> None:
    assert same(load(both(folders), 20 - batches, start=12 * batches), reference[batches:])


def test_a_batch_is_of_one_bucket_and_nothing_is_lost(folders: list[Path]) -> None:
    """Of one folder: what comes in four epochs, by key, and each in the shape nearest to its own."""
    config = replace(BUCKETED, path=str(folders[0]), flip=False)
    reader = ShardReader(folders[0])
    shapes = bucket_shapes(32, 8, 3.0)
    nearest = assign(reader.all_sizes(), shapes)
    expected = {reader.key(i): shapes[nearest[i]] for i in range(62)}
    loader = Loader(reader, config, batch_size=4, seed=1)
    assert set(loader.shapes) == set(expected.values()) and len(loader.shapes) >= 4
    batches = take(loader, 62)  # 4 epochs, but for what buckets hold back
    seen: Counter[str] = Counter()
    for batch in batches:
        shape = tuple(batch.image.shape[:1:-1])
        assert {expected[key] for key in batch.keys} == {shape}
        assert batch.sizes is not None and (batch.sizes[:, 4:] == torch.tensor(shape[::-1])).all()
        seen.update(batch.keys)
    assert set(seen) == set(expected) and set(seen.values()) <= {3, 4, 5}


def test_sizes_are_kept_beside_the_shards_and_known_anew_when_those_change(tmp_path: Path, folders: list[Path]) -> None:
    shutil.copytree(folders[1], tmp_path / "copy")
    for kept in (tmp_path / "copy").glob(".sizes-*"):
        kept.unlink()
    wanted = [SIDES[(i + 2) % 5] for i in range(13)]
    assert ShardReader(tmp_path / "copy").all_sizes().tolist() == [list(size) for size in wanted]
    (kept,) = (tmp_path / "copy").glob(".sizes-*")
    for index in (tmp_path / "copy").glob("0*.json"):
        index.rename(index.with_suffix(".away"))  # not asked any more
    assert ShardReader(tmp_path / "copy").all_sizes().tolist() == [list(size) for size in wanted]
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"shard index .*00000.json is damaged or missing"):
        ShardReader(tmp_path / "copy").all_sizes()


def test_shares_of_folders(folders: list[Path]) -> None:
    plain = DataConfig([str(f) for f in folders], size=16)

    def counts(config: DataConfig, samples: int) -> list[int]:
        order = Loader(open_data(config), config, batch_size=12, seed=7).order
        places = [place for start in range(0, samples, 12) for place in order.batch(start, slice(None))]
        return [sum(place[1] == n for place in places) for n in range(2)]

    assert counts(plain, 300) == [248, 52]
    assert counts(replace(plain, weights=(1.0, 1.0)), 120) == [60, 60]
    assert counts(replace(plain, repeats=(1.0, 4.0)), 228) == [124, 104]
    for change, said in (
        ({"weights": (1.0,)}, r"data.weights=\[1.0\]: give one number"),
        ({"repeats": (1.0, 0.0)}, r"data.repeats=\[1.0, 0.0\]: give one number"),
        ({"weights": (1.0, 1.0), "repeats": (1.0, 1.0)}, "not both"),
        ({"window": -1}, "data.window=-1"),
        ({"path": [str(folders[0]), 3]}, "give a folder or a list"),
        ({"size": None}, "differ in size; set size=N"),
    ):
        with pytest.raises(ValueError, match=said):
            load(replace(plain, **change), 1)


def test_weights_of_samples(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    lines = [{"file_name": f"{i:03d}.png", "text": f"picture {i}", "weight": i / 2} for i in range(1, 6)]
    for text in (tmp_path / "pictures").glob("*.txt"):
        text.unlink()
    lines.append({"file_name": "000.png", "text": "picture 0"})
    (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    source = FolderSource(FolderConfig(str(tmp_path / "pictures")))
    build(source, BuildConfig(size=16), tmp_path / "out")
    batch = fixed_batch(ShardReader(tmp_path / "out"), DataConfig(""), 6)
    stored = {c: w for c, w in zip(batch.captions, batch.weights.tolist(), strict=True)}  # type: ignore[union-attr]
    assert stored == {f"picture {i}": i / 2 if i else 1.0 for i in range(6)}


def test_captions_are_drawn_by_every_setting(folders: list[Path]) -> None:
    config = DataConfig(str(folders[0]), size=16, caption="random", caption_dropout=0.25, templates=("a {}", "the {}"))
    captions = [c for b in load(config, 40) for c in b.captions]
    shares = Counter("" if not c else " ".join(c.split()[:2]) for c in captions)
    assert set(shares) == {"", "a picture", "the picture", "a also", "the also"}
    # 480 draws: five standard deviations, a false alarm in 10^6
    assert abs(shares[""] - 120) < 48 and all(abs(shares[s] - 90) < 43 for s in shares if s)
    with pytest.raises(ValueError, match="dropout=2"):
        load(replace(config, caption_dropout=2.0), 1)


def test_far_away_shards_come_through_bounded_copies(folders: list[Path], tmp_path: Path) -> None:
    config = DataConfig(str(folders[0]), size=16, window=2)
    expected = load(config, 12)
    for file in folders[0].iterdir():
        if not file.name.startswith("."):
            storage.upload(file, f"memory://loader/many/{file.name}")
    far = replace(config, path="memory://loader/many", copies=str(tmp_path / "copies"), copies_mb=1)
    assert same(load(far, 12), expected)
    assert sum(f.stat().st_size for f in (tmp_path / "copies").iterdir()) <= 10**6
    largest = sorted((s.bytes for s in ShardReader(folders[0]).info.shards), reverse=True)
    assert sum(largest[:4]) < 1_000_000
    with pytest.raises(ValueError, match=r"mixing 2 shards at a time takes 1 MB here, data.copies_mb is 0"):
        load(replace(far, copies_mb=0), 1)


def test_all_far_folders_share_the_bound_of_copies(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fits by itself; all shards of both do not."""
    paths = []
    for number, folder in enumerate(folders[:2]):
        paths.append(f"memory://loader/share{number}")
        for file in folder.iterdir():
            if not file.name.startswith("."):
                storage.upload(file, f"{paths[-1]}/{file.name}")
    monkeypatch.setattr(samples, "_MB", 1000)  # these folders are small
    held = [sum(shard.bytes for shard in ShardReader(folder).info.shards) for folder in folders[:2]]
    enough = -(-sum(held) // 1000)
    assert max(held) < (enough - 1) * 1000
    config = DataConfig(paths, size=16, copies_mb=enough)
    Samples(open_data(config), config, seed=0).buckets()
    short = replace(config, copies_mb=enough - 1)
    with pytest.raises(ValueError, match=rf"share0, .*share1: mixing all shards at a time takes {enough} MB here"):
        Samples(open_data(short), short, seed=0).buckets()
    once = replace(config, path=[paths[0], paths[0]], copies_mb=-(-held[0] // 1000))
    Samples(open_data(once), once, seed=0).buckets()  # a folder named twice has its copies once


def test_users_do_not_share_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ShardReader", lambda path, cache: cache)
    kept = []
    for user in (1000, 1001):
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        kept.append(open_folder("memory://far", DataConfig("")).folder)
    assert kept[0] != kept[1]


def test_damage_is_named(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "copy")
    reader = ShardReader(tmp_path / "copy")
    tar = tmp_path / "copy" / reader.info.shards[0].file
    sample = json.loads((tmp_path / "copy" / reader.info.shards[0].index).read_bytes())["samples"][3]
    data = bytearray(tar.read_bytes())
    data[sample["members"]["png"][0] + 20] ^= 1
    tar.write_bytes(data)
    assert reader[2].key and reader[4].key
    with pytest.raises(RuntimeError, match=rf"damaged at {sample['key']}\.png"):
        reader[3]
    tar.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"has {len(data) - 1} bytes instead of {len(data)}"):
        ShardReader(tmp_path / "copy")
    tar.unlink()
    with pytest.raises(ValueError, match=r"00000\.tar is missing"):
        ShardReader(tmp_path / "copy")


def test_reads_what_the_plain_list_reads(folders: list[Path]) -> None:
    plain, reader = ShardReader(folders[0]), ShardReader(folders[0])
    assert [reader[i] for i in range(62)] == [plain[i] for i in range(62)]
    with pytest.raises(IndexError):
        reader[62]


def many_shards(folder: Path, copies: int) -> Path:
    """A folder whose index lists one and the same shard of 100 samples many times."""
    build(pictures(folder / "pictures", 100), BuildConfig(size=8, samples_per_shard=100), folder / "one")
    info = shards.read_index(folder / "one")
    (shard,) = info.shards
    (folder / "many").mkdir()
    listed = []
    for i in range(copies):
        os.link(folder / "one" / shard.file, folder / "many" / f"{i:05d}.tar")
        listed.append(replace(shard, file=f"{i:05d}.tar", index=str(folder / "one" / shard.index)))
    shards.write_index(folder / "many", replace(info, samples=100 * copies, shards=tuple(listed)))
    return folder / "many"


def test_ten_thousand_shards_open_within_two_seconds(tmp_path: Path) -> None:
    """CPU time of this process, on whatever machine; `benchmarks/data.py` prints the wall-clock time."""
    folder = many_shards(tmp_path, 10_000)
    before = psutil.Process().cpu_times()
    config = DataConfig(str(folder))
    (batch,) = load(config, 1, batch_size=64)
    after = psutil.Process().cpu_times()
    assert len(batch) == 64 and len(open_data(config)[0]) == 1_000_000
    assert after.user + after.system - before.user - before.system < 2


def test_memory_stays_flat_over_epochs(folders: list[Path]) -> None:
    config = DataConfig(str(folders[0]), size=32, flip=True)
    loader = iter(Loader(open_data(config), config, batch_size=12, seed=0))
    process, peaks = psutil.Process(), []
    for _ in range(4):
        for _ in range(31):  # 6 epochs
            next(loader)
        peaks.append(process.memory_info().rss / 1e6)
    assert max(peaks[1:]) - peaks[0] < 8  # MB; a batch has 0.15

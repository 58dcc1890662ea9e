"""A folder as it is -> shards to fine-tune on: 1, 3, 10 pictures and more, held-out ones, reuse, and mistakes."""

import itertools
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import prepare
from data_pipeline.batch import Batch
from data_pipeline.loader import DataConfig, Loader, open_data
from data_pipeline.prepare import PrepareConfig, Prepared, prepare_folder
from data_pipeline.reader import ShardReader
from data_pipeline.verify import verify

DOG = PrepareConfig(size=16, caption="photo of sks dog")


def fill(folder: Path, names: list[str], size: tuple[int, int] = (30, 22)) -> Path:
    """Noise pictures that all differ."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def some(folder: Path, count: int) -> Path:
    return fill(folder, [f"{i:03d}.png" for i in range(count)])


def names(*folders: str) -> list[str]:
    """The files that the samples of shard folders came from."""
    readers = [ShardReader(folder) for folder in folders if folder]
    return [reader[i].meta["file"] for reader in readers for i in range(len(reader))]


def take(made: Prepared, batch_size: int, count: int, start: int = 0) -> list[Batch]:
    config = DataConfig(list(made.folders), repeats=made.repeats_for(batch_size), flip=True)
    loader = Loader(open_data(config), config, batch_size=batch_size, seed=1, start=start)
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_few_pictures_fill_any_batch_and_resume(tmp_path: Path, count: int) -> None:
    made = prepare_folder(some(tmp_path / "in", count), tmp_path / "out", replace(DOG, holdout=0))
    assert made.samples == (count,) and made.validation == "" and made.rejected == {}
    batches = take(made, 8, 6)
    assert {b.captions[0] for b in batches} == {"photo of sks dog"}
    keys = [key for b in batches for key in b.keys]
    for start in range(0, 48 // count * count, count):  # each pass has every picture once
        assert len(set(keys[start : start + count])) == count
    resumed = take(made, 8, 3, start=24)
    assert [b.keys for b in resumed] == [b.keys for b in batches[3:]]
    assert all((a.image == b.image).all() for a, b in zip(resumed, batches[3:], strict=True))


def test_repeats_reach_one_batch_and_no_more() -> None:
    made = Prepared(("a", "b"), (10.0, 1.0), (2, 5))
    assert made.repeats_for(1) == made.repeats_for(25) == (10.0, 1.0)
    assert made.repeats_for(26) == (20.0, 2.0) and made.repeats_for(51) == (30.0, 3.0)
    assert Prepared(("a",), (1.0,), (3,)).repeats_for(8) == (3.0,)


@pytest.mark.parametrize(
    ("count", "holdout", "held"),
    [(1, None, 0), (4, None, 0), (5, None, 1), (23, None, 2), (4, 1, 1), (10, 0.3, 3), (10, 0, 0), (3, 0.1, 1)],
)
def test_held_out(tmp_path: Path, count: int, holdout: float | None, held: int) -> None:
    pictures = some(tmp_path / "in", count)
    made = prepare_folder(pictures, tmp_path / "out", replace(DOG, holdout=holdout))
    assert sum(made.samples) == count - held and bool(made.validation) == bool(held)
    out = names(made.validation)
    assert len(out) == held and sorted(out + names(*made.folders)) == sorted(p.name for p in pictures.iterdir())


def test_held_out_ones_mostly_stay_when_others_come(tmp_path: Path) -> None:
    """The 4 with the smallest hashes, of 40 and of 42 pictures: each newcomer takes one place at most."""
    pictures = some(tmp_path / "in", 40)
    before = names(prepare_folder(pictures, tmp_path / "out", DOG).validation)
    fill(pictures, [f"new {i}.png" for i in range(2)])
    after = names(prepare_folder(pictures, tmp_path / "out", DOG).validation)
    assert len(set(before) & set(after)) >= 2 and set(after) - set(before) <= {"new 0.png", "new 1.png"}


def test_kohya_folders(tmp_path: Path) -> None:
    """Repeats by folder, the caption from its name where there is no file; 0_name is switched off."""
    root = fill(tmp_path / "in", ["10_sks dog/a.png", "10_sks dog/b.png", "1_cat/c.png", "0_old/d.png"])
    (root / "10_sks dog" / "b.caption").write_text("a dog, asleep")
    made = prepare_folder(root, tmp_path / "out", replace(DOG, caption=""))
    assert [Path(f).name for f in made.folders] == ["train-1", "train-10"] and made.repeats == (1.0, 10.0)
    assert made.samples == (1, 2) and made.rejected == {"0 repeats": 1}
    batches = take(made, 7, 9)  # 3 epochs of 21
    assert Counter(c for b in batches for c in b.captions) == {"sks dog": 30, "a dog, asleep": 30, "cat": 3}
    with pytest.raises(ValueError, match="lie in folders 0_name"):
        prepare_folder(fill(tmp_path / "off", ["0_dog/a.png"]), tmp_path / "out", DOG)


def test_reused_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, out = some(tmp_path / "in", 6), tmp_path / "out"
    first = prepare_folder(pictures, out, DOG)
    built: list[str] = []
    original = prepare.build
    monkeypatch.setattr(prepare, "build", lambda *a, **k: built.append(a[2]) or original(*a, **k))
    assert prepare_folder(pictures, out, replace(DOG, workers=1)) == first and not built
    monkeypatch.chdir(tmp_path)
    assert Path(prepare_folder("in", "out", DOG).folders[0]).resolve() == Path(first.folders[0]) and not built
    kept = {p: p.read_bytes() for p in out.rglob("*.*")}
    others = [first]
    for change in (
        lambda: fill(pictures, ["one more.png"]),
        lambda: (pictures / "000.txt").write_text("its own words"),
        lambda: os.utime(pictures / "003.png", ns=(1, 1)),
    ):
        change()
        others.append(prepare_folder(pictures, out, DOG))
    for config in (replace(DOG, size=20), replace(DOG, keep_shape=True), replace(DOG, holdout=2)):
        others.append(prepare_folder(pictures, out, config))
    assert len({made.folders for made in others}) == 7 and len(built) == 12
    assert {p: p.read_bytes() for p in kept} == kept  # a run that reads the first is not disturbed


def test_interrupted_and_damaged_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, out = some(tmp_path / "in", 8), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(pictures, out, DOG)
    (folder,) = out.iterdir()
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.tar")}
    made = prepare_folder(pictures, out, DOG)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.tar")} == times  # complete shards were kept
    tar = Path(made.folders[0], "00000.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    assert prepare_folder(pictures, out, DOG) == made and tar.read_bytes() == whole
    assert verify(made.folders[0]) == verify(made.validation) == []


def test_odd_names_links_and_rotation(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", ["снимок 1.png", "İstanbul.PNG"])
    elsewhere = fill(tmp_path / "far", ["photo.png"])
    os.symlink(elsewhere / "photo.png", root / "link.png")
    turned = Image.open(elsewhere / "photo.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    config = replace(DOG, keep_shape=True)
    made = prepare_folder(root, tmp_path / "out", config)
    assert sorted(names(*made.folders)) == sorted(["снимок 1.png", "İstanbul.PNG", "link.png", "turned.jpg"])
    reader = ShardReader(made.folders[0])
    sizes = {reader[i].meta["file"]: reader.sizes(i)[0] for i in range(4)}
    assert sizes["turned.jpg"] == (22, 30) and sizes["link.png"] == (30, 22)


def test_broken_pictures_are_counted_and_never_held_out(tmp_path: Path) -> None:
    pictures = some(tmp_path / "in", 6)
    for i in range(5):
        (pictures / f"broken {i}.jpg").write_bytes(b"no")
    made = prepare_folder(pictures, tmp_path / "out", replace(DOG, holdout=5))
    assert made.samples == (1,) and len(ShardReader(made.validation)) == 5
    assert made.rejected == {"unreadable image": 5}


def test_pictures_without_a_caption_do_not_count_as_held_out(tmp_path: Path) -> None:
    """Of 3 with a caption, among 9, none can be spared; of 11 with one among 40, a tenth of the 11 is one."""
    for count, captioned, held in ((9, 3, 0), (40, 11, 1)):
        pictures = some(tmp_path / f"in{count}", count)
        for i in range(captioned):
            (pictures / f"{i:03d}.txt").write_text("a dog")
        made = prepare_folder(pictures, tmp_path / "out", replace(DOG, caption=""))
        assert made.samples == (captioned - held,) and bool(made.validation) == bool(held)
        assert made.rejected == {"no caption": count - captioned}


def test_a_usable_picture_is_always_left(tmp_path: Path) -> None:
    pictures = some(tmp_path / "in", 1)
    for i in range(9):
        (pictures / f"broken {i}.jpg").write_bytes(b"no")
    made = prepare_folder(pictures, tmp_path / "out", DOG)
    assert made.samples == (1,) and made.validation == "" and made.rejected == {"unreadable image": 9}
    with pytest.raises(ValueError, match="holdout=1 of 1 usable pictures leaves none"):
        prepare_folder(pictures, tmp_path / "out", replace(DOG, holdout=1))


def test_a_part_without_a_usable_picture_is_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", ["10_dog/a.png", "1_cat/b.png"])
    (root / "1_cat" / "b.png").write_bytes(b"no")
    made = prepare_folder(root, tmp_path / "out", DOG)
    assert [Path(f).name for f in made.folders] == ["train-10"] and made.repeats == (10.0,)
    assert made.rejected == {"unreadable image": 1}
    (root / "10_dog" / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"not one of 2 pictures in .* is usable \(2 unreadable image\)"):
        prepare_folder(root, tmp_path / "other", DOG)
    assert not (tmp_path / "other").exists()


def test_whole_pictures_for_buckets(tmp_path: Path) -> None:
    """No more than 4 size^2 pixels, of the same shape, and the true size is known; small ones stay."""
    root = fill(tmp_path / "in", ["large.png"], (300, 200))
    fill(root, ["small.png"], (20, 40))
    made = prepare_folder(root, tmp_path / "out", replace(DOG, keep_shape=True, size=32))
    reader = ShardReader(made.folders[0])
    found = {reader[i].meta["file"]: reader.sizes(i) for i in range(2)}
    assert found == {"large.png": ((78, 52), (300, 200)), "small.png": ((20, 40), (20, 40))}  # 78 * 52 <= 4096
    config = DataConfig(list(made.folders), size=32, buckets=True, bucket_step=8, repeats=made.repeats_for(2))
    loader = Loader(open_data(config), config, batch_size=2, seed=0)
    shapes = {tuple(batch.image.shape[2:]) for batch in itertools.islice(loader, 4)}
    assert len(shapes) == 2


def test_conditions_and_masks(tmp_path: Path) -> None:
    pictures = some(tmp_path / "in", 3)
    shutil.copytree(pictures, tmp_path / "before")
    config = replace(DOG, conditions=str(tmp_path / "before"), masks="alpha")
    made = prepare_folder(pictures, tmp_path / "out", config)
    data = DataConfig(list(made.folders), repeats=made.repeats_for(4), condition="stored", mask="stored")
    batch = next(iter(Loader(open_data(data), data, batch_size=4, seed=0)))
    assert batch.condition is not None and (batch.condition * 2 - 1 - batch.image).abs().max() < 1e-6
    assert batch.mask is not None and batch.mask.min() == 1
    (tmp_path / "before" / "001.png").unlink()
    assert prepare_folder(pictures, tmp_path / "out", config).rejected == {"missing condition": 1}


def test_a_shard_folder_stands_for_itself(tmp_path: Path, shard_folder: Path) -> None:
    made = prepare_folder(shard_folder, tmp_path / "out", PrepareConfig())
    assert made == Prepared((str(shard_folder),), (1.0,), (37,)) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"holds finished shards: caption='x' is for pictures only"):
        prepare_folder(shard_folder, tmp_path / "out", PrepareConfig(caption="x"))


def test_progress_counts_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare_folder(some(tmp_path / "in", 7), tmp_path / "out", DOG, lambda *at: seen.append(at))
    assert seen[-1] == (7, 7) and [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(DOG, caption=""), r'none of the 3 pictures in .* has a caption: write NAME\.txt .* caption="photo of'),
        (replace(DOG, holdout=3), "holdout=3 of 3 pictures leaves none"),
        (replace(DOG, holdout=1.5), "holdout=1.5: allowed are a share below 1, or how many"),
        (replace(DOG, holdout=-1), "holdout=-1"),
        (replace(DOG, size=0), "size=0"),
        (replace(DOG, image_format="tiff"), "image_format='tiff'"),
        (replace(DOG, conditions="/no/such"), "no folder '/no/such' of conditions"),
    ],
)
def test_mistakes_cost_nothing(tmp_path: Path, config: PrepareConfig, message: str) -> None:
    pictures = some(tmp_path / "in", 3)
    with pytest.raises(ValueError, match=message):
        prepare_folder(pictures, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_more_mistakes(tmp_path: Path) -> None:
    pictures = some(tmp_path / "in", 3)
    with pytest.raises(ValueError, match="must not go into the folder of pictures"):
        prepare_folder(pictures, pictures / "shards", DOG)
    with pytest.raises(ValueError, match="does not exist"):
        prepare_folder(tmp_path / "none", tmp_path / "out", DOG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        prepare_folder(tmp_path / "empty", tmp_path / "out", DOG)

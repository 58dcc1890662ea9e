"""The layouts of folders in use: ImageFolder's metadata, kohya's repeats, captions from names; and name() of all."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline import storage
from data_pipeline.sources.emoji import EmojiConfig, EmojiSource
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from tests.data_pipeline.makers import check_random_access, described, png, verdicts


def fill(root: Path, files: dict[str, str | None]) -> None:
    """Files by path: a text, or a picture."""
    for number, (name, text) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number) if text is None else text.encode())


def opened(folder: Path | str, **settings: Any) -> FolderSource:
    return FolderSource(FolderConfig(str(folder), **settings))


def test_metadata_of_the_nearest_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a.png": None, "train/deep/b.png": None, "c.png": None, "train/own.png": None})
    fill(tmp_path, {"train/own.txt": "its own"})
    rows = [
        {"file_name": "a.png", "text": "a", "AESTHETIC_SCORE": 6, "licence": "CC0"},
        {"file_name": "deep/b.png", "text": "b from above"},
        {"file_name": "own.png", "text": "not this", "aesthetic": 4.5},
        {"file_name": "gone.png", "text": "x"},
    ]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fill(tmp_path, {"metadata.csv": "file_name,text\nc.png,c\ntrain/a.png,from far\n"})
    near = {"file_name": ["b.png"], "words": ["b"], "caption": ["not asked for"]}
    parquet.write_table(pa.table(near | {"caption": ["b"]}), tmp_path / "train/deep/metadata.parquet")
    source = opened(tmp_path)
    assert verdicts(source) == {
        "c.png": ("c",), "train/a.png": ("a",), "train/deep/b.png": ("b",), "train/gone.png": "missing image",
        "train/own.png": ("its own",),
    }  # fmt: skip
    meta = {r[0]: r[3] for r in described(source) if len(r) == 5}
    assert meta["train/a.png"]["scores"] == {"aesthetic": 6.0} and meta["train/a.png"]["columns"] == {"licence": "CC0"}
    assert meta["train/own.png"]["scores"] == {"aesthetic": 4.5}
    check_random_access(source, tmp_path)


def test_one_caption_for_all_that_have_none(tmp_path: Path) -> None:
    fill(tmp_path, {"5_cat/a.png": None, "5_cat/b.png": None, "5_cat/c.png": None, "5_cat/b.txt": "its own"})
    fill(tmp_path, {"5_cat/metadata.csv": "file_name,text\nc.png,from the table\n"})
    source = opened(tmp_path, caption="photo of sks cat")
    assert verdicts(source) == {
        "5_cat/a.png": ("photo of sks cat",), "5_cat/b.png": ("its own",), "5_cat/c.png": ("from the table",),
    }  # fmt: skip
    assert all(source.has_caption(i) for i in range(3)) and {source.repeats(i) for i in range(3)} == {5}
    plain = opened(tmp_path, layout="plain")
    assert [plain.has_caption(i) for i in range(3)] == [False, True, True] and plain.repeats(0) == 1
    assert [name for name, said in verdicts(plain).items() if said == "no caption"] == ["5_cat/a.png"]


def test_chosen_columns(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": None, "metadata.csv": "image_id,short,long\na.png,one,two\n"})
    source = opened(tmp_path, path_column="image_id", caption_columns=("long", "short"))
    assert verdicts(source) == {"a.png": ("two", "one")}
    with pytest.raises(ValueError, match=r"metadata\.csv has no column 'none'; it has image_id, short, long"):
        opened(tmp_path, path_column="none")


def test_kohya(tmp_path: Path) -> None:
    fill(tmp_path, {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.caption": "a dog\nmy dog"})
    fill(tmp_path, {"1_cat/deep/c.png": None, "notes/readme.md": "no pictures here"})
    source = opened(tmp_path)
    assert verdicts(source) == {
        "1_cat/deep/c.png": ("cat",), "10_sks dog/a.png": ("sks dog",), "10_sks dog/b.png": ("a dog", "my dog"),
    }  # fmt: skip
    assert {r[0]: r[3]["repeats"] for r in described(source)} == {
        "1_cat/deep/c.png": 1, "10_sks dog/a.png": 10, "10_sks dog/b.png": 10,
    }  # fmt: skip
    assert set(verdicts(opened(tmp_path, layout="plain")).values()) == {"no caption", ("a dog", "my dog")}
    fill(tmp_path, {"other/x.png": None, "y.png": None})
    with pytest.raises(ValueError, match=r"'10_sks dog' looks like kohya's N_name .*, '\.' does not; say layout=kohya"):
        opened(tmp_path)
    told = verdicts(opened(tmp_path, layout="kohya"))
    assert told["other/x.png"] == told["y.png"] == "not in a folder N_name" and told["1_cat/deep/c.png"] == ("cat",)
    with pytest.raises(ValueError, match="layout='x': allowed are auto, plain, kohya"):
        opened(tmp_path, layout="x")


def test_captions_from_names(tmp_path: Path) -> None:
    fill(tmp_path, {"5_dog/a_big-dog.png": None, "5_dog/b.png": None, "5_dog/b.txt": "own", "5_dog/___.png": None})
    found = verdicts(opened(tmp_path, caption_from_name=True))
    assert found == {"5_dog/___.png": "empty caption", "5_dog/a_big-dog.png": ("a big dog",), "5_dog/b.png": ("own",)}


def test_weights_in_metadata(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": ["x", "y"], "w": [1, 2]}, {"file_name": "a.png", "text": ["x "], "w": 4}]
    fill(tmp_path, {"a.png": None, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    (row,) = described(opened(tmp_path, caption_weight_columns=("w",)))
    assert row[2] == ("x", "y") and row[3]["weights"] == [5.0, 2.0]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(png())
    (tmp_path / name.replace(".png", ".txt")).write_text("coffee")
    (row,) = described(opened(tmp_path))
    assert row[0] == "caf\ufffd.png" == row[3]["file"] and json.dumps(row[3]).encode() and row[2] == ("coffee",)


def test_far_away() -> None:
    for name, data in {"a.png": png(), "a.txt": b"one", "sub/b.png": png(1), ".hidden/c.png": png(2)}.items():
        storage.write(f"memory://folder/{name}", data)
    assert verdicts(opened("memory://folder")) == {"a.png": ("one",), "sub/b.png": "no caption"}
    with pytest.raises(ValueError, match=r"'memory://folder/a\.png' is not a folder"):
        opened("memory://folder/a.png")


def test_drawn_sources_have_names() -> None:
    shapes = ShapesSource(ShapesConfig(count=2))
    assert shapes.name(1) == shapes[1].key == "shapes-train-0-0000001"
    config = EmojiConfig()
    if not (Path(config.font).is_file() and Path(config.cldr).is_dir()):
        pytest.skip("no emoji font here")
    emoji = EmojiSource(config)
    assert emoji.name(0) == f"{emoji.emoji[0].text} {emoji.emoji[0].name}"

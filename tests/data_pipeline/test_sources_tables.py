"""Tables: CSV, JSON lines, Parquet and Arrow give the same rows; columns by their usual names or by config."""

import csv
import io
import json
import pickle
import random
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline import storage
from data_pipeline.sources import Rejected
from data_pipeline.sources import rows as rows_module
from data_pipeline.sources.columns import Columns, choose, plain
from data_pipeline.sources.huggingface import HuggingFaceConfig, HuggingFaceSource
from data_pipeline.sources.rows import open_table
from data_pipeline.sources.table import TableConfig, TableSource
from tests.data_pipeline.makers import check_random_access, described, png, row, verdicts

TEXTS = ["plain", 'with "quotes", commas', "two\nlines\r\nthree", "né 日本 👍", "", '"', "\n\n", " padded "]


def write_table(path: Path, table: dict[str, list[Any]], **options: Any) -> str:
    """Columns as a table of the kind the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t", **options)
            writer.writerows([list(table), *([r[c] for c in table] for r in records)])
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table(table), path, **options)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
@pytest.mark.parametrize("block", [1 << 24, 7])
def test_rows_by_number(suffix: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with quotes, newlines and more, looked up in any order; blocks of 7 bytes cut everything in two."""
    monkeypatch.setattr(rows_module, "_BLOCK", block)
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choices('a",\n\r\t é', k=rng.randrange(12))) for _ in range(200)]
    table = {"a": texts, "b": [f"{i}" for i in range(len(texts))]}
    options = {"row_group_size": 50} if suffix == ".parquet" else {}
    opened = open_table(write_table(tmp_path / f"t{suffix}", table, **options))
    assert opened.columns == ("a", "b") and len(opened) == len(texts)
    copy = pickle.loads(pickle.dumps(opened))
    for index in rng.sample(range(len(texts)), len(texts)):
        assert copy[index] == {"a": texts[index], "b": f"{index}"}
    with pytest.raises(IndexError):
        opened[len(texts)]
    assert opened.place(0) == {".parquet": "row 1", ".csv": "line 2", ".tsv": "line 2"}.get(suffix, "line 1")


def test_text_tables_that_are_damaged(tmp_path: Path) -> None:
    def table(name: str, data: bytes) -> Any:
        (tmp_path / name).write_bytes(data)
        return open_table(str(tmp_path / name))

    def outcomes(opened: Any) -> list[Any]:
        found: list[Any] = []
        for index in range(len(opened)):
            try:
                found.append(list(opened[index].values()))
            except Rejected as rejected:
                found.append(rejected.reason)
        return found

    assert outcomes(table("a.csv", b'\xef\xbb\xbf"a",b\r\n\r\n1,2\r\n3\r\n4,5,6\r\n\xff,7\r\n8,"9"x\r\n10,11')) == [
        ["1", "2"], "bad row", "bad row", "row is not UTF-8", "bad row", ["10", "11"],
    ]  # fmt: skip
    assert outcomes(table("a.jsonl", b'{"a": 1}\n[1]\n\n{oops\n{"a": "\xff"}\n' + b"[" * 100000 + b'\n{"a": 2}')) == [
        [1], "bad row", "bad row", "row is not UTF-8", "bad row", [2],
    ]  # fmt: skip
    for name, data, message in (
        ("b.csv", b'a,b\n1,5" pipe\n2,6" pipe\n', "a quote within a bare field at byte 7"),
        ("b.csv", b'a,b\n1,"open\n2,3\n', "a quote is opened and never closed"),
        ("b.csv", b"a,a\n1,2\n", "names are empty or repeat: a, a"),
        ("b.csv", b"a,b\n", "has no rows"),
        ("b.csv", b"", "is not a table"),
        ("b.jsonl", b"\n\n", "has no rows"),
        ("b.parquet", b"PAR1 or not", "cannot be read"),
        ("b.xlsx", b"", "is not a table: .csv, .tsv, .jsonl"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            table(name, data)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ValueError, match="no table"):
        open_table(str(tmp_path / "none.csv"))


def test_a_damaged_row_group_rejects_its_rows(tmp_path: Path) -> None:
    path = Path(write_table(tmp_path / "t.parquet", {"a": [f"{i} " * 50 for i in range(30)]}, row_group_size=10))
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first pages
    path.write_bytes(data)
    opened = open_table(str(path))
    with pytest.raises(Rejected, match=r"damaged table: .*t\.parquet, row group 0"):
        opened[3]
    assert opened[25]["a"] == "25 " * 50


def test_a_million_rows_are_cheap(tmp_path: Path) -> None:
    """A million rows of CSV: opened in about a second, kept in 8 bytes a row."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"path,caption\n" + b"".join(b'%d.png,"caption, %d"\n' % (i, i) for i in range(1_000_000)))
    began = time.perf_counter()
    opened = TableSource(TableConfig(path=str(path)))
    assert time.perf_counter() - began < 10
    assert len(opened) == 1_000_000 and opened.name(987_654) == "987654.png"
    assert len(pickle.dumps(opened)) < 9_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_paths(suffix: str, folder: Path) -> None:
    table = {
        "file_name": ["images/0.png", str(folder / "images/1.png"), "images/none.png", "images", ""],
        "URL": [f"http://h/{i}" for i in range(5)],
        "TEXT": ["zero", "one", "two", "three", "four"],
        "AESTHETIC_SCORE": ["5.5", "", "1", "1", "1"],
        "punsafe": ["0.25", "1e-3", "0", "0", "0"],
        "note": list("abcde"),
        "EXIF": ["GPS"] * 5,
    }
    source = TableSource(TableConfig(path=write_table(folder / f"train{suffix}", table)))
    rows = described(source)
    assert [r[0] for r in rows] == [*table["file_name"][:4], "http://h/4"]
    assert [r[1] for r in rows[2:]] == ["missing image"] * 3
    assert [r[1:3] for r in rows[:2]] == [("train-000000000", ("zero",)), ("train-000000001", ("one",))]
    meta = rows[0][3]
    assert meta["scores"] == {"aesthetic": 5.5, "unsafe": 0.25} and rows[1][3]["scores"] == {"unsafe": 0.001}
    assert meta["columns"] == {"note": "a"} and meta["url"] == "http://h/0" and meta["file"] == "images/0.png"
    assert len(meta["sha256"]) == 64 and (meta["width"], meta["height"]) == (6, 5)
    json.dumps(meta, allow_nan=False)
    check_random_access(source, folder)


def test_pictures_inside_with_keys_and_weights(folder: Path) -> None:
    table = {
        "picture": [
            png(0),
            {"bytes": png(1), "path": "x.png"},
            {"bytes": None, "path": "images/2.png"},
            None,
            png(3),
            b"no",
        ],
        "short": ["a", " ", "c", "d", "e", "f"],
        "long": [["a long", "a"], ["b long"], None, ["d"], ["e long", 5], ["f"]],
        "w1": [0.25, 0.5, 1, 1, 1, 1],
        "w2": [[0.5, 0.25], [2], None, [1], [1, 1], [1]],
        "name": ["ok_key", "Not a Key!", "", None, "k4", "k5"],
        "weight": [2, None, float("nan"), 1, 1, 1],
        "p": [0.5] * 6,
    }
    path = folder / "t.jsonl"

    class Rows:
        columns = tuple(table)
        place = None

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: values[index] for name, values in table.items()}

    from data_pipeline.sources.table import RowSource

    config = TableConfig(
        path=str(path), image_column="picture", caption_columns=("short", "long"), key_column="name",
        caption_weight_columns=("w1", "w2"), similarity_column="p",
    )  # fmt: skip
    rows = described(RowSource(config, Rows(), ""))
    assert rows[0][1:3] == ("ok_key", ("a", "a long")) and rows[0][3]["weights"] == [0.5, 0.5]
    assert rows[0][3]["weight"] == 2.0 and rows[0][3]["scores"] == {"similarity": 0.5}
    assert rows[1][1].startswith("not-a-key-") and rows[1][2] == ("b long",) and rows[1][3]["weights"] == [2.0]
    assert rows[1][3]["file"] == "x.png" and "weight" not in rows[2][3] and rows[2][1] == "t-000000002"
    assert [r[1] for r in rows[3:5]] == ["missing image", "caption is not text"] and len(rows[5]) == 3


def test_rows_that_are_refused(folder: Path) -> None:
    (folder / "pipe").symlink_to("/dev/zero")
    table = {
        "path": [
            "images/0.png",
            "http://h/x.png",
            "s3://b/x.png",
            "pipe",
            "images/0.png/x",
            "n" * 300,
            "a\0b",
            "ftp://x/y",
        ],
        "caption": ["ok", *["x"] * 7],
        "aesthetic": [1, 1, 1, 1, 1, 1, 1, 1],
    }
    opened = TableSource(TableConfig(path=write_table(folder / "t.jsonl", table)))
    assert [r[1] for r in described(opened)[1:]] == [
        "not fetched", "remote path", "missing image", "missing image",
        "unreadable file", "unreadable file", "remote path",
    ]  # fmt: skip
    told = TableSource(TableConfig(path=str(folder / "t.jsonl"), allow_remote=True))
    assert row(told, 7)[1] == "unreadable file"
    storage.write("memory://pictures/x.png", png(1))
    write_table(folder / "far.jsonl", {"path": ["memory://pictures/x.png"], "caption": ["far"]})
    assert described(TableSource(TableConfig(path=str(folder / "far.jsonl"), allow_remote=True)))[0][2] == ("far",)
    scores = {
        "path": ["images/0.png"] * 4,
        "caption": list("abcd"),
        "aesthetic": ["high", True, [1], -1],
        "weight": [1, 1, 1, -1],
    }
    found = [r[1] for r in described(TableSource(TableConfig(path=write_table(folder / "s.jsonl", scores))))]
    assert found[0] == found[2] == "not a number" and found[3] == "negative weight"


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (
            {"url": ["http://h/x"], "caption": ["x"]},
            {},
            r"has addresses \(column 'url'\).*ldm data fetch .*t\.jsonl FOLDER",
        ),
        ({"path": ["https://h/x"], "caption": ["x"]}, {}, r"has addresses \(column 'path'\)"),
        (
            {"x": ["a.png"], "caption": ["x"]},
            {},
            "no column of pictures; say path_column=.*of: x, caption",
        ),
        ({"path": ["a.png"], "x": ["x"]}, {}, r"no column of captions; say caption_columns=\[...\] of: path, x"),
        ({"path": ["a.png"], "text": ["x"]}, {"caption_columns": ("capt",)}, "no column 'capt'; it has path, text"),
        (
            {"path": ["a.png"], "text": ["x"]},
            {"caption_weight_columns": ("path", "text")},
            "2 caption_weight_columns for 1",
        ),
    ],
)
def test_tables_that_are_refused(table: dict[str, Any], settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TableSource(TableConfig(path=write_table(tmp_path / "t.jsonl", table), **settings))
    assert "\n" not in str(caught.value)


def test_what_json_can_hold() -> None:
    value = {"a": [1, float("nan"), b"x", date(2020, 1, 2), "\ud800", np.float32(0.5)], 3: (None, True)}
    assert plain(value) == {"a": [1, None, None, "2020-01-02", "?", "0.5"], "3": [None, True]}
    roles = choose(Columns(image_column="i"), ("i", "path", "Caption"), "t")
    assert (roles.image, roles.path, roles.captions) == ("i", "", ("Caption",))


def test_pyarrow_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.parquet", {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ValueError, match=r"^Parquet and Arrow files need pyarrow; get it with: pip install 'ldm\[data\]'$"
    ):
        open_table(path)


def save_to_disk(folder: Path, batches: list[list[int]], *, stream: bool = True, embedded: bool = True) -> None:
    """One split as `datasets` saves it: a file a list of numbers, two rows a record batch."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(batches):05d}.arrow" for i in range(len(batches))]
    for name, numbers in zip(names, batches, strict=True):
        pictures = [
            {"bytes": png(n) if embedded else None, "path": None if embedded else f"images/{n}.png"} for n in numbers
        ]
        table = pa.table({"image": pictures, "text": [f"number {n}" for n in numbers], "label": numbers})
        with pa.OSFile(str(folder / name), "wb") as sink:
            writer = (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema)
            writer.write_table(table, max_chunksize=2)
            writer.close()
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x", "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}}}))


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    def opened(path: Path, **settings: str) -> HuggingFaceSource:
        return HuggingFaceSource(HuggingFaceConfig(path=str(path), **settings))

    save_to_disk(tmp_path / "one", [[0, 1, 2], [3, 4]])
    source = opened(tmp_path / "one")
    assert [r[2] for r in described(source)] == [(f"number {n}",) for n in range(5)]
    assert described(source)[4][3]["columns"] == {"label": 4} and source.name(4) == "one#4"
    check_random_access(source, tmp_path)
    save_to_disk(tmp_path / "two/train", [[0]], stream=False, embedded=False)
    save_to_disk(tmp_path / "two/test", [[1]])
    (tmp_path / "two/images").mkdir()
    (tmp_path / "two/images/0.png").write_bytes(png(0))
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert verdicts(opened(tmp_path / "two", split="train")) == {"images/0.png": ("number 0",)}
    for split, message in (("", "several splits; say split=..., one of test, train"), ("x", "no split 'x'")):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "two", split=split)
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 data files, such as data-00001-of-00002"):
        opened(tmp_path / "one")
    (tmp_path / "two/test/data-00000-of-00001.arrow").write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="cannot be read"):
        opened(tmp_path / "two", split="test")
    for state, message in (
        ('{"_indices_files": [1], "_data_files": []}', "flatten_indices"),
        ("[]", "damaged"),
        ("{}", "lists no"),
    ):
        (tmp_path / "one/state.json").write_text(state)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "one")


def test_a_hub_folder_of_parquet(tmp_path: Path) -> None:
    for split, numbers in (("train", [[0, 1], [2]]), ("validation", [[3]])):
        for part, group in enumerate(numbers):
            rows = {
                "image": [{"bytes": png(n), "path": f"{n}.png"} for n in group],
                "caption": [f"n {n}" for n in group],
            }
            write_table(tmp_path / f"data/{split}-{part:05d}-of-{len(numbers):05d}-0a1b2c3d.parquet", rows)
    source = HuggingFaceSource(HuggingFaceConfig(path=str(tmp_path), split="train"))
    assert verdicts(source) == {"0.png": ("n 0",), "1.png": ("n 1",), "2.png": ("n 2",)}
    check_random_access(source, tmp_path)
    with pytest.raises(ValueError, match="one of train, validation"):
        HuggingFaceSource(HuggingFaceConfig(path=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a dataset"):
        HuggingFaceSource(HuggingFaceConfig(path=str(tmp_path / "empty")))


def test_csv_agrees_with_the_standard_reader(tmp_path: Path) -> None:
    """Random well-formed tables: the rows are those of Python's own reader."""
    rng = random.Random(1)
    for trial in range(50):
        made = [["x", "y"]] + [
            ["".join(rng.choices('ab",\n ', k=rng.randrange(1, 6))) for _ in "xy"] for _ in range(rng.randrange(1, 9))
        ]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"])).writerows(made)
        path = tmp_path / f"{trial}.csv"
        path.write_text(text.getvalue(), newline="")
        opened = open_table(str(path))
        assert [list(opened[i].values()) for i in range(len(opened))] == made[1:]


def test_values_that_python_cannot_hold_reject_their_row(tmp_path: Path) -> None:
    """Text that is not UTF-8 passes through Parquet and Arrow and fails on its way to Python."""
    offsets, data = pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes()), pa.py_buffer(b"a\xff")
    table = pa.table({"text": pa.StringArray.from_buffers(2, offsets, data)})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for rows in (
        rows_module.ParquetRows([str(tmp_path / "t.parquet")]),
        rows_module.ArrowRows([str(tmp_path / "t.arrow")]),
    ):
        assert rows[0] == {"text": "a"}
        with pytest.raises(Rejected, match="bad row"):
            rows[1]


def test_names_and_depths_that_json_allows() -> None:
    roles = choose(Columns(), ("text", "\ud800"), "t")
    assert roles.about({"text": "x", "\ud800": {"\ud801": 1}}) == {"columns": {"?": {"?": 1}}}
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(Rejected, match="nested too deep"):
        roles.about({"text": "x", "more": deep})


def test_parquet_files_of_any_name_and_place(tmp_path: Path) -> None:
    for name in ("odd name.parquet", "a/train-0.parquet", "b/train-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / name, {"text": ["x"]})
    with pytest.raises(ValueError, match="one of odd name, train"):
        HuggingFaceSource(HuggingFaceConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="'train' lie in several folders"):
        HuggingFaceSource(HuggingFaceConfig(path=str(tmp_path), split="train"))

"""What a path is taken for, and what is said when it could be two things."""

import json
from pathlib import Path

import pytest
from webdataset import TarWriter

from data_pipeline import storage
from data_pipeline.build import BuildConfig, build
from data_pipeline.sources.opening import KINDS, open_source, recognise
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from tests.data_pipeline.makers import png


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            with TarWriter(str(path)) as writer:
                writer.write({"__key__": "a", "png": png(), "txt": "one"})
        elif name.endswith(".png"):
            path.write_bytes(png())
        else:
            path.write_text('{"path": "a.png", "text": "one", "count": 1}\n')
    return root


@pytest.mark.parametrize(
    ("files", "spec", "kind", "why"),
    [
        (["a.png", "b/c.png", "metadata.jsonl"], "", "folder", "2 png"),
        (["t.jsonl", "a.png"], "t.jsonl", "table", "a jsonl file"),
        (["0.tar", "deep/1.tar"], "", "webdataset", "2 tars"),
        (["0.tar"], "0.tar", "webdataset", "a tar"),
        (["00.tar", "01.tar"], "{00..01}.tar", "webdataset", "a pattern of tars"),
        (["0.tar", "0.parquet", "0_stats.json"], "", "img2dataset", "1 tars with _stats.json"),
        (["0/a.png", "0.parquet", "0_stats.json"], "", "folder", "1 png"),
        (["state.json", "dataset_info.json", "data-0.arrow"], "", "huggingface", "state.json"),
        (["dataset_dict.json", "train/state.json"], "", "huggingface", "dataset_dict.json"),
        (["data/train-0.parquet", "README.md"], "", "huggingface", "1 parquet files"),
    ],
)
def test_recognised(files: list[str], spec: str, kind: str, why: str, tmp_path: Path) -> None:
    fill(tmp_path, *files)
    path = f"{tmp_path}/{spec}" if spec else str(tmp_path)
    found = recognise(path)
    assert (found.kind, found.path, found.why) == (kind, path, why)
    assert str(found) == f"{path}: taken as {kind} ({why})"
    told = recognise(f"{kind}:{path}")
    assert (told.kind, told.path, told.why) == (kind, path, "as told")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.png", "0.tar"], r"1 pictures and 1 tars: say folder:\S+ or webdataset:\S+$"),
        (
            ["a.png", "captions.csv"],
            r"pictures and the table captions\.csv: say folder:\S+ or table:\S+/captions\.c",
        ),
        (["t.csv"], r"no pictures, but a table: say table:\S+/t\.csv$"),
        (["notes.md"], "no pictures .*, no tars and no dataset$"),
        ([], "no pictures"),
    ],
)
def test_ambiguous(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recognise(str(fill(tmp_path, *files)))
    assert "\n" not in str(caught.value)


def test_refused(tmp_path: Path) -> None:
    build(ShapesSource(ShapesConfig(count=2)), BuildConfig(), tmp_path / "built")
    fill(tmp_path, "notes.md")
    for spec, message in (
        (str(tmp_path / "built"), "is a finished shard folder"),
        (str(tmp_path / "notes.md"), "a file is a table .* or a tar; anything else lies in a folder"),
        (str(tmp_path / "none"), "unknown source .*, and nothing is there: sources: shapes, emoji, a path, KIND:PATH"),
        ("ftp://host/x", "remote paths are s3://"),
    ):
        with pytest.raises(ValueError, match=message):
            recognise(spec)


def test_open_source(tmp_path: Path) -> None:
    shapes = open_source("shapes", {"count": 3, "size": 40})
    assert len(shapes) == 3 and shapes[0].image.size == (40, 40)
    fill(tmp_path, "a.png", "t.jsonl")
    source = open_source(f"table:{tmp_path}/t.jsonl", {"max_pixels": 100})
    assert source[0].captions == ("one",) and source.config.max_pixels == 100
    with pytest.raises(ValueError, match=r"table has no setting 'layout'; known: .*folder"):
        open_source(f"{tmp_path}/t.jsonl", {"layout": "plain"})
    storage.write("memory://opening/a.png", png())
    storage.write("memory://opening/a.txt", b"far")
    assert open_source("memory://opening")[0].captions == open_source("folder:memory://opening")[0].captions == ("far",)


def test_every_kind_keeps_the_protocol(tmp_path: Path) -> None:
    """Each kind of source of a path: config, fingerprint, length, a sample and its name."""
    fill(tmp_path, "pictures/a.png", "table/t.jsonl", "table/a.png", "tars/0.tar", "out/0.tar")
    (tmp_path / "pictures/a.txt").write_text("one")
    (tmp_path / "out/0_stats.json").write_text(json.dumps({"count": 1}))
    specs = {"folder": "pictures", "table": "table/t.jsonl", "webdataset": "tars", "img2dataset": "out"}
    for kind, path in specs.items():
        source = open_source(f"{kind}:{tmp_path}/{path}")
        assert isinstance(source.config, KINDS[kind][0]) and len(source.fingerprint) == 64 and len(source) == 1
        assert source[0].captions == ("one",) and source.name(0)
        for index in (-1, 1):
            with pytest.raises(IndexError):
                source[index]
        report = build(source, BuildConfig(), tmp_path / f"built-{kind}")
        assert report.delivered == 1

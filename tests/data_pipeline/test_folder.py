"""The folder source: captions from files or metadata, and every picture delivered or rejected by name."""

import pickle
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources import Rejected
from data_pipeline.sources.folder import FolderConfig, FolderSource, file_key


def picture(path: Path, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def verdicts(folder: Path, **settings: int) -> dict[str, tuple[str, ...] | str]:
    """file -> its captions, or the reason it was rejected with."""
    source = FolderSource(FolderConfig(str(folder), **settings))
    found: dict[str, tuple[str, ...] | str] = {}
    for i in range(len(source)):
        try:
            sample = source[i]
            found[sample.meta["file"]] = sample.captions
        except Rejected as rejected:
            found[rejected.detail.split(" (")[0]] = rejected.reason
    return found


def test_every_picture_has_a_verdict(tmp_path: Path) -> None:
    for name in ("b.PNG", "deep/er/c.jpg", "a.webp", "no caption.gif", "latin.bmp", "blank.png"):
        picture(tmp_path / name)
    (tmp_path / "b.txt").write_text("\n two \nmore\n")
    (tmp_path / "deep/er/c.caption").write_text("\ufeffthree", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "text.txt").write_text("caption of it")
    (tmp_path / "notes.md").write_text("ignored")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".cache" / "thumbnail.png")
    assert verdicts(tmp_path) == {
        "a.webp": ("one",),
        "b.PNG": ("two", "more"),
        "blank.png": "empty caption",
        "deep/er/c.jpg": ("three",),
        "latin.bmp": "caption is not UTF-8",
        "no caption.gif": "no caption",
        "text.jpg": "unreadable image",
    }
    names = list(verdicts(tmp_path))
    assert names == sorted(names)


def test_a_caption_is_a_line(tmp_path: Path) -> None:
    """Lines end with LF, CRLF or CR; what else Unicode calls a line's end is space within a caption."""
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("one\u2028still\r\ntwo\fstill\rthree\x85still\nfour\u2029still".encode())
    assert verdicts(tmp_path) == {"a.png": ("one still", "two still", "three still", "four still")}


def test_sizes(tmp_path: Path) -> None:
    for name, size in (("a.png", (4, 40)), ("b.png", (30, 30)), ("c.png", (12, 10))):
        picture(tmp_path / name, size)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    found = verdicts(tmp_path, min_side_px=10, max_pixels=500)
    assert found == {"a.png": "too small", "b.png": "too many pixels", "c.png": ("x",)}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "c.txt").write_text("its own file wins")
    if kind == "jsonl":
        rows = [
            '{"file_name": "a.png", "text": ["one", "uno"]}',
            "",
            '{"file_name": "./sub/b.png", "caption": "two, né"}',
            '{"file_name": "c.png", "text": "from metadata"}',
            '{"file_name": "../gone.png", "text": "x"}',
        ]
    else:
        rows = ["file_name,text", "a.png,one", "a.png,uno", 'sub/b.png,"two, né"', "c.png,x", "../gone.png,x"]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(rows), encoding="utf-8")
    assert verdicts(tmp_path) == {
        "../gone.png": "missing image",
        "a.png": ("one", "uno"),
        "c.png": ("its own file wins",),
        "sub/b.png": ("two, né",),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops', "line 2"),
        ("metadata.jsonl", '["a.png"]', "line 1"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1: needs file_name and text"),
        ("metadata.csv", "name,text\na.png,x", "line 2: needs file_name"),
        ("metadata.csv", "file_name,text\na.png", "line 2: needs file_name and text"),
        ("metadata.csv", "file_name,text\na.png,\udce9", "not UTF-8"),
    ],
)
def test_bad_metadata_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        FolderSource(FolderConfig(str(tmp_path)))


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*absent' does not exist"):
        FolderSource(FolderConfig(str(tmp_path / "absent")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"'.*file' is not a folder"):
        FolderSource(FolderConfig(str(tmp_path / "file")))
    with pytest.raises(ValueError, match="has no pictures"):
        FolderSource(FolderConfig(str(tmp_path)))


def test_keys_are_safe_and_differ() -> None:
    names = [
        "a b.png",
        "a-b.png",
        "a_b.png",
        "A B.png",
        "a b.jpg",
        "d/a b.png",
        "v1.5_img.jpg",
        "日本.png",
        "x" * 200 + ".png",
    ]
    keys = [file_key(n) for n in names]
    assert len(set(keys)) == len(keys)
    assert all(set(k) <= set("0123456789abcdefghijklmnopqrstuvwxyz-") and 0 < len(k) <= 80 for k in keys)


def test_pickles(source: FolderSource) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and copy.fingerprint == source.fingerprint


def test_pictures_of_other_formats_are_rejected_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.JFIF")
    picture(tmp_path / "b.tiff")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert verdicts(tmp_path) == {"a.JFIF": ("a",), "b.tiff": "unsupported image format"}


def test_names_that_are_not_text(tmp_path: Path) -> None:
    """A lone surrogate, which JSON can hold and UTF-8 cannot, is shown as U+FFFD; keys differ all the same."""
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\\ud800.png", "text": "x"}\n')
    assert verdicts(tmp_path) == {"a.png": "no caption", "\ufffd.png": "missing image"}
    keys = [file_key(name) for name in ("\ud800.png", "\udcff.png", "a" * 99 + ".png")]
    assert len(set(keys)) == 3 and [len(key) for key in keys] == [16, 16, 77]

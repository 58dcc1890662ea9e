"""Duplicates against brute force and planted neighbours; removal lists line by line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline import duplicates
from data_pipeline.duplicates import DropList, Duplicate, HashedRow, find_duplicates, perceptual_hash, read_drop_list

BITS = "{:016x}".format


def rows_of(hashes: list[int], contents: list[str] | None = None) -> list[HashedRow]:
    return [HashedRow(f"k{i}", contents[i] if contents else f"c{i}", BITS(h)) for i, h in enumerate(hashes)]


def by_definition(rows: list[HashedRow], near: int) -> list[Duplicate]:
    """The rule, row by row: the first kept row within reach."""
    kept: list[HashedRow] = []
    found = []
    for row in rows:
        distances = [(int(row.phash, 16) ^ int(k.phash, 16)).bit_count() for k in kept]
        hit = next((i for i, d in enumerate(distances) if d <= near), None)
        if hit is None:
            kept.append(row)
        else:
            found.append(Duplicate(row.key, kept[hit].key, "near", distances[hit]))
    return found


def planted(count: int, reach: int, seed: int = 0) -> list[int]:
    """Random hashes, a third of them some flipped bits (0 to `reach` + 2) away from an earlier one, chains included."""
    rng = np.random.default_rng(seed)
    hashes: list[int] = []
    for _ in range(count):
        if hashes and rng.random() < 1 / 3:
            flips = rng.choice(64, rng.integers(0, reach + 3), replace=False)
            hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in flips))
        else:
            hashes.append(int(rng.integers(0, 2**64, dtype=np.uint64)))
    return hashes


@pytest.mark.parametrize("near", [0, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("most_for_numpy", [10**5, 0])
def test_both_paths_are_exact(near: int, most_for_numpy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if most_for_numpy == 0:
        pytest.importorskip("faiss")
    monkeypatch.setattr(duplicates, "NUMPY_ROWS", most_for_numpy)
    rows = rows_of(planted(2000, near))
    found = find_duplicates(rows, near)
    assert found == by_definition(rows, near)
    assert len(found) > 200 and {d.distance for d in found} == set(range(near + 1))


@pytest.mark.parametrize("block", [1, 7])
def test_blocks_do_not_change_the_answer(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    monkeypatch.setattr(duplicates, "_CHUNK", 5)
    rows = rows_of(planted(120, 4))
    assert find_duplicates(rows, 4) == by_definition(rows, 4)


def test_a_chain_keeps_its_far_end() -> None:
    """0 - 4 - 8 bits: the middle one goes, and so is no reason for the last to go."""
    found = find_duplicates(rows_of([0, 0b1111, 0b11111111]), near=4)
    assert found == [Duplicate("k1", "k0", "near", 4)]


def test_same_bytes() -> None:
    rows = rows_of([5, 6, 5, 2**60 - 1], ["a", "b", "a", "b"])
    exact = [Duplicate("k2", "k0", "exact", 0), Duplicate("k3", "k1", "exact", 0)]
    assert find_duplicates(rows) == exact
    assert find_duplicates(rows, near=1) == exact  # 5 and 6 are 2 bits apart
    # Once the first with these bytes goes, all with these bytes go, to the same kept row.
    assert find_duplicates(rows, near=2) == [
        Duplicate("k1", "k0", "near", 2),
        Duplicate("k2", "k0", "exact", 0),
        Duplicate("k3", "k0", "near", 2),
    ]
    assert find_duplicates([HashedRow("a", ""), HashedRow("b", "")], near=16) == []  # nothing is known of them


def test_bad_requests() -> None:
    for near in (-1, 17):
        with pytest.raises(ValueError, match=f"near={near}: allowed are 0 to 16"):
            find_duplicates([], near)
    with pytest.raises(ValueError, match="keys repeat"):
        find_duplicates([HashedRow("a", "x"), HashedRow("a", "y")])
    with pytest.raises(ValueError, match="a: perceptual hash 'zz'"):
        find_duplicates([HashedRow("a", "x", "zz")], 0)


def scene(seed: int, side: int = 256) -> Image.Image:
    """Smooth random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def bits_apart(a: Image.Image, b: Image.Image) -> int:
    return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()


def test_hash_sees_the_picture_not_the_file() -> None:
    imagehash = pytest.importorskip("imagehash")
    for seed in range(5):
        picture = scene(seed)
        assert perceptual_hash(picture) == str(imagehash.phash(picture))
        for copy in (scene(seed, 400), picture.filter(ImageFilter.GaussianBlur(2)), picture.resize((256, 200))):
            assert bits_apart(picture, copy) <= 4
        assert bits_apart(picture, scene(seed + 100)) > duplicates.MAX_NEAR


def test_pictures_without_structure_have_no_hash() -> None:
    pytest.importorskip("imagehash")
    ramp = np.linspace(0, 255, 64)
    row, column = np.broadcast_to(ramp, (64, 64)), np.broadcast_to(ramp[:, None], (64, 64))
    stripes = np.broadcast_to(np.random.default_rng(0).integers(0, 256, 64), (64, 64))
    speck = np.full((64, 64), 200.0)
    speck[5, 5] = 190
    for gray in (np.zeros((64, 64)), np.full((64, 64), 255.0), row, column, (row + column) / 2, stripes, speck):
        assert perceptual_hash(Image.fromarray(gray.astype(np.uint8)).convert("RGB")) == ""
    dot = np.full((64, 64), 255, dtype=np.uint8)
    dot[20:40, 20:40] = 0
    assert len(perceptual_hash(Image.fromarray(dot).convert("RGB"))) == 16


def test_drop_lists(tmp_path: Path) -> None:
    path, digest = tmp_path / "list.txt", "ab" * 32
    path.write_bytes(b"\xef\xbb\xbf# asked for by mail\r\n\r\n cat-1 \r\ncat-2\n")
    keys = read_drop_list(path, "keys")
    assert keys == DropList(keys=frozenset({"cat-1", "cat-2"}))
    path.write_text("https://a.example/b.jpg?c=1#d\n")
    urls = read_drop_list(path, "urls")
    path.write_text(digest.upper())
    every = keys | urls | read_drop_list(path, "hashes")
    assert len(every) == 4
    assert every.drops("cat-2") and every.drops("x", url="https://a.example/b.jpg?c=1#d")
    assert every.drops("x", content=digest) and every.drops("x", None, digest)
    assert not every.drops("cat-3", "https://a.example/b.jpg", "cd" * 32) and not every.drops("x", None, None)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("a\nB C\n", "keys", "line 2: 'B C'; needs 1 to 80"),
        ("example.org/a.jpg", "urls", "line 1: 'example.org/a.jpg'; needs an address"),
        ("abcd", "hashes", "needs 64 hex digits"),
        ("# nothing\n\n", "keys", "names no keys"),
        ("a", "names", "kind='names': allowed are keys, urls, hashes"),
    ],
)
def test_bad_drop_lists(text: str, kind: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_drop_list(tmp_path / "list", kind)
    with pytest.raises(ValueError, match="cannot be read"):
        read_drop_list(tmp_path / "missing", "keys")


@pytest.mark.long
def test_a_hundred_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths at the size where they change places."""
    pytest.importorskip("faiss")
    rows = rows_of(planted(100_000, 4))
    found = find_duplicates(rows, 4)
    monkeypatch.setattr(duplicates, "NUMPY_ROWS", 0)
    assert find_duplicates(rows, 4) == found and len(found) > 20_000

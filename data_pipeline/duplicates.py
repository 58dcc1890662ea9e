"""Pictures that are there twice, exactly or nearly, and lists of what has to go.

The rule is one sentence: rows are taken in order, the first stays, and a row goes when its bytes equal, or its
perceptual hash lies within `near` bits of, a row that stays. Rows that go are no reason for others to go, so a chain
of small steps does not take out its far end. Rows with the same bytes share one fate.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

NUMPY_ROWS = 100_000  # every pair is compared up to here (12 s on a core), above through faiss
MAX_NEAR = 16  # bits; two unrelated pictures differ in 32 of 64, give or take 4
KINDS = ("keys", "urls", "hashes")
_BLOCK, _CHUNK = 512, 2048  # 8 MB of pairs at a time
_FORMS = {
    "keys": re.compile(r"[0-9a-z_-]{1,80}"),
    "urls": re.compile(r"\S+://\S+"),
    "hashes": re.compile("[0-9a-f]{64}"),
}

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HashedRow:
    """One delivered sample: its key, the sha256 of its source bytes, its perceptual hash ("" where it has none)."""

    key: str
    content: str
    phash: str = ""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Row `key` repeats the kept row `duplicate_of`. kind: "exact" (same bytes) or "near", `distance` bits apart."""

    key: str
    duplicate_of: str
    kind: str
    distance: int


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits: signs of the lowest 8 x 8 DCT terms of a 32 x 32 gray copy, around their median.

    "" for pictures without two-dimensional structure (blank ones, plain gradients, stripes: a profile of rows plus a
    profile of columns, to within 1 of 255 gray levels rms). Most of their terms are rounding noise, so that their
    hashes say nothing and would make all of them look alike. Raises ValueError when imagehash is missing.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ValueError("perceptual hashes need imagehash; get it with: pip install 'ldm[data]'") from error
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    gray = np.asarray(small).astype(np.float64)
    gray -= gray.mean(0)
    gray -= gray.mean(1, keepdims=True)
    if np.vdot(gray, gray) < gray.size:
        return ""
    return str(imagehash.phash(small))


def find_duplicates(rows: Sequence[HashedRow], near: int | None = None) -> list[Duplicate]:
    """The rows that go, in order; the same for any machine. `near`: bits, None compares bytes only.

    Rows of several folders: one after the other, their keys told apart by the caller. Results are exact for any
    number of rows, memory is linear in it. Raises ValueError.
    """
    if near is not None and not 0 <= near <= MAX_NEAR:
        raise ValueError(f"near={near}: allowed are 0 to {MAX_NEAR} of 64 bits, or none")
    if len({row.key for row in rows}) < len(rows):
        raise ValueError("keys repeat: rows of several folders need the folder in their keys")
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.content:
            first.setdefault(row.content, number)
    same = {n: first[row.content] for n, row in enumerate(rows) if row.content and first[row.content] != n}
    alike = {} if near is None else _near(rows, [n for n, row in enumerate(rows) if row.phash and n not in same], near)
    duplicates = []
    for number, row in enumerate(rows):
        origin = same.get(number, number)
        owner, distance = alike.get(origin, (origin, 0))
        if owner != number:
            kind = "near" if origin in alike else "exact"
            duplicates.append(Duplicate(row.key, rows[owner].key, kind, distance))
    return duplicates


def _near(rows: Sequence[HashedRow], numbers: list[int], near: int) -> dict[int, tuple[int, int]]:
    """Row number -> (the first kept row within `near` bits, their distance), for those of `numbers` that have one."""
    hashes = np.array([_bits(rows[n]) for n in numbers], dtype=np.uint64)
    index: _Index = _AllPairs(near) if len(rows) <= NUMPY_ROWS else _Bands(near)
    kept: list[int] = []  # positions in `numbers`, in the order of the index
    found: dict[int, tuple[int, int]] = {}
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        owners = np.array([kept[i] if i >= 0 else -1 for i in index.first_within(block)], dtype=np.int64)
        loose = np.flatnonzero(owners < 0)
        close = np.bitwise_count(block[loose, None] ^ block[None, loose]) <= near  # [L, L]
        for i in np.flatnonzero(close.sum(1) > 1):
            if owners[loose[i]] < 0:  # it stays, and takes the later ones that nobody took
                later = loose[i + 1 :][close[i, i + 1 :]]
                owners[later[owners[later] < 0]] = start + loose[i]
        stays = np.flatnonzero(owners < 0)
        index.add(block[stays])
        kept += (start + stays).tolist()
        for i in np.flatnonzero(owners >= 0):
            owner = int(owners[i])
            found[numbers[start + i]] = (numbers[owner], int(np.bitwise_count(block[i] ^ hashes[owner])))
    return found


def _bits(row: HashedRow) -> int:
    if not re.fullmatch("[0-9a-f]{16}", row.phash):
        raise ValueError(f"{row.key}: perceptual hash {row.phash!r}: 16 hex digits are allowed")
    return int(row.phash, 16)


class _Index(Protocol):
    """Kept hashes, numbered as they come."""

    def add(self, hashes: Hashes) -> None: ...

    def first_within(self, queries: Hashes) -> Numbers:
        """For each query the lowest number within reach, or -1."""
        ...


class _AllPairs:
    """Every query against every hash."""

    def __init__(self, near: int) -> None:
        self.near = near
        self.parts: list[Hashes] = []

    def add(self, hashes: Hashes) -> None:
        self.parts.append(hashes)

    def first_within(self, queries: Hashes) -> Numbers:
        first = np.full(len(queries), -1, dtype=np.int64)
        hashes = np.concatenate(self.parts) if self.parts else np.empty(0, np.uint64)
        for start in range(0, len(hashes), _CHUNK):
            open_ = np.flatnonzero(first < 0)
            hits = np.bitwise_count(queries[open_, None] ^ hashes[None, start : start + _CHUNK]) <= self.near
            some = hits.any(1)
            first[open_[some]] = start + hits[some].argmax(1)
        return first


class _Bands:
    """Multi-index hashing (Norouzi, Punjani, Fleet 2012): 4 tables of 16 bits, nothing missed.

    Were every band of a pair more than near // 4 bits apart, the pair would be at least 4 (near // 4 + 1) > near apart.
    """

    def __init__(self, near: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ValueError(
                f"near duplicates among more than {NUMPY_ROWS} rows need faiss; get it with: pip install 'ldm[data]'"
            ) from error
        self.near = near
        self.index: Any = faiss.IndexBinaryMultiHash(64, 4, 16)
        self.index.nflip = near // 4

    def add(self, hashes: Hashes) -> None:
        if len(hashes):
            self.index.add(_bytes(hashes))

    def first_within(self, queries: Hashes) -> Numbers:
        limits, _, hits = self.index.range_search(_bytes(queries), self.near + 1)  # distances below the radius
        spans = zip(limits[:-1].astype(int), limits[1:].astype(int), strict=True)
        return np.array([hits[a:b].min() if a < b else -1 for a, b in spans], dtype=np.int64)


def _bytes(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)


@dataclass(frozen=True)
class DropList:
    """Samples that must go: by key, by address, by the sha256 of their source bytes."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()

    def __or__(self, other: "DropList") -> "DropList":
        return DropList(self.keys | other.keys, self.urls | other.urls, self.hashes | other.hashes)

    def __len__(self) -> int:
        return len(self.keys) + len(self.urls) + len(self.hashes)

    def drops(self, key: str, url: str | None = None, content: str | None = None) -> bool:
        """Whether any of the three is on the list. Addresses are compared as written."""
        return key in self.keys or url in self.urls or content in self.hashes


def read_drop_list(path: Path, kind: str) -> DropList:
    """A text file with one of `kind` (keys, urls, hashes) a line; empty lines and lines that begin with # are skipped.

    Raises ValueError naming the first line that is no such thing, and for a list with nothing on it: a request that
    takes out nothing by a slip of the pen must not look done.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"drop list {path} cannot be read: {error}") from error
    names = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        name = line.lower() if kind == "hashes" else line
        if not name or name.startswith("#"):
            continue
        if not _FORMS[kind].fullmatch(name):
            allowed = {"keys": "1 to 80 of 0-9 a-z _ -", "urls": "an address", "hashes": "64 hex digits (sha256)"}[kind]
            raise ValueError(f"{path}, line {number}: {line[:80]!r}; needs {allowed}")
        names.add(name)
    if not names:
        raise ValueError(f"drop list {path} names no {kind}")
    return DropList(**{kind: frozenset(names)})

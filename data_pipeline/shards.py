"""Shards: WebDataset tar files beside an index with hashes, written atomically and read through the index.

    DIR/index.json       written last: what the folder holds (Info)
    DIR/00000.tar        key.png, key.txt, key.json for each sample; any WebDataset reader takes it
    DIR/00000.json       where each member lies, its size and sha256

The tar alone cannot tell a cut or a flipped byte from a smaller, different shard; the index can.
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = "ldm-shards"
VERSION = 1
INDEX = "index.json"
_OPEN_FILES = 64  # per process; far below the usual limit of 1024


@dataclass(frozen=True)
class Entry:
    """One sample to write: its key and its members, extension -> bytes, in order."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: the encoded picture, its captions (at least one) and what else is known."""

    key: str
    image_bytes: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the folder's index: its tar, and the per-shard index beside it."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Info:
    """The folder's index. `size`: pictures are size x size pixels; None means each has its own size."""

    samples: int
    bytes: int
    size: int | None
    image_format: str
    source: dict[str, Any]
    shards: tuple[ShardInfo, ...]


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, whatever happens."""
    staged = staged_name(path)
    with staged.open("wb") as file:
        file.write(data)
        commit(file, staged, path)


def staged_name(path: Path) -> Path:
    """Where a file is prepared before it takes its name: hidden, and not ending in .tar."""
    return path.with_name(f".{path.name}.tmp")


def commit(file: BinaryIO, staged: Path, path: Path) -> None:
    """Flush `file` to the disk, give it its final name, and flush the name too."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(staged, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def to_json(value: Any) -> bytes:
    """The one way JSON is written here: stable, UTF-8, no NaN."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def seal(value: dict[str, Any]) -> bytes:
    """JSON that carries its own sha256 as `seal`, so that a flipped digit does not pass for another count."""
    return to_json({**value, "seal": sha256(to_json(value))})


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` wrote to a file. Raises ValueError when it is missing or damaged."""
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        if value.pop("seal") == sha256(to_json(value)):
            return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is missing or damaged; build the folder again")


def write_tar(path: Path, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Write one shard; the same entries give the same bytes. No entries, no file.

    Returns the samples for the per-shard index: [{"key": k, "members": {extension: [offset, size, sha256]}}].
    """
    samples: list[dict[str, Any]] = []
    staged = staged_name(path)
    with staged.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for entry in entries:
                places = {ext: _add(tar, f"{entry.key}.{ext}", data) for ext, data in entry.members.items()}
                samples.append({"key": entry.key, "members": places})
        if samples:
            commit(file, staged, path)
    if not samples:
        staged.unlink()
    return samples


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> list[Any]:
    header = tarfile.TarInfo(name)  # time, owner and group stay 0, so that bytes depend on content only
    header.size = len(data)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [tar.offset - padded, len(data), sha256(data)]


def write_index(folder: Path, info: Info) -> None:
    """Declare the folder complete."""
    write_atomically(folder / INDEX, seal({"format": FORMAT, "version": VERSION, **asdict(info)}))


def read_index(folder: Path) -> Info:
    """The index of a shard folder. Raises ValueError when it is not one, or not complete."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; build one with: ldm data build SOURCE {folder}")
    path = folder / INDEX
    if not path.exists():
        raise ValueError(f"{folder} has no {INDEX}: not a shard folder; build one with: ldm data build")
    data = unseal(path)
    found = f"{data.pop('format', 'no format')} version {data.pop('version', None)}"
    if found != f"{FORMAT} version {VERSION}":
        raise ValueError(f"{path} is {found}; this program reads {FORMAT} version {VERSION}")
    return Info(**{**data, "shards": tuple(ShardInfo(**s) for s in data["shards"])})


class ShardDataset:
    """A shard folder as a list: `len(ds)`, `ds[i]`, `ds.info`. Every byte returned has matched its sha256.

    Opening checks that every shard is there with its full length. Safe in forked and spawned worker
    processes; one object is not for several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.info = read_index(self.path)
        for shard in self.info.shards:
            file = self.path / shard.file
            found = file.stat().st_size if file.exists() else None
            if found != shard.bytes:
                problem = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise ValueError(f"shard {file} {problem}; build the folder again")
        if self.info.samples == 0:
            raise ValueError(f"{self.path} holds no samples")
        self._ends = list(itertools.accumulate(s.samples for s in self.info.shards))
        self._samples: dict[int, list[dict[str, Any]]] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index`. Raises IndexError; RuntimeError naming shard and key if its bytes changed."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard] - self.info.shards[shard].samples
        sample = self._shard_samples(shard)[index - first]
        parts = {ext: self._read(shard, sample["key"], ext, place) for ext, place in sample["members"].items()}
        meta = json.loads(parts["json"])
        return RawSample(sample["key"], parts[self.info.image_format], tuple(meta.pop("captions")), meta)

    def damaged(self) -> list[str]:
        """Read every shard whole and name each file that is not as it was written; [] when all is well."""
        named = [
            (name, digest) for s in self.info.shards for name, digest in ((s.file, s.sha256), (s.index, s.index_sha256))
        ]
        return [
            name for name, digest in named if not (self.path / name).exists() or file_sha256(self.path / name) != digest
        ]

    def close(self) -> None:
        """Close the shard files this process has open; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # file descriptors mean nothing in another process

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def _shard_samples(self, shard: int) -> list[dict[str, Any]]:
        if shard not in self._samples:
            info = self.info.shards[shard]
            path = self.path / info.index
            data = path.read_bytes() if path.exists() else b""
            if sha256(data) != info.index_sha256:
                raise RuntimeError(f"shard index {path} is damaged or missing; build the folder again")
            self._samples[shard] = json.loads(data)["samples"]
        return self._samples[shard]

    def _read(self, shard: int, key: str, extension: str, place: list[Any]) -> bytes:
        offset, size, digest = place
        data = os.pread(self._file(shard), size, offset)
        if sha256(data) != digest:
            path = self.path / self.info.shards[shard].file
            raise RuntimeError(f"shard {path} is damaged at {key}.{extension}; build the folder again")
        return data

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.path / self.info.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

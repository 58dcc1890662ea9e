"""Shards: WebDataset tar files beside an index with hashes, written atomically and read through the index.

    DIR/index.json       written last: what the folder holds (Info)
    DIR/00000.tar        key.png, key.txt, key.json for each sample; any WebDataset reader takes it
    DIR/00000.json       where each member lies, its size and sha256, and what became of every row (ledger.py)

The tar alone cannot tell a cut or a flipped byte from a smaller, different shard; the index can.
"""

import bisect
import hashlib
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from data_pipeline import storage
from data_pipeline.durable import StagedFile
from data_pipeline.storage import StrPath

FORMAT = "ldm-shards"
VERSION = (
    2  # 1 had no ledger: neither `rows` and `empty` here, nor the rows of samples and rejections in a shard's index
)
READABLE = (1, 2)
INDEX = "index.json"
_OPEN_FILES = 64  # per process; far below the usual limit of 1024


@dataclass(frozen=True)
class Entry:
    """One sample to write: its key, its members (extension -> bytes, in order), and what its index says besides."""

    key: str
    members: dict[str, bytes]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: the encoded picture, its captions (at least one) and what else is known."""

    key: str
    image_bytes: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Tar:
    """A tar as written: for each sample {"key": k, "members": {extension: [offset, size, sha256]}, ...}."""

    samples: list[dict[str, Any]]
    bytes: int
    sha256: str


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
class LedgerInfo:
    """A part of the source without one usable sample: no tar, only the index that says why."""

    index: str
    index_sha256: str


@dataclass(frozen=True)
class Info:
    """The folder's index. `size`: pictures are size x size pixels; None means each has its own size.

    rows: of the source, delivered and rejected together; None where version 1 did not say.
    """

    samples: int
    bytes: int
    size: int | None
    image_format: str
    source: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    rows: int | None = None
    empty: tuple[LedgerInfo, ...] = ()


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: StrPath) -> str:
    """Hex digest of a file's content."""
    with storage.open_read(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()  # has readinto, which BinaryIO does not say


def to_json(value: Any) -> bytes:
    """The one way JSON is written here: stable, UTF-8, no NaN."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def seal(value: dict[str, Any]) -> bytes:
    """JSON that carries its own sha256 as `seal`, so that a flipped digit does not pass for another count."""
    return to_json({**value, "seal": sha256(to_json(value))})


def unseal(path: StrPath) -> dict[str, Any]:
    """What `seal` wrote to a file. Raises ValueError when it is missing or damaged."""
    try:
        data = storage.read(path)
        value: dict[str, Any] = json.loads(data)
        del value["seal"]
        if data == seal(value):
            return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is missing or damaged; build the folder again")


def write_tar(path: StrPath, entries: Iterable[Entry]) -> Tar:
    """Write one shard; the same entries give the same bytes. No entries, no file."""
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            tar = write_tar(Path(folder, "tar"), entries)
            if tar.samples:
                storage.upload(Path(folder, "tar"), path)
        return tar
    samples: list[dict[str, Any]] = []
    with StagedFile(Path(path)) as file:
        for entry in entries:
            places = {extension: _add(file, f"{entry.key}.{extension}", d) for extension, d in entry.members.items()}
            samples.append({"key": entry.key, **entry.about, "members": places})
        if not samples:
            file.discard()
            return Tar([], 0, "")
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.size % tarfile.RECORDSIZE))
    return Tar(samples, file.size, file.sha256)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member; time, owner and group stay 0, so that they depend on name and size only."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT)


def members_in_order(sample: dict[str, Any]) -> list[str]:
    """The extensions of a sample's members as they follow each other in the tar; JSON keeps them by name."""
    return sorted(sample["members"], key=lambda extension: int(sample["members"][extension][0]))


def _add(file: StagedFile, name: str, data: bytes) -> list[Any]:
    file.write(tar_header(name, len(data)))
    offset = file.size
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return [offset, len(data), sha256(data)]


def write_index(folder: StrPath, info: Info) -> None:
    """Declare the folder complete."""
    storage.write(storage.join(folder, INDEX), seal({"format": FORMAT, "version": VERSION, **asdict(info)}))


def read_index(folder: StrPath) -> Info:
    """The index of a shard folder. Raises ValueError when it is not one, or not complete."""
    if not storage.is_folder(folder):
        raise ValueError(f"no folder {folder}; build one with: ldm data build SOURCE {folder}")
    path = storage.join(folder, INDEX)
    if not storage.exists(path):
        raise ValueError(f"{folder} has no {INDEX}: not a shard folder; build one with: ldm data build")
    data = unseal(path)
    found, version = data.pop("format", "no format"), data.pop("version", None)
    if found != FORMAT or version not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise ValueError(f"{path} is {found} version {version}; this program reads {FORMAT} versions {readable}")
    listed = tuple(ShardInfo(**s) for s in data.pop("shards"))
    empty = tuple(LedgerInfo(**s) for s in data.pop("empty", ()))
    return Info(**data, shards=listed, empty=empty)


class ShardDataset:
    """A shard folder as a list: `len(ds)`, `ds[i]`, `ds.info`. Every byte returned has matched its sha256.

    Opening checks that every shard is there with its full length. Safe in forked and spawned worker
    processes; one object is not for several threads.
    """

    def __init__(self, path: StrPath) -> None:
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
        named = [(s.file, s.sha256) for s in self.info.shards]
        named += [(s.index, s.index_sha256) for s in self.info.shards]
        named += [(s.index, s.index_sha256) for s in self.info.empty]
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

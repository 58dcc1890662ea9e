"""Shards: WebDataset tar files beside an index with hashes, written atomically and read through the index.

    DIR/index.json       written last: what the folder holds (Info)
    DIR/00000.tar        key.png, key.txt, key.json for each sample; any WebDataset reader takes it. Some have the
                         paired picture key.condition.png (RGB) and key.mask.png (gray), both of the picture's size
    DIR/00000.json       where each member lies, its size and sha256, and what became of every row (ledger.py)

The tar alone cannot tell a cut or a flipped byte from a smaller, different shard; the index can.
"""

import hashlib
import json
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
VERSION = 2  # 1 had no ledger: no `rows` and `empty` here, no rows of samples and rejections in a shard's index
READABLE = (1, 2)
INDEX = "index.json"
CONDITION, MASK = "condition.png", "mask.png"


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

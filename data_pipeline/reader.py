"""Random access to a shard folder, here or far away, with little memory: what the loader reads through."""

import bisect
import io
import itertools
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data_pipeline import storage
from data_pipeline.filecache import FileCache
from data_pipeline.shards import INDEX, RawSample, read_index, sha256, to_json
from data_pipeline.storage import StrPath, join

_OPEN_FILES = 64  # per process; far below the usual limit of 1024
_OPEN_COPIES = 2
_KEPT_SAMPLES = 1_000_000  # of which the places are remembered, about 200 bytes each
_DIGEST = 32  # bytes of a sha256


@dataclass(frozen=True)
class _Part:
    """The places of one shard's members. n samples, m members in the order of `extensions`.

    places [n, m, 2] int64: offset and size. digests: n m sha256. sizes [n, 4] int32: width and height as stored, and
    before they were stored; 0 where version 1 of the format did not say.
    """

    extensions: tuple[str, ...]
    keys: tuple[str, ...]
    places: np.ndarray
    digests: bytes
    sizes: np.ndarray

    @staticmethod
    def of(samples: list[dict[str, Any]]) -> "_Part":
        extensions = tuple(samples[0]["members"])
        places = np.empty((len(samples), len(extensions), 2), np.int64)
        sizes = np.zeros((len(samples), 4), np.int32)
        digests = []
        for i, sample in enumerate(samples):
            for j, extension in enumerate(extensions):
                *places[i, j], digest = sample["members"][extension]
                digests.append(digest)
            if "size" in sample:
                sizes[i] = [*sample["size"], *sample.get("original", sample["size"])]
        keys = tuple(sample["key"] for sample in samples)
        return _Part(extensions, keys, places, bytes.fromhex("".join(digests)), sizes)

    def digest(self, row: int, extension: str) -> bytes:
        """The sha256 of one member."""
        at = (row * len(self.extensions) + self.extensions.index(extension)) * _DIGEST
        return self.digests[at : at + _DIGEST]


class ShardReader:
    """A shard folder as a list of samples; every byte returned has matched its sha256.

    Opening checks that every shard is there with its full length. copies: where shards from far away are kept.
    Safe in forked and spawned worker processes; one object is not for several threads. Raises ValueError when the
    folder is not complete, or far away without `copies`.
    """

    def __init__(self, path: StrPath, copies: FileCache | None = None) -> None:
        self.path = os.fspath(path)
        self.info = read_index(path)
        if storage.is_remote(path) and copies is None:
            raise ValueError(f"{path} is far away: say where copies of its shards go")
        self._copies = copies if storage.is_remote(path) else None
        self._check_lengths()
        if self.info.samples == 0:
            raise ValueError(f"{self.path} holds no samples")
        self.ends = list(itertools.accumulate(s.samples for s in self.info.shards))
        self._parts: dict[int, _Part] = {}
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index`. Raises IndexError; RuntimeError naming shard and key if its bytes changed."""
        members = self.read(index, (self.info.image_format, "json"))
        meta = json.loads(members["json"])
        captions = tuple(meta.pop("captions"))
        return RawSample(self.key(index), members[self.info.image_format], captions, meta)

    @cached_property
    def fingerprint(self) -> str:
        """What changes with any byte of any sample, hex."""
        return sha256(to_json([shard.sha256 for shard in self.info.shards]))

    def read(self, index: int, extensions: Sequence[str]) -> dict[str, bytes]:
        """Some members of a sample, in one read from the first of them to the end of the last."""
        shard, row = self._find(index)
        part = self._part(shard)
        spans = {extension: part.places[row, part.extensions.index(extension)].tolist() for extension in extensions}
        first = min(offset for offset, _ in spans.values())
        last = max(offset + size for offset, size in spans.values())
        data = os.pread(self._file(shard).fileno(), last - first, first)
        members = {name: data[offset - first : offset - first + size] for name, (offset, size) in spans.items()}
        for extension, member in members.items():
            if bytes.fromhex(sha256(member)) != part.digest(row, extension):
                path = join(self.path, self.info.shards[shard].file)
                raise RuntimeError(f"shard {path} is damaged at {part.keys[row]}.{extension}; build the folder again")
        return members

    def key(self, index: int) -> str:
        """The key of a sample."""
        shard, row = self._find(index)
        return self._part(shard).keys[row]

    def extensions(self, index: int) -> tuple[str, ...]:
        """The names of a sample's members."""
        return self._part(self._find(index)[0]).extensions

    def sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) of the picture as stored, and as it was before, px."""
        shard, row = self._find(index)
        width, height, before_width, before_height = self._part(shard).sizes[row].tolist()
        if width == 0:  # version 1: only the picture knows
            data = self.read(index, (self.info.image_format,))[self.info.image_format]
            with Image.open(io.BytesIO(data)) as opened:
                return opened.size, opened.size
        return (width, height), (before_width, before_height)

    def sizes_of(self, indices: Sequence[int]) -> np.ndarray:
        """[n, 2] int32: width and height of these pictures as stored."""
        return np.array([self.sizes(i)[0] for i in indices], np.int32).reshape(-1, 2)

    def all_sizes(self) -> np.ndarray:
        """[N, 2] int32: width and height of every picture as stored.

        They come from the index of every shard, so they are kept beside the shards when these lie on a disk.
        """
        name = f".sizes-{sha256(storage.read(join(self.path, INDEX)))[:16]}.npy"
        kept = None if self._copies else join(self.path, name)
        with suppress(OSError, ValueError):
            if kept is not None:
                data = storage.read(kept)
                found: np.ndarray = np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False)
                if sha256(data[_DIGEST:]) == data[:_DIGEST].hex() and found.shape == (len(self), 2):
                    return found
        sizes = self.sizes_of(range(len(self)))
        buffer = io.BytesIO()
        np.save(buffer, sizes)
        with suppress(OSError):  # a folder that may not be written to
            if kept is not None:
                data = buffer.getvalue()
                storage.write(kept, bytes.fromhex(sha256(data)) + data)
        return sizes

    def close(self) -> None:
        """Close the shard files this process has open; reading opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files mean nothing in another process

    def _check_lengths(self) -> None:
        if self._copies:
            there = {file.name: file.size for file in storage.list_files(self.path)}
        else:
            with os.scandir(self.path) as entries:
                names = {entry.name: entry for entry in entries}
            there = {s.file: names[s.file].stat().st_size for s in self.info.shards if s.file in names}
        for shard in self.info.shards:
            if (found := there.get(shard.file)) != shard.bytes:
                problem = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise ValueError(f"shard {join(self.path, shard.file)} {problem}; build the folder again")

    def _find(self, index: int) -> tuple[int, int]:
        """The shard that a sample is in, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self.ends, index)
        return shard, index - (self.ends[shard] - self.info.shards[shard].samples)

    def _part(self, shard: int) -> _Part:
        if shard not in self._parts:
            info = self.info.shards[shard]
            path = join(self.path, info.index)
            try:
                data = storage.read(path)
            except FileNotFoundError:
                data = b""
            if sha256(data) != info.index_sha256:
                raise RuntimeError(f"shard index {path} is damaged or missing; build the folder again")
            most = max(1, _KEPT_SAMPLES // max(s.samples for s in self.info.shards))
            while len(self._parts) >= most:
                self._parts.pop(next(iter(self._parts)))
            self._parts[shard] = _Part.of(json.loads(data)["samples"])
        return self._parts[shard]

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            # A copy that was thrown out takes its place on the disk for as long as it is open.
            if len(self._files) >= (_OPEN_COPIES if self._copies else _OPEN_FILES):
                self._files.pop(next(iter(self._files))).close()
            info = self.info.shards[shard]
            path = join(self.path, info.file)
            self._files[shard] = self._copies.open(path, info.sha256) if self._copies else storage.open_read(path)
        return self._files[shard]

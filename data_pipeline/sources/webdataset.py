"""WebDataset shards that others wrote: tars without an index of ours, read by offset and strictly.

Each tar is scanned once (its headers only) into the list of its samples, see shard_scan.py. A changed byte inside a
member is seen only when the picture no longer decodes: tars have no checksum of content.
"""

import bisect
import hashlib
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline import storage
from data_pipeline.captions import clean_captions, decode_caption
from data_pipeline.images import MAX_BYTES, MAX_PIXELS
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.columns import Columns, Roles, choose
from data_pipeline.sources.pictures import file_key, make_sample
from data_pipeline.sources.shard_scan import PICTURES, Entry, from_json, scan, to_json

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # the packed ones to be named, not passed over
_CAPTIONS = ("txt", "caption")
_HELD = 4  # scans kept in memory
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class WebDatasetConfig(Columns):
    """path: a folder with tars (also further down), one tar, or a pattern such as data/{00000..00099}.tar.

    The columns are those of each sample's .json, if it has one; a .txt or .caption member is the caption before them.
    index: a folder to keep scans in, so that the next process need not scan again; "" keeps none.
    """

    path: str = ""
    index: str = ""
    max_pixels: int = MAX_PIXELS


class WebDatasetSource:
    """The samples of foreign shards, by shard and by place in it. ValueError when there are no tars.

    Every damaged place and every sample that is not whole is a row that is rejected by name.
    """

    def __init__(self, config: WebDatasetConfig) -> None:
        self.config = config
        self._folder = self._root()
        self._shards = self._find()
        self._held: OrderedDict[int, list[Entry]] = OrderedDict()
        self._ends = list(itertools.accumulate(len(self._entries(n)) for n in range(len(self._shards))))
        listed = "".join(f"{name}\0{version}\n" for name, version in self._shards)
        self.fingerprint = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. Raises Rejected, IndexError; RuntimeError when a tar changed since this was made."""
        number, entry = self._locate(index)
        if entry.reason:
            raise Rejected(entry.reason, entry.detail)
        pictures = [ext for ext in entry.members if ext in PICTURES]
        if len(pictures) != 1:
            raise Rejected("several images" if pictures else "missing image", ", ".join(sorted(entry.members)))
        wanted = [ext for ext in (*pictures, *_CAPTIONS, "json") if ext in entry.members]
        parts = self._read(number, {ext: entry.members[ext] for ext in wanted})
        captions, meta = self._describe(entry, parts)
        meta |= {"shard": _shown(self._shards[number][0]), "member": _shown(entry.key)}
        if unused := sorted(entry.members.keys() - parts.keys()):
            meta["unused_members"] = unused
        return make_sample(self._key(number, entry), parts[pictures[0]], captions, meta, self.config.max_pixels)

    def name(self, index: int) -> str:
        """Tar and key, as 00012.tar/000120034; 00012.tar/@512 for damage at byte 512."""
        number, entry = self._locate(index)
        return _shown(f"{self._shards[number][0]}/{entry.key}".rstrip("/"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    def _find(self) -> list[tuple[str, str]]:
        """Name and version of each tar."""
        path = self.config.path
        if "{" in path:
            names = list(expand(path.removeprefix(self._folder).lstrip("/")))
            if missing := [n for n in names if not storage.exists(self._path(n))]:
                raise ValueError(f"{len(missing)} of {len(names)} shards of {path} are missing, such as {missing[0]}")
            return [(n, storage.info(self._path(n)).version) for n in names]
        if path and storage.is_folder(path):
            found = [(f.name, f.version) for f in storage.list_files(path) if f.name.lower().endswith(TARS)]
            if not found:
                raise ValueError(f"{path} has no .tar files")
            return found
        if not path or not storage.exists(path):
            raise ValueError(f"no shards at {path!r}")
        return [(storage.basename(path), storage.info(path).version)]

    def _root(self) -> str:
        """The folder that names of shards are relative to: of a pattern, the one above its first brace."""
        path = self.config.path
        if "{" in path:
            return storage.parent(path[: path.index("{")] + "x")
        return path if storage.is_folder(path) else storage.parent(path)

    def _path(self, name: str) -> str:
        return storage.join(self._folder, name)

    def _locate(self, index: int) -> tuple[int, Entry]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        entries = self._entries(number)
        first = self._ends[number - 1] if number else 0
        if len(entries) != self._ends[number] - first:
            raise RuntimeError(f"{self._path(self._shards[number][0])} changed while it was being read")
        return number, entries[index - first]

    def _entries(self, number: int) -> list[Entry]:
        """The rows of shard `number`, from memory if it was used lately."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        entries = self._rows_of(number)
        self._held[number] = entries
        if len(self._held) > _HELD:
            self._held.popitem(last=False)
        return entries

    def _rows_of(self, number: int) -> list[Entry]:
        """Scan shard `number`, or read its kept scan."""
        name, version = self._shards[number]
        path = self._path(name)
        if storage.info(path).version != version:
            raise RuntimeError(f"{path} changed while it was being read")
        if not self.config.index:
            return scan(path)
        label = f"{path}\0{version}".encode("utf-8", "surrogateescape")
        kept = storage.join(self.config.index, f"{hashlib.sha256(label).hexdigest()}.json")
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            return from_json(storage.read(kept))
        entries = scan(path)
        storage.write(kept, to_json(entries))
        return entries

    def _read(self, number: int, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        """Members of one sample, each by its own range: what lies between them is not read."""
        if (largest := max(size for _, size in places.values())) > MAX_BYTES:
            raise Rejected("file too large", f"{largest} bytes, at most {MAX_BYTES}")
        path = self._path(self._shards[number][0])
        return {ext: storage.read_range(path, offset, size) for ext, (offset, size) in places.items()}

    def _describe(self, entry: Entry, parts: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, Any]]:
        row = entry.row if entry.row is not None else _json(parts.get("json", b"{}"))
        try:
            roles: Roles = choose(self.config, tuple(row), "its .json")
        except ValueError as error:
            raise Rejected("missing column", str(error)) from error
        beside = next((parts[ext] for ext in _CAPTIONS if ext in parts), None)
        if beside is not None:
            return clean_captions([decode_caption(beside)]), roles.about(row)
        if not roles.captions:
            raise Rejected("no caption")
        return roles.describe(row)

    def _key(self, number: int, entry: Entry) -> str:
        return file_key(f"{self._shards[number][0].rpartition('.')[0]}/{entry.key}.")


def expand(pattern: str) -> Iterator[str]:
    """data/{00..02}.tar -> data/00.tar, data/01.tar, data/02.tar; several ranges give every combination.

    Raises ValueError for other braces, and for a range that runs backwards.
    """
    match = _RANGE.search(pattern)
    if not match:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"pattern {pattern!r}: braces hold a range of numbers, as in {{00000..00099}}")
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ValueError(f"pattern {pattern!r}: {match[0]} runs backwards")
    for number in range(first, last + 1):
        for rest in expand(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{number:0{len(match[1])}d}{rest}"


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Rejected("unreadable metadata", str(error)) from error
    if not isinstance(found, dict):
        raise Rejected("unreadable metadata", f"{type(found).__name__}, not an object")
    return found


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

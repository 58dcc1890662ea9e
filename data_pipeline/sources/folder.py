"""A folder of pictures with captions beside them."""

import csv
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.captions import clean_captions, decode_caption
from data_pipeline.images import MAX_PIXELS, SUFFIXES, load_image
from data_pipeline.sources import Rejected, Sample

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class FolderConfig:
    """path: the folder, searched with all below it. min_side_px, max_pixels: smaller or
    larger pictures are rejected.

    Captions: a file with the same stem and .txt or .caption, one caption a line; else the folder's
    metadata.jsonl or metadata.csv with the columns file_name and text or caption (in .jsonl also a list).
    """

    path: str = ""
    min_side_px: int = 1
    max_pixels: int = MAX_PIXELS


class FolderSource:
    """The pictures of a folder in the order of their relative paths. ValueError when there are none."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config
        root = Path(config.path)
        if not config.path or not root.is_dir():
            kind = "is not a folder" if config.path and root.exists() else "does not exist"
            raise ValueError(f"source folder {config.path!r} {kind}")
        files = _files(root)
        self._captions = _read_metadata(root, set(files))
        found = {f for f in files if f.lower().endswith(SUFFIXES)}
        if not found:
            raise ValueError(f"source folder {config.path!r} has no pictures ({', '.join(SUFFIXES)})")
        # A picture that the metadata names but that is not there is rejected by name, not forgotten.
        self._names = sorted(found | self._captions.keys())
        self._files = frozenset(files)
        self.fingerprint = _fingerprint(root, files)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """Picture `index`. Raises Rejected."""
        name = self._names[index]
        try:
            if name not in self._files:
                raise Rejected("missing image")
            captions = clean_captions(self._texts(name))
            image = load_image(Path(self.config.path, name), self.config.max_pixels)
            if min(image.size) < self.config.min_side_px:
                raise Rejected("too small", f"{image.width} x {image.height}")
        except Rejected as rejected:
            raise Rejected(rejected.reason, f"{name} ({rejected.detail})" if rejected.detail else name) from rejected
        meta = {"file": name, "width": image.width, "height": image.height}
        return Sample(file_key(name), image, captions, meta)

    def _texts(self, name: str) -> list[str]:
        stem = name.rpartition(".")[0]
        for suffix in CAPTION_SUFFIXES:
            if stem + suffix in self._files:
                return decode_caption(Path(self.config.path, stem + suffix).read_bytes()).splitlines()
        if name not in self._captions:
            raise Rejected("no caption")
        return self._captions[name]


def file_key(name: str) -> str:
    """A relative path -> a key: readable, plus 8 digits of its hash, so that different paths never meet."""
    slug = re.sub(r"[^0-9a-z]+", "-", name.rpartition(".")[0].lower()).strip("-")[-60:]
    return f"{slug}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}".lstrip("-")


def _files(root: Path) -> list[str]:
    """Relative paths of all files that are not hidden, sorted, with / between folders."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _fingerprint(root: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        stat = (root / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_metadata(root: Path, files: set[str]) -> dict[str, list[str]]:
    """file_name -> captions from metadata.jsonl or .csv; {} without one. ValueError names the line."""
    captions: dict[str, list[str]] = {}
    for name in METADATA:
        if name not in files:
            continue
        try:
            text = (root / name).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{root / name} is not UTF-8 (byte {error.start})") from error
        for line, row in _rows(name, text):
            value = row.get("text", row.get("caption")) if isinstance(row, dict) else None
            texts: list[Any] = value if isinstance(value, list) else [value]
            if not all(isinstance(t, str) for t in texts) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{root / name}, line {line}: needs file_name and text (or caption)")
            captions.setdefault(Path(row["file_name"]).as_posix(), []).extend(texts)
    return captions


def _rows(name: str, text: str) -> list[tuple[int, Any]]:
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(reader.line_num, row) for row in reader]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError:
                rows.append((number, None))
    return rows

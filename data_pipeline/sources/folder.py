"""A folder of pictures with captions beside them, here or far away, in the layouts that are in use.

The caption of a picture is the first of these that it has:
  1. the file of the same stem with .txt, or else .caption: one caption a line;
  2. its rows in a metadata table, the one in the nearest folder above it;
  3. with caption_from_name: its own file name, without the suffix and with - and _ as spaces;
  4. the one `caption` for all;
  5. in kohya's layout: the name in its folder's name.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline import storage
from data_pipeline.captions import clean_captions, decode_caption
from data_pipeline.images import MAX_PIXELS, SUFFIXES, read_opacity
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.columns import Columns, Roles, choose
from data_pipeline.sources.partners import ALPHA, Partners
from data_pipeline.sources.pictures import file_key, make_sample, read_picture
from data_pipeline.sources.rows import open_table

CAPTION_SUFFIXES = (".txt", ".caption")
# Also pictures: .jfif is a JPEG, the others are rejected by name ("unsupported image format"), not passed over.
_OTHER_SUFFIXES = (".jfif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff")
LAYOUTS = ("auto", "plain", "kohya")
_METADATA = re.compile(r"(?:.*/)?metadata\.(?:csv|tsv|jsonl|ndjson|parquet)")
_REPEATS = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class FolderConfig(Columns):
    """path: the folder, searched with all below it. min_side_px, max_pixels: smaller or
    larger pictures are rejected.

    Captions: a file with the same stem and .txt or .caption, one caption a line; else the row of metadata.jsonl,
    .csv or .parquet with the columns file_name (relative to the table) and text or caption, which may be a list.

    layout: "kohya" takes the folders N_name right below `path`, with name as the caption where there is no other;
    pictures elsewhere are rejected. N is only kept in the meta, as `repeats`: data.repeats repeats a folder.
    "plain" gives names of folders no meaning.
    "auto" is kohya when the pictures lie in such folders only. caption_from_name, caption: see the order above.

    conditions: a folder with a paired picture for each one, under the same relative path with any suffix; it may lie
    inside `path`. masks: likewise, white where a pixel counts in the loss; or "alpha": the pictures' own opacity.
    """

    path: str = ""
    min_side_px: int = 1
    max_pixels: int = MAX_PIXELS
    layout: str = "auto"
    caption_from_name: bool = False
    caption: str = ""
    conditions: str = ""
    masks: str = ""


class FolderSource:
    """The pictures of a folder in the order of their relative paths. ValueError when there are none."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config
        if config.layout not in LAYOUTS:
            raise ValueError(f"layout={config.layout!r}: allowed are {', '.join(LAYOUTS)}")
        if not config.path or not storage.is_folder(config.path):
            kind = "is not a folder" if config.path and storage.exists(config.path) else "does not exist"
            raise ValueError(f"source folder {config.path!r} {kind}")
        self._conditions = Partners(config.conditions, "condition", config.max_pixels) if config.conditions else None
        apart = config.masks not in ("", ALPHA)
        self._masks = Partners(config.masks, "mask", config.max_pixels) if apart else None
        files = _without(storage.list_files(config.path), config)
        self._files = frozenset(f.name for f in files)
        self._described = _read_metadata(config, self._files)
        found = {f for f in self._files if f.lower().endswith(SUFFIXES + _OTHER_SUFFIXES)}
        if not found:
            raise ValueError(f"source folder {config.path!r} has no pictures ({', '.join(SUFFIXES)})")
        # A picture that the metadata names but that is not there is rejected by name, not forgotten.
        self._names = sorted(found | self._described.keys())
        self._kohya = config.layout == "kohya" or (config.layout == "auto" and _is_kohya(config.path, found))
        listed = "".join(f"{f.name}\0{f.size}\0{f.version}\n" for f in files)
        listed += "".join(partners.fingerprint for partners in (self._conditions, self._masks) if partners)
        self.fingerprint = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """Picture `index`. Raises Rejected, IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        name = self._names[index]
        try:
            sample = self._sample(name)
            if min(sample.image.size) < self.config.min_side_px:
                raise Rejected("too small", f"{sample.image.width} x {sample.image.height}")
        except Rejected as rejected:
            shown = self.name(index)
            raise Rejected(rejected.reason, f"{shown} ({rejected.detail})" if rejected.detail else shown) from rejected
        return sample

    def name(self, index: int) -> str:
        """The path within the folder."""
        return _shown(self._names[index])

    def repeats(self, index: int) -> int:
        """How often kohya's layout wants the picture in an epoch; 1 in other layouts."""
        found = self._kohya_folder(self._names[index])
        return int(found[1]) if found else 1

    def has_caption(self, index: int) -> bool:
        """Whether picture `index` has any, by the names of files and what the metadata list."""
        name, config = self._names[index], self.config
        stem = name.rpartition(".")[0]
        return bool(
            config.caption
            or config.caption_from_name
            or name in self._described
            or self._kohya_folder(name)
            or any(stem + suffix in self._files for suffix in CAPTION_SUFFIXES)
        )

    def _kohya_folder(self, name: str) -> re.Match[str] | None:
        return _REPEATS.fullmatch(name.partition("/")[0]) if self._kohya and "/" in name else None

    def _sample(self, name: str) -> Sample:
        if name not in self._files:
            raise Rejected("missing image")
        repeats = self._kohya_folder(name)
        if self._kohya and not repeats:
            raise Rejected("not in a folder N_name", "layout=plain takes it")
        captions, meta = self._captions(name, repeats[2] if repeats else "")
        meta["file"] = _shown(name)
        if repeats:
            meta["repeats"] = int(repeats[1])
        data = read_picture(storage.join(self.config.path, name))
        sample = make_sample(file_key(name), data, captions, meta, self.config.max_pixels)
        condition = self._conditions.read(name) if self._conditions else None
        mask = self._masks.read(name) if self._masks else None
        if self.config.masks == ALPHA:
            mask = read_opacity(data, self.config.max_pixels)
        return replace(sample, condition=condition, mask=mask)

    def _captions(self, name: str, class_tokens: str) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The captions by the order above, and what metadata say besides, whoever gives the captions."""
        stem = name.rpartition(".")[0]
        rows = self._described.get(name, [])
        meta: dict[str, Any] = {}
        for roles, row in rows:
            meta |= roles.about(row)
        beside = next((stem + s for s in CAPTION_SUFFIXES if stem + s in self._files), "")
        if beside:
            text = decode_caption(storage.read(storage.join(self.config.path, beside)))
            return clean_captions(re.split("\r\n?|\n", text)), meta
        if rows:
            total: dict[str, float] = {}
            for caption, weight in (item for roles, row in rows for item in roles.weighted(row).items()):
                total[caption] = total.get(caption, 0.0) + weight
            captions = clean_captions(total)
            if any(roles.caption_weights for roles, _ in rows):
                meta["weights"] = [total[c] for c in captions]
            return captions, meta
        if self.config.caption_from_name:
            return clean_captions([re.sub("[-_]+", " ", stem.rpartition("/")[2])]), meta
        if self.config.caption or class_tokens:
            return clean_captions([self.config.caption or class_tokens]), meta
        raise Rejected("no caption")


def _without(files: list[storage.FileInfo], config: FolderConfig) -> list[storage.FileInfo]:
    """The files but those in the folders of conditions and masks."""
    others = [folder for folder in (config.conditions, config.masks) if folder not in ("", ALPHA)]
    inside = tuple(name for folder in others if (name := storage.within(folder, config.path)))
    return [file for file in files if not inside or not file.name.startswith(inside)]


def _shown(name: str) -> str:
    """A file's name as text: what is not UTF-8 in it becomes a question mark in a box."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def _is_kohya(path: str, pictures: Iterable[str]) -> bool:
    """Whether all pictures lie in folders N_name. ValueError when some do: a guess would be wrong for the others."""
    tops = {name.partition("/")[0] if "/" in name else "." for name in pictures}
    named = {top for top in tops if _REPEATS.fullmatch(top)}
    if named and named != tops:
        raise ValueError(
            f"source folder {path!r}: {min(named)!r} looks like kohya's N_name (N repeats), {min(tops - named)!r} does "
            "not; say layout=kohya to use only the first kind, or layout=plain to use all without repeats"
        )
    return bool(named)


Described = dict[str, list[tuple[Roles, dict[str, Any]]]]


def _read_metadata(config: FolderConfig, files: Iterable[str]) -> Described:
    """Picture -> its rows in the metadata table of the nearest folder. ValueError names the table and the row."""
    tables = sorted((f for f in files if _METADATA.fullmatch(f)), key=lambda f: (f.count("/"), f))
    found: Described = {}
    for table in tables:  # nearer to the picture comes later, and wins
        folder = table.rpartition("/")[0]
        here: Described = {}
        rows = open_table(storage.join(config.path, table))
        known: dict[tuple[str, ...], Roles] = {}  # rows of JSON lines may differ in their names
        for number in range(len(rows)):
            problem, row = "", {}
            try:
                row = rows[number]
            except Rejected as rejected:
                problem = f" ({rejected})"
            if (names := tuple(row)) not in known:
                known[names] = choose(config, names, table)
            roles = known[names]
            file = row.get(roles.path)
            if not isinstance(file, str) or not file or not roles.captions:
                where = f"{storage.join(config.path, table)}, {rows.place(number)}"
                raise ValueError(f"{where}: needs file_name and text (or caption){problem}")
            name = "/".join(part for part in f"{folder}/{file}".split("/") if part not in ("", "."))
            here.setdefault(name, []).append((roles, row))
        found |= here
    return found

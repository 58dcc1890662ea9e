"""What a shard folder holds, counted: outcomes, sizes, shapes, captions, words, duplicates, and some pictures."""

import base64
import io
import json
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline import storage
from data_pipeline.copying import read_member
from data_pipeline.images import to_rgb
from data_pipeline.ledger import Ledger, index_names, read_ledgers
from data_pipeline.report import Report
from data_pipeline.shards import Info, read_index
from data_pipeline.storage import StrPath, join

PICTURES = 48  # thumbnails of each sort, at most
THUMBNAIL_PX = 160
_THUMBNAIL_BYTES = 24_000  # of a thumbnail in a ledger, base64; ours are smaller
_CAPTIONS = 200_000  # samples whose captions are read, spread evenly over the folder
_WORDS = 40
_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMON = (
    "an",
    "the",
    "of",
    "in",
    "on",
    "with",
    "and",
    "to",
    "is",
    "are",
    "at",
    "for",
    "by",
    "as",
    "it",
    "its",
    "from",
)

SIDES = (64, 128, 256, 512, 768, 1024, 1536, 2048)  # px of the shorter side
LENGTHS = (1, 2, 3, 5, 9, 17, 33, 65)  # words of a caption
SHAPES = {"1:3": 1 / 3, "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0} | {
    "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, "3:1": 3.0
}  # fmt: skip
Bars = dict[str, int]


@dataclass
class Picture:
    """One to show: a JPEG in base64 ("" where there is none), its key or name, and a text below it."""

    jpeg: str
    name: str
    text: str


@dataclass
class Survey:
    """Counts over a folder. `aspects`: nearest of SHAPES by ratio. repeated: samples whose bytes an earlier one has;
    alike: whose perceptual hash an earlier one has. captions_read: of how many samples words are counted."""

    info: Info
    report: Report
    sides: Bars = field(default_factory=dict)
    aspects: Bars = field(default_factory=dict)
    lengths: Bars = field(default_factory=dict)
    captions_each: Bars = field(default_factory=dict)
    words: Bars = field(default_factory=dict)
    captions_read: int = 0
    repeated: int = 0
    alike: int = 0
    kept: list[Picture] = field(default_factory=list)
    rejected: list[Picture] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The build's report and these counts, without the pictures."""
        names = ("sides", "aspects", "lengths", "captions_each", "words", "captions_read", "repeated", "alike")
        info = {k: v for k, v in asdict(self.info).items() if k not in ("shards", "empty")}
        return {**self.report.to_json(), **info, **{name: getattr(self, name) for name in names}}


def survey(folder: StrPath, pictures: int = PICTURES) -> Survey:
    """Count what a complete folder holds. Raises ValueError when it is not one; RuntimeError naming what is damaged."""
    info = read_index(folder)
    found = Survey(info, Report(bytes=info.bytes))
    sides: Counter[int] = Counter()
    aspects: Counter[str] = Counter()
    contents, hashes = array("Q"), array("Q")
    for _, ledger in read_ledgers(folder, index_names(folder, info)):
        found.report.add(Report.of(ledger.samples, ledger.rejected))
        for sample in ledger.samples:
            width, height = sample.get("original", sample.get("size", (0, 0)))
            if width:
                sides[bisect_right(SIDES, min(width, height))] += 1
                aspects[_nearest_shape(width / height)] += 1
            contents.extend(int(digits[:16], 16) for digits in (sample.get("content"),) if digits)
            hashes.extend(int(digits, 16) for digits in (sample.get("phash"),) if digits)
        found.rejected += rejected_pictures(ledger, pictures - len(found.rejected))
    found.repeated, found.alike = _repeats(contents), _repeats(hashes)
    found.sides = {_between(SIDES, i): sides[i] for i in range(len(SIDES) + 1) if sides[i]}
    found.aspects = {shape: aspects[shape] for shape in SHAPES if aspects[shape]}
    _count_captions(found, folder)
    found.kept = list(kept_pictures(folder, info, pictures))
    return found


def kept_pictures(folder: StrPath, info: Info, count: int) -> Iterator[Picture]:
    """`count` delivered pictures spread evenly over the folder, as small JPEGs with their main captions."""
    for tar, file, sample in _spread(folder, info, count):
        captions = json.loads(read_member(file, tar, sample, "json"))["captions"]
        data = read_member(file, tar, sample, info.image_format)
        yield Picture(_small_jpeg(data), sample["key"], captions[0])


def _spread(folder: StrPath, info: Info, count: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(tar, its open file, sample) for `count` samples at even distances, or all where there are fewer."""
    step = max(1.0, info.samples / max(count, 1))
    position = 0
    chosen = iter(range(min(count, info.samples)))
    wanted = next(chosen, None)
    for name, ledger in read_ledgers(folder, index_names(folder, info)):
        tar = join(folder, f"{name}.tar")
        file = None
        try:
            for sample in ledger.samples:
                if wanted is not None and position == int(wanted * step):
                    file = file or storage.open_read(tar)
                    yield tar, file, sample
                    wanted = next(chosen, None)
                position += 1
        finally:
            if file is not None:
                file.close()


def _count_captions(found: Survey, folder: StrPath) -> None:
    lengths: Counter[int] = Counter()
    each: Counter[int] = Counter()
    words: Counter[str] = Counter()
    for tar, file, sample in _spread(folder, found.info, _CAPTIONS):
        captions = json.loads(read_member(file, tar, sample, "json"))["captions"]
        found.captions_read += 1
        each[len(captions)] += 1
        lengths[bisect_right(LENGTHS, len(captions[0].split()))] += 1
        words.update(w for w in _WORD.findall(captions[0].lower()) if w not in _COMMON)
    found.lengths = {_between(LENGTHS, i): lengths[i] for i in range(len(LENGTHS) + 1) if lengths[i]}
    found.captions_each = {str(n): count for n, count in sorted(each.items())}
    found.words = dict(words.most_common(_WORDS))


def rejected_pictures(ledger: Ledger, limit: int) -> list[Picture]:
    """Pictures that filters turned away, as far as the ledger keeps them; at most `limit`."""
    small = (row for row in ledger.rejected if 0 < len(row.get("thumbnail", "")) <= _THUMBNAIL_BYTES)
    return [Picture(r["thumbnail"], r["name"], f"{r['reason']}: {r['detail']}") for r in islice(small, max(limit, 0))]


def _small_jpeg(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
        image = to_rgb(opened)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def _repeats(values: "array[int]") -> int:
    """How many of these 8-byte numbers are there before."""
    return len(values) - len(np.unique(np.frombuffer(values, np.uint64))) if values else 0


def _nearest_shape(ratio: float) -> str:
    return min(SHAPES, key=lambda shape: max(ratio / SHAPES[shape], SHAPES[shape] / ratio))


def _between(edges: tuple[int, ...], bin_number: int) -> str:
    """The name of a bin between whole numbers: "< 64", "64-127", ..., "2048 +"."""
    if bin_number == 0:
        return f"< {edges[0]}"
    low = edges[bin_number - 1]
    if bin_number == len(edges):
        return f"{low} +"
    high = edges[bin_number] - 1
    return str(low) if low == high else f"{low}-{high}"

"""A source -> a shard folder: restartable, the same bytes for any executor and number of workers."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from PIL import Image

from data_pipeline import executors, shards, storage
from data_pipeline.assembly import Progress, assemble
from data_pipeline.buckets import Shape
from data_pipeline.captions import clean_captions, clean_weights
from data_pipeline.duplicates import perceptual_hash
from data_pipeline.filters import FilterConfig, Similarity, check
from data_pipeline.images import encode_image
from data_pipeline.ledger import Ledger, newest_names, removed_row, shard_name, write_ledger
from data_pipeline.remove import read_removals
from data_pipeline.report import Report
from data_pipeline.resize import centre_square, resize, resize_crop, resize_mask
from data_pipeline.sources import Rejected, Sample, Source
from data_pipeline.storage import StrPath, join

IMAGE_FORMATS = ("png", "jpg", "webp")
THUMBNAILS = 2  # of the pictures that filters turned away: so many for each reason in each shard
_THUMBNAIL_PX = 96
_KEY = re.compile(r"[0-9a-z_-]{1,80}")
_LONGEST_PX = {"webp": 16_383, "jpg": 65_500}  # the longest side that the encoders take; png has no limit to speak of
_LONGEST_TEXT = 8192  # characters of a name or detail in a ledger


@dataclass(frozen=True)
class BuildConfig:
    """size: pictures become size x size pixels; None keeps them, but for those of more than max_area pixels: they are
    made smaller.

    workers: processes, or CPUs of a local Ray; executor: serial, processes, ray, or None: processes if workers > 0.
    image_format: png (lossless), jpg or webp; quality (1-100) counts for jpg and webp.
    """

    size: int | None = None
    workers: int = 0
    samples_per_shard: int = 500
    image_format: str = "png"
    quality: int = 95
    executor: str | None = None
    filters: FilterConfig = field(default_factory=FilterConfig)
    max_area: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= 8192:
            raise ValueError(f"size={self.size}: allowed are 1 to 8192 pixels, or none to keep the original size")
        if self.max_area is not None and (self.size is not None or self.max_area < 1):
            raise ValueError(f"max_area={self.max_area}: allowed are 1 and more, for pictures that keep their shape")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: allowed are 0 (work in this process) and more")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={self.samples_per_shard}: a shard holds at least 1 sample")
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format={self.image_format!r}: allowed are {', '.join(IMAGE_FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: allowed are 1 to 100")
        if self.executor not in (None, *executors.EXECUTORS):
            raise ValueError(f"executor={self.executor!r}: allowed are {', '.join(executors.EXECUTORS)}")

    def stored_size(self, size: Shape) -> Shape:
        """(width, height) at which a picture of this size is stored."""
        if self.size is not None:
            return self.size, self.size
        scale = math.sqrt((self.max_area or math.inf) / (size[0] * size[1]))
        return size if scale >= 1 else (max(1, int(scale * size[0])), max(1, int(scale * size[1])))


def build(
    source: Source,
    settings: BuildConfig,
    out: StrPath,
    progress: Progress | None = None,
    part: tuple[int, int] = (1, 1),
    similarity: Similarity | None = None,
) -> Report | None:
    """Write every sample of `source` into the shard folder `out`; `progress(done, total)` counts samples.

    similarity: of picture and captions, for `filters.min_similarity`; picklable, with a `fingerprint` of its model.
    Started again after a kill it keeps the shards that are complete. part (i, n): make only every n-th shard, from
    the i-th on; None is returned until the other parts are there, too (see assemble). Raises ValueError when `out`
    holds anything else, when keys repeat, when not one sample is usable; RuntimeError when a worker process dies
    twice over one shard.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: allowed are 1/N to N/N")
    executor = settings.executor or ("processes" if settings.workers else "serial")
    if storage.is_remote(out) and str(out).startswith("memory://") and executor != "serial":
        raise ValueError(f"{out} is in the memory of one process; use workers=0")
    names = newest_names(out) if storage.is_folder(out) else {}
    rewritten = {number: name for number, name in names.items() if name != shard_name(number)}
    job = ShardJob(source, settings, str(out), read_removals(out), rewritten, similarity)

    def run(numbers: list[int]) -> Iterator[int]:
        return executors.run(job, numbers, executor, settings.workers)

    def samples(done: int, count: int) -> None:
        total = min(count * settings.samples_per_shard, len(source))
        if progress:
            progress(min(done * settings.samples_per_shard, total), total)

    plan = plan_of(source, settings)
    if similarity is not None:
        plan["similarity"] = getattr(similarity, "fingerprint", "")
    return assemble(out, plan, run, part, samples)


@dataclass(frozen=True)
class ShardJob:
    """One part of a source -> one shard: a function of the shard's number that any process can call.

    removed: keys that were taken out since, with (reason, detail); a shard made again leaves them out.
    names: of shards that were written anew since, under the name of a later generation.
    """

    source: Source
    settings: BuildConfig
    out: str
    removed: dict[str, tuple[str, str]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    similarity: Similarity | None = None

    def __call__(self, number: int) -> None:
        """Make shard `number` and the index beside it, from its range of the source only."""
        first = number * self.settings.samples_per_shard
        rows = range(first, min(first + self.settings.samples_per_shard, len(self.source)))
        rejected: list[dict[str, Any]] = []
        name = self.names.get(number, shard_name(number))
        tar = shards.write_tar(join(self.out, f"{name}.tar"), self._entries(rows, rejected))
        write_ledger(self.out, name, Ledger(rows.start, rows.stop, tar.bytes, tar.sha256, tar.samples, rejected))

    def _entries(self, rows: range, rejected: list[dict[str, Any]]) -> Iterator[shards.Entry]:
        shown: Counter[str] = Counter()
        for row in rows:
            sample = None
            try:
                sample = self._sample(row)
                if sample.key in self.removed:
                    reason, detail = self.removed[sample.key]
                    rejected.append(removed_row(row, self._name(row, sample.key), sample.key, reason, detail))
                    continue
                check(sample, self.settings.filters, self.similarity)
                self._check_side(sample.image)
                check_shapes(sample)
            except Rejected as error:
                entry = {
                    "row": row,
                    "name": self._name(row, f"row {row}"),
                    "reason": error.reason,
                    "detail": _text(error.detail),
                }
                if sample is not None:
                    entry.update(identity(sample))
                    shown[error.reason] += 1
                    if shown[error.reason] <= THUMBNAILS:
                        entry["thumbnail"] = thumbnail(sample.image)
                rejected.append(entry)
                continue
            yield self._entry(row, sample)

    def _sample(self, row: int) -> Sample:
        sample = self.source[row]
        if not _KEY.fullmatch(sample.key):
            raise ValueError(f"key {sample.key!r}: allowed are 1 to 80 of 0-9 a-z _ -")
        if "captions" in sample.meta:
            raise ValueError(f"sample {sample.key}: the name 'captions' in its meta is taken")
        captions, meta = clean_captions(sample.captions), sample.meta
        if "weights" in meta:
            meta = {**meta, "weights": clean_weights(sample.captions, meta["weights"])}
        return replace(sample, captions=captions, meta=meta)

    def _name(self, row: int, otherwise: str) -> str:
        """The row's own name; a source that draws its pictures may have none."""
        name = getattr(self.source, "name", None)
        return _text(str(name(row))) if name else otherwise

    def _check_side(self, image: Image.Image) -> None:
        """Raises Rejected for a picture that is kept at its size and longer than its format can hold."""
        longest = max(self.settings.stored_size(image.size))
        limit = _LONGEST_PX.get(self.settings.image_format)
        if self.settings.size is None and limit and longest > limit:
            raise Rejected("too long for its format", f"{longest} px, {self.settings.image_format} holds {limit}")

    def _entry(self, row: int, sample: Sample) -> shards.Entry:
        settings = self.settings
        image = self._resized(sample.image, settings.stored_size(sample.image.size))
        encoded = encode_image(image, settings.image_format, settings.quality)
        members = {
            settings.image_format: encoded,
            **self._beside(sample, image.size),
            "txt": sample.captions[0].encode(),
            "json": shards.to_json({"captions": sample.captions, **sample.meta}),
        }
        about = {
            "row": row,
            "size": list(image.size),
            "captions": len(sample.captions),
            "words": len(sample.captions[0].split()),
            "phash": perceptual_hash(image),
            **identity(sample),
        }
        # A source that draws its pictures has no bytes of its own to hash: the stored ones stand for them.
        about.setdefault("content", shards.sha256(encoded))
        if sample.image.size != image.size:
            about["original"] = list(sample.image.size)
        if (name := self._name(row, sample.key)) != sample.key:
            about["name"] = name
        return shards.Entry(sample.key, members, about)

    def _beside(self, sample: Sample, size: Shape) -> dict[str, bytes]:
        """The paired picture and the mask of a sample, cut and sized as its picture is."""
        members = {}
        if sample.condition is not None:
            members[shards.CONDITION] = encode_image(self._resized(sample.condition, size), "png", 100)
        if sample.mask is not None:
            box = None if self.settings.size is None else centre_square(sample.mask.size)
            members[shards.MASK] = encode_image(resize_mask(sample.mask, size, box), "png", 100)
        return members

    def _resized(self, image: Image.Image, size: Shape) -> Image.Image:
        if self.settings.size is not None:
            return resize_crop(image, self.settings.size)
        return image if image.size == size else resize(image, size)


def check_shapes(sample: Sample) -> None:
    """Raises Rejected when the paired picture or the mask is not the picture at some scale, rounded to whole pixels."""
    width, height = sample.image.size
    for kind, beside in (("condition", sample.condition), ("mask", sample.mask)):
        if beside is not None and abs(beside.width * height - beside.height * width) > max(width, height):
            raise Rejected(f"{kind} of another shape", f"{beside.width} x {beside.height} for {width} x {height}")


def _text(text: str) -> str:
    """What a ledger can hold of a text: valid UTF-8, and no more than 8192 characters."""
    return text.encode("utf-8", "replace").decode()[:_LONGEST_TEXT]


def identity(sample: Sample) -> dict[str, Any]:
    """What a removal request can name a picture by: its key, and its URL and content hash where they are known."""
    known = {"key": sample.key, "content": sample.meta.get("sha256"), "url": sample.meta.get("url")}
    return {name: value for name, value in known.items() if value}


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of the picture, base64."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return base64.b64encode(encode_image(small, "jpg", 75)).decode()


def plan_of(source: Source, settings: BuildConfig) -> dict[str, Any]:
    """What decides the bytes of the shards, which executor and workers do not; and how many shards there are."""
    made_with = {k: v for k, v in asdict(settings).items() if k not in ("workers", "executor")}
    plan = {
        **made_with,
        "source": _describe(source),
        "samples": len(source),
        "shards": -(-len(source) // settings.samples_per_shard),
        "version": shards.VERSION,
        "content": getattr(source, "fingerprint", ""),
    }
    as_read: dict[str, Any] = json.loads(shards.to_json(plan))  # lists instead of tuples
    return as_read


def _describe(source: Source) -> dict[str, Any]:
    config = getattr(source, "config", None)
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {"kind": type(source).__name__, "settings": settings}

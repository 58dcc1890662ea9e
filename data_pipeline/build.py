"""A source -> a shard folder: restartable, the same bytes for any number of worker processes."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, is_dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_pipeline import shards
from data_pipeline.captions import clean_captions
from data_pipeline.images import encode_image, resize_crop
from data_pipeline.report import Report
from data_pipeline.sources import Rejected, Sample, Source

log = logging.getLogger(__name__)

IMAGE_FORMATS = ("png", "jpg", "webp")
PLAN = "build.json"
REPORT = "report.json"
_KEY = re.compile(r"[0-9a-z_-]{1,80}")


@dataclass(frozen=True)
class BuildConfig:
    """size: pictures become size x size pixels; None keeps them. workers: processes; 0 works in this one.

    image_format: png (lossless), jpg or webp; quality (1-100) counts for jpg and webp.
    """

    size: int | None = None
    workers: int = 0
    samples_per_shard: int = 500
    image_format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= 8192:
            raise ValueError(f"size={self.size}: allowed are 1 to 8192 pixels, or none to keep the original size")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: allowed are 0 (work in this process) and more")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={self.samples_per_shard}: a shard holds at least 1 sample")
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format={self.image_format!r}: allowed are {', '.join(IMAGE_FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: allowed are 1 to 100")


def build(
    source: Source,
    settings: BuildConfig,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write every sample of `source` into the shard folder `out`; `progress(done, total)` counts samples.

    Started again after a kill it keeps the shards that are complete. Raises ValueError when `out` holds
    anything else, when keys repeat, when not one sample is usable; RuntimeError when a worker process dies.
    """
    began = time.monotonic()
    total = len(source)
    _claim(out, _plan(source, settings))
    numbers = range(-(-total // settings.samples_per_shard))
    kept = {n for n in numbers if _is_complete(out, n)}
    report = Report(kept_shards=len(kept))
    done = sum(_samples_of(n, settings, total) for n in kept)
    if progress:
        progress(done, total)
    for number in _make_shards(source, settings, out, [n for n in numbers if n not in kept]):
        done += _samples_of(number, settings, total)
        if progress:
            progress(done, total)
    infos = _collect(out, len(numbers), report)
    report.seconds = time.monotonic() - began
    shards.write_atomically(out / REPORT, shards.to_json(report.to_json()))
    if report.delivered == 0:
        raise ValueError(f"not one of {total} samples is usable ({report.reasons})")
    size, image_format = settings.size, settings.image_format
    info = shards.Info(report.delivered, report.bytes, size, image_format, _describe(source), tuple(infos))
    shards.write_index(out, info)
    log.info("%s: %d samples; rejected: %s", out, report.delivered, report.reasons)
    return report


def make_shard(source: Source, settings: BuildConfig, out: Path, number: int) -> int:
    """Make shard `number` and the index beside it, from its range of the source only. Returns `number`."""
    first = number * settings.samples_per_shard
    indices = range(first, min(first + settings.samples_per_shard, len(source)))
    report = Report()
    tar = out / f"{number:05d}.tar"
    samples = shards.write_tar(tar, _entries(source, settings, indices, report))
    report.bytes = tar.stat().st_size if samples else 0
    digest = shards.file_sha256(tar) if samples else ""
    index = {"sha256": digest, "bytes": report.bytes, "samples": samples, "report": report.to_json()}
    shards.write_atomically(tar.with_suffix(".json"), shards.seal(index))
    return number


def _entries(source: Source, settings: BuildConfig, indices: range, report: Report) -> Iterator[shards.Entry]:
    for index in indices:
        try:
            sample = source[index]
            captions = clean_captions(sample.captions)
        except Rejected as rejected:
            report.reject(rejected.reason, rejected.detail or f"sample {index}")
            continue
        report.accept(captions, sample.image.size)
        yield shards.Entry(sample.key, _members(sample, captions, settings))


def _members(sample: Sample, captions: tuple[str, ...], settings: BuildConfig) -> dict[str, bytes]:
    if not _KEY.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r}: allowed are 1 to 80 of 0-9 a-z _ -")
    if "captions" in sample.meta:
        raise ValueError(f"sample {sample.key}: the name 'captions' in its meta is taken")
    image = sample.image if settings.size is None else resize_crop(sample.image, settings.size)
    return {
        settings.image_format: encode_image(image, settings.image_format, settings.quality),
        "txt": captions[0].encode(),
        "json": shards.to_json({"captions": captions, **sample.meta}),
    }


def _make_shards(source: Source, settings: BuildConfig, out: Path, numbers: list[int]) -> Iterator[int]:
    """Make the shards of these numbers; yields each number when it is done, in any order."""
    if settings.workers == 0 or not numbers:
        for number in numbers:
            yield make_shard(source, settings, out, number)
        return
    workers = min(settings.workers, len(numbers))
    # spawn: this process may have threads (torch, a progress bar), and a fork would copy their locks
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source, settings, out))
    try:
        for future in as_completed([pool.submit(_work, number) for number in numbers]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died (out of memory?); finished shards are kept: "
            f"run the same command again, with fewer than {workers} workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: tuple[Source, BuildConfig, Path]  # set in worker processes only: the source travels once, not once a shard


def _start_worker(source: Source, settings: BuildConfig, out: Path) -> None:
    global _job
    _job = (source, settings, out)


def _work(number: int) -> int:
    return make_shard(*_job, number)


def _samples_of(number: int, settings: BuildConfig, total: int) -> int:
    return min(settings.samples_per_shard, total - number * settings.samples_per_shard)


def _describe(source: Source) -> dict[str, Any]:
    config = getattr(source, "config", None)
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {"kind": type(source).__name__, "settings": settings}


def _plan(source: Source, settings: BuildConfig) -> dict[str, Any]:
    """What decides the bytes of the shards; the number of workers does not."""
    made_with = {k: v for k, v in asdict(settings).items() if k != "workers"}
    plan = {
        **made_with,
        "source": _describe(source),
        "samples": len(source),
        "version": shards.VERSION,
        "content": getattr(source, "fingerprint", ""),
    }
    as_read: dict[str, Any] = json.loads(shards.to_json(plan))  # lists instead of tuples
    return as_read


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` the folder of this plan, or raise ValueError: it is someone else's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    path = out / PLAN
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty and no build started there; choose another folder")
        shards.write_atomically(path, shards.seal(plan))
        return
    found = shards.unseal(path)
    for name in sorted((plan.keys() | found.keys()) - {"content"}):
        if plan.get(name) != found.get(name):
            raise ValueError(
                f"{out} holds a different build ({name}: {found.get(name)} there, {plan.get(name)} asked); "
                "choose another folder, or delete that one"
            )
    if plan["content"] != found.get("content"):
        raise ValueError(f"the source changed since the build in {out} began; delete that folder, or choose another")


def _is_complete(out: Path, number: int) -> bool:
    """Whether the shard is there, whole and unchanged; reads all of it."""
    tar = out / f"{number:05d}.tar"
    try:
        index = shards.unseal(tar.with_suffix(".json"))
        return not index["samples"] or shards.file_sha256(tar) == index["sha256"]
    except (OSError, ValueError):
        return False


def _collect(out: Path, count: int, report: Report) -> list[shards.ShardInfo]:
    """Add up the shards' reports and list the non-empty shards. Raises ValueError when a key repeats."""
    infos = []
    seen: dict[str, str] = {}
    for number in range(count):
        name = f"{number:05d}"
        index = shards.unseal(out / f"{name}.json")
        report.add(Report.from_json(index["report"]))
        for sample in index["samples"]:
            key = sample["key"]
            if key in seen:
                raise ValueError(f"duplicate key {key!r} in {seen[key]}.tar and {name}.tar: keys must be unique")
            seen[key] = name
        if index["samples"]:
            infos.append(
                shards.ShardInfo(
                    file=f"{name}.tar",
                    samples=len(index["samples"]),
                    bytes=index["bytes"],
                    sha256=index["sha256"],
                    index=f"{name}.json",
                    index_sha256=shards.file_sha256(out / f"{name}.json"),
                )
            )
    return infos

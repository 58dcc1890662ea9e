"""Is this data fit to train on, with so many processes and so large a batch? Questions asked before it costs hours."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline.reader import ShardReader
from data_pipeline.storage import StrPath
from data_pipeline.survey import Survey, survey

OK, WARNING, ERROR = "ok", "warning", "error"
_PICTURES = 64  # that are decoded
_CAPTIONS = 2000  # that are split into tokens
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Finding:
    """level: ok, warning or error."""

    level: str
    text: str


@dataclass(frozen=True)
class Training:
    """What the data is wanted for. batch: samples of one step over all ranks; workers: of each rank.

    samples_per_second: over all ranks, if known; max_tokens: what the text encoder takes, start and end included.
    """

    ranks: int = 1
    workers: int = 0
    batch: int = 1
    samples_per_second: float | None = None
    max_tokens: int = 77

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.workers < 0 or self.batch < 1 or self.max_tokens < 3:
            raise ValueError(
                f"ranks={self.ranks}, workers={self.workers}, batch={self.batch}, max_tokens={self.max_tokens}: "
                "allowed are ranks and batch from 1, workers from 0, max_tokens from 3"
            )
        if self.samples_per_second is not None and not self.samples_per_second > 0:
            raise ValueError(f"samples_per_second={self.samples_per_second}: allowed is more than 0")


def examine(folder: StrPath, training: Training, tokens: Callable[[str], int] | None = None) -> list[Finding]:
    """What is well and what is not, in order; `tokens` counts those of a caption, start and end included."""
    try:
        dataset = ShardReader(folder)
        found = survey(folder, pictures=0)
        step = max(1, len(dataset) // max(_PICTURES, _CAPTIONS))
        rows = range(0, len(dataset), step)[:_CAPTIONS]
        captions = {sample.key: sample.captions for sample in map(dataset.__getitem__, rows)}
        shown = rows[:: max(1, len(rows) // _PICTURES)][:_PICTURES]
        pictures = _pictures(dataset, shown, found.info.size, found.info.image_format)
    except (ValueError, RuntimeError, OSError) as error:
        return [Finding(ERROR, str(error))]
    return [
        *_sharing(found, training),
        *_cost(found, training),
        *pictures,
        *_captions(captions, training, tokens),
        *_rows(found),
    ]


def _sharing(found: Survey, training: Training) -> list[Finding]:
    """Samples and shards against ranks, workers and batch."""
    info, ranks, batch = found.info, training.ranks, training.batch
    findings = []
    if batch % ranks:
        findings.append(
            Finding(ERROR, f"a batch of {batch} cannot be shared by {ranks} ranks: use a multiple of {ranks}")
        )
    if info.samples < batch:
        findings.append(Finding(ERROR, f"{info.samples} samples are fewer than one batch of {batch}"))
    elif info.samples < 10 * batch:
        few = f"{info.samples} samples are {info.samples / batch:.1f} batches of {batch}: each is seen very often"
        findings.append(Finding(WARNING, few))
    else:
        findings.append(Finding(OK, f"{info.samples:,} samples are {info.samples / batch:,.0f} batches of {batch}"))
    readers = ranks * max(training.workers, 1)
    if len(info.shards) < readers:
        text = f"{len(info.shards)} shards for {readers} readers: well here, where samples are shared out; "
        findings.append(Finding(WARNING, text + "webdataset shares out whole shards and would leave readers empty"))
    else:
        findings.append(Finding(OK, f"{len(info.shards)} shards for {ranks} ranks x {training.workers} workers"))
    return findings


def _cost(found: Survey, training: Training) -> list[Finding]:
    """Disk, and time of an epoch."""
    info = found.info
    disk = f"{info.bytes / 1e9:.3f} GB on disk, {info.bytes / info.samples / 1e3:.1f} kB a sample"
    if training.samples_per_second is None:
        return [Finding(OK, disk)]
    seconds = info.samples / training.samples_per_second
    rate = info.bytes / info.samples * training.samples_per_second / 1e6
    return [Finding(OK, f"{disk}; an epoch takes {_duration(seconds)} and reads {rate:.1f} MB/s")]


def _pictures(dataset: ShardReader, rows: range, size: int | None, image_format: str) -> list[Finding]:
    """Mode, size and range of values, as a model would get them."""
    findings, low, high, blank = [], 255, 0, 0
    for sample in map(dataset.__getitem__, rows):
        try:
            with Image.open(io.BytesIO(sample.image_bytes), formats=_FORMATS) as opened:
                mode, pixels = opened.mode, np.asarray(opened.convert("RGB"))
        except Exception as error:
            findings.append(Finding(ERROR, f"{sample.key}: its {image_format} cannot be decoded: {error}"))
            continue
        if mode != "RGB":
            findings.append(Finding(ERROR, f"{sample.key}: a picture of mode {mode}; stored ones are RGB"))
        if size is not None and pixels.shape[:2] != (size, size):
            text = f"{sample.key}: {pixels.shape[1]} x {pixels.shape[0]} px; the index says {size} x {size}"
            findings.append(Finding(ERROR, text))
        low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
        blank += pixels.min() == pixels.max()
    if findings:
        return findings
    scaled = f"{low / 127.5 - 1:.2f} to {high / 127.5 - 1:.2f}"
    span = f"values of {len(rows)} pictures from {low} to {high}, that is {scaled} for the model"
    findings.append(Finding(OK if high - low >= 128 else WARNING, f"{span}; -1 to 1 is usual"))
    if blank:
        level = ERROR if blank == len(rows) else WARNING
        findings.append(Finding(level, f"{blank} of {len(rows)} pictures are one flat colour"))
    return findings


def _captions(
    captions: dict[str, tuple[str, ...]], training: Training, tokens: Callable[[str], int] | None
) -> list[Finding]:
    """Missing, too long, always the same. captions: of each sample, by its key."""
    findings = []
    missing = [key for key, several in captions.items() if not several or not all(c.strip() for c in several)]
    firsts = [several[0] for several in captions.values() if several]
    if missing:
        text = f"{len(missing)} of {len(captions)} samples have an empty caption, such as {missing[0]}"
        findings.append(Finding(ERROR, text))
    if tokens is not None:
        lengths = [tokens(caption) for caption in firsts]
        long = sum(n > training.max_tokens for n in lengths)
        text = f"captions have {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.0f} on average"
        if long:
            text += f"; of {long / len(lengths):.1%} the model sees only the first {training.max_tokens}"
        findings.append(Finding(WARNING if long > 0.05 * len(lengths) else OK, text))
    (caption, times), *_ = Counter(firsts).most_common(1) or [("", 0)]
    if len(captions) > 1 and times > len(captions) / 2:
        text = f"{times} of {len(captions)} samples have the same caption: {caption[:60]!r}"
        findings.append(Finding(WARNING, text))
    return findings


def _rows(found: Survey) -> list[Finding]:
    """Duplicates, and how much was turned away."""
    info, report = found.info, found.report
    share = found.repeated / info.samples
    text = f"{found.repeated:,} samples ({share:.1%}) repeat another's bytes, {found.alike:,} look like another"
    findings = [Finding(WARNING if share > 0.01 else OK, text)]
    rows = report.delivered + report.rejected_count
    turned_away = report.rejected_count / rows
    text = f"{report.rejected_count:,} of {rows:,} rows ({turned_away:.1%}) were turned away"
    reason = f"; most often: {report.reasons.partition(':')[0]}" if report.rejected_count else ""
    return [*findings, Finding(WARNING if turned_away > 0.5 else OK, text + reason)]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

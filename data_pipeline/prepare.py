"""A folder of pictures as it is -> shards to fine-tune on, made once and found again while nothing changes.

    OUT/4f0c.../train-1, train-10     shard folders, one for each number of repeats (kohya's folders N_name)
    OUT/4f0c.../validation            the pictures held out
    OUT/4f0c.../prepared.json         written last: what is there

The first part of the name is a hash of the pictures' names, sizes and times and of the settings: when any changes,
another folder is made beside it, and a run that still reads the old one is not disturbed.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipeline import shards, storage
from data_pipeline.build import BuildConfig, build, check_shapes
from data_pipeline.durable import write_atomically
from data_pipeline.reader import ShardReader
from data_pipeline.shards import INDEX
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.partners import ALPHA

VERSION = 1
PREPARED = "prepared.json"
FEWEST_TO_HOLD_OUT = 5  # of fewer pictures none can be spared
_HELD_OUT_SHARE, _HELD_OUT_MOST = 10, 64
_AREA = 4  # times size^2: what is cut from a picture stored so large loses no visible sharpness


@dataclass(frozen=True)
class PrepareConfig:
    """size: pixels a side that are trained on. keep_shape: store whole pictures, for buckets and several crops; else
    their centred squares. caption: of all pictures that have none of their own.

    conditions: a folder of paired pictures under the same names; masks: likewise, or "alpha" (see FolderConfig).
    holdout: pictures kept for validation: how many (1 and more), or what share (less than 1); None: a tenth, at least
    1 and at most 64, but none of fewer than 5 pictures.
    image_format: png, or jpg or webp for a tenth of the space. workers: processes.
    """

    size: int = 512
    keep_shape: bool = False
    caption: str = ""
    conditions: str = ""
    masks: str = ""
    holdout: float | None = None
    image_format: str = "png"
    workers: int = 0

    @property
    def building(self) -> BuildConfig:
        """How the shards are built. Raises ValueError."""
        if self.size < 1:
            raise ValueError(f"size={self.size}: allowed are 1 pixel a side and more")
        return BuildConfig(
            size=None if self.keep_shape else self.size,
            max_area=_AREA * self.size**2 if self.keep_shape else None,
            image_format=self.image_format,
            workers=self.workers,
        )


@dataclass(frozen=True)
class Prepared:
    """folders: shards to train on; repeats: how often the samples of each come in an epoch; both for DataConfig.

    samples: of each folder. validation: the shards held out, "" for none. rejected: reason -> how many pictures.
    """

    folders: tuple[str, ...]
    repeats: tuple[float, ...]
    samples: tuple[int, ...]
    validation: str = ""
    rejected: dict[str, int] = field(default_factory=dict)

    def repeats_for(self, batch_size: int) -> tuple[float, ...]:
        """The repeats, all multiplied by the least whole number that makes an epoch hold one batch or more."""
        epoch = sum(Fraction(r) * n for r, n in zip(self.repeats, self.samples, strict=True))
        times = max(1, math.ceil(batch_size / epoch))
        return tuple(times * r for r in self.repeats)


def prepare_folder(
    pictures: str | Path, out: str | Path, config: PrepareConfig, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """The shards of a folder of pictures below `out`; at once when they are there, resumed when they were begun.

    A folder of shards stands for itself. Pictures in kohya's folders 0_name are left out. `progress(done, total)`
    counts pictures. Raises ValueError, before anything is written, when there are no pictures, none has a caption,
    `holdout` leaves nothing to train on, or not one picture is usable.
    """
    if Path(pictures, INDEX).is_file():
        return _finished(str(pictures), config)
    building = config.building
    if storage.within(out, pictures):
        raise ValueError(f"the shards must not go into the folder of pictures: {out} is in {pictures}")
    source = FolderSource(_described(pictures, config))
    if not any(source.has_caption(row) for row in range(len(source))):
        raise ValueError(
            f"none of the {len(source)} pictures in {pictures} has a caption: write NAME.txt beside each, "
            'or give one for all, such as caption="photo of sks dog"'
        )
    decisive = {
        "version": VERSION,
        "content": source.fingerprint,
        "source": asdict(source.config),
        "holdout": config.holdout,
        "building": {name: value for name, value in asdict(building).items() if name != "workers"},
    }
    folder = Path(out, shards.sha256(shards.to_json(decisive))[:16])
    with suppress(ValueError):
        return _read(folder)
    _build(source, config.holdout, building, folder, progress)
    return _read(folder)


def _described(pictures: str | Path, config: PrepareConfig) -> FolderConfig:
    """The folder as a source, by absolute paths: from wherever it is named, it is the same."""
    masks = config.masks if config.masks in ("", ALPHA) else os.path.abspath(config.masks)
    conditions = config.conditions and os.path.abspath(config.conditions)
    return FolderConfig(os.path.abspath(pictures), caption=config.caption, conditions=conditions, masks=masks)


def _read(folder: Path) -> Prepared:
    """What is in `folder`. Raises ValueError unless all of it is there."""
    found = shards.unseal(folder / PREPARED)
    folders = tuple(str(folder / part) for part in found["folders"])
    validation = str(folder / found["validation"]) if found["validation"] else ""
    for part in (*folders, validation) if validation else folders:
        ShardReader(part)
    return Prepared(folders, tuple(found["repeats"]), tuple(found["samples"]), validation, found["rejected"])


def _finished(folder: str, config: PrepareConfig) -> Prepared:
    """A shard folder as it is. Raises ValueError for settings that only say how one is made."""
    plain = PrepareConfig()
    for name in ("caption", "conditions", "masks", "holdout"):
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{folder} holds finished shards: {name}={getattr(config, name)!r} is for pictures only")
    return Prepared((folder,), (1.0,), (len(ShardReader(folder)),))


def _build(
    source: FolderSource,
    holdout: float | None,
    building: BuildConfig,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    times = {row: source.repeats(row) for row in range(len(source))}
    used = [row for row in times if times[row]]
    if not used:
        raise ValueError(f"all pictures in {source.config.path} lie in folders 0_name, of no repeats")
    held_out = _held_out(source, used, holdout)
    parts: dict[str, list[int]] = {}
    for row in used:
        parts.setdefault("validation" if row in held_out else f"train-{times[row]}", []).append(row)
    rejected = {"0 repeats": len(source) - len(used)} if len(used) < len(source) else {}
    done, samples = 0, dict[str, int]()
    for name, rows in parts.items():
        if reasons := _all_rejected(source, rows):
            for reason in reasons:
                rejected[reason] = rejected.get(reason, 0) + 1
            done += len(rows)
            continue

        def count(so_far: int, _: int, before: int = done) -> None:
            if progress:
                progress(before + so_far, len(used))

        report = build(Chosen(source, rows), building, folder / name, count)
        assert report is not None  # not built in parts
        samples[name] = report.delivered
        for reason, found in report.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + found.count
        done += len(rows)
    training = sorted(samples.keys() - {"validation"})
    if not training:
        listed = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        raise ValueError(f"not one of {len(source)} pictures in {source.config.path} is usable ({listed})")
    prepared: dict[str, Any] = {
        "folders": training,
        "repeats": [float(times[parts[name][0]]) for name in training],
        "samples": [samples[name] for name in training],
        "validation": "validation" if "validation" in samples else "",
        "rejected": rejected,
    }
    write_atomically(folder / PREPARED, shards.seal(prepared))


def _held_out(source: FolderSource, used: list[int], holdout: float | None) -> set[int]:
    """The rows kept for validation: the usable ones with the smallest hashes, so that most stay when others come.

    Pictures without a caption do not count, and a usable one is always left. Raises ValueError when `holdout` leaves
    nothing to train on, or is neither a count nor a share.
    """
    captioned = [row for row in used if source.has_caption(row)]
    rows = len(captioned)
    if holdout is None:
        wanted = 0 if rows < FEWEST_TO_HOLD_OUT else min(max(1, rows // _HELD_OUT_SHARE), _HELD_OUT_MOST)
    elif holdout < 0 or (holdout >= 1 and holdout != int(holdout)):
        raise ValueError(f"holdout={holdout}: allowed are a share below 1, or how many pictures")
    else:
        wanted = int(holdout) if holdout >= 1 or not holdout else max(1, round(holdout * rows))
    if wanted >= rows:
        raise ValueError(f"holdout={holdout} of {rows} pictures leaves none to train on")
    usable: list[int] = []
    for row in sorted(captioned, key=lambda row: hashlib.sha256(source.name(row).encode()).digest()):
        if not wanted or len(usable) > wanted:
            break
        if not _why_rejected(source, row):  # else it is named in the ledger of what is trained on
            usable.append(row)
    if holdout is not None and 0 < len(usable) <= wanted:
        raise ValueError(f"holdout={holdout} of {len(usable)} usable pictures leaves none to train on")
    return set(usable[: min(wanted, len(usable) - 1)]) if usable else set()


def _all_rejected(source: FolderSource, rows: list[int]) -> list[str]:
    """Why each of the rows cannot be used; nothing as soon as one can."""
    reasons: list[str] = []
    for row in rows:
        if not (reason := _why_rejected(source, row)):
            return []
        reasons.append(reason)
    return reasons


def _why_rejected(source: FolderSource, row: int) -> str:
    """Why the picture cannot be used, "" if it can."""
    try:
        check_shapes(source[row])
    except Rejected as rejected:
        return rejected.reason
    return ""


class Chosen:
    """Some rows of a source, as a source."""

    def __init__(self, source: FolderSource, rows: Sequence[int]) -> None:
        self.config = source.config
        self.fingerprint = hashlib.sha256(f"{source.fingerprint}{list(rows)}".encode()).hexdigest()
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._rows[index]]

    def name(self, index: int) -> str:
        """What the source calls it."""
        return self._source.name(self._rows[index])

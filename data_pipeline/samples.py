"""One sample of a batch: read, decoded, cut and captioned, or taken from a cache."""

import json
import math
import os
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.batch import Batch, sample_rng
from data_pipeline.buckets import Shape, assign, bucket_shapes
from data_pipeline.captions import choose_caption
from data_pipeline.conditions import KINDS, maker
from data_pipeline.config import DataConfig
from data_pipeline.filecache import FileCache
from data_pipeline.mixing import Bucket, Place, Stream
from data_pipeline.precompute import Cache
from data_pipeline.reader import ShardReader
from data_pipeline.shards import CONDITION, MASK
from data_pipeline.storage import is_remote
from data_pipeline.transforms import Frame, cut, cut_mask, decode, decode_mask, to_tensor, to_unit, told_sizes

STORED = "stored"
_MB = 10**6


def open_folder(path: str, config: DataConfig) -> ShardReader:
    """A shard folder, here or far away."""
    folder = Path(config.copies or Path(tempfile.gettempdir(), f"ldm-shards-{os.getuid()}"))  # one for each user
    return ShardReader(path, FileCache(folder, config.copies_mb * _MB) if is_remote(path) else None)


class Samples(Dataset[Batch]):
    """The samples of some folders as batches of one, looked up by place. Raises ValueError for what cannot work."""

    def __init__(self, readers: list[ShardReader], config: DataConfig, seed: int) -> None:
        self.size = size_of(readers, config)
        self.readers = readers
        self.config = config
        self.seed = seed
        self.framing, self.captions = config.framing, config.captions
        self._make = maker(config.condition) if config.condition in KINDS else None
        self._check_members()
        if config.prior and len(config.prior) != len(readers):
            raise ValueError(f"data.prior={list(config.prior)}: say yes or no of each of {len(readers)} folders")
        self._cached = [open_folder(path, config) for path in config.caches]
        self.caches = self._open_caches()

    def __getitem__(self, place: Place) -> Batch:
        position, dataset, index, target = place
        reader = self.readers[dataset]
        rng = sample_rng(self.seed, position, "transform")
        cache = self.caches[dataset] if self.caches else None
        extension = reader.info.image_format
        pictured = cache is None or self._make is not None
        members = reader.read(index, (extension, *self._beside, "json") if pictured else (*self._beside, "json"))
        meta = json.loads(members["json"])
        key, (stored, original) = reader.key(index), reader.sizes(index)
        frame = self.framing.draw(stored, target, rng)
        caption = choose_caption(meta["captions"], meta.get("weights"), self.captions, rng)
        image = to_tensor(cut(decode(members[extension]), frame, target)) if pictured else torch.empty(3, 0, 0)
        batch = Batch(
            image=torch.empty(1, 3, 0, 0) if cache else image[None],
            captions=[caption],
            positions=torch.tensor([position]),
            keys=[key],
            weights=torch.tensor([_weight(meta, key)], dtype=torch.float32),
            prior=torch.tensor([self.config.prior[dataset]]) if self.config.prior else None,
            sizes=torch.tensor([told_sizes(frame, stored, original, target)]),
            condition=self._make(image)[None] if self._make else _stored(members, CONDITION, frame, target),
            mask=_stored(members, MASK, frame, target),
        )
        if cache is None:
            return batch
        text = {}
        if cache.key.text:  # one without text allows captions that are not as they are stored
            text = cache.text(index, meta["captions"].index(caption) if caption else None)
        return replace(batch, moments=cache.moments(index, frame.variant), text=text)

    def buckets(self) -> list[Bucket]:
        """What there is to train on, by shape, and how much of it comes in an epoch."""
        config, shapes = self.config, shapes_of(self.size, self.config)
        streams: dict[Shape, list[Stream]] = {}
        self._check_window()
        for dataset, (reader, often) in enumerate(zip(self.readers, self._often(), strict=True)):
            sizes = reader.all_sizes() if config.buckets else np.ones((len(reader), 2))
            nearest = assign(sizes, shapes)
            for i in np.unique(nearest).tolist():
                samples = np.flatnonzero(nearest == i)
                shards = np.searchsorted(reader.ends, samples, side="right")
                stream = Stream(dataset, samples, often * len(samples), config.window, shards)
                streams.setdefault(shapes[i], []).append(stream)
        return [Bucket(shape, streams[shape]) for shape in shapes if shape in streams]

    @property
    def _beside(self) -> tuple[str, ...]:
        """The members that are read beside the picture and its captions."""
        stored = ((self.config.condition, CONDITION), (self.config.mask, MASK))
        return tuple(member for chosen, member in stored if chosen == STORED)

    def _check_members(self) -> None:
        """That every folder has the paired pictures and masks that are asked for."""
        config = self.config
        if config.condition not in ("", STORED, *KINDS):
            raise ValueError(
                f"data.condition={config.condition!r}: allowed are {', '.join((STORED, *KINDS))} or nothing"
            )
        if config.mask not in ("", STORED):
            raise ValueError(f"data.mask={config.mask!r}: allowed is {STORED} or nothing")
        for reader in self.readers:
            for member in self._beside:
                if member not in reader.extensions(0):
                    kind = member.partition(".")[0]
                    raise ValueError(f"{reader.path} holds no {kind}s: build it again with them, or set data.{kind}=")

    def _often(self) -> list[Fraction]:
        """How often the samples of each folder come in an epoch."""
        config, count = self.config, len(self.readers)
        given = config.weights or config.repeats or (1.0,) * count
        if config.weights and config.repeats:
            raise ValueError("give data.weights or data.repeats, not both")
        if len(given) != count or not all(1e-6 <= value <= 1e6 for value in given):
            name = "weights" if config.weights else "repeats"
            raise ValueError(f"data.{name}={list(given)}: give one number, 1e-6 to 1e6, for each of {count} folders")
        exact = [Fraction(value).limit_denominator(10**6) for value in given]
        if not config.weights:
            return exact
        samples = sum(len(reader) for reader in self.readers)
        return [w * samples / (sum(exact) * len(r)) for w, r in zip(exact, self.readers, strict=True)]

    def _check_window(self) -> None:
        """That the copies of two windows of every folder and cache far away fit together."""
        window = self.config.window
        if window < 0:
            raise ValueError(f"data.window={window}: allowed are 0 (all shards) and more")
        needed: dict[str, int] = {}  # bytes; a folder that is named twice has its copies once
        for reader in [*self.readers, *self._cached]:
            if is_remote(reader.path):
                sizes = sorted((shard.bytes for shard in reader.info.shards), reverse=True)
                needed[reader.path] = sum(sizes[: 2 * window] if window else sizes)
        if (total := sum(needed.values())) > self.config.copies_mb * _MB:
            raise ValueError(
                f"{', '.join(needed)}: mixing {window or 'all'} shards at a time takes {-(-total // _MB)} MB here, "
                f"data.copies_mb is {self.config.copies_mb}; make it larger, or data.window smaller"
            )

    def _open_caches(self) -> list[Cache]:
        config = self.config
        if not config.caches:
            return []
        if len(config.caches) != len(self.readers):
            raise ValueError(f"data.cache names {len(config.caches)} folders, data.path {len(self.readers)}")
        if not config.crops:
            raise ValueError("data.crops=0: a cache holds some crops, not any; set data.crops as it was made")
        caches = []
        for cached, reader in zip(self._cached, self.readers, strict=True):
            cache = Cache(cached, reader)
            cache.key.check(cache.path, framing_of(self.size, config))
            if cache.key.text and (config.templates or config.shuffle_tags or config.tag_dropout):
                raise ValueError(
                    f"the cache {cache.path} holds text as it is stored: no templates, shuffle_tags, tag_dropout"
                )
            caches.append(cache)
        if len({bool(cache.key.text) for cache in caches}) > 1:
            raise ValueError("data.cache: some folders hold text and others do not; make all with --text, or none")
        return caches


def size_of(readers: list[ShardReader], config: DataConfig) -> int:
    """The pixels a side, from the config or the shards. Raises ValueError when neither says."""
    sizes = {reader.info.size for reader in readers}
    size = config.size or (sizes.pop() if len(sizes) == 1 else None)
    if size is None:
        named = ", ".join(reader.path for reader in readers)
        raise ValueError(f"the pictures in {named} differ in size; set size=N (pixels a side)")
    return size


def shapes_of(size: int, config: DataConfig) -> list[Shape]:
    """The shapes that pictures are trained in: one square, or the buckets."""
    return bucket_shapes(size, config.bucket_step, config.max_aspect) if config.buckets else [(size, size)]


def framing_of(size: int, config: DataConfig) -> dict[str, Any]:
    """What of the config decides the frames of a picture, as a cache's key says it."""
    buckets = {"bucket_step": config.bucket_step, "max_aspect": config.max_aspect} if config.buckets else {}
    return {"size": size, "bucket_step": 0, "max_aspect": 0.0, "crops": config.crops, "flip": config.flip, **buckets}


def _stored(members: dict[str, bytes], member: str, frame: Frame, target: Shape) -> Tensor | None:
    """The paired picture [1, 3, H, W] or mask [1, 1, H, W] of a sample, in [0, 1]; None where none was asked for."""
    if member not in members:
        return None
    if member == MASK:
        return to_unit(cut_mask(decode_mask(members[member]), frame, target))[None]
    return to_unit(cut(decode(members[member]), frame, target))[None]


def _weight(meta: dict[str, Any], key: str) -> float:
    weight = meta.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"sample {key} has the weight {weight!r}: allowed are numbers from 0")
    return float(weight)

"""Latents and text embeddings computed before: how a cache lies on the disk, and its reading.

A cache is a shard folder beside the one it was made from: sample i of the one is sample i of the other, with members

    moments.npy   [V, 2 C, h, w] float16: mean and log-variance of the latents, for each frame of the picture
    context.npy   [K, L, D] float16, mask.npy [K, L] bool, pooled.npy [K, P] float16: of each of its K captions

and, as its source, what it was made from and how (CacheKey). A cache that does not fit is refused by name.
"""

import io
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.reader import ShardReader

KIND = "cache"
MOMENTS = "moments.npy"
TEXT = ("context", "mask", "pooled")
_MEANING = {
    "data": "the shards",
    "autoencoder": "the autoencoder's weights",
    "text": "the text encoder's weights",
    "size": "the size",
    "bucket_step": "the step of the buckets",
    "max_aspect": "the largest aspect ratio",
    "crops": "the number of crops",
    "flip": "the mirroring",
}


@dataclass(frozen=True)
class CacheKey:
    """What decides every number in a cache. data: fingerprint of the shards; autoencoder, text: of weights ("": none).

    size, bucket_step (0: squares), max_aspect, crops, flip: as in DataConfig.
    """

    data: str
    autoencoder: str
    text: str
    size: int
    bucket_step: int = 0
    max_aspect: float = 0.0
    crops: int = 1
    flip: bool = False

    def check(self, where: str, wanted: dict[str, Any]) -> None:
        """Raises ValueError naming the first part that is not as `wanted`, and how to mend it."""
        for name, value in wanted.items():
            found = getattr(self, name)
            if found != value:
                there, here = (str(v)[:12] or "none" for v in (found, value))
                raise ValueError(
                    f"the cache {where} was made for another run ({_MEANING[name]}: {there} there, {here} here); "
                    "make a new one with: ldm data encode"
                )


class Cache:
    """The cache in a folder, opened for the shards it was made from. Raises ValueError when it is another's."""

    def __init__(self, cache: ShardReader, data: ShardReader) -> None:
        self.path, source = cache.path, cache.info.source
        if source.get("kind") != KIND or set(source["settings"]) != {f.name for f in fields(CacheKey)}:
            raise ValueError(f"{cache.path} holds no cache of latents; make one with: ldm data encode")
        self.key = CacheKey(**source["settings"])
        self.key.check(self.path, {"data": data.fingerprint})
        if len(cache) != len(data):
            raise ValueError(f"the cache {cache.path} has {len(cache)} samples, {data.path} has {len(data)}")
        self._cache = cache

    def moments(self, index: int, variant: int) -> Tensor:
        """[1, 2 C, h, w] float32 of sample `index` in one of its frames."""
        stored = load_array(self._cache.read(index, (MOMENTS,))[MOMENTS])
        return torch.from_numpy(stored[variant if self.key.flip else variant // 2].astype(np.float32))[None]

    def text(self, index: int, caption: int | None) -> dict[str, Tensor]:
        """Of one of the captions of sample `index`, each [1, ...]; all zeros for None, an empty caption."""
        names = [f"{name}.npy" for name in TEXT if f"{name}.npy" in self._cache.extensions(index)]
        members = self._cache.read(index, names)
        return {name.removesuffix(".npy"): _row(load_array(members[name]), caption) for name in names}


def _row(stored: np.ndarray, row: int | None) -> Tensor:
    values = torch.from_numpy(stored[0 if row is None else row].copy())[None]
    values = values if values.dtype == torch.bool else values.float()
    return torch.zeros_like(values) if row is None else values


def cache_source(key: CacheKey) -> dict[str, Any]:
    """What the index of a cache says that it was made from."""
    return {"kind": KIND, "settings": asdict(key)}


def dump_array(values: Tensor | np.ndarray) -> bytes:
    """An array as the bytes of an .npy file, floats in float16. Raises ValueError when one is too large for that."""
    array = values.numpy() if isinstance(values, Tensor) else values
    if array.dtype.kind == "f":
        if not np.abs(array).max() <= np.finfo(np.float16).max:
            raise ValueError(
                f"values up to {np.abs(array).max():.3g} do not fit in float16: this model cannot be cached"
            )
        array = array.astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_array(data: bytes) -> np.ndarray:
    """What `dump_array` wrote."""
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array

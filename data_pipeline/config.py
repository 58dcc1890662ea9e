"""How shards become batches: the settings."""

from dataclasses import dataclass
from typing import Any

from data_pipeline.captions import CaptionConfig
from data_pipeline.transforms import Framing


@dataclass
class DataConfig:
    """path: a shard folder, or a list of them. size: pixels a side; None takes the size the shards were built with.

    Of several folders every sample comes equally often, unless `repeats` says how often each folder's come in an
    epoch, or `weights` what share of all samples each folder gives: one number a folder. prior: of each folder, whether
    it shows what a model that is fine-tuned knows already, and should not forget.
    buckets: pictures keep their shapes, near enough: about size^2 px, sides multiples of bucket_step.
    crops, flip: see Framing. caption and what follows: see CaptionConfig (caption is its choice).
    cache: what `ldm data encode` made, one for each folder. workers: processes that decode.
    condition: the paired picture of each sample: "" none, "stored" the one in the shards, "edges" or "segments" made of
    the cut picture (conditions.py). mask: "stored": the shards' weights of pixels in the loss; "": all count alike.
    window: mix samples among so many shards at a time, 0: all. Copies of shards from far away go to `copies` (else a
    folder for temporary files) and take copies_mb at most, which must be enough for two windows.
    """

    path: Any  # a str, or a list of them
    size: int | None = None
    flip: bool = False
    caption: str = "first"
    workers: int = 0
    repeats: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    prior: tuple[bool, ...] = ()
    buckets: bool = False
    bucket_step: int = 64
    max_aspect: float = 2.0
    crops: int = 1
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    separator: str = ","
    templates: tuple[str, ...] = ()
    cache: Any = ""  # a str, or a list of them
    condition: str = ""
    mask: str = ""
    window: int = 0
    copies: str = ""
    copies_mb: int = 20_000

    @property
    def paths(self) -> tuple[str, ...]:
        """The shard folders."""
        return _listed("data.path", self.path)

    @property
    def caches(self) -> tuple[str, ...]:
        """The folders of latents, as many as there are shard folders, or none."""
        return _listed("data.cache", self.cache) if self.cache else ()

    @property
    def framing(self) -> Framing:
        """How pictures are cut."""
        return Framing(self.crops, self.flip)

    @property
    def captions(self) -> CaptionConfig:
        """How captions are chosen."""
        return CaptionConfig(
            choice=self.caption,
            dropout=self.caption_dropout,
            shuffle_tags=self.shuffle_tags,
            tag_dropout=self.tag_dropout,
            keep_tags=self.keep_tags,
            separator=self.separator,
            templates=tuple(self.templates),
        )


def _listed(name: str, value: Any) -> tuple[str, ...]:
    listed = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(path, str) and path for path in listed):
        raise ValueError(f"{name}={value!r}: give a folder or a list of folders")
    return listed

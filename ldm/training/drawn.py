"""Pictures that a model draws itself, as data: of a subject's class, and of what it must not forget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.build import BuildConfig, build
from data_pipeline.shards import INDEX
from data_pipeline.sources import Sample
from ldm.images import to_pil
from ldm.pipeline import Pipeline, Request

CHUNK = 8
"""Pictures that are drawn together: a fixed number, as in larger batches sums may be rounded otherwise."""


@dataclass(frozen=True)
class DrawnConfig:
    """count pictures of the prompts in turns, number i from seed i, by the model in the folder or file `model`."""

    model: str
    prompts: tuple[str, ...]
    count: int
    size: int  # px a side
    steps: int = 30
    guidance: float = 4.0


@dataclass
class DrawnSource:
    """Those pictures as a source: each is drawn when it is asked for, with its neighbours."""

    config: DrawnConfig
    pipeline: Any
    _chunk: dict[int, Sample] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Sample:
        if index not in self._chunk:
            first = index - index % CHUNK
            self._chunk = self._drawn(range(first, min(first + CHUNK, len(self))))
        return self._chunk[index]

    def name(self, index: int) -> str:
        return f"drawn-{index:06d}"

    def _drawn(self, rows: Sequence[int]) -> dict[int, Sample]:
        config = self.config
        prompts = tuple(config.prompts[row % len(config.prompts)] for row in rows)
        request = Request(
            prompts,
            tuple(rows),
            plain=True,
            steps=config.steps,
            guidance=config.guidance,
            width=config.size,
            height=config.size,
        )
        return {
            row: Sample(self.name(row), to_pil(picture), (prompt,), {})
            for row, prompt, picture in zip(rows, prompts, self.pipeline(request), strict=True)
        }


def draw(config: DrawnConfig, out: Path) -> str:
    """The pictures as the shard folder `out`, drawn unless they are there. Raises ValueError if others are."""
    if not config.prompts or config.count < 1:
        raise ValueError(f"drawing takes a prompt and a count of 1 or more, not {config.prompts} and {config.count}")
    source = DrawnSource(config, None)
    if not (out / INDEX).is_file():
        source.pipeline = Pipeline.load(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    build(source, BuildConfig(size=None), out)
    return str(out)

"""The loop of `ldm generate`: pictures as they are drawn, what is seen of them meanwhile, and their files."""

import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.diffusion.samplers import Step
    from ldm.models.preview import LatentPreview
    from ldm.pipeline import Pipeline, Request

PREVIEW_PX = 256  # the longer side of a picture in a preview, about


class Preview:
    """A file with the estimates of the batch that is being drawn, replaced whole every few steps.

    Estimates are shown by a projection of their latents. It is fitted to decoded ones: in the first batch to the 1st,
    2nd, 4th, 8th, ... that is shown, as they get clearer; from then on to the pictures of the batch before.
    """

    def __init__(self, pipeline: "Pipeline", path: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"--preview N shows every N-th step; N must be at least 1, got {every}")
        self.pipeline, self.path, self.every = pipeline, path, every
        self.projection: LatentPreview | None = None
        self.learned = False  # from finished pictures

    def __call__(self, step: "Step") -> None:
        """Look at a step."""
        from ldm.images import grid, save_png
        from ldm.models.preview import LatentPreview

        number, rest = divmod(step.index + 1, self.every)
        if rest:
            return
        if self.projection is None or (not self.learned and number.bit_count() == 1):
            self.projection = LatentPreview.fit(step.x0, self.pipeline.decode(step.x0))
        pictures = self.projection(step.x0)
        scale = max(1, PREVIEW_PX // max(pictures.shape[-2:]))
        save_png(grid(pictures, math.ceil(math.sqrt(len(pictures))), scale=scale), self.path)

    def learn(self, latent: "Tensor", pictures: "Tensor") -> None:
        """Fit to what a batch came to be: latents [B, C, h, w] and their pictures [B, 3, H, W]."""
        from ldm.models.preview import LatentPreview

        self.projection, self.learned = LatentPreview.fit(latent, pictures), True


def drawn(
    pipeline: "Pipeline", wanted: Sequence["Request"], preview: Preview | None = None
) -> Iterator[list["Image.Image"]]:
    """The pictures of each request, all requests checked before any is drawn; steps and the time left are shown.

    Raises ValueError for a request that the pipeline cannot do.
    """
    streams = [pipeline.stream(request) for request in wanted]
    return _drawn(pipeline, wanted, streams, preview)


def _drawn(
    pipeline: "Pipeline", wanted: Sequence["Request"], streams: Sequence[Iterator["Step"]], preview: Preview | None
) -> Iterator[list["Image.Image"]]:
    from tqdm import tqdm

    from ldm.images import to_pil

    total = sum(map(pipeline.steps, wanted))
    with tqdm(total=total, unit="step", disable=not sys.stderr.isatty()) as bar:
        for request, stream in zip(wanted, streams, strict=True):
            for step in stream:
                bar.update()
                if preview is not None:
                    preview(step)
            pictures = pipeline.pictures(request, step)
            if preview is not None and request.given is None:
                preview.learn(step.x, pictures)
            yield [to_pil(picture) for picture in pictures]


class Album:
    """A folder of pictures, each under the next number that is free; nothing in it is overwritten."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._numbers = {prefix: self._free(prefix) for prefix in ("", "grid-")}

    def add(self, picture: "Image.Image", settings: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
        """A picture, as NUMBER-SEED.png."""
        return self._save(picture, "", f"-{settings['Seed']}", settings, record)

    def add_sheet(self, sheet: "Image.Image", settings: Mapping[str, Any]) -> Path:
        """Several on one sheet, as grid-NUMBER.png."""
        return self._save(sheet, "grid-", "", settings, None)

    def _free(self, prefix: str) -> Iterator[int]:
        """Numbers after those of the PNG files that begin with `prefix` and a number."""
        names = (re.match(rf"{prefix}(\d+).*\.png$", file.name) for file in self.folder.iterdir())
        return itertools.count(max((int(name[1]) for name in names if name), default=-1) + 1)

    def _save(
        self,
        picture: "Image.Image",
        prefix: str,
        suffix: str,
        settings: Mapping[str, Any],
        record: Mapping[str, Any] | None,
    ) -> Path:
        """Save under the next number that is free, also if another process takes names in the same folder."""
        from ldm.images import save_png

        while True:
            path = self.folder / f"{prefix}{next(self._numbers[prefix]):05d}{suffix}.png"
            try:
                save_png(picture, path, settings, record=record, overwrite=False)
                return path
            except FileExistsError:
                continue

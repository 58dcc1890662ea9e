"""A picture to go by, and what becomes of it before and after drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ldm.diffusion.restoration import Operator, blur, downscale
from ldm.names import known
from ldm.pipeline.canvas import Box, boxes_around, cut, extended, filled, pasted, softened

MEASURES = ("downscale", "blur")
FILLS = ("original", "fill", "noise", "nothing")
STRENGTH = 0.75  # of a plain picture, unless told otherwise


@dataclass(frozen=True, eq=False)
class Given:
    """A picture to go by: plain (to start from), or with one of a mask, a measure or what it shows.

    image [1 or N, 3, H, W] in [-1, 1]: N as many as the request's. To a model for editing it is what is edited, to
        one that enlarges what is enlarged; there it is plain.
    strength in (0, 1]: how far up in noise to start from the picture; 1 is the noisiest level. None is 0.75 for a plain
        picture; with a mask, and for models that are shown the picture anyway, drawing then starts from noise alone.
    strength_steps: "all" takes as many steps as asked for from there; "part" those of the whole way that lie below, as
        diffusers does: int(steps * strength).
    mask [1 or N, 1, H, W] in 0..1: 1 is drawn anew, 0 stays as it is, to the pixel.
    measure: "downscale:4" or "blur:2.5" (pixels): the image is this of the picture that is asked for.
    shows: the prompt that fits the image, read as the request's are; its noise is found first, and the request's prompt
        drawn from that.
    """

    image: Tensor
    strength: float | None = None
    strength_steps: str = "all"
    mask: Tensor | None = None
    mask_blur: float = 0.0  # standard deviation of a Gaussian, px
    padding: int | None = None  # px: draw only what is that near to the mask, at the request's size; None is all.
    # Then depths and pictures of controls are, as the mask, of the given picture's size, and are cut as it is.
    fill: str = "original"  # what the masked part starts from, with a strength: its surroundings, noise or nothing
    resample: int = 1  # mask: times to go down each stretch of `jump` steps, so that the parts agree (RePaint)
    jump: int = 10
    measure: str = ""
    noise_std: float = 0.0  # of the measurement
    measure_scale: float = 1.0
    shows: str | None = None
    image_guidance: float = 1.5  # models for editing: how strictly to keep to the picture; 1 turns it off
    noise_level: int = 20  # models that enlarge: noise put on the small picture, against its own faults

    def __post_init__(self) -> None:
        ways = (self.mask is not None) + bool(self.measure) + (self.shows is not None)
        if ways > 1:
            raise ValueError(f"a given picture goes with one of mask, measure and what it shows; got {ways} of them")
        if self.image.ndim != 4 or self.image.shape[1] != 3:
            raise ValueError(f"a given picture must be [1 or N, 3, H, W], got {[*self.image.shape]}")
        known("strength_steps", self.strength_steps, ("all", "part"))
        known("fill", self.fill, FILLS)
        if self.mask is not None:
            _check_mask(self.mask, self.image)
        for name, unused in (("mask_blur", 0.0), ("padding", None), ("fill", "original"), ("resample", 1)):
            if self.mask is None and getattr(self, name) != unused:
                raise ValueError(f"{name}={getattr(self, name)} goes with a mask")
        if self.strength is not None and (self.measure or self.shows is not None):
            raise ValueError("strength goes with a plain picture or a mask, not with measure or what it shows")
        if self.fill != "original" and self.strength is None:
            raise ValueError(f"fill={self.fill} is what the masked part starts from; give a strength as well")
        self._check_numbers()
        if self.measure:
            self.operator()

    def _check_numbers(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")
        if not (math.isfinite(self.measure_scale) and 0 <= self.noise_std < math.inf):
            raise ValueError(
                f"measure_scale must be finite and noise_std 0 or more, got {self.measure_scale} and {self.noise_std}"
            )
        if self.resample < 1 or self.jump < 1:
            raise ValueError(f"resample and jump must be at least 1, got {self.resample} and {self.jump}")
        if not 0 <= self.mask_blur < math.inf or (self.padding is not None and self.padding < 0):
            raise ValueError(f"mask_blur and padding must be 0 px or more, got {self.mask_blur} and {self.padding}")
        if not math.isfinite(self.image_guidance) or self.noise_level < 0:
            raise ValueError(
                "image_guidance must be finite and noise_level 0 or more, "
                f"got {self.image_guidance} and {self.noise_level}"
            )

    @property
    def plain(self) -> bool:
        """Whether it comes without a mask, a measure or what it shows."""
        return self.mask is None and not self.measure and self.shows is None

    @property
    def way(self) -> str:
        """How it is gone by, in a few words."""
        if self.mask is not None:
            return "mask" if self.resample == 1 else f"mask, {self.resample} times by {self.jump} steps"
        return "picture" if self.plain else self.measure or f"shows {self.shows}"

    @cached_property
    def soft_mask(self) -> Tensor:
        """The mask as it is drawn by, blurred."""
        assert self.mask is not None
        return softened(self.mask, self.mask_blur)

    def operator(self) -> Operator:
        """What `measure` says. Raises ValueError for anything else."""
        word, _, number = self.measure.partition(":")
        known("measure", word, MEASURES)
        try:
            return downscale(int(number)) if word == "downscale" else blur(float(number))
        except ValueError as error:
            raise ValueError(
                f"measure must be downscale:FACTOR or blur:RADIUS, got {self.measure!r} ({error})"
            ) from error

    def at(self, width: int, height: int) -> "Given":
        """The picture as it is drawn into at that size: with a padding, the part around the mask; its mask blurred."""
        if self.mask is None:
            return self
        if self.padding is None:
            return replace(self, mask=self.soft_mask, mask_blur=0.0)
        image = self.part_of(self.image, width, height).clamp(-1, 1)
        mask = self.part_of(self.soft_mask, width, height).clamp(0, 1)
        return replace(self, image=image, mask=mask, mask_blur=0.0, padding=None)

    def part_of(self, pictures: Tensor, width: int, height: int) -> Tensor:
        """With a padding: of pictures [1 or N, C, H, W] of the given size the part that is drawn, at this size."""
        boxes = self.boxes(width, height)
        count = max(len(boxes), len(pictures))
        return cut(pictures.expand(count, -1, -1, -1), boxes * count if len(boxes) == 1 else boxes, width, height)

    def put_back(self, drawn: Tensor, rows: slice) -> Tensor:
        """Pictures [B, 3, H, W] drawn for those rows, with the known pixels as they were given."""
        if self.mask is None:
            return drawn
        image, mask = (value if len(value) == 1 else value[rows] for value in (self.image, self.soft_mask))
        if self.padding is not None:
            boxes = self.boxes(drawn.shape[3], drawn.shape[2])
            boxes = boxes * len(drawn) if len(boxes) == 1 else boxes[rows]
            drawn = pasted(image.expand(len(drawn), -1, -1, -1), boxes, drawn).clamp(-1, 1)
        return torch.lerp(image.to(drawn), drawn, mask.to(drawn))

    def filled(self) -> Tensor:
        """The picture that drawing starts from: with fill "fill" the masked part is made of its surroundings."""
        if self.mask is None or self.fill != "fill":
            return self.image
        return filled(self.image, self.mask)

    def boxes(self, width: int, height: int) -> list[Box]:
        """With a padding: the part that is drawn by each mask, at that size. Raises ValueError for an empty mask."""
        assert self.padding is not None
        return boxes_around(self.soft_mask, self.padding, width, height)


def outpaint(
    image: Tensor,
    sides: Sequence[int],
    *,
    overlap: int | None = None,
    multiple: int = 64,
    strength: float | None = None,
) -> Given:
    """A picture [1 or N, 3, H, W] to be continued beyond its edges by left, right, top and bottom px.

    overlap: px within the picture over which new and old are blended; None is 16, or a quarter of its shorter side if
    that is less. multiple: of the canvas' width and height, what
    the model can draw (`Pipeline.multiple`): the right and the bottom grow to reach it. strength: see `Given`.
    Raises ValueError for other than 4 numbers, numbers below 0 and nothing added.
    """
    overlap = min(16, *(side // 4 for side in image.shape[2:])) if overlap is None else overlap
    extended(image, sides, overlap)  # checks before anything is rounded
    left, right, top, bottom = sides
    right += -(image.shape[3] + left + right) % multiple
    bottom += -(image.shape[2] + top + bottom) % multiple
    canvas, mask = extended(image, (left, right, top, bottom), overlap)
    return Given(canvas, strength=strength, mask=mask)


def _check_mask(mask: Tensor, image: Tensor) -> None:
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask must be [1 or N, 1, H, W], got {[*mask.shape]}")
    if mask.shape[2:] != image.shape[2:]:
        sizes = (f"{w}x{h}" for h, w in (mask.shape[2:], image.shape[2:]))
        raise ValueError("the mask is {} px and the picture {}; they must be of one size".format(*sizes))
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"a mask must be in 0..1, got {mask.min():.4g}..{mask.max():.4g}")

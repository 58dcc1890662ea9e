"""A stored picture -> the part of it that a model is trained on, and what that model is told of the cut."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.buckets import Shape
from data_pipeline.images import to_rgb
from data_pipeline.resize import resize, resize_mask

_FORMATS = ("PNG", "JPEG", "WEBP")  # in which shards store pictures


@dataclass(frozen=True)
class Frame:
    """What is cut out: a box in px of the stored picture, and whether it is mirrored.

    variant: its number among all that are drawn from, 2 crop + mirrored; -1 when the crop lies anywhere.
    """

    left: int
    top: int
    width: int
    height: int
    mirrored: bool = False
    variant: int = -1


@dataclass(frozen=True)
class Framing:
    """How frames are drawn. crops: so many places, evenly from one end to the other; 1: the centre; 0: anywhere.

    flip: mirror half of the pictures; off by default because captions may say left and right.
    """

    crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.crops <= 64:
            raise ValueError(f"crops={self.crops}: allowed are 1 (the centre) to 64, or 0 for anywhere")

    def draw(self, stored: Shape, target: Shape, rng: np.random.Generator) -> Frame:
        """Draws the mirroring, then the crop; each only when there is a choice."""
        mirrored = self.flip and bool(rng.random() < 0.5)
        if self.crops:
            return self.variant(stored, target, int(rng.integers(self.crops)) if self.crops > 1 else 0, mirrored)
        width, height = largest_box(stored, target)
        left, top = (int(rng.integers(slack + 1)) for slack in (stored[0] - width, stored[1] - height))
        return Frame(left, top, width, height, mirrored)

    def variant(self, stored: Shape, target: Shape, crop: int, mirrored: bool) -> Frame:
        """The frame of one of the fixed crops, 0 to crops - 1."""
        width, height = largest_box(stored, target)
        # Whole pixels: a half-pixel offset would blur a picture that only needs cropping.
        share, whole = (crop, self.crops - 1) if self.crops > 1 else (1, 2)
        left, top = (slack * share // whole for slack in (stored[0] - width, stored[1] - height))
        return Frame(left, top, width, height, mirrored, 2 * crop + mirrored)

    def variants(self, stored: Shape, target: Shape) -> list[Frame]:
        """All frames that `draw` can give, in the order of their numbers (without mirrored ones: every other)."""
        ways = (False, True) if self.flip else (False,)
        return [self.variant(stored, target, crop, mirrored) for crop in range(self.crops) for mirrored in ways]


def largest_box(stored: Shape, target: Shape) -> Shape:
    """(width, height) of the largest part of a picture with the aspect ratio of `target`, whole pixels."""
    (width, height), (w, h) = stored, target
    if width * h >= height * w:
        return min(width, max(1, (2 * height * w + h) // (2 * h))), height
    return width, min(height, max(1, (2 * width * h + w) // (2 * w)))


def told_sizes(frame: Frame, stored: Shape, original: Shape, target: Shape) -> list[int]:
    """Original height and width, crop top and left, target height and width (Podell et al. 2023, sec. 2.2).

    The crop is where the corner of the target lies in the whole original, scaled as the target is (and mirrored as
    it is). original: (width, height) before the picture was stored, as the centre of it.
    """
    box = largest_box(original, stored)
    numbers = []
    for axis, (start, extent) in enumerate(((frame.left, frame.width), (frame.top, frame.height))):
        margin = (original[axis] - box[axis]) // 2
        if axis == 0 and frame.mirrored:
            start, margin = stored[0] - extent - start, original[0] - box[0] - margin
        corner = margin + start * box[axis] / stored[axis]
        numbers.append(round(corner * target[axis] * stored[axis] / (extent * box[axis])))
    return [original[1], original[0], numbers[1], numbers[0], target[1], target[0]]


def decode(data: bytes) -> Image.Image:
    """A picture as stored, RGB."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    image.load()
    return image if image.mode == "RGB" else to_rgb(image)


def cut(image: Image.Image, frame: Frame, target: Shape) -> Image.Image:
    """The part of a stored picture in `frame` at the size `target` (Lanczos, antialiased)."""
    if image.size != target:
        box = (frame.left, frame.top, frame.left + frame.width, frame.top + frame.height)
        image = resize(image, target, box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if frame.mirrored else image


def decode_mask(data: bytes) -> Image.Image:
    """A mask as stored, mode L."""
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image.convert("L")


def cut_mask(mask: Image.Image, frame: Frame, target: Shape) -> Image.Image:
    """The part of a mask in `frame` at the size `target`: what `cut` does, but each pixel is the mean of its area."""
    if mask.size != target:
        box = (frame.left, frame.top, frame.left + frame.width, frame.top + frame.height)
        mask = resize_mask(mask, target, box)
    return mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if frame.mirrored else mask


def to_unit(image: Image.Image) -> Tensor:
    """RGB or gray picture -> [3 or 1, H, W] float32 in [0, 1]."""
    planes = np.stack([np.asarray(band) for band in image.split()])
    return torch.from_numpy(planes).to(torch.float32).div_(255.0)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3, H, W] float32 in [-1, 1]."""
    planes = np.stack([np.asarray(band) for band in image.split()])  # [3, H, W]: faster than to transpose floats
    return torch.from_numpy(planes).to(torch.float32).div_(127.5).sub_(1.0)

"""Pictures and masks made ready to be drawn into: scaled, blurred, filled, extended, and cut out around a mask."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.restoration import blur

Box = tuple[int, int, int, int]
"""left, top, right, bottom in px, right and bottom excluded."""


def open_depth(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture file as a depth, upright and scaled to size (width, height) px: [1, 1, H, W] in the file's own units.

    Of 8 or 16 bits, grey or the luma of a colour. Raises ValueError for what is no picture.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("F")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
        raise ValueError(f"{path} is no picture that can be read ({error})") from error
    depth = torch.from_numpy(np.array(image))[None, None]
    return depth if size is None else resized(depth, *size)


def resized(image: Tensor, width: int, height: int) -> Tensor:
    """[B, C, H, W] -> [B, C, height, width] by Lanczos' filter of 3 lobes, in float, on the CPU; may overshoot."""
    if image.shape[2:] == (height, width):
        return image
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
        for plane in image.float().cpu().flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).view(*image.shape[:2], height, width)


def interpolated(latent: Tensor, size: Sequence[int], how: str) -> Tensor:
    """[B, C, h, w] -> [B, C, *size] by nearest, bilinear or bicubic interpolation."""
    if how == "nearest":
        return F.interpolate(latent, size=tuple(size), mode="nearest-exact")
    return F.interpolate(latent, size=tuple(size), mode=how, antialias=True, align_corners=False)


def cells_of(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask of pixels [B, 1, H, W] for latents [.., C, h, w], [B, 1, h, w]: the highest of those each stands for."""
    return F.adaptive_max_pool2d(mask.to(latent), list(latent.shape[-2:]))


def softened(mask: Tensor, radius: float) -> Tensor:
    """A mask [B, 1, H, W] in 0..1, blurred by a Gaussian of that standard deviation in px; 0 leaves it as it is."""
    return blur(radius)(mask).clamp(0, 1) if radius else mask


def filled(image: Tensor, mask: Tensor) -> Tensor:
    """The picture with its masked part drawn from what is around it: smooth, and the same at the mask's edge.

    By pulling and pushing (Gortler et al. 1996, sec. 3.4): means of the known pixels at half, quarter, ... the size, of
    which each unknown pixel takes the finest that knows it. image [B or 1, C, H, W], mask [B or 1, 1, H, W] in 0..1, 1
    is unknown. A picture of which nothing is known comes back as 0.
    """
    known = (1 - mask).expand(max(len(image), len(mask)), -1, -1, -1)
    return _made_up(image * known, known)


def _made_up(total: Tensor, weight: Tensor) -> Tensor:
    """Sums of weighted values, their weights below 1 made up to 1 from those of half the size."""
    height, width = total.shape[2:]
    if height == width == 1:
        return torch.where(weight > 0, total / weight.clamp(min=1e-12), total)
    edges = (0, width % 2, 0, height % 2)
    coarse, known = (F.avg_pool2d(F.pad(value, edges), 2, divisor_override=1) for value in (total, weight))
    coarse = _made_up(coarse / known.clamp(min=1), known.clamp(max=1))
    coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return total + (1 - weight) * coarse[..., :height, :width]


def boxes_around(mask: Tensor, padding: int, width: int, height: int) -> list[Box]:
    """For each mask [B, 1, H, W] the box around what is not 0, `padding` px wider, of the shape width : height.

    As near to that shape as the picture allows: a box stays within it. Raises ValueError for a mask of nothing.
    """
    boxes = []
    for row in mask[:, 0] > 0:
        if not row.any():
            raise ValueError("the mask is empty: nothing of the picture is to be drawn anew")
        tall, wide = row.shape
        spans = [torch.nonzero(row.any(axis)).flatten()[[0, -1]].tolist() for axis in (0, 1)]  # across, then down
        (left, right), (top, bottom) = (
            (max(first - padding, 0), min(last + 1 + padding, side))
            for (first, last), side in zip(spans, (wide, tall), strict=True)
        )
        left, right = _widened(left, right, math.ceil((bottom - top) * width / height), wide)
        top, bottom = _widened(top, bottom, math.ceil((right - left) * height / width), tall)
        boxes.append((left, top, right, bottom))
    return boxes


def _widened(first: int, last: int, size: int, limit: int) -> tuple[int, int]:
    """The span made at least `size` long, about its middle where it fits into 0..limit."""
    size = min(max(size, last - first), limit)
    first = min(max((first + last - size) // 2, 0), limit - size)
    return first, first + size


def cut(image: Tensor, boxes: list[Box], width: int, height: int) -> Tensor:
    """The part of each picture [B, C, H, W] in its box, scaled to width x height px."""
    rows = [
        resized(image[i : i + 1, :, top:bottom, left:right], width, height)
        for i, (left, top, right, bottom) in enumerate(boxes)
    ]
    return torch.cat(rows)


def pasted(image: Tensor, boxes: list[Box], drawn: Tensor) -> Tensor:
    """The pictures with `drawn` [B, C, h, w], scaled to it, in each one's box."""
    image = image.clone()
    for i, (left, top, right, bottom) in enumerate(boxes):
        image[i, :, top:bottom, left:right] = resized(drawn[i : i + 1], right - left, bottom - top)[0].to(image)
    return image


def extended(image: Tensor, sides: Sequence[int], overlap: int = 0) -> tuple[Tensor, Tensor]:
    """A picture [B, 3, H, W] on a canvas larger by `sides` px, its edges going on outward, and the mask of the new.

    sides: left, right, top, bottom. The mask [1, 1, H', W'] is 1 on the new canvas and falls to 0 over `overlap` px
    within the picture, along the sides that are extended. Raises ValueError for other than 4 numbers, for those below
    0, for nothing added, and for an overlap that leaves no pixel of the picture as it is.
    """
    if len(sides) != 4 or min(*sides, overlap) < 0 or not any(sides):
        raise ValueError(f"outpainting adds 0 px or more at 4 sides, and more at one; got {sides}, overlap {overlap}")
    height, width = image.shape[2:]
    left, right, top, bottom = (side > 0 for side in sides)
    kept = torch.minimum(_kept(width, overlap, left, right)[None, :], _kept(height, overlap, top, bottom)[:, None])
    if kept.max() < 1:
        raise ValueError(f"an overlap of {overlap} px leaves nothing of a picture of {width}x{height} px")
    return F.pad(image, tuple(sides), mode="replicate"), 1 - F.pad(kept, tuple(sides))[None, None]


def _kept(size: int, overlap: int, before: bool, after: bool) -> Tensor:
    """How much of the picture is kept along one axis [size]: rising over `overlap` px from a side that is extended."""
    rising = ((torch.arange(size) + 1) / (overlap + 1)).clamp(max=1)
    kept = rising if before else torch.ones(size)
    return torch.minimum(kept, rising.flip(0)) if after else kept

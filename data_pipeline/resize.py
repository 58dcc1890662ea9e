"""Resizing of RGB pictures: Lanczos, antialiased, in integers, so that every CPU gives the same bytes."""

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]


def resize(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """The part `box` (left, top, right, bottom; whole pixels) of an RGB picture at `size` (width, height).

    Lanczos with 3 lobes; rows first, rounded and clipped to 0..255, then columns: within 2 of 255 of that in real
    numbers. Pillow's differs by which pass comes first; this is several times faster where the CPU has AVX2.
    """
    import torch  # here, for it takes seconds to import, and the command line imports this module

    pixels = np.array(image if box is None else image.crop(box))  # a copy: torch wants memory that it may write to
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # [1, 3, H, W] in the order of memory as it is
    resized = torch.nn.functional.interpolate(planes, size=(size[1], size[0]), mode="lanczos", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an RGB picture, as size x size pixels.

    Same as shortest side to `size`, then a centre crop, but a 1 x 20000 picture costs no more than others.
    """
    if size < 1:
        raise ValueError(f"size={size}: a picture needs at least 1 pixel a side")
    if image.size == (size, size):
        return image
    return resize(image, (size, size), centre_square(image.size))


def resize_mask(mask: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """The part `box` of a gray picture at `size`: each pixel the mean of those whose centres its area holds."""
    return mask.resize(size, Image.Resampling.BOX, box)


def centre_square(size: tuple[int, int]) -> Box:
    """The largest centred square of a picture of this size."""
    width, height = size
    side = min(width, height)
    # Whole pixels: a half-pixel offset would blur a picture that only needs cropping.
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side

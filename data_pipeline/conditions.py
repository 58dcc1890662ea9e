"""Condition pictures made of the pictures themselves: their edges, and their regions."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline import storage
from data_pipeline.images import SUFFIXES, encode_image, read_image
from data_pipeline.resize import resize
from data_pipeline.sources import Rejected
from data_pipeline.sources.pictures import read_picture
from data_pipeline.transforms import to_tensor

KINDS = ("edges", "segments")
_REGIONS = 400  # a region holds at least 1 / 400 of the picture


def edges(image: Tensor) -> Tensor:
    """image [3, H, W] in [-1, 1] -> [3, H, W] in {0, 1}: white lines on black (Canny 1986).

    A pixel is on a line when it is in one of the colour channels: two colours may be equally bright.
    Gaussian of 1 px; hysteresis at 0.1 and 0.2 of the range of values by the Sobel gradient, whose largest value is 4.
    """
    canny, _ = _skimage()
    lines = np.any([canny(channel, sigma=1.0, low_threshold=0.1, high_threshold=0.2) for channel in _unit(image)], 0)
    return torch.from_numpy(lines.astype(np.float32)).expand(3, *lines.shape).contiguous()


def segments(image: Tensor) -> Tensor:
    """image [3, H, W] in [-1, 1] -> [3, H, W] in [0, 1]: regions of like colour, each in its mean colour, 8 bits deep.

    Regions by Felzenszwalb and Huttenlocher (2004), with their k = 100 of 255.
    """
    pixels = _unit(image).transpose(1, 2, 0)  # [H, W, 3]
    least = max(1, pixels.shape[0] * pixels.shape[1] // _REGIONS)
    _, felzenszwalb = _skimage()
    labels = felzenszwalb(pixels, scale=100, sigma=0.8, min_size=least).ravel()
    sums = [np.bincount(labels, weights=channel.ravel()) for channel in np.moveaxis(pixels, 2, 0)]
    colours = np.round(255 * np.stack(sums) / np.bincount(labels)) / 255  # [3, regions]
    return torch.from_numpy(colours[:, labels].reshape(3, *pixels.shape[:2]).astype(np.float32))


def maker(kind: str) -> Callable[[Tensor], Tensor]:
    """`edges` or `segments`. Raises ValueError for another kind, and without scikit-image."""
    makers = {"edges": edges, "segments": segments}
    if kind not in makers:
        raise ValueError(f"condition={kind!r}: made from the picture are {', '.join(KINDS)}")
    _skimage()
    return makers[kind]


def write_conditions(
    pictures: str, out: str, kind: str, size: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """For each picture of a folder its condition, as a PNG of the same relative name in `out`.

    size: pictures are first made smaller until their shorter side is so many pixels. What could not be read is
    returned, name -> why. Raises ValueError without pictures, and when two would have one condition.
    """
    make, own = maker(kind), storage.within(out, pictures)
    if size is not None and size < 1:
        raise ValueError(f"size={size}: allowed are 1 pixel and more")
    if not storage.is_folder(pictures):
        raise ValueError(f"{pictures} is not a folder")
    names: dict[str, str] = {}
    for file in storage.list_files(pictures):
        stem = file.name.rpartition(".")[0]
        if not file.name.lower().endswith(SUFFIXES) or (own and file.name.startswith(own)):
            continue
        if stem in names:
            raise ValueError(f"{pictures}: {names[stem]} and {file.name} would have the same condition")
        names[stem] = file.name
    if not names:
        raise ValueError(f"{pictures} has no pictures ({', '.join(SUFFIXES)})")
    unusable: dict[str, str] = {}
    for done, (stem, name) in enumerate(names.items(), start=1):
        try:
            image = _smaller(read_image(read_picture(storage.join(pictures, name))).image, size)
            made = (make(to_tensor(image)).permute(1, 2, 0) * 255).round().to(torch.uint8)
            storage.write(storage.join(out, f"{stem}.png"), encode_image(Image.fromarray(made.numpy()), "png", 100))
        except Rejected as rejected:
            unusable[name] = str(rejected)
        if progress:
            progress(done, len(names))
    return unusable


def _smaller(image: Image.Image, size: int | None) -> Image.Image:
    if size is None or min(image.size) <= size:
        return image
    scale = size / min(image.size)
    return resize(image, (math.ceil(scale * image.width), math.ceil(scale * image.height)))


def _unit(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> the same in [0, 1], float64."""
    if image.ndim != 3 or len(image) != 3:
        raise ValueError(f"a condition is made of one picture [3, H, W], not of {list(image.shape)}")
    unit: np.ndarray = (image.detach().cpu().double().numpy() + 1) / 2
    return unit


def _skimage() -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """scikit-image's canny and felzenszwalb; it takes a second to import. Raises ValueError without it."""
    try:
        from skimage.feature import canny
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ValueError("edges and segments need scikit-image; get it with: pip install 'ldm[data]'") from error
    return canny, felzenszwalb

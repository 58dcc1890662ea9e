"""A stored sample -> what a model is trained on."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.captions import choose_caption
from data_pipeline.images import load_image, resize_crop
from data_pipeline.shards import RawSample


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> [3, H, W] float32 in [-1, 1]."""
    pixels = np.array(image, dtype=np.uint8)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def transform(
    sample: RawSample, rng: np.random.Generator, *, size: int, flip: bool = False, caption: str = "first"
) -> tuple[Tensor, str]:
    """-> (picture [3, size, size] float32 in [-1, 1], one caption).

    flip: mirror half of the samples; off by default because captions may say left and right.
    caption: "first" or "random". Both draw from `rng`, in this order, and only when they are on.
    """
    image = resize_crop(load_image(sample.image_bytes), size)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(image), choose_caption(sample.captions, caption, rng)

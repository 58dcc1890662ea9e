"""Where drawing begins: the latents that a pass starts from."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.noise import ImageNoise
from ldm.pipeline.canvas import cells_of, interpolated, resized
from ldm.pipeline.control import Batch
from ldm.pipeline.given import Given
from ldm.pipeline.inputs import reseeded
from ldm.pipeline.request import Request

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


def begun(pipeline: "Pipeline", known: Tensor, given: Given, batch: Batch) -> Tensor:
    """The latents that drawing starts from: the known ones, but for what the masked part is filled with."""
    if given.fill == "original":
        return known
    if given.fill == "fill":
        return pipeline.encode(batch.of(given.filled()))
    assert given.mask is not None
    filling = torch.zeros_like(known)
    if given.fill == "noise":
        filling = ImageNoise(reseeded(batch.seeds, "fill"), batch.way.shape)().to(known)
    return torch.lerp(known, filling, cells_of(batch.of(given.mask), known))


def enlarged(pipeline: "Pipeline", latent: Tensor, shape: tuple[int, ...], request: Request) -> Tensor:
    """The result of a pass at the size of the next."""
    assert request.upscale is not None
    if request.upscale.how != "lanczos":
        return interpolated(latent, shape[-2:], request.upscale.how)
    height, width = (side * pipeline.autoencoder.factor for side in shape[-2:])
    return pipeline.encode(resized(pipeline.decode(latent), width, height).clamp(-1, 1))

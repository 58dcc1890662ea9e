"""What a denoiser with more input channels than latents is shown: a part of a picture, a depth, or a picture."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.noise import ImageNoise, NoiseSchedule
from ldm.models.typed import type_of
from ldm.nn.offload import works_on
from ldm.pipeline.control import Batch, hints
from ldm.pipeline.given import Given
from ldm.pipeline.request import Request
from ldm.types import Conditioning

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

KINDS = ("plain", "depth", "inpainting", "editing", "enlarging")
Encode = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] -> normalised latents [B, C, h, w], the means of their posteriors."""


def kind_of(denoiser: Any, autoencoder: Any) -> str:
    """What a denoiser is shown besides the autoencoder's latents, by the number of its channels more.

    plain: nothing. depth: 1. inpainting: a mask and the latents of what it leaves. editing (InstructPix2Pix): the
    latents of a picture. enlarging (the x4 upscaler): a small picture, 3, and as a label how noisy it is.
    Raises ValueError for another number.
    """
    config, latents = getattr(denoiser, "config", None), autoencoder.latent_channels
    more = getattr(config, "in_channels", latents) - latents
    if more == 3 and getattr(config, "classes", 0):
        return "enlarging"
    found = {0: "plain", 1: "depth", 1 + latents: "inpainting", latents: "editing"}.get(more)
    if found is None:
        raise ValueError(
            f"its denoiser takes {latents + more} channels and its latents have {latents}; known are as many, and more "
            f"by 1 (depth), {latents} (editing), {latents + 1} (inpainting) and, with labels, 3 (enlarging)"
        )
    return found


def check_kind(kind: str, request: Request, labels: int) -> None:
    """Raise ValueError for a request that a model of that kind cannot be shown. labels: how many it knows."""
    given = request.given
    if (request.depth is not None) != (kind == "depth"):
        raise ValueError(
            "this model needs a depth" if kind == "depth" else "a depth is for models that are shown one; this is none"
        )
    for field, needed in (("image_guidance", "editing"), ("noise_level", "enlarging")):
        if given is not None and kind != needed and getattr(given, field) != getattr(Given, field):
            raise ValueError(f"{field} is for models for {needed}; this one is {kind}")
    if kind in ("editing", "enlarging"):
        if given is None or not given.plain:
            raise ValueError(f"this model is for {kind}: give a picture, without mask, measure or what it shows")
        if request.upscale is not None:
            raise ValueError(f"this model is for {kind}; it has no second pass at a larger size")
    if kind == "editing" and (request.plus_plus or request.steering.projected or request.steering.perturb):
        raise ValueError("guidance for editing is by text and picture; it takes no CFG++, projection or perturbation")
    if kind == "enlarging":
        assert given is not None
        if given.strength is not None:
            raise ValueError("a picture that is enlarged has no strength: drawing starts from noise")
        if given.noise_level >= labels:
            raise ValueError(f"noise_level must be in 0..{labels - 1} for this model, got {given.noise_level}")
    if kind == "inpainting" and given is not None:
        if given.measure or given.shows is not None:
            raise ValueError("a model for inpainting goes by a picture, with or without a mask")
        if given.resample != 1:
            raise ValueError("a model for inpainting fits the parts together itself; resample is for others")
    if kind != "plain" and given is not None and given.shows is not None:
        raise ValueError("the noise of what a picture shows is found with models of text alone; this is shown more")


def around_the_mask(image: Tensor, mask: Tensor, encode: Encode, shape: Sequence[int]) -> Tensor:
    """For inpainting: the mask by latents, then the latents of the picture, grey (0) where it is to be drawn anew.

    A pixel counts as masked from 0.5, a latent if any of its pixels does. -> [B or 1, 1 + C, h, w].
    """
    masked = (mask >= 0.5).to(image)
    latents = encode(image * (1 - masked))
    cells = F.adaptive_max_pool2d(masked, list(shape[-2:])).to(latents)
    batch = max(len(cells), len(latents))
    return torch.cat([v.expand(batch, -1, -1, -1) for v in (cells, latents)], dim=1)


def normalised_depth(depth: Tensor, shape: Sequence[int]) -> Tensor:
    """Depths [B, 1, H, W] at the latents' size (bicubic), each picture's own range to [-1, 1]; flat ones are -1."""
    small = F.interpolate(depth.float(), size=tuple(shape[-2:]), mode="bicubic", align_corners=False)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    return 2 * (small - low) / (high - low).clamp(min=torch.finfo(small.dtype).tiny) - 1


def noised_picture(given: Given, image: Tensor, schedule: NoiseSchedule, seeds: Sequence[int]) -> Tensor:
    """For enlarging: the small pictures with noise at their level, each from its own seed: [B, 3, H, W]."""
    level = schedule.at(given.noise_level)
    noise = ImageNoise(reseeded(seeds, "small picture"), image.shape[1:])()
    return level.alpha * image.float().cpu() + level.sigma * noise


def shown(pipeline: "Pipeline", batch: Batch) -> tuple[Batch, Conditioning | None]:
    """The batch with what its network is shown besides the text: pictures by channel, and those of controls.

    And, of a model for editing, what it is told instead: the negative prompt, and no picture.
    """
    given, shape, kind, autoencoder = batch.request.given, batch.way.shape, pipeline.kind, pipeline.autoencoder
    height, width = (side * autoencoder.factor for side in shape[-2:])
    count, (device, dtype) = len(batch.prompts), home(pipeline.denoiser)
    concat: Tensor | None = None
    label: Tensor | None = None
    if kind == "depth" and batch.request.depth is not None:
        concat = normalised_depth(batch.of(batch.request.depth), shape)
    elif kind == "inpainting":
        image, mask = torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width)
        if given is not None and given.mask is not None:
            image, mask = batch.of(given.image), batch.of(given.mask)
        concat = around_the_mask(image, mask, pipeline.encode, shape)
    elif kind == "editing" and given is not None:  # the raw means, as these models were trained
        latent = pipeline.encode(batch.of(given.image))
        concat = latent * autoencoder.latent_std.to(latent) + autoencoder.latent_mean.to(latent)
    elif kind == "enlarging" and given is not None:
        concat = noised_picture(given, batch.each(given.image), pipeline.low_res, batch.seeds)
        label = torch.full((count,), given.noise_level, device=device)
    if concat is not None:
        concat = concat.expand(count, -1, -1, -1).to(device, dtype)
    control = tuple(hint.to(device, dtype) for hint in hints(batch, height, width))
    cond, uncond = (replace(told, concat=concat, label=label, control=control) for told in (batch.cond, batch.uncond))
    batch = replace(batch, cond=cond, uncond=uncond)
    if kind != "editing" or concat is None:
        return batch, None
    return batch, replace(uncond, concat=torch.zeros_like(concat))


def reseeded(seeds: Sequence[int], purpose: str) -> tuple[int, ...]:
    """Other seeds, one for each, in 0..2^63-1: what they draw has nothing to do with what the first ones do."""
    digests = (hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest() for seed in seeds)
    return tuple(int.from_bytes(digest, "big") >> 1 for digest in digests)


def home(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in which type."""
    return works_on(module), type_of(module)

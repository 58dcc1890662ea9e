"""Pipelines of diffusers with random adapters by peft, and ours beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.lora import attach
from ldm.checkpoints import diffusers
from ldm.diffusion.noise import ImageNoise
from ldm.images import to_pil
from ldm.pipeline import Pipeline, Request
from ldm.types import Conditioning
from tests.checkpoints.families import make

PROMPTS, SEEDS, SIZE = ("a red circle", "a blue square, in oil"), (3, 4), 32
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def folder(family: str, path: Path) -> Path:
    """A tiny random model of a family as a folder of diffusers."""
    if not path.exists():
        diffusers.write(make(family), path)
    return path


def pipeline(model: Path) -> Any:
    """It in diffusers."""
    import diffusers as library

    pipe = library.DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def parts_of(pipe: Any) -> dict[str, Any]:
    """Its networks that adapters change."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def adapted(pipe: Any, make_config: Any) -> Any:
    """The pipeline with a random adapter, far from zero, on its U-Net and text encoders."""
    import peft

    torch.manual_seed(5)
    for name, part in parts_of(pipe).items():
        peft.inject_adapter_in_model(make_config(UNET if name == "unet" else TEXT), part)
        for key, parameter in part.named_parameters():
            if parameter.requires_grad:
                wide = 0.3 if ("lora_" in key and "magnitude" not in key) else 0.5 if "magnitude" not in key else 0.05
                parameter.data += wide * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        part.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def theirs(pipe: Any, xl: bool) -> dict[str, Tensor]:
    """What diffusers' networks say of fixed input."""
    x, t, context, told = _inputs(pipe.unet.config.cross_attention_dim)
    added = {"text_embeds": told["pooled"], "time_ids": told["sizes"]} if xl else None
    said = {"denoiser": pipe.unet(x, t, context, added_cond_kwargs=added).sample}
    said["text"] = pipe.encode_prompt(
        list(PROMPTS), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return said


@torch.no_grad()
def ours(components: Mapping[str, nn.Module], xl: bool) -> dict[str, Tensor]:
    """What our networks say of it."""
    denoiser: Any = components["denoiser"]
    x, t, context, told = _inputs(denoiser.config.context_dim)
    cond = Conditioning(context=context, **(told if xl else {}))
    return {"denoiser": denoiser(x, t, cond), "text": components["text"](PROMPTS).context}


def _inputs(width: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    told = {"pooled": torch.randn(2, 1280, generator=generator), "sizes": torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)}
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, width, generator=generator)
    return x, torch.tensor([10.0, 700.0]), context, told


def apart(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest difference of any network, relative to its largest output."""
    return max(float((ours[n] - r).abs().max() / r.abs().max()) for n, r in reference.items())


def our_pictures(model: Path, adapter: Adapter) -> np.ndarray:
    """Pictures [N, H, W, 3], 0..255, after 3 steps."""
    pipe = Pipeline.load(model)
    attach({"denoiser": pipe.denoiser, "text": pipe.text}, adapter)
    request = Request(PROMPTS, SEEDS, steps=3, sampler="ddim", guidance=5.0)
    return np.stack([np.asarray(to_pil(image)) for image in pipe(request)]).astype(int)


def their_pictures(pipe: Any) -> np.ndarray:
    """The same by diffusers, from the same noise."""
    latents = ImageNoise(SEEDS, (4, SIZE // 2, SIZE // 2))()
    made = pipe(
        list(PROMPTS), height=SIZE, width=SIZE, num_inference_steps=3, guidance_scale=5.0, latents=latents,
        output_type="np",
    )  # fmt: skip
    return np.round(made.images * 255).astype(int)

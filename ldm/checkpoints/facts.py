"""What a single file leaves open about its model, told by explicit rules."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.layouts.dit import LATENT_FACTOR
from ldm.checkpoints.layouts.table import Tensors
from ldm.models.dit import DiTConfig
from ldm.models.unet import UNetConfig

SCALE = {"sd": 0.18215, "sdxl": 0.13025, "x4": 0.08333}
"""Latent scale by family; a file does not say it, and programs that read such files have it built in."""


def recorded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a single file of ours says of itself: components with their configs, and settings. Empty for others'."""
    try:
        found = json.loads(metadata.get("ldm", "{}"))
    except (TypeError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def settings(
    configs: Mapping[str, Any], tensors: Tensors, metadata: Mapping[str, Any], prediction: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a model was trained with, from the configs of its components and the rest of its file.

    Returns the settings, with the `latent_scale` of its autoencoder, and a note for each thing that is a rule and
    not in the file. `prediction` overrides what is found. Raises ValueError for an unknown noise schedule.
    """
    if any(name.startswith("edm_") for name in tensors):
        raise ValueError("it is marked as trained by EDM's formulation (edm_...), which is not known here")
    if found := recorded(metadata).get("settings"):
        if prediction and "diffusion" in found:
            found["diffusion"] |= {"prediction": prediction}
        return found, ()
    denoiser = configs.get("denoiser")
    if isinstance(denoiser, DiTConfig):
        positions = tensors.get("dit.pos_embed")
        size = 256 if positions is None else math.isqrt(positions.shape[1]) * denoiser.patch * LATENT_FACTOR
        linear = {
            "schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction": "eps",
            "spacing": "trailing",
        }
        return {"size": size, "diffusion": linear}, ("predicts eps, linear betas: the rule for DiT",)
    if not isinstance(denoiser, UNetConfig):
        rule = f"latent scale {SCALE['sd']}: the rule for a file without a U-Net"
        return {"size": 256, "latent_scale": SCALE["sd"]}, (rule,) if "autoencoder" in configs else ()
    family = _family(denoiser)
    predicts, reason = _prediction(denoiser, family, tensors, metadata, prediction)
    size = {"sdxl": 1024, "x4": 512}.get(family) or (768 if predicts == "v" and denoiser.context_dim == 1024 else 512)
    schedule, start, end = _schedule(tensors, family)
    found = {
        "size": size,
        "latent_scale": SCALE[family],
        "null_prompt": None if family == "sdxl" and not denoiser.aesthetic else "",
        "diffusion": {
            "schedule": schedule,
            "beta_start": start,
            "beta_end": end,
            "prediction": predicts,
            "spacing": "leading",
            "zero_snr": "ztsnr" in tensors,
        },
    }
    return found, (f"predicts {predicts}: {reason}", f"latent scale {SCALE[family]}: the rule for this family")


def _prediction(
    config: UNetConfig, family: str, tensors: Tensors, metadata: Mapping[str, Any], given: str | None
) -> tuple[str, str]:
    """(eps or v, where that is from)."""
    if given:
        return given, "as asked for"
    stated = str(metadata.get("modelspec.prediction_type", "")).lower()
    if stated and not stated.startswith(("v", "eps")):
        raise ValueError(f"its metadata say that it predicts {stated!r}, which is not known here")
    if stated:
        return ("v" if stated.startswith("v") else "eps"), "stated in the file's metadata"
    if "768-v" in str(metadata.get("modelspec.architecture", "")):
        return "v", "stated in the file's metadata"
    if "v_pred" in tensors:
        return "v", "the file carries the mark v_pred"
    if family == "x4":
        return "v", "the rule for the x4 upscaler"
    if config.context_dim == 1024 and config.in_channels == 4:
        if metadata.get("global_step") == 875_000:
            return "eps", "global step 875000, as the 512 px model of Stable Diffusion 2 has"
        return "v", "the rule for Stable Diffusion 2; its 512 px model needs --prediction eps"
    return "eps", "the rule for this family"


def _schedule(tensors: Tensors, family: str) -> tuple[str, float, float]:
    """(kind, first beta, last beta) that the file's own betas have, or else the family's."""
    if "betas" not in tensors:
        return ("scaled_linear", 1e-4, 2e-2) if family == "x4" else ("scaled_linear", 0.00085, 0.012)
    betas = tensors["betas"].double()
    start, end = round(float(betas[0]), 8), round(float(betas[-1]), 8)
    for kind, power in (("scaled_linear", 2), ("linear", 1)):
        expected = torch.linspace(start ** (1 / power), end ** (1 / power), len(betas), dtype=torch.float64) ** power
        if len(betas) == 1000 and torch.allclose(betas, expected, rtol=1e-4):
            return kind, start, end
    raise ValueError(f"its noise schedule of {len(betas)} betas from {start:g} to {end:g} is not known here")


def marked(tensors: Tensors, diffusion: Mapping[str, Any]) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors with the empty ones that tell programs of v-prediction and zero SNR, and notes on what has none."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("v_pred", "ztsnr")}
    if diffusion.get("prediction") == "v":
        kept["v_pred"] = torch.zeros(0)
    if diffusion.get("zero_snr"):
        kept["ztsnr"] = torch.zeros(0)
    schedule, prediction = diffusion.get("schedule", "scaled_linear"), diffusion.get("prediction", "eps")
    if schedule == "scaled_linear" and prediction in ("eps", "v"):
        return kept, ()
    return kept, (f"other programs do not know {schedule} with prediction {prediction} and would read this as eps",)


def latent_scale(denoiser: nn.Module | None) -> float:
    """What programs that read such a file multiply raw latents with."""
    config = getattr(denoiser, "config", None)
    return SCALE[_family(config) if isinstance(config, UNetConfig) else "sd"]


def _family(config: UNetConfig) -> str:
    return "sdxl" if config.size_dim else "x4" if config.classes and config.in_channels == 7 else "sd"


def modelspec(denoiser: nn.Module | None, found: Mapping[str, Any], title: str) -> dict[str, str]:
    """Metadata by the ModelSpec standard 1.0.1, for the published architectures; empty for any other."""
    config = getattr(denoiser, "config", None)
    if not isinstance(config, UNetConfig):
        return {}
    if not {"diffusion", "size"} <= found.keys():
        return {}
    predicts, size = found["diffusion"]["prediction"], found["size"]
    second = "stable-diffusion-v2-768-v" if predicts == "v" else "stable-diffusion-v2-512"
    names = {
        (320, 768): "stable-diffusion-v1",
        (320, 1024): second,
        (320, 2048): "stable-diffusion-xl-v1-base",
        (384, 1280): "stable-diffusion-xl-v1-refiner",
    }
    name = names.get((config.channels, config.context_dim))
    if name is None or predicts not in ("eps", "v"):
        return {}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": name,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if predicts == "v" else "epsilon",
    }

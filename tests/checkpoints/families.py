"""Small random models of every family, for the tests of formats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoints.model import LoadedModel
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.text import TextConfig, TextEncoder, TextPair, TextPairConfig
from ldm.models.unet import UNet, UNetConfig
from tests.parity.reference import randomised

SMALL: dict[str, Any] = dict(channels=32, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=16, heads=2)
LINEAR: dict[str, Any] = dict(heads=8, head_dim=16, linear_projection=True)
CLIP = TextConfig(width=16, layers=3, heads=2, embed_dim=0, activation="quick_gelu", pad_id=49_407)
OPEN_CLIP = replace(CLIP, embed_dim=16, activation="gelu", pad_id=0, skip=1)
SD_DIFFUSION = dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, spacing="leading", zero_snr=False)


def tiny_autoencoder(scale: float, **changes: Any) -> AutoencoderKL:
    config = AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1)
    module = AutoencoderKL(replace(config, **changes))
    module.latent_std.fill_(1 / scale)
    randomised(module)
    return module


def text_to_image(unet: dict[str, Any], text: nn.Module, scale: float = 0.18215, **settings: Any) -> LoadedModel:
    components: dict[str, nn.Module] = {
        "autoencoder": tiny_autoencoder(scale),
        "text": randomised(text, 1),
        "denoiser": randomised(UNet(UNetConfig(**unet)), 2),
    }
    diffusion = SD_DIFFUSION | {"prediction": settings.pop("prediction", "eps")}
    found = {"size": 32, "null_prompt": "", "diffusion": diffusion} | settings
    return LoadedModel(components, found, "tiny", Path("tiny"))


def make(family: str, channels: int = 32) -> LoadedModel:
    """A tiny random model of that family."""
    small = SMALL | dict(channels=channels)
    pair = TextPairConfig(
        replace(CLIP, skip=1, final_norm=False), replace(OPEN_CLIP, width=24, embed_dim=1280, final_norm=False)
    )
    xl = small | LINEAR | dict(multipliers=(1, 2, 4), depths=(0, 1, 2), middle_depth=2, context_dim=40)
    xl |= dict(pooled_dim=1280, pooled_layers=2, size_dim=256)
    refining = xl | dict(depths=(0, 2, 0), context_dim=24, aesthetic=True)
    alone: dict[str, dict[str, nn.Module]] = {
        "autoencoder": {"autoencoder": tiny_autoencoder(0.18215, attention_levels=(1,), latent_channels=16)},
        "controlnet": {
            "controlnet": randomised(ControlNet(ControlNetConfig(UNetConfig(**small), hint_widths=(8, 16))))
        },
        "t2i_adapter": {"t2i_adapter": randomised(T2IAdapter(T2IAdapterConfig((8, 16, 16))))},
        "t2i_adapter_xl": {
            "t2i_adapter": randomised(T2IAdapter(T2IAdapterConfig((8, 16, 24, 24), factor=16, xl=True)))
        },
        "dit": {"denoiser": randomised(DiT(DiTConfig(width=72, depth=2, heads=1, classes=5)))},
        "diffusers dit": {
            "denoiser": randomised(
                DiT(
                    DiTConfig(
                        width=32, depth=2, heads=2, classes=5, frequency_shift=1.0, mlp_norm_eps=1e-5, base_size=16
                    )
                )
            )
        },
        "mmdit": {
            "denoiser": randomised(
                MMDiT(
                    MMDiTConfig(
                        in_channels=4, out_channels=4, width=32, depth=2, heads=2, context_dim=16, pooled_dim=8,
                        base_size=16, max_size=24,
                    )
                )
            )
        },
    }  # fmt: skip
    if family in alone:
        settings = {"size": 64} if family != "mmdit" else {"size": 32}
        settings = {"size": 32} if "dit" in family else settings
        return LoadedModel(alone[family], settings, "tiny", Path("tiny"))
    return {
        "sd1": lambda: text_to_image(small, TextEncoder(CLIP)),
        "sd2": lambda: text_to_image(small | LINEAR, TextEncoder(OPEN_CLIP), prediction="v"),
        "sdxl": lambda: text_to_image(xl, TextPair(pair), 0.13025, null_prompt=None),
        "refiner": lambda: text_to_image(refining, TextEncoder(pair.second), 0.13025),
        "inpainting": lambda: text_to_image(small | dict(in_channels=9), TextEncoder(CLIP)),
        "depth": lambda: text_to_image(small | LINEAR | dict(in_channels=5), TextEncoder(OPEN_CLIP)),
        "x4 upscaler": lambda: text_to_image(
            small | dict(in_channels=7, classes=20, depths=(0, 1), cross_only=(1,), linear_projection=True),
            TextEncoder(OPEN_CLIP), 0.08333, prediction="v",
        ),
    }[family]()  # fmt: skip

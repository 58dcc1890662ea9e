"""Small random pipelines of every kind, and what they can be asked for."""

from dataclasses import replace

import torch

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.cpu import for_cpu
from ldm.pipeline import Control, Given, Pipeline, Request, Upscale, Variation

UNET = UNetConfig(
    in_channels=4, out_channels=4, channels=16, multipliers=(1, 2), blocks=1, depths=(1, 1), context_dim=16, heads=2,
    norm_groups=4,
)  # fmt: skip
CHANNELS = {"plain": 4, "depth": 5, "inpainting": 9, "editing": 8, "enlarging": 7}
PICTURE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
PICTURES = torch.cat([PICTURE, -PICTURE, PICTURE.flip(3)])
MASK = torch.zeros(1, 1, 16, 24)
MASK[..., 4:9, 10:20] = 1
DEPTH = torch.rand(3, 1, 16, 24, generator=torch.Generator().manual_seed(2))
HINT = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3))


def random(module):
    """In evaluation mode, frozen, with no layer left at zero."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return for_cpu(module.eval().requires_grad_(False))


def small(kind="plain", seed=0, **diffusion):
    """A pipeline for pictures of 16 px, 4 px a latent, in multiples of 8 px."""
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(channels=8, multipliers=(1, 1, 1), blocks=1, norm_groups=4)
    text = TextConfig(width=16, layers=1, heads=2, embed_dim=8, context_length=12)
    parts = [random(AutoencoderKL(autoencoder)), random(TextEncoder(text))]
    torch.manual_seed(seed)
    unet = replace(UNET, in_channels=CHANNELS[kind], classes=30 if kind == "enlarging" else 0)
    process = Diffusion.from_config(DiffusionConfig(**{"prediction": "v"} | diffusion))
    return Pipeline(*parts, random(UNet(unet)), process, size=16, name=kind)


def controlnet(seed=5):
    torch.manual_seed(seed)
    return random(ControlNet(ControlNetConfig(UNET, hint_widths=(4, 8, 8))))


def adapter(channels=3):
    torch.manual_seed(6)
    return random(T2IAdapter(T2IAdapterConfig((16, 32), 1, channels, 4)))


def request(**changes):
    """Three images of two prompts."""
    base = Request(("a cat", "a dog", "a cat"), (3, 4, 5), steps=4, guidance=3.0, width=24, height=16)
    return replace(base, **changes)


def modes():
    """name -> (kind of model, what is asked of it)."""
    net, other = controlnet(), adapter()
    return {
        "picture": ("plain", {"given": Given(PICTURES, 0.6)}),
        "part of the steps": ("plain", {"given": Given(PICTURE, 0.6, "part")}),
        "masked": ("plain", {"given": Given(PICTURES, 0.6, mask=MASK, mask_blur=1.0)}),
        "filled": ("plain", {"given": Given(PICTURE, 0.6, mask=MASK, fill="fill")}),
        "filled with noise": ("plain", {"given": Given(PICTURE, 0.6, mask=MASK, fill="noise")}),
        "region": ("plain", {"given": Given(PICTURES, mask=MASK, padding=2)}),
        "depth": ("depth", {"depth": DEPTH, "given": Given(PICTURE, 0.6)}),
        "inpainting": ("inpainting", {"given": Given(PICTURES, mask=MASK)}),
        "inpainting by prompt": ("inpainting", {}),
        "inpainting with a control": (
            "inpainting", {"given": Given(PICTURE, mask=MASK), "controls": (Control(net, HINT),)},
        ),
        "editing with a control": ("editing", {"given": Given(PICTURES), "controls": (Control(other, HINT),)}),
        "editing": ("editing", {"given": Given(PICTURES)}),
        "enlarging": ("enlarging", {"given": Given(PICTURES[..., ::4, ::4]), "width": None, "height": None}),
        "controls": (
            "plain",
            {"controls": (Control(net, HINT, 0.7, end=0.5), Control(net, -HINT + 1), Control(other, HINT, start=0.25))},
        ),
        "variation": ("plain", {"variation": Variation((7, 8, 9), 0.3)}),
        "second pass": ("plain", {"upscale": Upscale(1.5, 0.5, steps=3)}),
        "second pass by pixels": ("plain", {"upscale": Upscale(2.0, 0.5, "lanczos"), "given": Given(PICTURES, 0.6)}),
        "second pass with controls": ("plain", {"upscale": Upscale(), "controls": (Control(net, HINT),)}),
        "second pass of depths": ("depth", {"upscale": Upscale(), "depth": DEPTH}),
    }  # fmt: skip

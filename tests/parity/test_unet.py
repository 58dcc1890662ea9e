"""U-Net and ControlNet against diffusers with random weights."""

import re
from collections.abc import Iterable

import pytest
import torch

from ldm.checkpoints.layouts import unet as layout
from ldm.checkpoints.layouts.table import Entry
from ldm.checkpoints.layouts.unet_config import (
    controlnet_from_diffusers,
    controlnet_to_diffusers,
    from_diffusers,
    to_diffusers,
)
from ldm.models.controlnet import Controlled, ControlNet, ControlNetConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Conditioning
from tests.parity.reference import LIMIT, converted, error, randomised

SMALL = dict(channels=16, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=12, heads=2, norm_groups=4)
VARIANTS = {
    "sd1": SMALL,
    "sd2": SMALL | dict(heads=8, head_dim=8, linear_projection=True),
    "sdxl": SMALL
    | dict(multipliers=(1, 2, 4), depths=(0, 1, 2), middle_depth=2, heads=8, head_dim=8, linear_projection=True)
    | dict(pooled_dim=6, pooled_layers=2, size_dim=8),
    "inpainting": SMALL | dict(in_channels=9),
    "x4 upscaler": SMALL | dict(in_channels=7, classes=20, depths=(0, 1), cross_only=(1,), linear_projection=True),
    "two blocks": SMALL | dict(blocks=2, multipliers=(1, 1, 2), depths=(1, 0, 1)),
    "scale-shift": SMALL | dict(scale_shift=True),
    "learned variance": SMALL | dict(out_channels=8),
}
PLAIN = SMALL | dict(context_dim=0, heads=8, head_dim=8)
PLAIN_VARIANTS = {
    "improved diffusion": PLAIN | dict(depths=(0, 1), scale_shift=True, out_channels=8),
    "guided diffusion": PLAIN | dict(depths=(1, 1), scale_shift=True, residual_resample=True, classes=5),
    "pixel space": PLAIN | dict(in_channels=3, out_channels=6, multipliers=(1, 2, 2), depths=(0, 0, 1)),
    "no attention": PLAIN | dict(depths=(0, 0), middle_depth=0),
}


def told(config: UNetConfig, dtype: torch.dtype, batch: int = 2) -> Conditioning:
    torch.manual_seed(1)
    return Conditioning(
        context=torch.randn(batch, 7, config.context_dim, dtype=dtype) if config.context_dim else None,
        pooled=torch.randn(batch, config.pooled_dim, dtype=dtype) if config.pooled_dim else None,
        sizes=torch.randint(0, 1024, (batch, 6)) if config.size_dim else None,
        label=torch.randint(0, config.classes, (batch,)) if config.classes else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_unet_with_text(name: str, dtype: torch.dtype) -> None:
    from diffusers import UNet2DConditionModel

    config = UNetConfig(**VARIANTS[name])
    words = to_diffusers(config, 16)
    assert from_diffusers(words, "here") == config
    reference = randomised(UNet2DConditionModel.from_config(words)).to(dtype)
    assert from_diffusers(dict(reference.config), "here") == config
    ours = converted(UNet(config), reference, lambda keys: layout.diffusers(config, keys))
    x, t, cond = torch.randn(2, config.in_channels, 16, 24, dtype=dtype), torch.tensor([7, 801]), told(config, dtype)
    added = None if cond.sizes is None else {"text_embeds": cond.pooled, "time_ids": cond.sizes}
    expected = reference(x, t, cond.context, class_labels=cond.label, added_cond_kwargs=added).sample
    assert error(ours(x, t, cond), expected) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLAIN_VARIANTS)
@torch.no_grad()
def test_unet_without_text(name: str, dtype: torch.dtype) -> None:
    from diffusers import UNet2DModel

    config = UNetConfig(**PLAIN_VARIANTS[name])
    words = to_diffusers(config, 16)
    assert from_diffusers(words, "here") == config
    reference = randomised(UNet2DModel.from_config(words)).to(dtype)
    ours = converted(UNet(config), reference, lambda keys: layout.diffusers(config, keys))
    x, t, cond = torch.randn(2, config.in_channels, 16, 8, dtype=dtype), torch.tensor([7, 801]), told(config, dtype)
    expected = reference(x, t, class_labels=cond.label).sample
    assert error(ours(x, t, cond), expected) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_controlnet(dtype: torch.dtype) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet_config = UNetConfig(**VARIANTS["two blocks"])
    config = ControlNetConfig(unet_config, hint_widths=(8, 12, 16, 24))
    words = controlnet_to_diffusers(config)
    assert controlnet_from_diffusers(words, "here") == config
    reference = randomised(ControlNetModel.from_config(words)).to(dtype)
    ours = converted(ControlNet(config), reference, lambda keys: layout.controlnet_diffusers(config, keys))
    base = randomised(UNet2DConditionModel.from_config(to_diffusers(unet_config, 16)), seed=1).to(dtype)
    unet = converted(UNet(unet_config), base, lambda keys: layout.diffusers(unet_config, keys))

    x, t, cond = torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([7, 801]), told(unet_config, dtype)
    hint = torch.rand(2, 3, 128, 128, dtype=dtype)
    down, middle = reference(x, t, cond.context, controlnet_cond=hint, conditioning_scale=0.7, return_dict=False)
    expected = base(x, t, cond.context, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    steered = Conditioning(context=cond.context, control=(hint,))
    assert error(Controlled(unet, ours, scale=0.7)(x, t, steered), expected.sample) <= LIMIT[dtype]


@torch.no_grad()
def test_a_fresh_controlnet_changes_nothing() -> None:
    config = UNetConfig(**SMALL)
    unet = randomised(UNet(config))
    controlnet = ControlNet(ControlNetConfig(config, hint_widths=(4, 8)))
    controlnet.copy_encoder(unet)
    assert torch.equal(controlnet.encoder.conv_in.weight, unet.conv_in.weight)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([7, 801]), told(config, torch.float32)
    steered = Conditioning(context=cond.context, control=(torch.rand(2, 3, 16, 16),))
    assert torch.equal(Controlled(unet, controlnet)(x, t, steered), unet(x, t, cond))
    assert torch.equal(Controlled(unet, controlnet)(x, t, cond), unet(x, t, cond))
    with pytest.raises(ValueError, match="16x16"):
        controlnet(x, t, Conditioning(context=cond.context, control=(torch.rand(2, 3, 8, 8),)))


def test_a_wrong_name_is_noticed() -> None:
    """Planted: two modules of the same shapes exchanged in the table."""
    from diffusers import UNet2DConditionModel

    config = UNetConfig(**VARIANTS["sd1"])
    reference = randomised(UNet2DConditionModel.from_config(to_diffusers(config, 16)))

    def swapped(keys: Iterable[str]) -> list[Entry]:
        table = layout.diffusers(config, keys)
        other = {"to_q": "to_k", "to_k": "to_q"}
        wrong = {e.native: re.sub(r"(?<=attn1\.)to_[qk]", lambda m: other[m[0]], e.foreign[0]) for e in table}
        return [Entry(native, (foreign,)) for native, foreign in wrong.items()]

    ours = converted(UNet(config), reference, swapped)
    x, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([7, 801]), told(config, torch.float32)
    with torch.no_grad():
        assert error(ours(x, t, cond), reference(x, t, cond.context).sample) > 1e-4

"""The KL autoencoder against diffusers with random weights."""

import pytest
import torch

from ldm.checkpoints.layouts import autoencoder as layout
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.parity.reference import LIMIT, converted, error, randomised

SMALL = dict(channels=8, blocks=1, norm_groups=4)
VARIANTS = {
    "f4": SMALL | dict(multipliers=(1, 2, 4), latent_channels=3),
    "f8": SMALL | dict(multipliers=(1, 2, 4, 4), latent_channels=4, blocks=2),
    "f16": SMALL | dict(multipliers=(1, 1, 2, 2, 4), latent_channels=16, attention_levels=(4,)),
    "Stable Diffusion 3": SMALL | dict(multipliers=(1, 2, 2, 2), latent_channels=16, quant=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_autoencoder(name: str, dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL as Reference

    config = AutoencoderConfig(**VARIANTS[name])
    words = layout.to_diffusers(config, 64, scale=0.5, shift=0.25)
    assert layout.from_diffusers(words, "here") == config
    reference = randomised(Reference.from_config(words)).to(dtype)
    ours = converted(AutoencoderKL(config), reference, lambda keys: layout.diffusers(config, keys))
    ours.latent_mean.fill_(0.25)
    ours.latent_std.fill_(2.0)
    image = torch.rand(2, 3, 32, 48, dtype=dtype) * 2 - 1
    expected = reference.encode(image).latent_dist
    latent = (expected.mode() - 0.25) * 0.5
    assert error(ours.encode(image), latent) <= LIMIT[dtype]
    assert error(ours.posterior(image).logvar, expected.logvar) <= LIMIT[dtype]
    assert error(ours.decode(latent), reference.decode(latent / 0.5 + 0.25).sample) <= LIMIT[dtype]


def test_names_of_older_folders() -> None:
    old = "decoder.mid_block.attentions.0.proj_attn.weight"
    assert layout.modern(old) == "decoder.mid_block.attentions.0.to_out.0.weight"
    assert layout.modern("encoder.mid_block.attentions.0.query.bias") == "encoder.mid_block.attentions.0.to_q.bias"
    assert layout.modern("encoder.conv_in.weight") == "encoder.conv_in.weight"

"""Latents as small pictures."""

import torch
from torch.nn import functional as F

from ldm.models.preview import LatentPreview


def test_a_linear_decoder_is_found_exactly() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 4) / 8, torch.tensor([0.1, -0.2, 0.3])
    latent = torch.randn(2, 4, 6, 5)
    small = torch.einsum("bchw,kc->bkhw", latent, weight) + bias[:, None, None]
    texture = torch.randn(2, 3, 48, 40)
    texture -= F.interpolate(F.avg_pool2d(texture, 8), scale_factor=8)  # of no mean in any block
    found = LatentPreview.fit(latent, F.interpolate(small, scale_factor=8) + texture)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found(latent), small.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_latents_that_say_nothing_still_give_a_picture() -> None:
    flat = torch.ones(1, 4, 4, 4)
    found = LatentPreview.fit(flat, torch.full((1, 3, 32, 32), 0.5))
    torch.testing.assert_close(found(flat), torch.full((1, 3, 4, 4), 0.5), rtol=0, atol=1e-3)

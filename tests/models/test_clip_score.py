"""CLIP's score of a latent against its parts taken by hand, Pillow's resizing and finite differences."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.models.clip import CLIP, ImageConfig, ImageEncoder
from ldm.models.clip_score import clip_score, to_square
from ldm.models.text import TextConfig, TextEncoder


def clip() -> CLIP:
    torch.manual_seed(0)
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, embed_dim=8, context_length=12, embedding_std=1.0))
    image = ImageEncoder(ImageConfig(size=16, patch=4, width=16, layers=2, heads=2, embed_dim=8))
    return CLIP(text, image).double().eval().requires_grad_(False)


PROMPTS = ["a red circle", "a blue square"]


def decode(latent: torch.Tensor) -> torch.Tensor:
    """[B, 2, h, w] -> [B, 3, 4 h, 4 w], beyond [-1, 1] too."""
    colours = torch.tensor([[1.0, 0.3], [-0.5, 1.0], [0.2, -1.0]], dtype=torch.float64)
    return F.interpolate(torch.einsum("ic,bchw->bihw", colours, latent), scale_factor=4, mode="bilinear")


def test_score_is_the_cosine_of_the_two_embeddings() -> None:
    model, x0 = clip(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    image = model.image.tower(decode(x0))
    text = model.text.tower(model.text.tokenize(PROMPTS))[0]
    expected = (image * text).sum(1) / (image.square().sum(1) * text.square().sum(1)).sqrt()
    torch.testing.assert_close(clip_score(model, PROMPTS, decode)(x0), expected)
    one = clip_score(model, PROMPTS[:1], decode)(x0)
    torch.testing.assert_close(one[0], expected[0])
    assert (expected.abs() < 1).all() and (one[1] - expected[1]).abs() > 1e-3


def test_larger_pictures_are_cut_and_shrunk_as_pillow_does() -> None:
    image = torch.rand(1, 3, 40, 52, dtype=torch.float64) * 2 - 1
    bands = [Image.fromarray(band.float().numpy()).crop((6, 0, 46, 40)) for band in image[0]]
    expected = [np.asarray(band.resize((16, 16), Image.Resampling.BICUBIC)) for band in bands]
    torch.testing.assert_close(to_square(image, 16)[0].float(), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0)
    assert torch.equal(to_square(image[..., :16, :16], 16), image[..., :16, :16])
    model, x0 = clip(), torch.randn(2, 2, 7, 5, dtype=torch.float64)
    expected_score = clip_score(model, PROMPTS, lambda x: to_square(decode(x), 16))(x0)
    torch.testing.assert_close(clip_score(model, PROMPTS, decode)(x0), expected_score)


def test_gradient_by_finite_differences_and_that_it_leads_up() -> None:
    model = clip()
    torch.manual_seed(1)
    x0 = torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():  # where a pipeline may make it
        score = clip_score(model, PROMPTS, decode)
    before = score(x0)
    (gradient,) = torch.autograd.grad(before.sum(), x0)
    with torch.no_grad():
        for _ in range(5):
            direction, h = torch.randn_like(x0), 1e-5
            slope = (score(x0 + h * direction) - score(x0 - h * direction)) / (2 * h)
            torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)
        x = x0.clone()
        for _ in range(50):
            with torch.enable_grad():
                (up,) = torch.autograd.grad(score(x.requires_grad_()).sum(), x)
            x = x.detach() + 0.3 * up / up.square().sum((1, 2, 3), keepdim=True).sqrt()
        assert (score(x) > before + 0.1).all()

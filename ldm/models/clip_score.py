"""How well a latent fits a prompt, in the eyes of a CLIP: what CLIP guidance follows."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.clip import CLIP


def clip_score(clip: CLIP, prompts: Sequence[str], decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x0 [B, C, h, w] -> the cosines [B] in -1..1 between CLIP's embeddings of image i and of prompt i.

    Nichol et al. 2022 (GLIDE), sec. 2.4, follow the gradient of this product, there with a CLIP trained on noised
    pictures; one trained on clean pictures is shown the estimate of x0. The temperature is left out: the guidance
    scale is in its place.

    clip: both towers, which a run of `ContrastiveTask` keeps as the components "text" and "image":
        CLIP(*load_model(path, ["text", "image"]).require("text", "image")).
    prompts: B, or one for all.
    decode: latents -> pictures [B, 3, H, W] in the [-1, 1] that our image towers are trained on, such as an
        autoencoder's own `decode`; not clamped, for that would stop the gradient.
    """
    size = clip.image.config.size
    with torch.inference_mode(False), torch.no_grad():  # the gradient needs a tensor of ordinary mode
        ids = clip.text.tokenize(prompts).to(clip.logit_scale.device)
        wanted = clip.text.features(ids)  # [B, embed_dim], unit vectors

    def score(x0: Tensor) -> Tensor:
        return (clip.image(to_square(decode(x0), size)) * wanted).sum(dim=1)

    return score


def to_square(image: Tensor, size: int) -> Tensor:
    """The largest centred square of image [B, 3, H, W], antialiased, as [B, 3, size, size]."""
    height, width = image.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[..., top : top + side, left : left + side]
    if side == size:
        return square
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False)

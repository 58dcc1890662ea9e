"""CLIP's image tower and temperature, for contrastive training beside a TextEncoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.text import TextEncoder, import_open_clip

MAX_SCALE = 100
"""Of the temperature (Radford et al. 2021, sec. 2.5)."""


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of the vision transformer; the defaults are CLIP ViT-L/14's."""

    size: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    embed_dim: int = 768


class ImageEncoder(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021): pictures -> the joint image-text space."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        import_open_clip()
        from open_clip.transformer import VisionTransformer

        self.tower = VisionTransformer(
            image_size=config.size,
            patch_size=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=config.embed_dim,
        )

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, size, size] in [-1, 1] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.tower(image), dim=-1)


class CLIP(nn.Module):
    """Both towers and the learned temperature (Radford et al. 2021, fig. 3).

    sigmoid: with the bias, and the temperature to start from, of the loss by pairs (Zhai et al. 2023, sec. 3.2).
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder, *, sigmoid: bool = False) -> None:
        super().__init__()
        if text.config.embed_dim != image.config.embed_dim:
            raise ValueError(
                f"clip: text embed_dim {text.config.embed_dim} and image embed_dim "
                f"{image.config.embed_dim} must be equal"
            )
        self.text, self.image = text, image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def forward(self, image: Tensor, ids: Tensor, micro_batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """image [B, 3, S, S] in [-1, 1], ids [B, L] -> (image features, text features, temperature).

        Features are unit vectors [B, embed_dim]; the temperature multiplies their products, at most 100. The towers
        read `micro_batch` samples at a time, 0 = all, and then remember the activations of no more than those.
        """
        scale = self.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()
        return _in_parts(self.image, image, micro_batch), _in_parts(self.text.features, ids, micro_batch), scale

    @torch.no_grad()
    def bound(self) -> None:
        """Take the temperature back to 100 if a step led beyond, where it has no gradient to come back by."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))


def _in_parts(tower: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """The features of x [B, ...], so many rows at a time, each part's activations made again for its gradient.

    That is the gradient cache of Gao et al. 2021: features alone outlive the first pass, and the second replays the
    random numbers of the first.
    """
    if not 0 < rows < len(x):
        return tower(x)
    return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in x.split(rows)])

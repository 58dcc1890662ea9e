"""CLIP's image tower and temperature, for contrastive training beside a TextEncoder."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.text import TextEncoder, import_open_clip


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
    """Both towers and the learned temperature (Radford et al. 2021, fig. 3)."""

    def __init__(self, text: TextEncoder, image: ImageEncoder) -> None:
        super().__init__()
        if text.config.embed_dim != image.config.embed_dim:
            raise ValueError(
                f"clip: text embed_dim {text.config.embed_dim} and image embed_dim "
                f"{image.config.embed_dim} must be equal"
            )
        self.text, self.image = text, image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [B, 3, S, S] in [-1, 1], ids [B, L] -> (image features, text features, temperature).

        Features are unit vectors [B, embed_dim]; the temperature multiplies their products, at most 100.
        """
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return self.image(image), self.text.features(ids), scale

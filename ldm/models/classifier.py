"""A classifier of noised latents (Dhariwal and Nichol 2021, sec. 4): what classifier guidance follows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet import UNetConfig, UNetEncoder
from ldm.names import known
from ldm.nn.blocks import Attention
from ldm.nn.embeddings import position_embedding
from ldm.types import Conditioning


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """Its classes, and the sizes of the half U-Net (see `UNetConfig`), by default those of the paper (table 12)."""

    classes: tuple[str, ...] = ()  # what its outputs mean, in order: words or phrases
    in_channels: int = 4
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 2
    depths: tuple[int, ...] = (0, 1, 1, 1)  # levels with attention after each residual block: not 0
    head_dim: int = 64
    norm_groups: int = 32

    @property
    def unet(self) -> UNetConfig:
        """The U-Net whose encoder it is."""
        return UNetConfig(
            in_channels=self.in_channels,
            channels=self.channels,
            multipliers=self.multipliers,
            blocks=self.blocks,
            depths=self.depths,
            context_dim=0,
            head_dim=self.head_dim,
            scale_shift=True,
            residual_resample=True,
            norm_groups=self.norm_groups,
        )


class AttentionPool(nn.Module):
    """The mean over all pixels asks the pixels, and itself, what to keep (Radford et al. 2021, sec. 2.4).

    x [B, C, H, W] -> [B, C]. Positions are sinusoids instead of learned, so that any size will do.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3))[:, None]  # [B, 1, C]
        placed = x + position_embedding(x.shape[2], x.shape[3], x.shape[1]).to(x)
        tokens = torch.cat([mean, placed.flatten(2).transpose(1, 2)], dim=1)  # [B, 1 + H W, C]
        return self.attention(mean, tokens)[:, 0]


class NoisyClassifier(nn.Module):
    """x_t [B, C, H, W] with H and W multiples of `factor`, t [B] as a denoiser is told it -> logits [B, classes].

    Raises ValueError for fewer than two classes, and for names that are empty or the same but for case.
    """

    def __init__(self, config: NoisyClassifierConfig) -> None:
        super().__init__()
        names = set(map(_plain, config.classes))
        if len(names) < 2 or len(names) < len(config.classes) or "" in names:
            raise ValueError(f"a classifier needs two or more different classes, got {list(config.classes)}")
        self.config = config
        self.encoder = UNetEncoder(config.unet)
        width = self.encoder.skip_widths[-1]
        self.norm = nn.GroupNorm(config.norm_groups, width)
        self.pool = AttentionPool(width, config.unet.heads_at(width))
        self.out = nn.Linear(width, len(config.classes))

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return self.encoder.factor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        nothing = Conditioning()
        emb = self.encoder.embed(t, nothing, x.dtype)
        h, _ = self.encoder.encode(self.encoder.conv_in(x), emb, nothing)  # [B, C', H / factor, W / factor]
        return self.out(self.pool(F.silu(self.norm(h))))


def log_prob(classifier: NoisyClassifier, classes: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t [B, C, H, W], t [B]) -> log p(class of image i | x_t, t) [B], by whose gradient in x_t to guide.

    classes: one of the classifier's for each of the B images, or one for all. Raises ValueError for another.
    """
    names = classifier.config.classes
    rows = [names.index(known("class", name, names)) for name in classes]

    def score(x: Tensor, t: Tensor) -> Tensor:
        return classifier(x, t).log_softmax(dim=1)[torch.arange(len(x)), rows]

    return score


def find_class(text: str, classes: Sequence[str]) -> int | None:
    """The index of the class that `text` names first, as whole words in any case; None if it names none.

    Where two begin at one place the longer wins: "black cat" before "black". Spaces may be any white space.
    """
    text, found = _plain(text), []
    for index, name in enumerate(map(_plain, classes)):
        if name in text and (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)):
            found.append((match.start(), -len(name), index))
    return min(found)[2] if found else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())

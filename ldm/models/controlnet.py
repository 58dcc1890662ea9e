"""ControlNet (Zhang et al. 2023): a second encoder that steers a frozen U-Net by a picture, such as edges."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet import UNet, UNetConfig, UNetEncoder
from ldm.nn.blocks import zero_init
from ldm.types import Conditioning, Denoiser


@dataclass(frozen=True)
class ControlNetConfig:
    """The U-Net whose encoder is copied, and the network that brings the hint to its latent size."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # each but the last halves the size: 8 times smaller


class ControlNet(nn.Module):
    """x [B, C, H, W], t [B], cond with control = (hint [B, 3, H f, W f] in [0, 1],) -> maps for a U-Net.

    The maps, one per skip connection and one for the middle, come out of convolutions that start at zero.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = UNetEncoder(config.unet)
        first, *_ = widths = config.hint_widths
        convs = [nn.Conv2d(config.hint_channels, first, 3, padding=1)]
        for a, b in pairwise(widths):
            convs += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        out = nn.Conv2d(widths[-1], config.unet.channels, 3, padding=1)
        self.hint = nn.ModuleList([*convs, zero_init(out)])
        self.zero = nn.ModuleList(zero_init(nn.Conv2d(w, w, 1)) for w in self.encoder.skip_widths)
        middle = self.encoder.skip_widths[-1]
        self.zero_middle = zero_init(nn.Conv2d(middle, middle, 1))

    @property
    def hint_factor(self) -> int:
        """Pixels of the hint per pixel of x, along each side."""
        return 2 ** (len(self.config.hint_widths) - 1)

    def copy_encoder(self, unet: UNet) -> None:
        """Start from the U-Net's own encoder, as the paper does."""
        theirs = unet.state_dict()
        self.encoder.load_state_dict({name: theirs[name] for name in self.encoder.state_dict()})

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        if len(cond.control) != 1:
            raise ValueError(f"a ControlNet is told one hint picture, got {len(cond.control)}")
        h = cond.control[0].to(x)
        expected = tuple(side * self.hint_factor for side in x.shape[-2:])
        if tuple(h.shape[-2:]) != expected:
            raise ValueError(f"the hint must be {expected[1]}x{expected[0]} px, got {h.shape[-1]}x{h.shape[-2]}")
        *convs, out = self.hint
        for conv in convs:
            h = F.silu(conv(h))
        emb = self.encoder.embed(t, cond, x.dtype)
        middle, skips = self.encoder.encode(self.encoder.conv_in(x) + out(h), emb, cond)
        maps = [zero(skip) for zero, skip in zip(self.zero, skips, strict=True)]
        return (*maps, self.zero_middle(middle))


class Controlled(nn.Module):
    """A denoiser steered by a ControlNet: another denoiser, equal to the first while the ControlNet is untrained.

    cond.control holds the hint picture; `scale` weighs what the ControlNet says. With no hint it is the denoiser.
    """

    def __init__(self, denoiser: Denoiser, controlnet: ControlNet, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.controlnet, self.scale = denoiser, controlnet, scale

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return self.controlnet.encoder.factor

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if not cond.control:
            return self.denoiser(x, t, cond)
        maps = self.controlnet(x, t, cond)
        return self.denoiser(x, t, replace(cond, control=tuple(self.scale * m for m in maps)))

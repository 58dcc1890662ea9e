"""ControlNet (Zhang et al. 2023): a second encoder that steers a frozen U-Net by a picture, such as edges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.t2i_adapter import T2IAdapter, once
from ldm.models.typed import in_type_of
from ldm.models.unet import UNet, UNetConfig, UNetEncoder
from ldm.nn.blocks import zero_init
from ldm.nn.embeddings import position_embedding
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
        made = self.encoder.conv_in(x)
        if self.config.unet.positions:
            made = made + position_embedding(made.shape[2], made.shape[3], made.shape[1]).to(made)
        middle, skips = self.encoder.encode(made + out(h), emb, cond)
        maps = [zero(skip) for zero, skip in zip(self.zero, skips, strict=True)]
        return (*maps, self.zero_middle(middle))


class Controlled(nn.Module):
    """A denoiser steered by a ControlNet or T2I-adapter: the denoiser itself while a ControlNet is untrained.

    cond.control holds the hint picture; `scale` weighs what the network says. With no hint it is the denoiser.
    """

    def __init__(self, denoiser: Denoiser, controlnet: ControlNet | T2IAdapter, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.controlnet, self.scale = denoiser, controlnet, scale

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        factor: int = getattr(self.denoiser, "factor", 1)
        return factor

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return controlled(self.denoiser, [(self.controlnet, self.scale)])(x, t, cond)


def controlled(
    denoiser: Denoiser, networks: Sequence[tuple[ControlNet | T2IAdapter, float | Callable[[Tensor], Tensor]]]
) -> Denoiser:
    """The denoiser steered by all the networks, each with its weight: a number, or by t [B] -> [B].

    cond.control holds a hint picture for each network, in their order; their maps are summed. A network whose weights
    are all 0 is not run, and with no hints this is the denoiser. Each network computes in its own type; where that is
    not the type of x, its maps are made so. Where it is, autocast may choose another, as it does for the denoiser.
    What a T2I-adapter makes of a hint does not depend on the noise: without gradients it is made once.
    """
    makers = [once(network) if isinstance(network, T2IAdapter) else network for network, _ in networks]

    def steer(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if not cond.control:
            return denoiser(x, t, cond)
        within: tuple[Tensor, ...] = ()  # of T2I-adapters, one map per level
        after: tuple[Tensor, ...] = ()  # of ControlNets, one per skip connection and the middle
        for (network, weight), make, hint in zip(networks, makers, cond.control, strict=True):
            share = weight(t).to(x).view(-1, 1, 1, 1) if callable(weight) else weight
            if not (share.any() if isinstance(share, Tensor) else share):
                continue
            own, told = in_type_of(network, x, replace(cond, control=(hint,)))
            made = make(own, t, told)
            maps = tuple(share * (m if own.dtype == x.dtype else m.to(x)) for m in made)
            if isinstance(network, T2IAdapter):
                within = _summed(within, maps)
            else:
                after = _summed(after, maps)
        return denoiser(x, t, replace(cond, control=(*within, *after)))

    return steer


def _summed(total: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(total, maps, strict=True)) if total else maps

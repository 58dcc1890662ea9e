"""The U-Net of Stable Diffusion (Rombach et al. 2022, app. E.2.1) and of guided diffusion, in any size."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import Downsample, PixelAttention, ResidualBlock, SpatialTransformer, Upsample, zero_init
from ldm.nn.embeddings import position_embedding, timestep_embedding
from ldm.types import Conditioning


@dataclass(frozen=True)
class UNetConfig:
    """Sizes; the defaults are Stable Diffusion 1.5's: 859,520,964 parameters."""

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; each level but the last halves the size
    blocks: int = 2  # residual blocks per level going down; one more going up
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block, by level; 0 = none
    middle_depth: int = 1
    context_dim: int = 768  # width of the text; 0 = no text: plain self-attention where a depth is not 0
    cross_only: tuple[int, ...] = ()  # levels, 0 = full size, where both attentions of a block look at the text
    pooled_dim: int = 0  # width of the pooled embedding added to the time embedding; 0 = none
    pooled_layers: int = 1  # linear layers it goes through: 1 | 2 (SDXL)
    size_dim: int = 0  # width of each of the six sinusoids of `sizes`, joined to pooled (SDXL: 256); 0 = none
    aesthetic: bool = False  # five of them: a score in the place of the target's height and width (SDXL's refiner)
    classes: int = 0  # rows of the label embedding added to the time embedding; 0 = none
    heads: int = 8  # attention heads, when head_dim is 0
    head_dim: int = 0  # channels per head instead of a fixed number of heads (Stable Diffusion 2: 64)
    linear_projection: bool = False
    positions: bool = False  # tell every pixel where it is; else only the padding's edges do
    scale_shift: bool = False  # time and pooled text scale and shift the norms instead of being added before them
    residual_resample: bool = False  # halve and double inside residual blocks (guided diffusion), not by convolutions
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.multipliers):
            raise ValueError(
                f"unet: depths {self.depths} must name one value per level of multipliers {self.multipliers}"
            )
        widths = [self.channels * m for m in self.multipliers]
        if self.head_dim and any(width % self.head_dim for width in widths):
            raise ValueError(f"unet: head_dim {self.head_dim} must divide every level's channels, {widths}")
        if self.pooled_layers not in (1, 2):
            raise ValueError(f"unet: pooled_layers must be 1 or 2, not {self.pooled_layers}")
        if self.size_dim and self.pooled_layers != 2:
            raise ValueError("unet: size_dim needs pooled_layers 2")
        if self.aesthetic and not self.size_dim:
            raise ValueError("unet: aesthetic needs a size_dim: the score is told as the sizes are")

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def sizes(self) -> int:
        """How many numbers a row of a conditioning's `sizes` has."""
        return 5 if self.aesthetic else 6

    @property
    def added_dim(self) -> int:
        """Width of all that is added to the time embedding by `pooled`: the pooled embedding, and the sizes."""
        return self.pooled_dim + self.sizes * self.size_dim

    def heads_at(self, width: int) -> int:
        """Attention heads of a layer of that many channels."""
        return width // self.head_dim if self.head_dim else self.heads


class UNetLayer(nn.Module):
    """A residual block and, where `depth` is not 0, attention. `level` counts from 0 = full size; None = the middle."""

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, *, depth: int, level: int | None
    ) -> None:
        super().__init__()
        self.residual = residual(config, in_channels, out_channels)
        self.attention: SpatialTransformer | PixelAttention | None = None
        heads, groups = config.heads_at(out_channels), config.norm_groups
        if depth and config.context_dim:
            self.attention = SpatialTransformer(
                out_channels,
                heads,
                config.context_dim,
                depth=depth,
                linear=config.linear_projection,
                cross_only=level in config.cross_only,
                groups=groups,
            )
        elif depth:
            self.attention = PixelAttention(out_channels, heads, groups=groups, eps=1e-5)
            zero_init(self.attention.to_out)

    def forward(self, x: Tensor, emb: Tensor, cond: Conditioning) -> Tensor:
        x = self.residual(x, emb)
        if isinstance(self.attention, SpatialTransformer):
            return self.attention(x, cond.context, cond.mask)
        return x if self.attention is None else self.attention(x)


def residual(
    config: UNetConfig, in_channels: int, out_channels: int, resample: Literal["", "down", "up"] = ""
) -> ResidualBlock:
    """A residual block with this U-Net's way of being told the time; it starts as its skip connection."""
    block = ResidualBlock(
        in_channels,
        out_channels,
        4 * config.channels,
        groups=config.norm_groups,
        scale_shift=config.scale_shift,
        resample=resample,
    )
    zero_init(block.conv2)
    return block


class UNetLevel(nn.Module):
    """The layers of one resolution, then the halving or doubling (absent at the end)."""

    def __init__(self, layers: list[UNetLayer], resample: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def down(self, h: Tensor, emb: Tensor, cond: Conditioning, extra: Tensor | None = None) -> list[Tensor]:
        """Every feature map made on the way, in order; the last one goes on down.

        extra: added to the last layer's, or, if it is of another size, to what that becomes when it is halved.
        """
        made = []
        for layer in self.layers:
            h = layer(h, emb, cond)
            made.append(h)
        if extra is not None and (self.resample is None or extra.shape[-2:] == h.shape[-2:]):
            h, extra = h + extra, None
            made[-1] = h
        if self.resample is None:
            return made
        h = self._resampled(h, emb)
        return [*made, h if extra is None else h + extra]

    def up(self, h: Tensor, skips: list[Tensor], emb: Tensor, cond: Conditioning) -> Tensor:
        """Each layer is joined by a skip connection, taken off the end of `skips`."""
        for layer in self.layers:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb, cond)
        return h if self.resample is None else self._resampled(h, emb)

    def _resampled(self, h: Tensor, emb: Tensor) -> Tensor:
        assert self.resample is not None
        return self.resample(h, emb) if isinstance(self.resample, ResidualBlock) else self.resample(h)


class UNetEncoder(nn.Module):
    """The half of a U-Net that goes down, with the embeddings and the middle: what a ControlNet copies."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_width = 4 * config.channels
        self.time = nn.Sequential(nn.Linear(config.channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.pooled: nn.Module | None = None
        if config.added_dim:
            self.pooled = nn.Linear(config.added_dim, emb_width)
            if config.pooled_layers == 2:
                self.pooled = nn.Sequential(self.pooled, nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label = nn.Embedding(config.classes, emb_width) if config.classes else None
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)

        self.skip_widths = [config.channels]
        width, last = config.channels, len(config.multipliers) - 1
        self.down = nn.ModuleList()
        for level, (multiplier, depth) in enumerate(zip(config.multipliers, config.depths, strict=True)):
            out, layers = config.channels * multiplier, []
            for _ in range(config.blocks):
                layers.append(UNetLayer(config, width, out, depth=depth, level=level))
                width = out
                self.skip_widths.append(out)
            halve = residual(config, out, out, "down") if config.residual_resample else Downsample(out)
            self.down.append(UNetLevel(layers, halve if level < last else None))
            if level < last:
                self.skip_widths.append(out)
        self.middle = UNetLayer(config, width, width, depth=config.middle_depth, level=None)
        self.middle_out = residual(config, width, width)

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return self.config.factor

    def embed(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """Time, pooled text, sizes and label -> [B, 4 channels], added to every residual block."""
        emb = self.time(timestep_embedding(t, self.config.channels).to(dtype))
        if self.pooled is not None:
            told = [_needed("pooled", cond.pooled)] if self.config.pooled_dim else []
            if self.config.size_dim:
                sizes = _needed("sizes", cond.sizes)
                if sizes.shape[1] != self.config.sizes:
                    raise ValueError(f"this U-Net is told {self.config.sizes} sizes, and got {sizes.shape[1]}")
                told.append(timestep_embedding(sizes.flatten(), self.config.size_dim).view(len(sizes), -1).to(dtype))
            emb = emb + self.pooled(torch.cat(told, dim=1))
        return emb if self.label is None else emb + self.label(_needed("label", cond.label))

    def encode(
        self, h: Tensor, emb: Tensor, cond: Conditioning, extras: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """h = conv_in's output -> (the middle's output, all maps made on the way for the skip connections).

        extras: of T2I-adapters, added to what each level makes and, if there is one more, the middle; or none.
        """
        skips, levels = [h], len(self.down)
        if len(extras) not in (0, levels, levels + 1):
            raise ValueError(f"a U-Net of {levels} levels is told a map for each, got {len(extras)}")
        within = [*extras, *[None] * (levels + 1 - len(extras))]
        for level, extra in zip(self.down, within, strict=False):
            assert isinstance(level, UNetLevel)
            skips += level.down(skips[-1], emb, cond, extra)
        h = self.middle_out(self.middle(skips[-1], emb, cond), emb)
        return h if within[-1] is None else h + within[-1], skips


class UNet(UNetEncoder):
    """Predicts eps, x0, v or flow (whatever it was trained for) from a noisy latent, a time and a text.

    x [B, C, H, W] with H and W multiples of `factor`, t [B] in 0..999 (need not be whole), cond with what the
    config asks for: context [B, L, context_dim], pooled, sizes, label; concat fills `in_channels` up beyond C.
    -> [B, out, H, W]; out is 2 C when the variance is learned as well.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        skips = list(self.skip_widths)
        width, self.up = skips[-1], nn.ModuleList()
        for level in reversed(range(len(config.multipliers))):
            out, layers = config.channels * config.multipliers[level], []
            for _ in range(config.blocks + 1):
                layers.append(UNetLayer(config, width + skips.pop(), out, depth=config.depths[level], level=level))
                width = out
            double = residual(config, out, out, "up") if config.residual_resample else Upsample(out)
            self.up.append(UNetLevel(layers, double if level > 0 else None))

        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        emb = self.embed(t, cond, x.dtype)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)
        h = self.conv_in(x)
        if self.config.positions:
            h = h + position_embedding(h.shape[2], h.shape[3], h.shape[1]).to(h)
        # of T2I-adapters one map per level (SDXL's: and the middle), of ControlNets one per skip connection and the
        # middle; either may be absent
        made = len(self.skip_widths) + 1
        extras = cond.control[:-made] if len(cond.control) >= made else cond.control
        h, skips = self.encode(h, emb, cond, extras)
        if len(cond.control) >= made:
            *maps, middle = cond.control[-made:]
            skips = [skip + extra for skip, extra in zip(skips, maps, strict=True)]
            h = h + middle
        for level in self.up:
            assert isinstance(level, UNetLevel)
            h = level.up(h, skips, emb, cond)
        return self.conv_out(F.silu(self.norm_out(h)))


def _needed(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"this U-Net is told {name}, and the conditioning has none")
    return value

"""The text-conditional U-Net of Stable Diffusion (Rombach et al. 2022, app. E.2.1), in any size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import Downsample, ResidualBlock, SpatialTransformer, Upsample, zero_init
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
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block, by level
    middle_depth: int = 1
    context_dim: int = 768
    pooled_dim: int = 0  # width of the pooled embedding added to the time embedding; 0 = none
    heads: int = 8  # attention heads, when head_dim is 0
    head_dim: int = 0  # channels per head instead of a fixed number of heads (Stable Diffusion 2: 64)
    linear_projection: bool = False
    positions: bool = False  # tell every pixel where it is; else only the padding's edges do
    scale_shift: bool = False  # time and pooled text scale and shift the norms instead of being added before them
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.multipliers):
            raise ValueError(
                f"unet: depths {self.depths} must name one value per level of multipliers {self.multipliers}"
            )

    def heads_at(self, width: int) -> int:
        """Attention heads of a layer of that many channels."""
        return width // self.head_dim if self.head_dim else self.heads


class UNetLayer(nn.Module):
    """A residual block and, where the level has attention, a spatial transformer."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        groups = config.norm_groups
        self.residual = ResidualBlock(
            in_channels,
            out_channels,
            4 * config.channels,
            groups=groups,
            zero_out=True,
            scale_shift=config.scale_shift,
        )
        self.transformer = (
            SpatialTransformer(
                out_channels,
                config.heads_at(out_channels),
                config.context_dim,
                depth=depth,
                linear=config.linear_projection,
                groups=groups,
            )
            if depth
            else None
        )

    def forward(self, x: Tensor, emb: Tensor, cond: Conditioning) -> Tensor:
        x = self.residual(x, emb)
        return x if self.transformer is None else self.transformer(x, cond.context, cond.mask)


class DownLevel(nn.Module):
    """The layers of one resolution going down, then the halving (absent at the lowest)."""

    def __init__(self, layers: list[UNetLayer], resample: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def forward(self, h: Tensor, emb: Tensor, cond: Conditioning) -> list[Tensor]:
        """Every feature map made on the way, in order; the last one goes on down."""
        made = []
        for layer in self.layers:
            h = layer(h, emb, cond)
            made.append(h)
        return made if self.resample is None else [*made, self.resample(h)]


class UpLevel(nn.Module):
    """The layers of one resolution going up, each joined by a skip connection, then the doubling."""

    def __init__(self, layers: list[UNetLayer], resample: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor, cond: Conditioning) -> Tensor:
        """Takes its skip connections off the end of `skips`."""
        for layer in self.layers:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb, cond)
        return h if self.resample is None else self.resample(h)


class UNet(nn.Module):
    """Predicts eps, x0, v or flow (whatever it was trained for) from a noisy latent, a time and a text.

    x [B, in, H, W] with H and W multiples of 2^(levels - 1), t [B] in 0..999 (need not be whole),
    cond.context [B, L, context_dim] -> [B, out, H, W].
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_width = 4 * config.channels
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1

        self.time = nn.Sequential(nn.Linear(config.channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.pooled = nn.Linear(config.pooled_dim, emb_width) if config.pooled_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)

        width, skips = config.channels, [config.channels]
        self.down = nn.ModuleList()
        for i, (out, depth) in enumerate(zip(widths, config.depths, strict=True)):
            layers = []
            for _ in range(config.blocks):
                layers.append(UNetLayer(config, width, out, depth))
                width = out
                skips.append(out)
            self.down.append(DownLevel(layers, Downsample(out) if i < last else None))
            if i < last:
                skips.append(out)

        self.middle = UNetLayer(config, width, width, config.middle_depth)
        self.middle_out = UNetLayer(config, width, width, 0)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            out, layers = widths[i], []
            for _ in range(config.blocks + 1):
                layers.append(UNetLayer(config, width + skips.pop(), out, config.depths[i]))
                width = out
            self.up.append(UpLevel(layers, Upsample(out) if i > 0 else None))

        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return 2 ** (len(self.config.multipliers) - 1)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        emb = self.time(timestep_embedding(t, self.config.channels).to(x.dtype))  # [B, 4 C]
        if self.pooled is not None:
            assert cond.pooled is not None
            emb = emb + self.pooled(cond.pooled)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

        h = self.conv_in(x)
        if self.config.positions:
            h = h + position_embedding(h.shape[2], h.shape[3], h.shape[1]).to(h)
        skips = [h]
        for level in self.down:
            skips += level(skips[-1], emb, cond)

        h = self.middle_out(self.middle(skips[-1], emb, cond), emb, cond)
        if cond.control:  # one map per skip connection in the order they were made, then the middle
            *maps, middle = cond.control
            skips = [skip + extra for skip, extra in zip(skips, maps, strict=True)]
            h = h + middle

        for level in self.up:
            h = level(h, skips, emb, cond)
        return self.conv_out(F.silu(self.norm_out(h)))

"""The blocks that the autoencoder and the U-Net are made of."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """norm-SiLU-conv twice, with the time embedding added between (Ho et al. 2020, app. B).

    x [B, C_in, H, W], emb [B, E] or None -> [B, C_out, H, W]. `scale_shift`: the embedding scales and shifts the
    second norm's output instead (Dhariwal and Nichol 2021, eq. 3). `resample`: halves ("down": mean of 2x2) or
    doubles ("up": nearest) H and W in both branches before their convolutions (ibid., sec. 3, from BigGAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_width: int = 0,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
        resample: Literal["", "down", "up"] = "",
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift, self.resample = scale_shift, resample
        self.emb = nn.Linear(emb_width, out_channels * (2 if scale_shift else 1)) if emb_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample:
            h, x = (_resampled(y, self.resample) for y in (h, x))
        h = self.conv1(h)  # [B, C_out, H, W]
        if self.emb is None:
            return self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        assert emb is not None
        told = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        return self.skip(x) + self.conv2(F.silu(h))


def _resampled(x: Tensor, resample: str) -> Tensor:
    return F.avg_pool2d(x, 2) if resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class PixelAttention(nn.Module):
    """Self-attention over the pixels of a feature map, pre-normed and residual (Ho et al. 2020, app. B).

    x [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, channels: int, heads: int = 1, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention width {channels} is not a multiple of its {heads} heads")
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (  # contiguous: what runs by blocks, without all H W x H W scores at once, takes nothing else
            f(h).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()  # [B, heads, H W, C / heads]
            for f in (self.to_q, self.to_k, self.to_v)
        )
        out = attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + self.to_out(out)


class Attention(nn.Module):
    """Multi-head attention of x to a context, or to itself when there is none.

    x [B, L, C], context [B, S, D] -> [B, L, C].
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L or S, C / heads]
            for h in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """x W1 * gelu(x W2) (Shazeer 2020, eq. 6), then back to the width of x."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * expansion * width)
        self.out = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normed and residual.

    x [B, L, C], context [B, S, D] -> [B, L, C]. `cross_only`: the first attention too looks at the text alone.
    """

    def __init__(self, width: int, heads: int, context_width: int, *, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if cross_only else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = GEGLU(width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + (self.attn1(self.norm1(x), context, mask) if self.cross_only else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, app. E.2.1).

    x [B, C, H, W], context [B, S, D] -> [B, C, H, W]. `linear` projects by a linear layer (Stable
    Diffusion 2) instead of a 1x1 convolution (Stable Diffusion 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int,
        *,
        depth: int = 1,
        linear: bool = False,
        cross_only: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        size = x.shape[2:]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, H W, C]
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, context, mask)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, size)  # [B, C, H, W]
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    """A stride-2 convolution. `symmetric=False` pads right and bottom only, as the KL autoencoder does."""

    def __init__(self, channels: int, *, symmetric: bool = True) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

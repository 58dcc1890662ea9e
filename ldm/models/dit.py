"""The diffusion transformer (Peebles and Xie 2023), told a class, a text or both."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import Attention
from ldm.nn.embeddings import timestep_embedding
from ldm.nn.positions import grid, sincos_2d
from ldm.nn.transformer import (
    Mlp,
    SelfAttention,
    check_size,
    check_widths,
    embedder,
    init_transformer,
    layer_norm,
    modulate,
    unpatchify,
)
from ldm.types import Conditioning


@dataclass(frozen=True)
class DiTConfig:
    """Sizes; the defaults are DiT-XL/2's for ImageNet: 674,834,720 parameters.

    The authors' 675,129,632 count the 256 x 1152 numbers of their fixed position embedding too.
    """

    in_channels: int = 4
    out_channels: int = 8  # twice the latent's where the variance is learned: the prediction, then the variance
    patch: int = 2  # latent pixels a side of a token
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    classes: int = 1000  # 0 = not told a class; otherwise label `classes` stands for none
    context_dim: int = 0  # width of the text tokens that every block attends to; 0 = none
    pooled_dim: int = 0  # width of the pooled embedding added to the time embedding; 0 = none
    frequencies: int = 256  # features of the timestep
    frequency_shift: float = 0.0  # time frequencies are 10000^(-i / (half - shift)); 1 in diffusers' DiT
    base_size: int = 0  # spread positions over 0..base_size at every size; 0 = count patches
    mlp_norm_eps: float = 1e-6  # of the norm before each MLP; 1e-5 in diffusers' DiT

    def __post_init__(self) -> None:
        check_widths("dit", self.width, self.heads)


class DiTBlock(nn.Module):
    """Self-attention and an MLP, both modulated and gated by the conditions (adaLN-Zero, sec. 3.2).

    x [B, L, C], emb [B, C], context [B, S, C] -> [B, L, C]. Text is read in between by a plain cross-attention
    (Chen et al. 2023, PixArt-alpha, sec. 2.3).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, config.heads)
        self.cross = Attention(width, config.heads) if config.context_dim else None
        self.norm2 = layer_norm(width, config.mlp_norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        told = self.modulation(F.silu(emb))[:, None].chunk(6, dim=-1)  # each [B, 1, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = told
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None:
            x = x + self.cross(x, context, mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts eps, x0, v or flow (whatever it was trained for) from a noisy latent, a time and a class or text.

    x [B, in, H, W] with H and W multiples of the patch, t [B] in 0..999 (need not be whole), cond.label [B] in
    0..classes, cond.context [B, L, context_dim], cond.pooled [B, pooled_dim] -> [B, out, H, W].
    Raises ValueError for another size of x, and for a condition that is missing.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.time = embedder(config.frequencies, width)
        self.label = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.pooled = nn.Linear(config.pooled_dim, width) if config.pooled_dim else None
        self.context = nn.Linear(config.context_dim, width) if config.context_dim else None
        blocks = [DiTBlock(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = layer_norm(width)
        self.out = nn.Linear(width, config.patch**2 * config.out_channels)

        embedders = [m for m in (self.time, self.label, self.pooled) if m is not None]
        ends = [block.cross.to_out for block in blocks if block.cross is not None]
        init_transformer(self, embedders, [self.modulation, self.out, *ends, *(block.modulation for block in blocks)])

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return self.config.patch

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._check(cond)
        config = self.config
        rows, columns = check_size("dit", x, config.patch)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

        emb = self.time(timestep_embedding(t, config.frequencies, config.frequency_shift).to(x.dtype))  # [B, C]
        if self.label is not None:
            emb = emb + self.label(cond.label)
        if self.pooled is not None:
            emb = emb + self.pooled(cond.pooled)
        context = None if self.context is None else self.context(cond.context)  # [B, S, C]

        h = self.patches(x).flatten(2).transpose(1, 2)  # [B, L, C] with L = rows columns
        down, across = grid(rows, config.base_size, x.device), grid(columns, config.base_size, x.device)
        h = h + sincos_2d(down, across, config.width).to(h.dtype)
        for block in self.blocks:
            h = block(h, emb, context, cond.mask)

        shift, scale = self.modulation(F.silu(emb))[:, None].chunk(2, dim=-1)
        h = self.out(modulate(self.norm(h), shift, scale))  # [B, L, patch^2 out]
        return unpatchify(h, rows, columns, config.patch)

    def _check(self, cond: Conditioning) -> None:
        for name in ("label", "pooled", "context"):
            if getattr(self, name) is not None and getattr(cond, name) is None:
                raise ValueError(f"dit: the conditioning has no {name}, and this model was built to be told one")
        if cond.control:
            raise ValueError("dit: control maps belong to a U-Net; a diffusion transformer has nowhere to add them")

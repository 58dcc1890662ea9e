"""The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention
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
    merge_heads,
    modulate,
    unpatchify,
)
from ldm.types import Conditioning


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes; the defaults are Stable Diffusion 3 medium's: 2,028,328,000 parameters."""

    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2  # latent pixels a side of a token
    width: int = 1536
    depth: int = 24
    heads: int = 24
    mlp_ratio: float = 4.0
    context_dim: int = 4096  # width of the text tokens
    pooled_dim: int = 2048
    frequencies: int = 256  # features of the timestep
    base_size: int = 64  # the grid of positions spans 0..base_size a side
    max_size: int = 192  # positions a side of that grid, of which x takes the middle
    qk_norm: bool = False  # norm queries and keys (Stable Diffusion 3.5)
    dual: tuple[int, ...] = ()  # blocks where image tokens also attend to themselves alone (3.5 medium: 0..12)

    def __post_init__(self) -> None:
        check_widths("mmdit", self.width, self.heads)
        if any(not 0 <= i < self.depth for i in self.dual):
            raise ValueError(f"mmdit: dual {self.dual} must name blocks in 0..{self.depth - 1}")


class Stream(nn.Module):
    """The weights that one kind of token, image or text, has to itself in a block (fig. 2b).

    x [B, L, C], emb [B, C]. `last`: it is only read by the other kind, and ends here. `dual`: a second attention,
    of these tokens to themselves.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool = False, dual: bool = False) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.parts = 2 if last else 9 if dual else 6
        self.modulation = nn.Linear(width, self.parts * width)
        self.norm = layer_norm(width)
        self.attn = SelfAttention(width, heads, qk_norm=config.qk_norm, out=not last)
        self.attn2 = SelfAttention(width, heads, qk_norm=config.qk_norm) if dual else None
        self.mlp = None if last else Mlp(width, int(width * config.mlp_ratio))

    def told(self, emb: Tensor) -> Sequence[Tensor]:
        """The shifts, scales and gates [B, 1, C]: of the attention, of the MLP, of the second attention."""
        return self.modulation(F.silu(emb))[:, None].chunk(self.parts, dim=-1)

    def project(self, x: Tensor, told: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What it brings to the joint attention: q, k and v, each [B, heads, L, C / heads]."""
        return self.attn.project(modulate(self.norm(x), told[0], told[1]))

    def update(self, x: Tensor, attended: Tensor, told: Sequence[Tensor]) -> Tensor:
        """What it makes of the joint attention's answer [B, heads, L, C / heads] -> [B, L, C]."""
        if self.mlp is None:
            return x
        assert self.attn.out is not None
        _, _, gate1, shift2, scale2, gate2, *second = told
        h = x + gate1 * self.attn.out(merge_heads(attended))
        if self.attn2 is not None:
            shift, scale, gate = second
            h = h + gate * self.attn2(modulate(self.norm(x), shift, scale))
        return h + gate2 * self.mlp(modulate(self.norm(h), shift2, scale2))


class JointBlock(nn.Module):
    """One attention over the tokens of image and text together, all else apart (sec. 4).

    x [B, L, C], context [B, S, C], emb [B, C], mask [B, L + S] True where a token counts -> x, context.
    """

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.image = Stream(config, dual=index in config.dual)
        self.text = Stream(config, last=index == config.depth - 1)

    def forward(self, x: Tensor, context: Tensor, emb: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        told_x, told_c = self.image.told(emb), self.text.told(emb)
        pairs = zip(self.image.project(x, told_x), self.text.project(context, told_c), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)  # [B, heads, L + S, C / heads]
        attended = attention(q, k, v, mask)
        for_x, for_context = attended.split([x.shape[1], context.shape[1]], dim=2)
        return self.image.update(x, for_x, told_x), self.text.update(context, for_context, told_c)


class MMDiT(nn.Module):
    """Predicts the flow from a noisy latent, a time and a text.

    x [B, in, H, W] with H and W multiples of the patch and at most max_size patches, t [B] = 1000 x time,
    cond.context [B, L, context_dim], cond.pooled [B, pooled_dim] -> [B, out, H, W].
    Raises ValueError for another size of x, and for a condition that is missing.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.time = embedder(config.frequencies, width)
        self.pooled = embedder(config.pooled_dim, width)
        self.context = nn.Linear(config.context_dim, width)
        blocks = [JointBlock(config, i) for i in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = layer_norm(width)
        self.out = nn.Linear(width, config.patch**2 * config.out_channels)

        zeros = [stream.modulation for block in blocks for stream in (block.image, block.text)]
        init_transformer(self, [self.time, self.pooled], [self.modulation, self.out, *zeros])

    @property
    def factor(self) -> int:
        """H and W of x must be multiples of this."""
        return self.config.patch

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._check(cond)
        assert cond.context is not None
        rows, columns = check_size("mmdit", x, self.config.patch)
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

        emb = self.time(timestep_embedding(t, self.config.frequencies).to(x.dtype)) + self.pooled(cond.pooled)  # [B, C]
        context = self.context(cond.context)  # [B, S, C]
        h = self.patches(x).flatten(2).transpose(1, 2)  # [B, L, C] with L = rows columns
        h = h + self._positions(rows, columns, x.device).to(h.dtype)
        mask = cond.mask  # image tokens always count
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], h.shape[1]), mask], dim=1)  # [B, L + S]
        for block in self.blocks:
            h, context = block(h, context, emb, mask)

        shift, scale = self.modulation(F.silu(emb))[:, None].chunk(2, dim=-1)
        h = self.out(modulate(self.norm(h), shift, scale))  # [B, L, patch^2 out]
        return unpatchify(h, rows, columns, self.config.patch)

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        size = self.config.max_size
        if max(rows, columns) > size:
            raise ValueError(
                f"mmdit: x of {rows} x {columns} patches is larger than the {size} x {size} that have a position"
            )
        axis = grid(size, self.config.base_size, device)
        top, left = (size - rows) // 2, (size - columns) // 2
        return sincos_2d(axis[top : top + rows], axis[left : left + columns], self.config.width)  # [L, C]

    def _check(self, cond: Conditioning) -> None:
        for name in ("context", "pooled"):
            if getattr(cond, name) is None:
                raise ValueError(f"mmdit: the conditioning has no {name}, and this model must be told one")
        if cond.control:
            raise ValueError("mmdit: control maps belong to a U-Net; this model has nowhere to add them")

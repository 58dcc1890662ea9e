"""What the diffusion transformers share: time features, modulation, self-attention, the MLP and patches."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention
from ldm.nn.blocks import zero_init


def embedder(inputs: int, width: int) -> nn.Sequential:
    """The two-layer network that embeds the time features or a pooled text: [B, inputs] -> [B, width]."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def layer_norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    """A layer norm with nothing to learn: what follows it is modulated."""
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift (Perez et al. 2018): x [B, L, C], shift and scale [B, 1, C]."""
    return x * (1 + scale) + shift


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, eq. 4): [..., C] -> [..., C]."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # The mean is a float32 whatever x is, as it was when the published weights were made.
        mean = x.float().pow(2).mean(dim=-1, keepdim=True)
        normed = (x * torch.rsqrt(mean + self.eps)).to(x.dtype)
        return (normed * self.weight).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection (Vaswani et al. 2017, sec. 3.2): [B, L, C] -> [B, L, C].

    `qk_norm`: queries and keys are normed per head (Esser et al. 2024, sec. 5.3.2). `project` and `out` may also be
    called by themselves, by a block whose attention runs over more tokens than these; out=False leaves `out` away.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if out else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, C] -> queries, keys and values, each [B, heads, L, C / heads]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x: Tensor) -> Tensor:
        assert self.out is not None
        return self.out(merge_heads(attention(*self.project(x))))


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, L, D] -> [B, L, heads D]."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with GELU, in its tanh approximation, between: [B, L, C] -> [B, L, C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def check_widths(what: str, width: int, heads: int) -> None:
    """Raises ValueError if `width` does not split into heads, or into sines and cosines of two axes."""
    if width % heads or width % 4:
        raise ValueError(f"{what}: width {width} must be a multiple of 4 and of its {heads} heads")


def check_size(what: str, x: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in x [B, C, H, W]. Raises ValueError if they do not come out even."""
    height, width = x.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"{what}: height and width of x must be multiples of {patch}, not {height} x {width}")
    return height // patch, width // patch


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """[B, rows columns, patch^2 C], channels last within a patch -> [B, C, rows patch, columns patch]."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # [B, rows, columns, patch, patch, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def init_transformer(model: nn.Module, embedders: Iterable[nn.Module], zeros: Iterable[nn.Module]) -> None:
    """The starting point of DiT (Peebles and Xie 2023, sec. 3.2 and 4): every block the identity, the output zero.

    Linear layers, of which the patch projection is one: Glorot, zero bias. `embedders` of the conditions: normal, 0.02.
    `zeros`: the modulations, and what ends a branch that has no gate.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (m for embedder in embedders for m in embedder.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in zeros:
        zero_init(module)

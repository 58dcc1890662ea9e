"""Scaled dot-product attention with a back-end chosen in one place. The only importer of xformers."""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "xformers", "math")
_backend = "sdpa"


def set_backend(name: str, device: torch.device | str = "cpu") -> None:
    """Use back-end `name` for every attention from now on: one of sdpa, xformers, math.

    xformers is probed by a real call on `device`, since it can import and still have no working
    operator. Raises ValueError for an unknown name or one that cannot run here.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention back-end {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "xformers":
        probe = torch.zeros(1, 1, 8, 8, device=device)
        try:
            _xformers(probe, probe, probe, None)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"attention back-end 'xformers' does not work on {device} here ({reason}); use 'sdpa'"
            ) from error
    _backend = name


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1).

    q [B, H, L, D], k and v [B, H, S, D], mask [B, S] True where a key counts -> [B, H, L, D].
    """
    if _backend == "xformers":
        return _xformers(q, k, v, mask)
    keep = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, S]
    if _backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, L, S]
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.softmax(dim=-1) @ v


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))  # [B, S]
        bias = bias[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # xformers wants [B, L, H, D]
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)

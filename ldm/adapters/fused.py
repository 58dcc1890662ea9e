"""The weights that adapters change, by name; fused projections taken apart from outside and put together again.

Adapters of the field act on queries, keys and values apart. Where a network has them in one matrix, the parts have
the name of the whole and .q, .k or .v.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.transformer import SelfAttention

PARTS = ("q", "k", "v")


def sites(component: nn.Module) -> dict[str, Tensor]:
    """Native module name -> its weight [O, I] or [O, I, k, k], without gradient; what is written to it stays.

    The projection behind a text encoder, a parameter [I, O] without a layer, is seen turned round. Raises ValueError
    for a component that training adapters were injected into: its names are not its own then.
    """
    found: dict[str, Tensor] = {}
    for name, module in component.named_modules():
        if name.endswith("base_layer"):
            raise ValueError(f"the component has adapters in training at {name.removesuffix('.base_layer')}")
        if isinstance(projection := getattr(module, "text_projection", None), nn.Parameter):
            found[f"{name}.text_projection"] = projection.detach().T
        if isinstance(module, nn.MultiheadAttention):
            found |= _thirds(f"{name}.in_proj", module.in_proj_weight.detach())
        elif isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach()
            fused = name.rpartition(".")[2] == "qkv"
            found |= _thirds(name, weight) if fused else {name: weight}
    return found


def _thirds(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {f"{name}.{x}": part for x, part in zip(PARTS, weight.chunk(3), strict=True)}


class Parts(nn.Module):
    """A fused linear layer as three: x [..., in] -> [..., 3 out], equal to the whole.

    The three share the memory of the whole, and its class, which may be one with a kernel of its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, layer: type[nn.Linear]) -> None:
        super().__init__()
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        self.q, self.k, self.v = (_linear(w, b, layer) for w, b in zip(weight.detach().chunk(3), biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def whole(self) -> nn.Linear:
        """The fused layer again."""
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([part.bias.detach() for part in parts])
        return _linear(torch.cat([part.weight.detach() for part in parts]), bias, type(self.q))


def _linear(weight: Tensor, bias: Tensor | None, layer: type[nn.Linear]) -> nn.Linear:
    """A frozen linear layer around these very tensors."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    made.__class__ = layer
    return made


class SplitAttention(nn.Module):
    """nn.MultiheadAttention for batches first, its input projection in three; called and answering as that is.

    query, key and value must be one tensor [B, L, C]; attn_mask is added to the scores -> ([B, L, C], None).
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        assert fused.batch_first and fused.bias_k is None and not fused.add_zero_attn and not fused.dropout
        self.heads = fused.num_heads
        self.in_proj = Parts(fused.in_proj_weight, fused.in_proj_bias, nn.Linear)
        self.out_proj: nn.Linear = fused.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        assert query is key is value and not need_weights
        q, k, v = (
            h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, C / heads]
            for h in self.in_proj(query).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def whole(self) -> nn.MultiheadAttention:
        """The fused attention again."""
        fused_in = self.in_proj.whole()
        made = nn.MultiheadAttention(self.out_proj.in_features, self.heads, batch_first=True, device="meta")
        made.in_proj_weight = nn.Parameter(fused_in.weight, requires_grad=False)
        made.in_proj_bias = nn.Parameter(fused_in.bias, requires_grad=False)
        made.out_proj = self.out_proj  # type: ignore[assignment]
        return made.train(self.training)


def unfuse(component: nn.Module) -> None:
    """Take its fused projections apart; what it says stays."""
    for parent in list(component.modules()):
        if isinstance(parent, SelfAttention) and isinstance(parent.qkv, nn.Linear):
            whole = parent.qkv
            _put(parent, "qkv", Parts(whole.weight, whole.bias, type(whole)))
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                _put(parent, name, SplitAttention(child))


def fuse(component: nn.Module) -> None:
    """Undo `unfuse`, with the weights as they are now."""
    for parent in list(component.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Parts | SplitAttention) and not isinstance(parent, SplitAttention):
                _put(parent, name, child.whole())


def _put(parent: nn.Module, name: str, child: Any) -> None:
    child.train(parent.training)
    setattr(parent, name, child)

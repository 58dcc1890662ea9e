"""A denoiser weakened from outside, for guidance away from what it then says: c + s (c - weakened)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.controlnet import Controlled
from ldm.models.dit import DiT, DiTBlock
from ldm.models.mmdit import JointBlock, MMDiT
from ldm.models.unet import UNet, UNetLayer, UNetLevel
from ldm.names import known
from ldm.nn.attention import attention
from ldm.nn.blocks import Attention, PixelAttention, SpatialTransformer
from ldm.nn.transformer import SelfAttention, merge_heads
from ldm.types import Conditioning, Denoiser

HOW = ("identity", "skip")
Forward = Callable[..., Any]


def perturbed(network: nn.Module, layers: str, how: str = "identity") -> Denoiser:
    """The same network, weakened in `layers` for the length of each call.

    layers: names of `layers_of`, or their beginnings, with commas between: "mid", "down.2,mid", "7,8,9".
    how: what becomes of them.
        identity: every image token attends to itself alone, so that self-attention says out(v(x)); what it reads of
            the text stays (perturbed-attention guidance, Ahn et al. 2024, sec. 4, there with "mid"). In a joint
            attention an image token has itself and the text left to attend to, and the text still reads everything.
        skip: they hand on what they are given (skip-layer guidance, Stability AI's inference code for Stable
            Diffusion 3.5, for whose medium size it takes "7,8,9").
    Parameters and buffers stay as they are. Two calls of one network must not overlap in time, on two threads say:
    the other would be weakened as well. Raises ValueError for a word or a layer that is not known.
    """
    forwards: dict[nn.Module, Forward] = {}
    for layer in select(network, layers, how):
        forwards |= _identity(layer) if how == "identity" else _skip(layer)

    def weak(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with _replaced(forwards):
            output: Tensor = network(x, t, cond)
        return output

    return weak


def layers_of(network: nn.Module, how: str = "identity") -> dict[str, nn.Module]:
    """The layers that can be weakened, by name, in the order they run.

    U-Net: its attention layers. "down.2.1" is the second of level 2 on the way down, where 0 is full size; "mid";
    "up.0.2" the third of the first level on the way up, where 0 is the smallest. identity leaves out those whose
    attention looks at the text alone. Diffusion transformers: their blocks, "0", "1", ...
    Raises ValueError if there are none.
    """
    known("way to weaken a network", how, HOW)
    if isinstance(network, Controlled):
        assert isinstance(network.denoiser, nn.Module)
        return layers_of(network.denoiser, how)
    found: dict[str, nn.Module] = {}
    if isinstance(network, DiT | MMDiT):
        found = {str(index): block for index, block in enumerate(network.blocks)}
    elif isinstance(network, UNet):
        layers = _levels("down", network.down) | {"mid": network.middle} | _levels("up", network.up)
        attentions = {name: layer.attention for name, layer in layers.items()}
        found = {name: a for name, a in attentions.items() if a is not None and (how == "skip" or _identity(a))}
    if not found:
        raise ValueError(f"this {type(network).__name__} has no layers that {how} could weaken")
    return found


def select(network: nn.Module, layers: str, how: str = "identity") -> list[nn.Module]:
    """The layers that the words of `layers` name. Raises ValueError for a word that names none, with those known."""
    found = layers_of(network, how)
    beginnings = {".".join(name.split(".")[:n]) for name in found for n in (1, 2, 3)}
    words = [known("layer", word.strip(), beginnings) for word in layers.split(",")]
    return [layer for name, layer in found.items() if any(f"{name}.".startswith(f"{word}.") for word in words)]


def _levels(side: str, levels: nn.ModuleList) -> dict[str, UNetLayer]:
    found = {}
    for i, level in enumerate(levels):
        assert isinstance(level, UNetLevel)
        for j, layer in enumerate(level.layers):
            assert isinstance(layer, UNetLayer)
            found[f"{side}.{i}.{j}"] = layer
    return found


def _identity(layer: nn.Module) -> dict[nn.Module, Forward]:
    """What takes the place of the forward of each self-attention in the layer."""
    if isinstance(layer, SpatialTransformer):
        blocks: list[Any] = list(layer.blocks)
        return {block.attn1: partial(_attention, block.attn1) for block in blocks if not block.cross_only}
    if isinstance(layer, PixelAttention):
        return {layer: partial(_pixel_attention, layer)}
    if isinstance(layer, DiTBlock):
        return {layer.attn: partial(_self_attention, layer.attn)}
    assert isinstance(layer, JointBlock)
    forwards: dict[nn.Module, Forward] = {layer: partial(_joint_block, layer)}
    if layer.image.attn2 is not None:
        forwards[layer.image.attn2] = partial(_self_attention, layer.image.attn2)
    return forwards


def _attention(layer: Attention, x: Tensor) -> Tensor:
    return layer.to_out(layer.to_v(x))


def _pixel_attention(layer: PixelAttention, x: Tensor) -> Tensor:
    return x + layer.to_out(layer.to_v(layer.norm(x)))


def _self_attention(layer: SelfAttention, x: Tensor) -> Tensor:
    assert layer.out is not None
    return layer.out(merge_heads(layer.project(x)[2]))


def _joint_block(
    block: JointBlock, x: Tensor, context: Tensor, emb: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """JointBlock.forward, but the attention of image tokens to one another is the identity."""
    told_x, told_c = block.image.told(emb), block.text.told(emb)
    q, k, v = block.image.project(x, told_x)  # [B, heads, L, C / heads]
    q_text, k_text, v_text = block.text.project(context, told_c)  # [B, heads, S, C / heads]
    scaled = q * q.shape[-1] ** -0.5
    to_itself = (scaled * k).sum(dim=-1, keepdim=True)  # [B, heads, L, 1]
    to_text = scaled @ k_text.transpose(-1, -2)  # [B, heads, L, S]
    if mask is not None:
        to_text = to_text.masked_fill(~mask[:, None, None, x.shape[1] :], float("-inf"))
    weights = torch.cat([to_itself, to_text], dim=-1).softmax(dim=-1)
    for_x = weights[..., :1] * v + weights[..., 1:] @ v_text
    for_context = attention(q_text, torch.cat([k, k_text], dim=2), torch.cat([v, v_text], dim=2), mask)
    return block.image.update(x, for_x, told_x), block.text.update(context, for_context, told_c)


def _skip(layer: nn.Module) -> dict[nn.Module, Forward]:
    """What takes the place of the layer's forward so that it changes nothing."""
    if isinstance(layer, JointBlock):
        return {layer: lambda x, context, *_: (x, context)}
    return {layer: lambda x, *_: x}


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within the block the modules run these; an attribute of the module itself hides the method of its class."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            del module.__dict__["forward"]
            if own is not None:  # something else had put its own there
                module.__dict__["forward"] = own

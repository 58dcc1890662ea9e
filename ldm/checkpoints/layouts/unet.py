"""What CompVis and diffusers call the parts of a U-Net and of a ControlNet."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ldm.checkpoints.layouts.table import Entry, entries
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig

Names = Iterator[tuple[str, str]]

COMPVIS, DIFFUSERS = 0, 1
"""Columns of the leaf tables."""

RESIDUAL = {
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "emb": ("emb_layers.1", "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "skip": ("skip_connection", "conv_shortcut"),
}
BLOCK = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{x}": f"attn{i}.to_{x}" for i in (1, 2) for x in "qkv"},
    **{f"attn{i}.to_out": f"attn{i}.to_out.0" for i in (1, 2)},
    "ff.proj": "ff.net.0.proj",
    "ff.out": "ff.net.2",
}
TOP = {  # what is not in a level
    "time.0": ("time_embed.0", "time_embedding.linear_1"),
    "time.2": ("time_embed.2", "time_embedding.linear_2"),
    "pooled.0": ("label_emb.0.0", "add_embedding.linear_1"),
    "pooled.2": ("label_emb.0.2", "add_embedding.linear_2"),
    "label": ("label_emb", "class_embedding"),
    "conv_in": ("input_blocks.0.0", "conv_in"),
    "norm_out": ("out.0", "conv_norm_out"),
    "conv_out": ("out.2", "conv_out"),
}


@dataclass(frozen=True)
class Part:
    """One layer or change of resolution: our module, theirs (CompVis, diffusers), and what is in it."""

    native: str
    foreign: tuple[str, str]
    kind: str  # residual | attention | conv


def compvis(config: UNetConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for names below `model.diffusion_model.`. ValueError if that format cannot hold this U-Net."""
    _compvis_representable(config)
    return entries(keys, _modules(config, COMPVIS))


def diffusers(config: UNetConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for UNet2DConditionModel, or UNet2DModel for a U-Net without text."""
    _representable(config, "diffusers")
    keys = list(keys)
    special = [
        Entry(key, (_diffusers_attention(key, config),), "matrix" if key.endswith("weight") else "same")
        for key in keys
        if not config.context_dim and re.search(r"attention\.to_", key)
    ]
    return entries(keys, _modules(config, DIFFUSERS), special)


def controlnet_compvis(config: ControlNetConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for names below `control_model.` (lllyasviel). ValueError if that format cannot hold it."""
    _compvis_representable(config.unet)
    hints = 2 * len(config.hint_widths)
    extra = [(f"hint.{i}", f"input_hint_block.{2 * i}") for i in range(hints)]
    extra += [(f"zero.{i}", f"zero_convs.{i}.0") for i in range(_skips(config.unet))]
    encoder = ((f"encoder.{ours}", theirs) for ours, theirs in _modules(config.unet, COMPVIS))
    return entries(keys, [*encoder, *extra, ("zero_middle", "middle_block_out.0")])


def controlnet_diffusers(config: ControlNetConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for ControlNetModel."""
    last = 2 * len(config.hint_widths) - 1
    inner = [(f"hint.{i}", f"controlnet_cond_embedding.blocks.{i - 1}") for i in range(1, last)]
    outer = [("hint.0", "controlnet_cond_embedding.conv_in"), (f"hint.{last}", "controlnet_cond_embedding.conv_out")]
    zero = [(f"zero.{i}", f"controlnet_down_blocks.{i}") for i in range(_skips(config.unet))]
    encoder = ((f"encoder.{ours}", theirs) for ours, theirs in _modules(config.unet, DIFFUSERS))
    return entries(keys, [*encoder, *inner, *outer, *zero, ("zero_middle", "controlnet_mid_block")])


def _skips(config: UNetConfig) -> int:
    return len(config.multipliers) * (config.blocks + 1)


def _modules(config: UNetConfig, column: int) -> Names:
    yield from ((ours, theirs[column]) for ours, theirs in TOP.items())
    for part in _parts(config):
        foreign = part.foreign[column]
        if part.kind == "residual":
            yield from ((f"{part.native}.{ours}", f"{foreign}.{theirs[column]}") for ours, theirs in RESIDUAL.items())
        elif part.kind == "conv":
            yield part.native, foreign
        elif config.context_dim:
            yield from ((f"{part.native}.{x}", f"{foreign}.{x}") for x in ("norm", "proj_in", "proj_out"))
            for n in range(max(*config.depths, config.middle_depth)):
                block, theirs_block = f"{part.native}.blocks.{n}", f"{foreign}.transformer_blocks.{n}"
                yield from ((f"{block}.{ours}", f"{theirs_block}.{theirs}") for ours, theirs in BLOCK.items())
        else:
            yield f"{part.native}.norm", f"{foreign}.group_norm"


def _diffusers_attention(key: str, config: UNetConfig) -> str:
    module, leaf = key.split(".attention.")
    foreign = {p.native: p.foreign[DIFFUSERS] for p in _parts(config) if p.kind == "attention"}[f"{module}.attention"]
    return f"{foreign}.{leaf.replace('to_out.', 'to_out.0.')}"


def _parts(config: UNetConfig) -> Iterator[Part]:
    """Every part in the order CompVis numbers its blocks."""
    last = len(config.multipliers) - 1
    number = 1
    for level in range(last + 1):
        for j in range(config.blocks):
            ours, block = f"down.{level}.layers.{j}", f"input_blocks.{number}"
            yield Part(f"{ours}.residual", (f"{block}.0", f"down_blocks.{level}.resnets.{j}"), "residual")
            yield Part(f"{ours}.attention", (f"{block}.1", f"down_blocks.{level}.attentions.{j}"), "attention")
            number += 1
        if level < last:
            yield _resample(config, f"down.{level}", f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0")
            number += 1
    yield Part("middle.residual", ("middle_block.0", "mid_block.resnets.0"), "residual")
    yield Part("middle.attention", ("middle_block.1", "mid_block.attentions.0"), "attention")
    # The numbering of CompVis has a gap where there is no attention in the middle: none is written then.
    out = 2 if config.middle_depth else 1
    yield Part("middle_out", (f"middle_block.{out}", "mid_block.resnets.1"), "residual")
    number = 0
    for i in range(last + 1):
        depth = config.depths[last - i]
        for j in range(config.blocks + 1):
            ours, block = f"up.{i}.layers.{j}", f"output_blocks.{number}"
            yield Part(f"{ours}.residual", (f"{block}.0", f"up_blocks.{i}.resnets.{j}"), "residual")
            yield Part(f"{ours}.attention", (f"{block}.1", f"up_blocks.{i}.attentions.{j}"), "attention")
            number += 1
        if i < last:
            place = f"output_blocks.{number - 1}.{2 if depth else 1}"
            yield _resample(config, f"up.{i}", place, f"up_blocks.{i}.upsamplers.0")


def _resample(config: UNetConfig, level: str, block: str, sampler: str) -> Part:
    if config.residual_resample:
        return Part(f"{level}.resample", (block, sampler), "residual")
    leaf = "op" if level.startswith("down") else "conv"
    return Part(f"{level}.resample.conv", (f"{block}.{leaf}", f"{sampler}.conv"), "conv")


def _compvis_representable(config: UNetConfig) -> None:
    _representable(config, "a CompVis file")
    if config.norm_groups != 32:
        raise ValueError(f"a CompVis file cannot hold a U-Net with norm_groups {config.norm_groups}: it has 32")
    if not config.context_dim and any((*config.depths, config.middle_depth)):
        raise ValueError("a CompVis file cannot hold a U-Net that has attention and no text")


def _representable(config: UNetConfig, what: str) -> None:
    if config.positions:
        raise ValueError(f"{what} cannot hold a U-Net with positions")
    if config.pooled_dim and config.pooled_layers != 2:
        raise ValueError(f"{what} cannot hold a U-Net with pooled_layers {config.pooled_layers}")

"""What CompVis and diffusers call the parts of the KL autoencoder, and its config in either's words."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.layouts.table import Entry, Shapes, Tensors, entries, fixed
from ldm.models.autoencoder import AutoencoderConfig

COMPVIS, DIFFUSERS = 0, 1

RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
SKIP = ("nin_shortcut", "conv_shortcut")
ATTENTION = {
    "norm": ("norm", "group_norm"),
    "to_q": ("q", "to_q"),
    "to_k": ("k", "to_k"),
    "to_v": ("v", "to_v"),
    "to_out": ("proj_out", "to_out.0"),
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers before 0.15 wrote the left ones, and the published folders still have them."""

SCALING_FACTOR = 0.18215  # where a config.json says nothing

FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("silu",), "mid_block_add_attention": (True,)}


def compvis(config: AutoencoderConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for names below `first_stage_model.`. ValueError if that format cannot hold this autoencoder."""
    if config.norm_groups != 32:
        raise ValueError(f"a CompVis file cannot hold an autoencoder with norm_groups {config.norm_groups}: it has 32")
    return entries(_weights(keys), _modules(config, COMPVIS))


def diffusers(config: AutoencoderConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for AutoencoderKL."""
    keys = _weights(keys)
    table = entries(keys, _modules(config, DIFFUSERS))
    matrices = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.weight")
    return [Entry(e.native, e.foreign, "matrix") if e.native.endswith(matrices) else e for e in table]


def modern(name: str) -> str:
    """The name that diffusers of today gives what older ones wrote as `name`."""
    module, _, leaf = name.rpartition(".")
    head, _, last = module.rpartition(".")
    return f"{head}.{OLD_ATTENTION[last]}.{leaf}" if last in OLD_ATTENTION and ".attentions." in name else name


def _weights(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key not in ("latent_mean", "latent_std")]


def _modules(config: AutoencoderConfig, column: int) -> Iterator[tuple[str, str]]:
    last = len(config.multipliers) - 1
    yield from (("quant", "quant_conv"), ("post_quant", "post_quant_conv"))
    for half in ("encoder", "decoder"):
        yield from ((f"{half}.{x}", f"{half}.{x}") for x in ("conv_in", "conv_out"))
        yield f"{half}.norm_out", (f"{half}.norm_out", f"{half}.conv_norm_out")[column]
        middle = (f"{half}.mid", f"{half}.mid_block")[column]
        for i in (1, 2):
            yield from _residual(
                f"{half}.middle.block{i}", (f"{middle}.block_{i}", f"{middle}.resnets.{i - 1}")[column], column
            )
        yield from _attention(
            f"{half}.middle.attention", (f"{middle}.attn_1", f"{middle}.attentions.0")[column], column
        )
    for level in range(last + 1):
        compvis_level, diffusers_level = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _level(f"encoder.levels.{level}", (compvis_level, diffusers_level)[column], config.blocks, column)
        place = (f"{compvis_level}.downsample.conv", f"{diffusers_level}.downsamplers.0.conv")[column]
        yield f"encoder.levels.{level}.resample.conv", place
        # CompVis numbers the decoder's levels from full size, diffusers and we in the order they run.
        compvis_level, diffusers_level = f"decoder.up.{last - level}", f"decoder.up_blocks.{level}"
        yield from _level(
            f"decoder.levels.{level}", (compvis_level, diffusers_level)[column], config.blocks + 1, column
        )
        place = (f"{compvis_level}.upsample.conv", f"{diffusers_level}.upsamplers.0.conv")[column]
        yield f"decoder.levels.{level}.resample.conv", place


def _level(ours: str, theirs: str, blocks: int, column: int) -> Iterator[tuple[str, str]]:
    for j in range(blocks):
        yield from _residual(f"{ours}.blocks.{j}", f"{theirs}.{('block', 'resnets')[column]}.{j}", column)
        yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.{('attn', 'attentions')[column]}.{j}", column)


def _residual(ours: str, theirs: str, column: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RESIDUAL.items())
    yield f"{ours}.skip", f"{theirs}.{SKIP[column]}"


def _attention(ours: str, theirs: str, column: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{b[column]}") for a, b in ATTENTION.items())


def infer(shapes: Shapes) -> AutoencoderConfig:
    """The config of a CompVis autoencoder (names below `first_stage_model.`) from names and shapes alone."""
    levels = range(1 + max(int(k.split(".")[2]) for k in shapes if k.startswith("encoder.down.")))
    channels = shapes["encoder.conv_in.weight"][0]
    return AutoencoderConfig(
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["encoder.conv_out.weight"][0] // 2,
        channels=channels,
        multipliers=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] // channels for i in levels),
        blocks=1 + max(int(k.split(".")[4]) for k in shapes if k.startswith("encoder.down.0.block.")),
        attention_levels=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        quant="quant_conv.weight" in shapes,
    )


def from_diffusers(config: Mapping[str, Any], source: str) -> AutoencoderConfig:
    """From the config.json of an AutoencoderKL. Raises ValueError for what ours cannot be."""
    fixed(config, FIXED, source)
    widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
    unknown = set(down) - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
    if unknown or any(width % widths[0] for width in widths):
        raise ValueError(f"{source}: down_block_types {down} with block_out_channels {widths} are not supported")
    if not config.get("use_quant_conv", True) == config.get("use_post_quant_conv", True):
        raise ValueError(f"{source}: use_quant_conv and use_post_quant_conv must be equal")
    return AutoencoderConfig(
        image_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=config["layers_per_block"],
        attention_levels=tuple(i for i, name in enumerate(down) if name == "AttnDownEncoderBlock2D"),
        quant=config.get("use_quant_conv", True),
        norm_groups=config["norm_num_groups"],
    )


def to_diffusers(config: AutoencoderConfig, size: int, scale: float, shift: float) -> dict[str, Any]:
    """The config.json of an AutoencoderKL for pictures of size x size; latent = (raw - shift) * scale."""
    levels = range(len(config.multipliers))
    down = ["AttnDownEncoderBlock2D" if i in config.attention_levels else "DownEncoderBlock2D" for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": size,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "layers_per_block": config.blocks,
        "down_block_types": down,
        "up_block_types": [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
        "norm_num_groups": config.norm_groups,
        "use_quant_conv": config.quant,
        "use_post_quant_conv": config.quant,
        "scaling_factor": scale,
        "shift_factor": shift or None,
        "force_upcast": True,
    }


def fold(native: Tensors, mean: Tensor, std: Tensor, wanted_std: float) -> tuple[Tensors, bool]:
    """The autoencoder's tensors such that its raw latents have mean 0 and `wanted_std` in every channel.

    latent = (raw - mean) / std is affine, and so are the 1x1 convolutions that make raw latents and read them.
    Returns the tensors and whether that changed them. Raises ValueError if it has no such convolutions.
    """
    mean, std = mean.flatten(), std.flatten()
    if not mean.any() and torch.allclose(std, torch.full_like(std, wanted_std), rtol=1e-6):
        return native, False
    if "quant.weight" not in native:
        raise ValueError("latent statistics other than the family's need an autoencoder with quant convolutions")
    gain = (wanted_std / std).double()
    channels = len(gain)
    rows = torch.cat([gain, torch.ones_like(gain)])
    weight, bias = native["quant.weight"].double(), native["quant.bias"].double()
    offset = torch.cat([-mean.double() * gain, 2 * gain.log()])
    result = dict(native)
    result["quant.weight"] = (weight * rows[:, None, None, None]).to(native["quant.weight"])
    result["quant.bias"] = (bias * rows + offset).to(native["quant.bias"])
    weight = native["post_quant.weight"].double()
    shift = weight.view(channels, channels) @ mean.double()
    result["post_quant.weight"] = (weight / gain[None, :, None, None]).to(native["post_quant.weight"])
    result["post_quant.bias"] = (native["post_quant.bias"].double() + shift).to(native["post_quant.bias"])
    return result, True

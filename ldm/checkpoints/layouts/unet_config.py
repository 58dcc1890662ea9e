"""The config of a U-Net: read off the tensors of a CompVis file, and in the words of diffusers, both ways."""

import re
from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.layouts.table import Shapes, fixed
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig

SDXL, REFINER, SIZE_DIM = 2816, 2560, 256
"""Widths of what SDXL's label network takes in, base and refiner: 1280 of the text and 6 or 5 sinusoids of so many."""

FIXED: dict[str, tuple[Any, ...]] = {  # what we do not vary: the values that mean what we do
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "global_pool_conditions": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def infer(shapes: Shapes) -> UNetConfig:
    """The config of a CompVis U-Net or ControlNet (names as below `model.diffusion_model.`) from names and shapes.

    The number of heads leaves no trace in them. The rule: 64 channels a head where projections are linear and there
    is no label (Stable Diffusion 2, SDXL), else 8 heads (Stable Diffusion 1, the x4 upscaler).
    """
    channels = shapes["input_blocks.0.0.weight"][0]
    total = max(int(k.split(".")[1]) for k in shapes if k.startswith("input_blocks."))
    # The first change of resolution, found going down if it is a convolution, else going up, gives the blocks a level.
    halved = [int(k.split(".")[1]) - 1 for k in shapes if k.endswith(".0.op.weight")]
    doubled = [
        int(k.split(".")[1]) for k in shapes if re.search(r"output_blocks.*\.[12]\.(conv|in_layers\.0)\.weight", k)
    ]
    blocks = min(halved or doubled or [total])
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range((total + 1) // (blocks + 1))]
    text = next((v[1] for k, v in shapes.items() if k.endswith("attn2.to_k.weight")), 0)
    width, classes = shapes.get("label_emb.0.0.weight", (0, 0))[1], shapes.get("label_emb.weight", (0,))[0]
    linear = any(k.endswith(".proj_in.weight") and len(v) == 2 for k, v in shapes.items())
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes.get("out.2.weight", (4,))[0],
        channels=channels,
        multipliers=tuple(w // channels for w in widths),
        blocks=blocks,
        depths=tuple(_depth(shapes, f"{first}.1") for first in firsts),
        middle_depth=_depth(shapes, "middle_block.1"),
        context_dim=text,
        cross_only=tuple(level for level, first in enumerate(firsts) if _cross_only(shapes, first)),
        **_added(width, SIZE_DIM if width in (SDXL, REFINER) else 0),
        classes=classes,
        heads=8,
        head_dim=64 if linear and not classes else 0,
        linear_projection=linear,
        scale_shift=shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        residual_resample=not halved and len(widths) > 1,
    )


def _added(width: int, size_dim: int) -> dict[str, Any]:
    """What a label network of that width says of a config. No file says otherwise who is told an aesthetic score."""
    aesthetic = (width, size_dim) == (REFINER, SIZE_DIM)
    pooled = width - (5 if aesthetic else 6) * size_dim
    return {"pooled_dim": pooled, "pooled_layers": 2 if width else 1, "size_dim": size_dim, "aesthetic": aesthetic}


def _depth(shapes: Shapes, prefix: str) -> int:
    start = f"{prefix}.transformer_blocks."
    return max((int(k[len(start) :].split(".")[0]) for k in shapes if k.startswith(start)), default=-1) + 1


def _cross_only(shapes: Shapes, block: str) -> bool:
    width, told = shapes.get(f"{block}.1.transformer_blocks.0.attn1.to_k.weight", (0, 0))
    return told != width


def from_diffusers(config: Mapping[str, Any], source: str) -> UNetConfig:
    """From the config.json of a UNet2DConditionModel, UNet2DModel or ControlNetModel.

    Raises ValueError, naming `source` and the key, for what our U-Net cannot be.
    """
    fixed(config, FIXED, source)
    plain = config.get("_class_name") == "UNet2DModel"
    widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
    channels = widths[0]
    levels = range(len(widths))
    if any(width % channels for width in widths):
        raise ValueError(f"{source}: block_out_channels {widths} must be multiples of the first")
    attends = [name in ("CrossAttnDownBlock2D", "AttnDownBlock2D") for name in down]
    unknown = set(down) - {"CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"}
    if unknown:
        raise ValueError(f"{source}: down_block_types {', '.join(sorted(unknown))} are not supported")
    if plain and config.get("resnet_time_scale_shift") == "scale_shift" and not config.get("attn_norm_num_groups"):
        raise ValueError(f"{source}: a scale-shift UNet2DModel without attn_norm_num_groups is not supported")
    if plain and config.get("attn_norm_num_groups") not in (None, config["norm_num_groups"]):
        raise ValueError(f"{source}: attn_norm_num_groups must be norm_num_groups, {config['norm_num_groups']}")
    depths = _list(config.get("transformer_layers_per_block", 1), levels)
    cross = _list(config.get("only_cross_attention", False), levels)
    head_dim, heads = _heads(config, widths, plain, source)
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise ValueError(f"{source}: addition_embed_type {addition!r} is not supported")
    added = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    middle = bool(config.get("add_attention", True)) if plain else middle
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config.get("out_channels", 4),
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=config["layers_per_block"],
        depths=tuple(depth if attend else 0 for depth, attend in zip(depths, attends, strict=True)),
        middle_depth=depths[-1] if middle else 0,
        context_dim=0 if plain else config["cross_attention_dim"],
        cross_only=tuple(level for level in levels if cross[level] and attends[level]),
        **_added(*(config[key] if addition else 0 for key in added)),
        classes=config.get("num_class_embeds") or 0,
        heads=heads,
        head_dim=head_dim,
        linear_projection=config.get("use_linear_projection", False),
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        residual_resample=config.get("downsample_type", "conv") == "resnet",
        norm_groups=config["norm_num_groups"],
    )


def _heads(config: Mapping[str, Any], widths: list[int], plain: bool, source: str) -> tuple[int, int]:
    """(channels a head, or 0, and else the number of heads). The key's name misleads: see the library's own note."""
    given = config.get("num_attention_heads") or config["attention_head_dim"]
    if plain:
        return (given, 8) if given else (0, 1)
    heads = _list(given, range(len(widths)))
    if len(set(heads)) == 1:
        return 0, heads[0]
    dims = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(dims) > 1:
        raise ValueError(f"{source}: attention_head_dim {heads} means neither equal heads nor heads of equal width")
    return dims.pop(), 8


def to_diffusers(config: UNetConfig, size: int) -> dict[str, Any]:
    """The config.json of a UNet2DConditionModel, or UNet2DModel without text, for latents of size x size.

    Raises ValueError for what diffusers has no words for.
    """
    widths = [config.channels * m for m in config.multipliers]
    common: dict[str, Any] = {
        "sample_size": size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.classes or None,
    }
    if not config.context_dim:
        down = ["AttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths]
        heads = {config.heads_at(width) for width in widths}
        if not config.head_dim and heads != {1}:
            raise ValueError("diffusers cannot hold a U-Net without text whose heads are given by number: use head_dim")
        return common | {
            "_class_name": "UNet2DModel",
            "down_block_types": down,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "attention_head_dim": config.head_dim or None,
            "attn_norm_num_groups": config.norm_groups,  # unset, scale-shift would mean no norm in the middle
            "add_attention": bool(config.middle_depth),
            "downsample_type": "resnet" if config.residual_resample else "conv",
            "upsample_type": "resnet" if config.residual_resample else "conv",
        }
    if _added(config.added_dim, config.size_dim)["aesthetic"] != config.aesthetic:
        raise ValueError(f"diffusers knows who is told an aesthetic score by a width of {REFINER} of pooled_dim and "
                         f"sizes together; this one has {config.added_dim}")  # fmt: skip
    last = config.depths[-1]
    if config.residual_resample or (last and config.middle_depth not in (0, last)):
        raise ValueError("diffusers cannot hold a U-Net with text and residual_resample, or one with another depth in "
                         "the middle than in the lowest level")  # fmt: skip
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths]
    depths = [depth or 1 for depth in config.depths[:-1]] + [config.middle_depth or last or 1]
    return common | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle_depth else "UNetMidBlock2D",
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "only_cross_attention": [level in config.cross_only for level in range(len(widths))],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads_at(width) for width in widths],
        "use_linear_projection": config.linear_projection,
        "addition_embed_type": "text_time" if config.size_dim else None,
        "addition_time_embed_dim": config.size_dim or None,
        "projection_class_embeddings_input_dim": config.added_dim or None,
    }


def controlnet_from_diffusers(config: Mapping[str, Any], source: str) -> ControlNetConfig:
    """From the config.json of a ControlNetModel."""
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError(f"{source}: controlnet_conditioning_channel_order must be 'rgb'")
    return ControlNetConfig(
        from_diffusers(config, source),
        config.get("conditioning_channels", 3),
        tuple(config["conditioning_embedding_out_channels"]),
    )


def controlnet_to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """The config.json of a ControlNetModel."""
    unet = to_diffusers(config.unet, 0)
    dropped = ("sample_size", "out_channels", "up_block_types")
    return {k: v for k, v in unet.items() if k not in dropped} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
    }


def infer_controlnet(shapes: Shapes) -> ControlNetConfig:
    """The config of lllyasviel's ControlNet (names as below `control_model.`) from names and shapes."""
    hints = sorted(int(k.split(".")[1]) for k in shapes if re.fullmatch(r"input_hint_block\.\d+\.weight", k))
    widths = [shapes[f"input_hint_block.{i}.weight"][0] for i in (0, *hints[2:-1:2])]
    return ControlNetConfig(infer(shapes), shapes["input_hint_block.0.weight"][1], tuple(widths))


def _list(value: Any, levels: range) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value for _ in levels]

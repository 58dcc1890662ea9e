"""MMDiT in the files of diffusers: SD3Transformer2DModel (Stable Diffusion 3 and 3.5)."""

from collections.abc import Iterable
from typing import Any

from ldm.checkpoints.layouts.table import Entry, Modules, Tensors, entries
from ldm.models.mmdit import MMDiTConfig
from ldm.nn.positions import grid, sincos_2d

IGNORED = ("pos_embed.pos_embed",)
"""Tensors of this layout that are constants, not parameters: a reader drops them, `constants` makes them again."""

_DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
_QKV = {
    "image.attn": "attn.to_{}",
    "text.attn": "attn.add_{}_proj",
    "image.attn2": "attn2.to_{}",
}


def diffusers(config: MMDiTConfig, keys: Iterable[str]) -> list[Entry]:
    """The table of diffusers' files (without `IGNORED`). Raises ValueError for a model that they cannot hold."""
    _check(config)
    modules = [
        ("patches", "pos_embed.proj"),
        ("time.0", "time_text_embed.timestep_embedder.linear_1"),
        ("time.2", "time_text_embed.timestep_embedder.linear_2"),
        ("pooled.0", "time_text_embed.text_embedder.linear_1"),
        ("pooled.2", "time_text_embed.text_embedder.linear_2"),
        ("context", "context_embedder"),
        ("out", "proj_out"),
    ]
    # Norms with no gate to follow: theirs say the scale first, ours the shift.
    swapped = {"modulation": "norm_out.linear"}
    special = []
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        modules += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _BLOCK]
        for stream, pattern in _QKV.items():
            for leaf in ("weight", "bias"):
                names = tuple(f"{theirs}.{pattern.format(x)}.{leaf}" for x in "qkv")
                special.append(Entry(f"{ours}.{stream}.qkv.{leaf}", names, "join"))
        if i == config.depth - 1:
            swapped[f"{ours}.text.modulation"] = f"{theirs}.norm1_context.linear"
    for module, name in swapped.items():
        special += [Entry(f"{module}.{leaf}", (f"{name}.{leaf}",), "halves") for leaf in ("weight", "bias")]
    return entries(keys, modules, special)


_BLOCK: Modules = (
    ("image.modulation", "norm1.linear"),
    ("text.modulation", "norm1_context.linear"),
    ("image.attn.out", "attn.to_out.0"),
    ("text.attn.out", "attn.to_add_out"),
    ("image.attn.norm_q", "attn.norm_q"),
    ("image.attn.norm_k", "attn.norm_k"),
    ("text.attn.norm_q", "attn.norm_added_q"),
    ("text.attn.norm_k", "attn.norm_added_k"),
    ("image.attn2.out", "attn2.to_out.0"),
    ("image.attn2.norm_q", "attn2.norm_q"),
    ("image.attn2.norm_k", "attn2.norm_k"),
    ("image.mlp.fc1", "ff.net.0.proj"),
    ("image.mlp.fc2", "ff.net.2"),
    ("text.mlp.fc1", "ff_context.net.0.proj"),
    ("text.mlp.fc2", "ff_context.net.2"),
)
"""(our module in a block, theirs); not every block has them all."""


def constants(config: MMDiTConfig) -> Tensors:
    """What a whole file of theirs has besides the parameters: the grid of positions."""
    axis = grid(config.max_size, config.base_size)
    return {"pos_embed.pos_embed": sincos_2d(axis, axis, config.width)[None]}  # [1, max_size^2, C]


def from_diffusers(config: dict[str, Any]) -> MMDiTConfig:
    """diffusers' config.json -> ours. Raises ValueError for a variant that we do not know."""
    told = {**_DEFAULTS, **config}
    width = told["num_attention_heads"] * told["attention_head_dim"]
    if told["caption_projection_dim"] != width:
        raise ValueError(
            f"mmdit: caption_projection_dim of diffusers' config must be heads x head size = {width},"
            f" not {told['caption_projection_dim']}"
        )
    if told["qk_norm"] not in (None, "rms_norm"):
        raise ValueError(f"mmdit: qk_norm of diffusers' config must be None or 'rms_norm', not {told['qk_norm']!r}")
    if not told["pos_embed_max_size"]:
        raise ValueError("mmdit: diffusers' config must state a pos_embed_max_size above 0")
    return MMDiTConfig(
        in_channels=told["in_channels"],
        out_channels=told["out_channels"] or told["in_channels"],
        patch=told["patch_size"],
        width=width,
        depth=told["num_layers"],
        heads=told["num_attention_heads"],
        context_dim=told["joint_attention_dim"],
        pooled_dim=told["pooled_projection_dim"],
        base_size=told["sample_size"] // told["patch_size"],
        max_size=told["pos_embed_max_size"],
        qk_norm=told["qk_norm"] is not None,
        dual=tuple(told["dual_attention_layers"]),
    )


def to_diffusers(config: MMDiTConfig, sample_size: int) -> dict[str, Any]:
    """Ours -> diffusers' config.json, for latents of `sample_size` px. Raises ValueError for what it cannot say."""
    _check(config)
    if config.base_size != sample_size // config.patch:
        raise ValueError(
            f"mmdit: positions over 0..{config.base_size} need sample_size {config.base_size * config.patch}"
            f" in diffusers' config, not {sample_size}"
        )
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": sample_size,
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_dim,
        "out_channels": config.out_channels,
        "pos_embed_max_size": config.max_size,
        "dual_attention_layers": list(config.dual),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _check(config: MMDiTConfig) -> None:
    for name, value in {"mlp_ratio": 4.0, "frequencies": 256}.items():
        if getattr(config, name) != value:
            raise ValueError(f"mmdit: the diffusers layout needs {name} = {value}, not {getattr(config, name)}")

"""DiT in the files of others: the authors' (facebookresearch/DiT) and diffusers' DiTTransformer2DModel."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoints.layouts.table import Entry, Tensors, entries
from ldm.models.dit import DiTConfig
from ldm.nn.positions import grid, sincos_2d

IGNORED = ("pos_embed", "pos_embed.pos_embed")
"""Tensors of these layouts that are constants, not parameters: a reader drops them, `constants` makes them again."""

LATENT_FACTOR = 8  # of the autoencoder that every published DiT was trained with

_FIXED = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}


def facebook(config: DiTConfig, keys: Iterable[str]) -> list[Entry]:
    """The table of the authors' files (without `IGNORED`). Raises ValueError for a model that they cannot hold."""
    _check(config, "facebook", frequency_shift=0.0, mlp_norm_eps=1e-6, base_size=0)
    modules = [
        ("patches", "x_embedder.proj"),
        ("time.0", "t_embedder.mlp.0"),
        ("time.2", "t_embedder.mlp.2"),
        ("label", "y_embedder.embedding_table"),
        ("modulation", "final_layer.adaLN_modulation.1"),
        ("out", "final_layer.linear"),
    ]
    for i in range(config.depth):
        block = f"blocks.{i}"
        modules += [
            (f"{block}.modulation", f"{block}.adaLN_modulation.1"),
            (f"{block}.attn.qkv", f"{block}.attn.qkv"),
            (f"{block}.attn.out", f"{block}.attn.proj"),
            (f"{block}.mlp.fc1", f"{block}.mlp.fc1"),
            (f"{block}.mlp.fc2", f"{block}.mlp.fc2"),
        ]
    return entries(keys, modules)


def constants(config: DiTConfig, sample_size: int) -> Tensors:
    """What a whole file of the authors' has besides the parameters: the positions at that size of latent, px."""
    axis = grid(sample_size // config.patch)
    return {"pos_embed": sincos_2d(axis, axis, config.width)[None]}  # [1, L, C]


def infer(shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """The sizes of a model in the authors' layout, from the shapes of its tensors.

    Heads show in no shape. The authors' sizes have 64 channels a head (S, B, L) or 72 (XL), and only XL's width is a
    multiple of 72: so 72 where it divides the width, else 64. The last row of the label table is taken as "no class".
    Raises ValueError if the tensors are not such a model's.
    """
    try:
        width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
        classes = shapes["y_embedder.embedding_table.weight"][0] - 1
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        outputs = shapes["final_layer.linear.weight"][0]
        frequencies = shapes["t_embedder.mlp.0.weight"][1]
    except KeyError as error:
        raise ValueError(f"not a DiT in the facebook layout: it has no {error.args[0]}") from None
    head = 72 if width % 72 == 0 else 64
    if width % head:
        raise ValueError(
            f"dit: a width of {width} is no multiple of 64 or 72 channels a head, so its heads are unknown"
        )
    return DiTConfig(
        in_channels=in_channels,
        out_channels=outputs // patch**2,
        patch=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        heads=width // head,
        mlp_ratio=hidden / width,
        classes=classes,
        frequencies=frequencies,
    )


def diffusers(config: DiTConfig, keys: Iterable[str]) -> list[Entry]:
    """The table of diffusers' files. Raises ValueError for a model that they cannot hold."""
    _check(config, "diffusers", frequency_shift=1.0, mlp_ratio=4.0, frequencies=256)
    blocks = [f"transformer_blocks.{i}" for i in range(config.depth)]
    modules = [("patches", "pos_embed.proj"), ("modulation", "proj_out_1"), ("out", "proj_out_2")]
    special = []
    for leaf in ("weight", "bias"):
        for ours, theirs in (("time.0", "linear_1"), ("time.2", "linear_2")):
            names = tuple(f"{block}.norm1.emb.timestep_embedder.{theirs}.{leaf}" for block in blocks)
            special.append(Entry(f"{ours}.{leaf}", names, "copies"))
        for i, block in enumerate(blocks):
            names = tuple(f"{block}.attn1.to_{x}.{leaf}" for x in "qkv")
            special.append(Entry(f"blocks.{i}.attn.qkv.{leaf}", names, "join"))
    names = tuple(f"{block}.norm1.emb.class_embedder.embedding_table.weight" for block in blocks)
    special.append(Entry("label.weight", names, "copies"))
    for i, block in enumerate(blocks):
        modules += [
            (f"blocks.{i}.modulation", f"{block}.norm1.linear"),
            (f"blocks.{i}.attn.out", f"{block}.attn1.to_out.0"),
            (f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj"),
            (f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2"),
        ]
    return entries(keys, modules, special)


def from_diffusers(config: dict[str, Any]) -> DiTConfig:
    """diffusers' config.json -> ours. Raises ValueError for a variant that is not DiT's."""
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"dit: {name} of diffusers' config must be {value!r}, not {config[name]!r}")
    told = {**_DEFAULTS, **config}
    return DiTConfig(
        in_channels=told["in_channels"],
        out_channels=told["out_channels"] or told["in_channels"],
        patch=told["patch_size"],
        width=told["num_attention_heads"] * told["attention_head_dim"],
        depth=told["num_layers"],
        heads=told["num_attention_heads"],
        classes=told["num_embeds_ada_norm"],
        frequency_shift=1.0,
        base_size=told["sample_size"] // told["patch_size"],
        mlp_norm_eps=told["norm_eps"],
    )


def to_diffusers(config: DiTConfig, sample_size: int) -> dict[str, Any]:
    """Ours -> diffusers' config.json, for latents of `sample_size` px. Raises ValueError for what it cannot say."""
    _check(config, "diffusers", frequency_shift=1.0, mlp_ratio=4.0, frequencies=256)
    if config.base_size not in (0, sample_size // config.patch):
        raise ValueError(
            f"dit: positions over 0..{config.base_size} need sample_size {config.base_size * config.patch}"
            f" in diffusers' config, not {sample_size}"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": sample_size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.classes,
        "norm_eps": config.mlp_norm_eps,
        **_FIXED,
    }


def _check(config: DiTConfig, layout: str, **required: float) -> None:
    if not config.classes:
        raise ValueError(f"dit: the {layout} layout needs classes; this model has none")
    for name, value in {"context_dim": 0, "pooled_dim": 0, **required}.items():
        if getattr(config, name) != value:
            raise ValueError(f"dit: the {layout} layout needs {name} = {value}, not {getattr(config, name)}")

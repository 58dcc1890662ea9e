"""What transformers and open_clip call the parts of CLIP's text tower, and its config in either's words."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ldm.checkpoints.layouts.table import Entry, Shapes, Tensors, entries, fixed
from ldm.models.text import VOCABULARY, TextConfig

LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
WRAPPER = "text_model."
"""The prefix that transformers dropped in 5.6; everybody else still expects it."""

START, END = 49_406, 49_407
FIXED: dict[str, tuple[Any, ...]] = {"vocab_size": (VOCABULARY,), "layer_norm_eps": (1e-5,)}


def transformers(config: TextConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for CLIPTextModel, or CLIPTextModelWithProjection if `embed_dim` is not 0, with its old prefix."""
    modules = [("tower.token_embedding", "embeddings.token_embedding"), ("tower.ln_final", "final_layer_norm")]
    special = [Entry("tower.positional_embedding", (f"{WRAPPER}embeddings.position_embedding.weight",))]
    special += [Entry("tower.text_projection", ("text_projection.weight",), "transpose")]
    for i in range(config.layers):
        ours, theirs = f"tower.transformer.resblocks.{i}", f"encoder.layers.{i}"
        modules += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in LAYER.items()]
        for leaf in ("weight", "bias"):
            fused = tuple(f"{WRAPPER}{theirs}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            special.append(Entry(f"{ours}.attn.in_proj_{leaf}", fused, "join"))
    return entries(keys, ((ours, WRAPPER + theirs) for ours, theirs in modules), special)


def open_clip(keys: Iterable[str]) -> list[Entry]:
    """The table for open_clip's text tower: our own names without our prefix."""
    return [Entry(key, (key.removeprefix("tower."),)) for key in keys]


def infer(shapes: Shapes, *, skip: int, final_norm: bool) -> TextConfig:
    """The config of an open_clip tower (names such as `transformer.resblocks.0.ln_1.weight`) from its tensors.

    Heads and activation leave no trace in them; the rule is that of the published ones: 64 channels a head, and GELU.
    """
    width = shapes["token_embedding.weight"][1]
    return TextConfig(
        width=width,
        layers=_layers(shapes, "transformer.resblocks."),
        heads=max(1, width // 64),
        embed_dim=shapes["text_projection"][1] if "text_projection" in shapes else 0,
        context_length=shapes["positional_embedding"][0],
        skip=skip,
        final_norm=final_norm,
        activation="gelu",
        pad_id=0,
    )


def infer_transformers(shapes: Shapes, *, skip: int, final_norm: bool) -> TextConfig:
    """The same for names as in `text_model.encoder.layers.0.layer_norm1.weight`.

    In single files only OpenAI's ViT-L is stored under these names, and it has quick GELU.
    """
    width = shapes[f"{WRAPPER}embeddings.token_embedding.weight"][1]
    return TextConfig(
        width=width,
        layers=_layers(shapes, f"{WRAPPER}encoder.layers."),
        heads=max(1, width // 64),
        embed_dim=shapes.get("text_projection.weight", (0,))[0],
        context_length=shapes[f"{WRAPPER}embeddings.position_embedding.weight"][0],
        skip=skip,
        final_norm=final_norm,
        activation="quick_gelu",
        pad_id=END,
    )


def _layers(shapes: Shapes, prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix))


def from_transformers(config: Mapping[str, Any], source: str, *, pad_id: int) -> TextConfig:
    """From the config.json of a CLIPTextModel(WithProjection). Raises ValueError for what ours cannot be."""
    fixed(config, FIXED, source)
    width = config["hidden_size"]
    if config["intermediate_size"] != 4 * width:
        raise ValueError(f"{source}: intermediate_size must be 4 x hidden_size, {4 * width}")
    projected = "CLIPTextModelWithProjection" in config.get("architectures", [])
    return TextConfig(
        width=width,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        embed_dim=config["projection_dim"] if projected else 0,
        context_length=config["max_position_embeddings"],
        activation=config["hidden_act"],
        pad_id=pad_id,
    )


def to_transformers(config: TextConfig) -> dict[str, Any]:
    """The config.json of a CLIPTextModel, or CLIPTextModelWithProjection if `embed_dim` is not 0."""
    name = "CLIPTextModelWithProjection" if config.embed_dim else "CLIPTextModel"
    return {
        "architectures": [name],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.embed_dim or config.width,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 1,
    }


def with_last_block(config: TextConfig, native: Tensors) -> tuple[TextConfig, Tensors]:
    """With a last block and a projection of zeros, which OpenCLIP's names call for and skip = 1 leaves unread."""
    last, blocks = f"resblocks.{config.layers - 1}.", f"resblocks.{config.layers}."
    added = {k.replace(last, blocks): torch.zeros_like(v) for k, v in native.items() if last in k}
    projection = native["tower.ln_final.weight"].new_zeros(config.width, config.width)
    full = replace(config, layers=config.layers + 1, skip=config.skip + 1, embed_dim=config.width)
    return full, native | added | {"tower.text_projection": projection}

"""MMDiT against diffusers' SD3Transformer2DModel."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.layouts import mmdit as layout
from ldm.checkpoints.layouts.table import Entry, Tensors, to_foreign, to_native
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.text import import_open_clip
from ldm.types import Conditioning

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
VARIANTS = [
    {},  # as Stable Diffusion 3
    {"qk_norm": "rms_norm"},  # as 3.5 large
    {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},  # as 3.5 medium
    {"dual_attention_layers": (2,), "patch_size": 1, "out_channels": None, "pos_embed_max_size": 25},
]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def reference(dtype: torch.dtype, **changes: object) -> torch.nn.Module:
    """diffusers' model with every parameter drawn anew."""
    import_open_clip()
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = dict(sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3)
    widths = dict(joint_attention_dim=10, caption_projection_dim=24, pooled_projection_dim=6)
    model = SD3Transformer2DModel(**{**sizes, **widths, "out_channels": 5, "pos_embed_max_size": 12, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def parameters(theirs: torch.nn.Module) -> Tensors:
    return {name: tensor for name, tensor in theirs.state_dict().items() if name not in layout.IGNORED}


def table_of(config: MMDiTConfig) -> list[Entry]:
    with torch.device("meta"):
        return layout.diffusers(config, MMDiT(config).state_dict())


def converted(config: MMDiTConfig, table: list[Entry], tensors: Tensors, dtype: torch.dtype) -> MMDiT:
    model = MMDiT(config).to(dtype).eval()
    model.load_state_dict(to_native(table, tensors, "test"))
    return model


def inputs(dtype: torch.dtype, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    torch.manual_seed(3)
    x, context, pooled = (torch.randn(3, *shape, dtype=dtype) for shape in ((4, height, width), (7, 10), (6,)))
    return x, torch.tensor([0.0, 421.5, 1000.0], dtype=dtype), Conditioning(context=context, pooled=pooled)


def forward(theirs: torch.nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return theirs(x, encoder_hidden_states=cond.context, pooled_projections=cond.pooled, timestep=t).sample


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 14), (24, 2)])
def test_diffusers(dtype: torch.dtype, changes: dict, height: int, width: int) -> None:
    theirs = reference(dtype, **changes)
    config = layout.from_diffusers(dict(theirs.config))
    ours = converted(config, table_of(config), parameters(theirs), dtype)
    x, t, cond = inputs(dtype, height, width)
    expected = forward(theirs, x, t, cond)
    assert expected.std() > 0.05 and error(ours(x, t, cond), expected) <= LIMITS[dtype]


@pytest.mark.parametrize("changes", VARIANTS)
def test_there_and_back_is_the_same(changes: dict) -> None:
    theirs = reference(torch.float32, **changes)
    config = layout.from_diffusers(dict(theirs.config))
    table = table_of(config)
    back = to_foreign(table, to_native(table, parameters(theirs), "test")) | layout.constants(config)
    stored = theirs.state_dict()
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in stored)
    theirs.load_state_dict(back, strict=True)


@pytest.mark.parametrize("changes", VARIANTS)
def test_config_there_and_back(changes: dict) -> None:
    theirs = reference(torch.float32, **changes)
    config = layout.from_diffusers(dict(theirs.config))
    said = layout.to_diffusers(config, 8)
    again = type(theirs).from_config(said)
    assert said["_class_name"] == type(theirs).__name__ and layout.from_diffusers(dict(again.config)) == config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_published_positions() -> None:
    """The grid of Stable Diffusion 3 medium: 192 x 192 over 0..64."""
    import_open_clip()
    from diffusers.models.embeddings import PatchEmbed

    theirs = PatchEmbed(height=128, width=128, patch_size=2, in_channels=4, embed_dim=64, pos_embed_max_size=192)
    assert torch.equal(layout.constants(MMDiTConfig(width=64, heads=1))["pos_embed.pos_embed"], theirs.pos_embed)


@torch.no_grad()
@pytest.mark.parametrize("defect", ["blocks", "shift and scale", "queries and keys", "image and text", "positions"])
def test_comparison_notices_a_defect(defect: str) -> None:
    theirs = reference(torch.float64, qk_norm="rms_norm")
    config = layout.from_diffusers(dict(theirs.config))
    tensors, table = parameters(theirs), table_of(config)
    at = {entry.native: i for i, entry in enumerate(table)}
    if defect == "blocks":
        names = {"transformer_blocks.0.": "transformer_blocks.1.", "transformer_blocks.1.": "transformer_blocks.0."}
        tensors = {names.get(n[:21], n[:21]) + n[21:]: tensor for n, tensor in tensors.items()}
        assert tensors.keys() == parameters(theirs).keys()
    elif defect == "shift and scale":
        i = at["blocks.2.text.modulation.weight"]
        table[i] = replace(table[i], how="same")
    elif defect == "queries and keys":
        i, j = at["blocks.0.image.attn.norm_q.weight"], at["blocks.0.text.attn.norm_q.weight"]
        table[i], table[j] = replace(table[i], native=table[j].native), replace(table[j], native=table[i].native)
    elif defect == "image and text":
        i, j = at["blocks.0.image.mlp.fc1.weight"], at["blocks.0.text.mlp.fc1.weight"]
        table[i], table[j] = replace(table[i], native=table[j].native), replace(table[j], native=table[i].native)
    else:
        config = replace(config, base_size=config.base_size + 1)
    x, t, cond = inputs(torch.float64, 6, 14)
    assert error(converted(config, table, tensors, torch.float64)(x, t, cond), forward(theirs, x, t, cond)) > 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.diffusers(MMDiTConfig(mlp_ratio=2), []), "the diffusers layout needs mlp_ratio = 4.0, not 2"),
        (lambda: layout.to_diffusers(MMDiTConfig(), 64), "positions over 0..64 need sample_size 128 .* not 64"),
        (lambda: layout.from_diffusers({"qk_norm": "l2"}), "qk_norm .* must be None or 'rms_norm', not 'l2'"),
        (lambda: layout.from_diffusers({"num_attention_heads": 2}), "caption_projection_dim .* = 128, not 1152"),
        (lambda: layout.from_diffusers({"pos_embed_max_size": None}), "must state a pos_embed_max_size above 0"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        call()  # type: ignore[operator]
    assert "\n" not in str(refusal.value)

"""DiT against diffusers' DiTTransformer2DModel, and against the paper's forward pass on the authors' tensor names."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.layouts import dit as layout
from ldm.checkpoints.layouts.table import Entry, Tensors, to_foreign, to_native
from ldm.models.dit import DiT, DiTConfig
from ldm.models.text import import_open_clip
from ldm.types import Conditioning

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
BLOCKS, CLASSES = 3, 7


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def inputs(dtype: torch.dtype, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(3, 4, height, width, dtype=dtype)
    return x, torch.tensor([0, 421, 999]), torch.tensor([0, 6, CLASSES])


def converted(config: DiTConfig, table: list[Entry], tensors: Tensors, dtype: torch.dtype) -> DiT:
    model = DiT(config).to(dtype).eval()
    model.load_state_dict(to_native(table, tensors, "test"))
    return model


def our_keys(config: DiTConfig) -> list[str]:
    with torch.device("meta"):
        return list(DiT(config).state_dict())


def swapped_blocks(tensors: Tensors, prefix: str) -> Tensors:
    """The same tensors with the names of blocks 0 and 1 exchanged."""
    marks = {f"{prefix}.0.": f"{prefix}.1.", f"{prefix}.1.": f"{prefix}.0."}

    def renamed(name: str) -> str:
        return next((name.replace(a, b, 1) for a, b in marks.items() if name.startswith(a)), name)

    return {renamed(name): tensor for name, tensor in tensors.items()}


# diffusers


def reference(dtype: torch.dtype, **changes: object) -> torch.nn.Module:
    """diffusers' model with every parameter drawn anew, its copies of the embedders kept equal."""
    import_open_clip()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=3, attention_head_dim=8, num_layers=BLOCKS, out_channels=8, sample_size=8)
    model = DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": CLASSES, **changes}).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("changes", [{}, {"patch_size": 4, "out_channels": None, "norm_eps": 1e-2}])
@pytest.mark.parametrize("size", [8, 16, 4])  # theirs only knows squares; 16 and 4 spread the positions of 8
def test_diffusers(dtype: torch.dtype, changes: dict, size: int) -> None:
    theirs = reference(dtype, **changes)
    config = layout.from_diffusers(dict(theirs.config))
    ours = converted(config, layout.diffusers(config, our_keys(config)), theirs.state_dict(), dtype)
    x, t, label = inputs(dtype, size, size)
    expected = theirs(x, t, class_labels=label).sample
    found = ours(x, t, Conditioning(label=label))
    assert expected.std() > 0.05 and error(found, expected) <= LIMITS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("change", [{"frequency_shift": 0.0}, {"mlp_norm_eps": 1e-6}, {"base_size": 0}])
def test_each_setting_that_diffusers_has_otherwise_is_needed(change: dict) -> None:
    theirs = reference(torch.float64)
    config = layout.from_diffusers(dict(theirs.config))
    table = layout.diffusers(config, our_keys(config))
    ours = converted(replace(config, **change), table, theirs.state_dict(), torch.float64)
    x, t, label = inputs(torch.float64, 16, 16)
    assert error(ours(x, t, Conditioning(label=label)), theirs(x, t, class_labels=label).sample) > 1e-6


def test_diffusers_there_and_back_is_the_same() -> None:
    theirs = reference(torch.float32)
    config = layout.from_diffusers(dict(theirs.config))
    table = layout.diffusers(config, our_keys(config))
    back = to_foreign(table, to_native(table, theirs.state_dict(), "test"))
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.load_state_dict(back, strict=True)


def test_diffusers_config_there_and_back() -> None:
    theirs = reference(torch.float32)
    said = layout.to_diffusers(layout.from_diffusers(dict(theirs.config)), 8)
    assert said["_class_name"] == type(theirs).__name__
    assert all(theirs.config[name] == value for name, value in said.items() if name != "_class_name")
    again = type(theirs).from_config(said)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("defect", ["blocks", "qkv", "shift and scale"])
def test_diffusers_comparison_notices_a_defect(defect: str) -> None:
    theirs = reference(torch.float64)
    config = layout.from_diffusers(dict(theirs.config))
    tensors = theirs.state_dict()
    table = layout.diffusers(config, our_keys(config))
    if defect == "blocks":
        tensors = swapped_blocks(tensors, "transformer_blocks")
    elif defect == "qkv":
        at = next(i for i, entry in enumerate(table) if entry.native == "blocks.1.attn.qkv.weight")
        table[at] = replace(table[at], foreign=table[at].foreign[::-1])
    else:
        at = next(i for i, entry in enumerate(table) if entry.native == "modulation.weight")
        table[at] = replace(table[at], how="halves")
    ours = converted(config, table, tensors, torch.float64)
    x, t, label = inputs(torch.float64, 8, 8)
    assert error(ours(x, t, Conditioning(label=label)), theirs(x, t, class_labels=label).sample) > 1e-3


def test_diffusers_copies_that_differ_are_refused() -> None:
    theirs = reference(torch.float32)
    config = layout.from_diffusers(dict(theirs.config))
    tensors = theirs.state_dict()
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name] = tensors[name] + 1
    with pytest.raises(ValueError, match=f"{re.escape(name)} should equal"):
        to_native(layout.diffusers(config, our_keys(config)), tensors, "file")


# the authors' layout: no library has it, so the forward pass is written again, with nothing of ours

NAMES = DiTConfig(width=36, depth=BLOCKS, heads=3, classes=CLASSES)


def authors_tensors(config: DiTConfig, dtype: torch.dtype) -> Tensors:
    """Random tensors under the authors' names."""
    torch.manual_seed(0)
    width, p = config.width, config.patch
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(config.depth):
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        ):
            linear[f"blocks.{i}.{name}"] = (rows * width, columns * width)
    linear |= {
        "final_layer.linear": (p * p * config.out_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {"x_embedder.proj.weight": (width, config.in_channels, p, p), "x_embedder.proj.bias": (width,)}
    shapes |= {"y_embedder.embedding_table.weight": (config.classes + 1, width)}
    return {name: torch.randn(shape, dtype=dtype) * 0.15 for name, shape in shapes.items()}


def sines(places: Tensor, channels: int) -> Tensor:
    rates = torch.tensor([1 / 10_000 ** (i / (channels / 2)) for i in range(channels // 2)], dtype=torch.float64)
    angles = torch.einsum("n,c->nc", places.double(), rates)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def authors_forward(w: Tensors, config: DiTConfig, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """DiT's forward pass by the paper: sec. 3.2 (adaLN-Zero), app. A; one image at a time where that is clearer."""
    width, p, heads = config.width, config.patch, config.heads
    batch, _, height, across = x.shape

    def dense(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def gelu(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    # tokens: row by row, each a patch; its position: the column's sines first, then the row's
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    tokens = tokens.reshape(batch, width, -1).permute(0, 2, 1)
    place = torch.arange(tokens.shape[1])
    columns = across // p
    position = torch.cat([sines(place % columns, width // 2), sines(place // columns, width // 2)], dim=1)
    h = tokens + position.float()

    # the published model computes these frequencies and angles in single precision
    rates = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * rates[None]
    time = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(x.dtype)
    c = dense("t_embedder.mlp.2", F.silu(dense("t_embedder.mlp.0", time)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][label])

    for i in range(config.depth):
        told = dense(f"blocks.{i}.adaLN_modulation.1", c).reshape(batch, 1, 6, width)
        beta1, gamma1, alpha1, beta2, gamma2, alpha2 = (told[:, :, j] for j in range(6))
        fused = dense(f"blocks.{i}.attn.qkv", normed(h) * (1 + gamma1) + beta1)
        q, k, v = fused.reshape(batch, -1, 3, heads, width // heads).unbind(2)
        scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(width // heads)
        answer = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).reshape(batch, -1, width)
        h = h + alpha1 * dense(f"blocks.{i}.attn.proj", answer)
        inner = gelu(dense(f"blocks.{i}.mlp.fc1", normed(h) * (1 + gamma2) + beta2))
        h = h + alpha2 * dense(f"blocks.{i}.mlp.fc2", inner)

    shift, scale = dense("final_layer.adaLN_modulation.1", c)[:, None].split(width, dim=-1)
    h = dense("final_layer.linear", normed(h) * (1 + scale) + shift)
    out = torch.empty(batch, config.out_channels, height, across, dtype=x.dtype)
    for n in range(h.shape[1]):  # a token is its patch, row by row, channels last
        row, column = p * (n // columns), p * (n % columns)
        out[:, :, row : row + p, column : column + p] = h[:, n].reshape(batch, p, p, -1).permute(0, 3, 1, 2)
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("changes", "height", "width"), [({}, 8, 8), ({}, 6, 10), ({"patch": 4, "out_channels": 4}, 8, 16)]
)
def test_facebook(dtype: torch.dtype, changes: dict, height: int, width: int) -> None:
    config = replace(NAMES, **changes)
    tensors = authors_tensors(config, dtype)
    ours = converted(config, layout.facebook(config, our_keys(config)), tensors, dtype)
    x, t, label = inputs(dtype, height, width)
    expected = authors_forward(tensors, config, x, t, label)
    assert expected.std() > 0.05 and error(ours(x, t, Conditioning(label=label)), expected) <= LIMITS[dtype]


def test_facebook_there_and_back_is_the_same() -> None:
    tensors = authors_tensors(NAMES, torch.float32)
    table = layout.facebook(NAMES, our_keys(NAMES))
    back = to_foreign(table, to_native(table, tensors, "test"))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


@torch.no_grad()
@pytest.mark.parametrize("defect", ["blocks", "rows for columns"])
def test_facebook_comparison_notices_a_defect(defect: str) -> None:
    tensors = authors_tensors(NAMES, torch.float64)
    x, t, label = inputs(torch.float64, 6, 10)
    expected = authors_forward(tensors, NAMES, x, t, label)
    table = layout.facebook(NAMES, our_keys(NAMES))
    if defect == "blocks":
        ours = converted(NAMES, table, swapped_blocks(tensors, "blocks"), torch.float64)
        found = ours(x, t, Conditioning(label=label))
    else:
        tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].transpose(2, 3)
        ours = converted(NAMES, table, tensors, torch.float64)
        found = ours(x.transpose(2, 3), t, Conditioning(label=label)).transpose(2, 3)
    assert error(found, expected) > 1e-3


def test_facebook_constants_are_the_positions_at_that_size() -> None:
    stored = layout.constants(NAMES, 8)
    assert list(stored) == ["pos_embed"] and set(stored) <= set(layout.IGNORED)
    place = torch.arange(16)
    expected = torch.cat([sines(place % 4, 18), sines(place // 4, 18)], dim=1).float()
    assert torch.equal(stored["pos_embed"], expected[None])


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (DiTConfig(), 16),
        (DiTConfig(patch=8, width=384, depth=12, heads=6, out_channels=4), 6),  # S/8
        (DiTConfig(width=768, depth=12, heads=12), 12),  # B/2
        (DiTConfig(patch=4, width=1024, depth=24, classes=10), 16),  # L/4
    ],
)
def test_infer_finds_the_authors_sizes(config: DiTConfig, heads: int) -> None:
    with torch.device("meta"):
        table = layout.facebook(config, our_keys(config))
        tensors = to_foreign(table, DiT(config).state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes["pos_embed"] = (1, 256, config.width)
    assert layout.infer(shapes) == config and config.heads == heads


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.infer({}), "not a DiT in the facebook layout: it has no x_embedder.proj.weight"),
        (lambda: layout.facebook(DiTConfig(classes=0), []), "the facebook layout needs classes"),
        (lambda: layout.facebook(DiTConfig(context_dim=8), []), "the facebook layout needs context_dim = 0, not 8"),
        (lambda: layout.facebook(DiTConfig(frequency_shift=1.0), []), "needs frequency_shift = 0.0, not 1.0"),
        (lambda: layout.diffusers(DiTConfig(), []), "the diffusers layout needs frequency_shift = 1.0, not 0.0"),
        (lambda: layout.to_diffusers(DiTConfig(frequency_shift=1.0, mlp_ratio=2), 32), "needs mlp_ratio = 4.0, not 2"),
        (
            lambda: layout.to_diffusers(DiTConfig(frequency_shift=1.0, base_size=16), 64),
            r"positions over 0..16 need sample_size 32 in diffusers' config, not 64",
        ),
        (lambda: layout.from_diffusers({"norm_type": "layer_norm"}), "norm_type .* must be 'ada_norm_zero'"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        call()  # type: ignore[operator]
    assert "\n" not in str(refusal.value)

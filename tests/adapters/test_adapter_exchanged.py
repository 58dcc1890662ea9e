"""Files of adapters as others write them: Tucker's cores, Stable Diffusion 3's own names, projections of text."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters import files
from ldm.adapters.adapter import KINDS, delta, product
from ldm.adapters.algebra import extract
from ldm.adapters.lora import attach, detach, merge
from ldm.checkpoints.layouts import lora, mmdit
from ldm.checkpoints.layouts.table import to_native
from ldm.checkpoints.load import load_model
from ldm.models.mmdit import MMDiT, MMDiTConfig
from tests.adapters.reference import PROMPTS, folder, pipeline


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- Tucker's cores ----------------------------------------------------------------------------------------------

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
WIDE, R = 320, 3


def read_conv(factors: dict[str, Tensor], path: Path) -> Tensor:
    """What the factors of a 3x3 convolution, with alpha 2, are read as: [320, 320, 3, 3]."""
    save_file(
        {f"{CONV}.{name}": tensor for name, tensor in factors.items()} | {f"{CONV}.alpha": torch.tensor(2.0)}, path
    )
    (found,) = files.read(path).parts["denoiser"].values()
    return product(found).reshape(WIDE, WIDE, 3, 3)


def test_a_core_of_tuckers(tmp_path: Path) -> None:
    """LyCORIS' three: LoCon as the convolutions one after the other that it is, the others as their sums written out.

    alpha / r scales every one of them.
    """
    down, mid, up = random(R, WIDE, 1, 1), random(R, R, 3, 3), random(WIDE, R, 1, 1)
    found = read_conv(
        {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    x = random(1, WIDE, 6, 5)
    expected = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up) * 2 / R
    assert (F.conv2d(x, found, padding=1) - expected).abs().max() < 1e-5 * expected.abs().max()

    def summed(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        """sum_rs core[r, s] outer[r, o] inner[s, i], term by term."""
        terms = (
            outer[r][:, None, None, None] * inner[s][:, None, None] * core[r, s] for r in range(R) for s in range(R)
        )
        return torch.stack(list(terms)).sum(0)

    halves = [(random(R, R, 3, 3) + i, random(R, WIDE) - i, random(R, WIDE)) for i in (0, 1)]
    named = {
        f"hada_{n}": t
        for i, half in enumerate(halves, 1)
        for n, t in zip((f"t{i}", f"w{i}_a", f"w{i}_b"), half, strict=True)
    }
    expected = summed(*halves[0]) * summed(*halves[1]) * 2 / R
    assert (read_conv(named, tmp_path / "b.safetensors") - expected).abs().max() < 1e-5 * expected.abs().max()
    first, core, outer, inner = random(4, 5), random(R, R, 3, 3), random(R, WIDE // 4), random(R, WIDE // 5)
    named = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": outer, "lokr_w2_b": inner}
    blocks = first[:, None, :, None, None, None] * summed(core, outer, inner)[None, :, None]
    expected = blocks.reshape(WIDE, WIDE, 3, 3) * 2 / R
    assert (read_conv(named, tmp_path / "c.safetensors") - expected).abs().max() < 1e-5 * expected.abs().max()


# --- Stable Diffusion 3 ------------------------------------------------------------------------------------------

MMDIT = MMDiTConfig(
    in_channels=4, out_channels=4, width=32, depth=3, heads=2, context_dim=16, pooled_dim=8, base_size=16, max_size=24,
    qk_norm=True, dual=(0, 1),
)  # fmt: skip
OUTSIDE = {
    "patches": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2",
    "pooled.0": "y_embedder.mlp.0", "pooled.2": "y_embedder.mlp.2", "context": "context_embedder",
    "modulation": "final_layer.adaLN_modulation.1", "out": "final_layer.linear",
}  # fmt: skip
INSIDE = (
    (r"^blocks\.(\d+)\.image", r"joint_blocks.\1.x_block"), (r"^blocks\.(\d+)\.text", r"joint_blocks.\1.context_block"),
    (r"modulation$", "adaLN_modulation.1"), (r"(attn2?)\.out$", r"\1.proj"), (r"norm_([qk])$", r"ln_\1"),
)  # fmt: skip


def as_stability_has_them(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random tensors under the names of Stable Diffusion 3's own files, in the shapes of ours."""
    found = {"pos_embed": torch.randn(1, MMDIT.max_size**2, MMDIT.width)}
    for key, tensor in native.items():
        module, _, leaf = key.rpartition(".")
        for ours, theirs in INSIDE if module not in OUTSIDE else ():
            module = re.sub(ours, theirs, module)
        found[f"{OUTSIDE.get(module, module)}.{leaf}"] = torch.randn_like(tensor)
    return found


def by_the_library(theirs: dict[str, Tensor], model: MMDiT) -> dict[str, Tensor]:
    """They as ours, renamed by diffusers to its own names."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    renamed = convert_sd3_transformer_checkpoint_to_diffusers(dict(theirs))
    table = mmdit.diffusers(MMDIT, model.state_dict())
    return to_native(table, {k: v for k, v in renamed.items() if k not in mmdit.IGNORED}, "theirs")


@pytest.mark.parametrize("dialect", ["kohya", "ComfyUI", "bare"])
@torch.no_grad()
def test_stable_diffusion_3_in_its_own_names(dialect: str, tmp_path: Path) -> None:
    """Every layer, queries, keys and values as one: as the library converts the weights that it was added to."""
    torch.manual_seed(0)
    model = MMDiT(MMDIT)
    base = as_stability_has_them(model.state_dict())
    tensors, tuned = {}, dict(base)
    layers = [k.removesuffix(".weight") for k, w in base.items() if k.endswith(".weight") and w.ndim > 1]
    for layer in layers:
        weight = base[f"{layer}.weight"]
        ones = (1,) * (weight.ndim - 2)
        up, down = torch.randn(len(weight), 2, *ones), torch.randn(2, *weight.shape[1:])
        tuned[f"{layer}.weight"] = weight + 1.5 / 2 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        name = f"lora_unet_{layer.replace('.', '_')}" if dialect == "kohya" else layer
        name = f"diffusion_model.{layer}" if dialect == "ComfyUI" else name
        leaves = ("lora_up", "lora_down") if dialect == "kohya" else ("lora_B", "lora_A")
        tensors |= {f"{name}.{leaf}.weight": t for leaf, t in zip(leaves, (up, down), strict=True)}
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    assert "joint_blocks.1.x_block.attn2.qkv" in layers and "joint_blocks.2.context_block.attn.qkv" in layers
    save_file(tensors, tmp_path / "a.safetensors")
    model.load_state_dict(by_the_library(base, model))
    for components in (None, {"denoiser": model}):
        merged = {"denoiser": MMDiT(MMDIT)}
        merged["denoiser"].load_state_dict(model.state_dict())
        merge(merged, files.read(tmp_path / "a.safetensors", components))
        expected = by_the_library(tuned, model)
        for key, tensor in merged["denoiser"].state_dict().items():
            assert torch.allclose(tensor, expected[key], atol=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_a_fused_layer_comes_apart(kind: str, tmp_path: Path) -> None:
    """The three parts' changes are those of the whole, row by row; a LoKr's rows are not apart."""
    weight, name = random(96, 32), "lora_unet_joint_blocks_0_x_block_attn_qkv"
    left, right = random(96, 2), random(2, 32)
    tensors = {
        "lora": {"lora_up.weight": left, "lora_down.weight": right},
        "dora": {"lora_up.weight": left, "lora_down.weight": right, "dora_scale": random(96, 1)},
        "loha": {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left + 1, "hada_w2_b": right - 1},
        "lokr": {"lokr_w1": random(8, 4), "lokr_w2": random(12, 8)},
    }[kind]
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}, path)
    if kind == "lokr":
        with pytest.raises(ValueError, match=r"a lokr of blocks\.0\.image\.attn\.qkv, 96 outputs, does not come apart"):
            files.read(path)
        return
    parts = files.read(path).parts["denoiser"]
    assert list(parts) == [f"blocks.0.image.attn.qkv.{x}" for x in "qkv"]
    factors = {lora.LEAVES[leaf]: tensor for leaf, tensor in tensors.items()} | {"alpha": torch.tensor(2.0)}
    expected = delta(factors, weight)
    found = torch.cat([delta(part, third) for part, third in zip(parts.values(), weight.chunk(3), strict=True)])
    assert torch.allclose(found, expected, atol=1e-6) and expected.norm(dim=1).min() > 1e-3
    files.write(files.read(path), tmp_path / "k.safetensors", "kohya")
    assert len(load_file(tmp_path / "k.safetensors")) == 3 * (1 + len(tensors))  # they have names of their own there
    again = files.read(tmp_path / "k.safetensors").parts["denoiser"]
    assert all(torch.equal(product(again[name]), product(parts[name])) for name in parts)


# --- text encoders -----------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled(pipe: Any) -> Tensor:
    """What diffusers' SDXL makes of the prompts behind its second encoder's projection."""
    said: Tensor = pipe.encode_prompt(list(PROMPTS), num_images_per_prompt=1, do_classifier_free_guidance=False)[2]
    return said


@torch.no_grad()
def test_the_projection_of_a_text_encoder(tmp_path: Path) -> None:
    """By peft in diffusers and by kohya's name: the same pooled text; the library reads ours; it comes off again."""
    import peft
    from diffusers import StableDiffusionXLPipeline

    model = folder("sdxl", tmp_path / "model")
    pipe = pipeline(model)
    plain = pooled(pipe)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["text_projection", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.text_encoder_2)
    expected = pooled(pipe)
    state = peft.get_peft_model_state_dict(pipe.text_encoder_2)
    scaled = {key: tensor * (1.5 if "lora_B" in key else 1) for key, tensor in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "theirs", text_encoder_2_lora_layers=scaled)
    kohya = {
        f"lora_te2_{key.split('.lora_')[0].replace('.', '_')}.lora_{'up' if 'lora_B' in key else 'down'}.weight": tensor
        for key, tensor in scaled.items()
    }
    kohya = {key.replace("te2_encoder", "te2_text_model_encoder"): tensor for key, tensor in kohya.items()}
    assert {"lora_te2_text_projection.lora_up.weight"} < kohya.keys()
    save_file(kohya, tmp_path / "kohya.safetensors")

    components = load_model(model).components
    text: Any = components["text"]
    before = {key: tensor.clone() for key, tensor in text.state_dict().items()}
    adapter = files.read(tmp_path / "theirs")
    files.write(adapter, tmp_path / "k.safetensors", "kohya")
    files.write(adapter, tmp_path / "d", "diffusers")
    files.write(adapter, tmp_path / "p", "peft")
    for place in ("theirs", "kohya.safetensors", "k.safetensors", "d"):
        attach(components, files.read(tmp_path / place))
        assert (text(PROMPTS).pooled - expected).abs().max() < 1e-5 * expected.abs().max(), place
        detach(components, "default")
        assert all(torch.equal(tensor, before[key]) for key, tensor in text.state_dict().items())
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    fresh = pipeline(model)
    fresh.load_lora_weights(tmp_path / "d")
    assert (pooled(fresh) - expected).abs().max() < 1e-5 * expected.abs().max()
    loaded = pipeline(model)
    loaded.text_encoder_2 = peft.PeftModel.from_pretrained(loaded.text_encoder_2, tmp_path / "p").base_model.model
    assert (pooled(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()

    tuned = copy.deepcopy(components)
    text_projection = tuned["text"].second.tower.text_projection  # type: ignore[union-attr]
    text_projection.data += random(24, 1) * random(1, 1280)
    found = extract(tuned, components, 1)
    assert {c: list(part) for c, part in found.parts.items()} == {"text": ["second.tower.text_projection"]}
    merge(components, found)
    assert torch.allclose(text.second.tower.text_projection, text_projection, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("diffusion_model.input_blocks.1.1.proj_in", "down.0.layers.0.attention.proj_in"),
        ("lycoris_mid_block_attentions_0_transformer_blocks_0_ff_net_2", "middle.attention.blocks.0.ff.out"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
            "tower.transformer.resblocks.3.mlp.c_fc",
        ),
        ("text_encoders.clip_g.transformer.text_projection", "second.tower.text_projection"),
        ("lora_te2_text_projection", "second.tower.text_projection"),
        ("text_encoder_2.text_projection", "second.tower.text_projection"),
        ("base_model.model.transformer_blocks.7.attn.add_k_proj", "blocks.7.text.attn.qkv.k"),
        ("lycoris_transformer_blocks_7_attn_add_v_proj", "blocks.7.text.attn.qkv.v"),
        ("transformer.transformer_blocks.23.attn.to_add_out", "blocks.23.text.attn.out"),  # not the last of them then
        ("transformer.transformer_blocks.30.attn.to_add_out", "blocks.30.text.attn.out"),
        ("lora_unet_joint_blocks_37_x_block_adaLN_modulation_1", "blocks.37.image.modulation"),
    ],
)
def test_names_that_people_meet(name: str, module: str) -> None:
    """From the names alone."""
    assert lora.index(lora.infer({name: (8, 8)}))[name][1] == module

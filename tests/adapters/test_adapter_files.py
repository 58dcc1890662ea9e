"""Files of adapters: names of every layer, what is refused and how, metadata, hashes, damage."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters import files
from ldm.adapters.adapter import KINDS, Adapter, base_of, product
from ldm.adapters.facts import metadata
from ldm.adapters.fused import sites
from ldm.adapters.lora import AdapterConfig, adapter_of, attach, inject
from ldm.checkpoints import diffusers
from ldm.checkpoints.layouts import lora
from ldm.models.dit import DiT, DiTConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Conditioning
from tests.checkpoints.families import make
from tests.parity.reference import randomised

SMALL: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "depths": (1, 0), "heads": 2}
PUBLISHED = {
    "sd1": UNetConfig(),
    "sd2": UNetConfig(head_dim=64, context_dim=1024, linear_projection=True),
    "sdxl": UNetConfig(**lora.SDXL),
}


def learned(components: dict[str, nn.Module], **config: Any) -> Adapter:
    """A random adapter of rank 2 on these components."""
    own = {name: part for name, part in components.items() if name in ("denoiser", "text")}
    torch.manual_seed(0)
    inject(own, AdapterConfig(**({"rank": 2, "targets": ("all",), "text": "text" in own} | config)))
    for component in own.values():
        for parameter in component.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return adapter_of(own)


def equal(a: Adapter, b: Adapter, limit: float = 0.0) -> bool:
    """The same change of every layer."""
    if {c: p.keys() for c, p in a.parts.items()} != {c: p.keys() for c, p in b.parts.items()}:
        return False
    return all(
        float((product(f) - product(b.parts[c][n])).abs().max()) <= limit
        and ("magnitude" not in f or torch.equal(f["magnitude"], b.parts[c][n]["magnitude"]))
        for c, part in a.parts.items()
        for n, f in part.items()
    )


def stripped(path: Path) -> Path:
    """The same file without any metadata, as if another program had written it."""
    save_file(load_file(path), path)
    return path


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_comes_back_under_every_name(family: str, tmp_path: Path) -> None:
    components = make(family).components
    adapter = learned(components)
    for to in ("kohya", "diffusers", "native"):
        files.write(adapter, tmp_path / f"{to}.safetensors", to)
        assert equal(files.read(tmp_path / f"{to}.safetensors"), adapter, 1e-7), to
    files.write(adapter, tmp_path / "peft", "peft")
    assert equal(files.read(tmp_path / "peft"), adapter, 1e-7)
    # By names alone; where those are CompVis' numbers of other than two layers a level, by the model's own.
    told = components if family == "sdxl" else None
    assert equal(files.read(stripped(tmp_path / "kohya.safetensors"), told), adapter)
    assert equal(files.read(stripped(tmp_path / "diffusers.safetensors")), adapter, 1e-7)


@pytest.mark.parametrize("family", PUBLISHED)
def test_names_of_the_published_networks(family: str) -> None:
    """Every layer has one name in each dialect, and the width of the text alone tells the network."""
    network = ("unet", PUBLISHED[family])
    with torch.device("meta"):
        modules = list(sites(UNet(PUBLISHED[family])))
    places = lora.places(network, modules)
    kohya = {lora.kohya_name("denoiser", network, m, places[m]): m for m in modules}
    both = {
        f"lora_unet_{getattr(p, c).replace('.', '_')}": m for m, p in places.items() for c in ("diffusers", "compvis")
    }
    assert len(kohya) == len(modules) and len(both) >= 2 * len(modules) - 10
    context = PUBLISHED[family].context_dim
    inferred = lora.infer({name: (320, context) for name in both})
    index = lora.index(inferred)
    assert all(index[name][:2] == ("denoiser", module) for name, module in (both | kohya).items())


def test_names_that_people_meet() -> None:
    """Written out here from the conventions, not from the tables."""
    for family, module, kohya in (
        ("sd1", "down.0.layers.0.attention.blocks.0.attn1.to_q",
         "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sd1", "middle.attention.blocks.0.ff.proj",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"),
        ("sd2", "up.3.layers.2.attention.blocks.0.attn2.to_out",
         "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0"),
        ("sdxl", "down.1.layers.0.attention.blocks.1.attn2.to_k",
         "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"),
        ("sdxl", "up.0.layers.2.attention.proj_in", "lora_unet_output_blocks_2_1_proj_in"),
    ):  # fmt: skip
        network = ("unet", PUBLISHED[family])
        assert lora.kohya_name("denoiser", network, module, lora.places(network, [module])[module]) == kohya
    text = lora.infer({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768)})
    found = lora.index(text)["lora_te_text_model_encoder_layers_0_self_attn_q_proj"]
    assert found[:2] == ("text", "tower.transformer.resblocks.0.attn.in_proj.q")


@pytest.mark.parametrize("kind", KINDS)
def test_dit_in_the_names_of_diffusers(kind: str, tmp_path: Path) -> None:
    """The parts of its fused projections have names of their own there."""
    adapter = learned(make("diffusers dit").components, kind=kind, targets=("attention", "feedforward"))
    path = tmp_path / "a.safetensors"
    files.write(adapter, path, "kohya")
    names = {key.split(".")[0] for key in load_file(path)}
    leaves = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2")
    assert names == {f"lora_transformer_transformer_blocks_{i}_{leaf}" for i in (0, 1) for leaf in leaves}
    assert equal(files.read(stripped(path)), adapter)


@torch.no_grad()
def test_mmdit_by_diffusers(tmp_path: Path) -> None:
    """Every layer, the modulation with swapped halves among them: the same outputs in the library's own network."""
    from diffusers import SD3Transformer2DModel

    model: Any = make("mmdit")
    diffusers.write(model, tmp_path / "model")
    adapter = learned(make("mmdit").components)
    files.write(adapter, tmp_path / "a.safetensors", "diffusers")
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "model", local_files_only=True)
    theirs.load_lora_adapter(load_file(tmp_path / "a.safetensors"), prefix="transformer")
    denoiser = model.components["denoiser"]
    x, t, context, pooled = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([10.0, 700.0]),
        torch.randn(2, 7, 16),
        torch.randn(2, 8),
    )
    cond = Conditioning(context=context, pooled=pooled)
    plain = denoiser(x, t, cond)
    attach(model.components, files.read(stripped(tmp_path / "a.safetensors"), model.components))
    ours, reference = denoiser(x, t, cond), theirs(x, context, pooled, t).sample
    assert (ours - reference).abs().max() < 1e-5 * reference.abs().max() < 1e-3 * (ours - plain).abs().max()


def test_a_lokr_of_swapped_halves_is_refused(tmp_path: Path) -> None:
    adapter = learned(make("mmdit").components, kind="lokr")
    with pytest.raises(ValueError, match=r"a LoKr of .*modulation cannot be moved between programs"):
        files.write(adapter, tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


def test_networks_of_our_own_have_native_files_alone(tmp_path: Path) -> None:
    components: dict[str, nn.Module] = {
        "denoiser": randomised(DiT(DiTConfig(width=24, depth=1, heads=2, classes=0, context_dim=16)))
    }
    adapter = learned(components)
    files.write(adapter, tmp_path / "a.safetensors", "native")
    assert equal(files.read(tmp_path / "a.safetensors"), adapter)
    assert equal(files.read(stripped(tmp_path / "a.safetensors"), components), adapter)
    with pytest.raises(ValueError, match="needs classes"):
        files.write(adapter, tmp_path / "b.safetensors", "kohya")


PLAIN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TWO = {f"{PLAIN}.lora_down.weight": torch.ones(2, 768), f"{PLAIN}.lora_up.weight": torch.ones(320, 2)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.b": torch.ones(2)}, "is no adapter that is known here: it has a.b"),
        ({f"x{i}.diff": torch.ones(2) for i in range(5)}, "it has x0.diff, x1.diff, x2.diff and 2 more"),
        (
            TWO | {f"{PLAIN}.lora_mid.weight": torch.ones(2, 3, 3, 3)},
            "[r, I]; these are [320, 2], [2, 3, 3, 3] and [2, 768]",
        ),
        (TWO | {f"{PLAIN}.lora_mid.weight": torch.ones(2, 2)}, "a core of Tucker's is [r, r, k, k] between"),
        (TWO | {f"{PLAIN}.lokr_t2": torch.ones(2, 2, 3, 3)}, "has only down, lokr_t2, up, which is no whole change"),
        ({f"{PLAIN}.lokr_t2": torch.ones(2, 2, 3, 3)}, "has only lokr_t2, which is no whole change"),
        ({f"{PLAIN}.lora_down.weight": torch.ones(2, 768)}, "has only down, which is no whole change"),
        (TWO | {f"{PLAIN}.lora_up.weight": torch.ones(320, 3)}, "have 3 and 2 ranks"),
        (TWO | {f"{PLAIN}.lora_up.weight": torch.full((320, 2), torch.nan)}, "holds NaN or infinity"),
        (TWO | {f"{PLAIN}.lora_up.weight": torch.ones(2)}, "are no matrices"),
        (TWO | {f"{PLAIN}.alpha": torch.ones(3)}, "are no matrices with a number alpha"),
        (
            {
                f"{PLAIN}.hada_w{i}_{x}": torch.ones(*s)
                for i, x, s in (
                    (1, "a", (320, 2)),
                    (1, "b", (2, 768)),
                    (2, "a", (320, 2)),
                    (2, "b", (2, 767)),
                )
            },
            "different shapes",
        ),
        (TWO | {f"{PLAIN}.dora_scale": torch.ones(1, 768)}, "are not one an output"),
        (TWO | {f"{PLAIN}.dora_scale": torch.ones(1, 320)}, "are not one an output"),
        ({k.replace("attn2", "attn7"): v for k, v in TWO.items()}, "attn7_to_k"),
    ],
)
def test_what_is_no_adapter_is_refused(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        files.read(path)
    assert said in str(error.value)


def test_alpha(tmp_path: Path) -> None:
    """The file's; the rank where it has none; diffusers' metadata; alpha / sqrt(r) with rslora."""
    path = tmp_path / "a.safetensors"

    def scaled(tensors: dict[str, Tensor], **told: Any) -> float:
        config = json.dumps({f"unet.{key}": value for key, value in told.items()})
        save_file(tensors, path, {"lora_adapter_metadata": config} if told else None)
        (part,) = files.read(path).parts["denoiser"].values()
        return float(product(part)[0, 0]) / 2  # ones, of rank 2

    assert scaled(TWO) == 1
    assert scaled(TWO | {f"{PLAIN}.alpha": torch.tensor(0.5)}) == 0.25
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    theirs = {f"unet.{name}.lora.{x}.weight": TWO[f"{PLAIN}.lora_{x}.weight"] for x in ("down", "up")}
    assert scaled(theirs) == 1
    assert scaled(theirs, r=2, lora_alpha=3) == 1.5
    assert scaled(theirs, r=2, lora_alpha=3, use_rslora=True) == pytest.approx(3 / 2**0.5)
    assert scaled(theirs, r=2, lora_alpha=3, alpha_pattern={"attn2.to_k": 5}) == 2.5
    assert scaled(theirs, r=2, lora_alpha=3, alpha_pattern={"attn1.to_k": 5}) == 1.5
    with pytest.raises(ValueError, match="lora_bias is not known here"):
        scaled(theirs, r=2, lora_bias=True)


def test_pickles_are_read_without_being_run(tmp_path: Path) -> None:
    torch.save(TWO, tmp_path / "a.pt")
    assert base_of(files.read(tmp_path / "a.pt")).startswith("Stable Diffusion 1 ")
    torch.save({"x": Path("/")}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        files.read(tmp_path / "b.pt")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither adapter_config\.json nor"):
        files.read(tmp_path)
    with pytest.raises(ValueError, match="no adapter at"):
        files.read(tmp_path / "absent.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type 'IA3' is not known here"):
        files.read(tmp_path)


def test_where_it_is_written(tmp_path: Path) -> None:
    adapter = learned(make("sd1").components)
    for to, name in (("kohya", "a"), ("native", "a.pt"), ("peft", "a.safetensors"), ("kohia", "a.safetensors")):
        with pytest.raises(ValueError, match=r"an adapter for|unknown dialect"):
            files.write(adapter, tmp_path / name, to)
    loha = learned(make("sd1").components, kind="loha")
    with pytest.raises(ValueError, match="diffusers has no names for a loha"):
        files.write(loha, tmp_path / "d", "diffusers")
    assert not list(tmp_path.iterdir())


def test_metadata_and_hash(tmp_path: Path) -> None:
    """The hash is that of all bytes after the header; every ss_ key is text; our own round trip keeps them."""
    adapter = learned({"denoiser": randomised(UNet(UNetConfig(**SMALL)))}, alpha=1.0, targets=("attention",))
    told = metadata(
        adapter,
        {"title": "zorp", "steps": 300, "learning_rate": 1e-4, "tag_frequency": {"a": {"zorp": 8}}, "author": "me"},
    )
    path = tmp_path / "a.safetensors"
    files.write(adapter, path, "kohya", told, torch.float16)
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    raw = path.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert found["sshs_model_hash"] == digest and found["modelspec.hash_sha256"] == f"0x{digest}"
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "zorp",
        "modelspec.author": "me",
        "modelspec.resolution": "512x512",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_steps": "300",
        "ss_learning_rate": "0.0001",
        "ss_tag_frequency": '{"a": {"zorp": 8}}',
    }
    assert expected.items() <= found.items()
    assert {t.dtype for name, t in load_file(path).items() if not name.endswith("alpha")} == {torch.float16}
    assert files.read(path).metadata == {k: v for k, v in found.items() if k not in ("ldm", "format")}
    with pytest.raises(ValueError, match="unknown fact of an adapter 'stepz', did you mean 'steps'"):
        metadata(adapter, {"stepz": 3})


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = learned(make("sd1").components)
    path = tmp_path / "a.safetensors"
    files.write(adapter, path, "kohya")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(files, "_hashes", fail)
    with pytest.raises(OSError, match="full"):
        files.write(adapter, path, "kohya")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@torch.no_grad()
def test_a_sdxl_lora_on_stable_diffusion_1_is_named(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "xl.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.ones(640, 2)}, path)
    with torch.device("meta"):
        one = {"denoiser": UNet(UNetConfig())}
    with pytest.raises(ValueError, match=r"made for Stable Diffusion XL .*; this model is Stable Diffusion 1"):
        attach(one, files.read(path, one))

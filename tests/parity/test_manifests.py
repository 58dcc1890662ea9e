"""Our rename tables against the names and shapes of the published files, both ways; no weights needed.

`manifests/*.txt.gz` hold one `name shape` per line, `-` for a scalar. None of them comes from our tables:

- `*-folder`, `sd3-medium`: the state dicts of diffusers' and transformers' own classes, built from the published
  config.json (WORDS and TEXTS below) with the prefix `text_model.` that published files have. Checked again here.
- `*-single`, `controlnet-single`: a skeleton of the authors' module tree (UNetModel, ControlNet, Encoder, Decoder,
  FrozenCLIPEmbedder) written for this purpose, with open_clip's own CLIP for the text encoders of 2.1 and SDXL. Checked
  here by diffusers' converters, which must turn them into the folders; and by what others recorded of the published
  files: `sdxl-single` has the sha256 of the name list, the count, ranks and bytes of sd_xl_base_1.0; `sd15-single` has
  the count, header length and size of v1-5-pruned-emaonly; `sd21-single` the size of v2-1_768-ema-pruned. These also
  confirm the tensors that no model part holds: position_ids, logit_scale, schedule buffers, the average's counters.
- `dit-xl-2`: the authors' module tree (with timm's PatchEmbed, Attention and Mlp); checked by the 675,129,632 of the
  paper's repository and the names that diffusers' conversion script takes.

Inpainting and depth are the U-Nets alone, x4 the U-Net and autoencoder.
"""

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints import compvis, diffusers, diffusers_text
from ldm.checkpoints.layouts import autoencoder, dit, mmdit, text, unet
from ldm.checkpoints.layouts.table import Entry, to_foreign, to_native
from ldm.checkpoints.model import KINDS
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.text import TextConfig, TextPairConfig
from ldm.models.unet import UNetConfig

Manifest = dict[str, tuple[int, ...]]
FOLDER = Path(__file__).parent / "manifests"

SD1 = UNetConfig()
SD2 = replace(SD1, context_dim=1024, head_dim=64, linear_projection=True)
SDXL = replace(
    SD2, multipliers=(1, 2, 4), depths=(0, 2, 10), middle_depth=10, context_dim=2048, pooled_dim=1280, pooled_layers=2,
    size_dim=256,
)  # fmt: skip
X4 = UNetConfig(
    in_channels=7, channels=256, multipliers=(1, 2, 2, 4), depths=(0, 1, 1, 1), cross_only=(1, 2), context_dim=1024,
    classes=1000, linear_projection=True,
)  # fmt: skip
KL_F8, KL_F4 = AutoencoderConfig(), AutoencoderConfig(multipliers=(1, 2, 4))
CLIP_L = TextConfig(embed_dim=0, activation="quick_gelu", pad_id=49_407)
CLIP_H = TextConfig(width=1024, layers=24, heads=16, embed_dim=1024, skip=1)
CLIP_H_23 = replace(CLIP_H, layers=23, embed_dim=0, skip=0)
CLIP_G = TextConfig(width=1280, layers=32, heads=20, embed_dim=1280)

Component = tuple[str, Any, tuple[str, ...]]  # kind, config, prefixes
D, A = (compvis.DENOISER,), (compvis.AUTOENCODER,)
F8: Component = ("autoencoder", KL_F8, A)
V1: Component = ("text", CLIP_L, (compvis.TEXT_1,))
V2: Component = ("text", CLIP_H, (compvis.TEXT_2,))
XL: Component = ("text_pair", TextPairConfig(), compvis.PAIR)
SINGLE: dict[str, dict[str, Component]] = {
    "sd15-single": {"autoencoder": F8, "text": V1, "denoiser": ("unet", SD1, D)},
    "sd21-single": {"autoencoder": F8, "text": V2, "denoiser": ("unet", SD2, D)},
    "sdxl-single": {"autoencoder": F8, "text": XL, "denoiser": ("unet", SDXL, D)},
    "inpainting-single": {"denoiser": ("unet", replace(SD1, in_channels=9), D)},
    "depth-single": {"denoiser": ("unet", replace(SD2, in_channels=5), D)},
    "x4-single": {"autoencoder": ("autoencoder", KL_F4, A), "denoiser": ("unet", X4, D)},
    "controlnet-single": {"controlnet": ("controlnet", ControlNetConfig(), (compvis.CONTROL,))},
    "dit-xl-2": {"denoiser": ("dit", DiTConfig(), (compvis.DIT,))},
}
_ROOTS = "alphas_cumprod", "one_minus_alphas_cumprod", "recip_alphas_cumprod", "recipm1_alphas_cumprod"
_POSTERIOR = "variance", "log_variance_clipped", "mean_coef1", "mean_coef2"
SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod"}
SCHEDULE |= {f"sqrt_{x}" for x in _ROOTS} | {f"posterior_{x}" for x in _POSTERIOR}
COUNTERS = {"model_ema.decay", "model_ema.num_updates"}
IDS = "text_model.embeddings.position_ids"
UNREAD = {  # what no component holds: a file written again gets all but COUNTERS back
    "sd15-single": SCHEDULE | COUNTERS | {compvis.TEXT_1 + IDS},
    "sd21-single": SCHEDULE | COUNTERS | {compvis.TEXT_2 + "logit_scale"},
    "sdxl-single": {compvis.PAIR[0] + IDS, compvis.PAIR[1] + "logit_scale"},
    "dit-xl-2": {"pos_embed"},
}


def _unet(widths: list[int], attends: str, **words: Any) -> dict[str, Any]:
    """The published config.json, as far as it decides names, shapes or our config."""
    down = ["CrossAttnDownBlock2D" if a == "a" else "DownBlock2D" for a in attends]
    sizes = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, cross_attention_dim=768)
    blocks = dict(down_block_types=down, up_block_types=[n.replace("Down", "Up") for n in reversed(down)])
    rest = dict(block_out_channels=widths, attention_head_dim=8, _class_name="UNet2DConditionModel")
    return sizes | blocks | rest | words


def _vae(widths: list[int]) -> dict[str, Any]:
    n = len(widths)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n)
    sizes = dict(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32)
    return blocks | sizes | dict(block_out_channels=widths, _class_name="AutoencoderKL")


WIDTHS = [320, 640, 1280, 1280]
SECOND = dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
UNETS = {
    "sd15-folder": _unet(WIDTHS, "aaa-"),
    "sd21-folder": _unet(WIDTHS, "aaa-", **SECOND),
    "sdxl-folder": _unet(
        [320, 640, 1280], "-aa", **SECOND | dict(attention_head_dim=[5, 10, 20], cross_attention_dim=2048),
        transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "inpainting-folder": _unet(WIDTHS, "aaa-", in_channels=9),
    "depth-folder": _unet(WIDTHS, "aaa-", in_channels=5, **SECOND),
    "x4-folder": _unet(
        [256, 512, 512, 1024], "-aaa", in_channels=7, cross_attention_dim=1024, num_class_embeds=1000,
        only_cross_attention=[True, True, True, False], use_linear_projection=True,
    ),
}  # fmt: skip
CONTROL = _unet(WIDTHS, "aaa-", conditioning_embedding_out_channels=[16, 32, 96, 256], _class_name="ControlNetModel")
del CONTROL["out_channels"], CONTROL["up_block_types"]
SD3 = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
    pos_embed_max_size=192, _class_name="SD3Transformer2DModel",
)  # fmt: skip
WORDS: dict[str, dict[str, dict[str, Any]]] = {name: {"unet": words} for name, words in UNETS.items()}
WORDS |= {"controlnet-folder": {"controlnet": CONTROL}, "sd3-medium": {"transformer": SD3}}
WORDS["x4-folder"]["vae"] = _vae([128, 256, 512])
for _name in ("sd15", "sd21", "sdxl"):
    WORDS[f"{_name}-folder"]["vae"] = _vae([128, 256, 512, 512])


def _clip(width: int, layers: int, act: str, projection: int, kind: str = "CLIPTextModel") -> dict[str, Any]:
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=projection)
    rest = dict(num_attention_heads=width // 64, hidden_act=act, max_position_embeddings=77, vocab_size=49_408)
    return sizes | rest | dict(architectures=[kind])


_CLIP_L = _clip(768, 12, "quick_gelu", 768)
_CLIP_G = _clip(1280, 32, "gelu", 1280, "CLIPTextModelWithProjection")
TEXTS = {
    "sd15-folder": {"text_encoder": (_CLIP_L, CLIP_L)},
    "sd21-folder": {"text_encoder": (_clip(1024, 23, "gelu", 512), CLIP_H_23)},
    "sdxl-folder": {"text_encoder": (_CLIP_L, CLIP_L), "text_encoder_2": (_CLIP_G, CLIP_G)},
}
EXPECTED = {name.replace("single", "folder"): {p: c[1] for p, c in parts.items()} for name, parts in SINGLE.items()}
EXPECTED["sd3-medium"] = {"denoiser": MMDiTConfig()}
TOTALS = {  # (manifest, prefix): tensors, parameters
    ("sd15-single", compvis.DENOISER): (686, 859_520_964),
    ("sd15-single", compvis.AUTOENCODER): (248, 83_653_863),
    ("sd15-folder", "text_encoder/"): (196, 123_060_480),
    ("sd21-single", compvis.DENOISER): (686, 865_910_724),
    ("sd21-folder", "text_encoder/"): (372, 340_387_840),
    ("sdxl-single", compvis.DENOISER): (1680, 2_567_463_684),
    ("inpainting-single", compvis.DENOISER): (686, 859_535_364),
    ("controlnet-single", compvis.CONTROL): (340, 361_279_120),
    ("dit-xl-2", ""): (292, 675_129_632),
    ("sd3-medium", ""): (683, 2_028_328_000 + 192**2 * 1536),
}


def read(name: str) -> Manifest:
    lines = gzip.decompress((FOLDER / f"{name}.txt.gz").read_bytes()).decode().splitlines()
    pairs = [line.replace("-", "").split(" ") for line in lines]
    return {key: tuple(int(x) for x in shape.split("x") if x) for key, shape in pairs}


def meta(manifest: Manifest) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}


def marked(manifest: Manifest) -> dict[str, Tensor]:
    """Tensors that each hold a number of their own, which takes no memory."""
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(manifest.items())}


def marks(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor[(0,) * tensor.ndim]) for name, tensor in tensors.items()}


def shapes(tensors: dict[str, Tensor]) -> Manifest:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@lru_cache
def ours(kind: str, config: Any) -> dict[str, Tensor]:
    """A component's tensors on the meta device, without the latents' statistics, which no foreign file holds."""
    with torch.device("meta"):
        state = KINDS[kind][0](config).state_dict()
    return {k: v for k, v in state.items() if k not in ("latent_mean", "latent_std")}


def differences(manifest: Manifest, native: dict[str, Tensor], table: list[Entry]) -> set[Any]:
    """Where names and shapes of ours through the table, and there and back again, are not the manifest's."""
    written = to_foreign(table, native)
    wrong: set[Any] = set(shapes(written).items()) ^ set(manifest.items())
    names = [name for entry in table for name in entry.foreign]
    wrong |= {name for name, count in Counter(names).items() if count > 1}
    wrong |= set(shapes(to_native(table, written, "ours")).items()) ^ set(shapes(native).items())
    if not wrong:
        back = to_foreign(table, to_native(table, meta(manifest), "manifest"))
        wrong |= set(shapes(back).items()) ^ set(manifest.items())
    return wrong


def single_differences(name: str, manifest: Manifest) -> set[Any]:
    entries: list[Entry] = []
    native: dict[str, Tensor] = {}
    for part, (kind, config, prefixes) in SINGLE[name].items():
        native |= {f"{part}/{k}": v for k, v in ours(kind, config).items()}
        entries += [replace(e, native=f"{part}/{e.native}") for e in compvis.table(kind, config, prefixes)]
    return differences({k: v for k, v in manifest.items() if k not in UNREAD.get(name, ())}, native, entries)


def place(manifest: Manifest, folder: str) -> Manifest:
    return {k.removeprefix(f"{folder}/"): v for k, v in manifest.items() if k.startswith(f"{folder}/")}


@pytest.mark.parametrize("name", SINGLE)
def test_single_file(name: str) -> None:
    manifest = read(name)
    assert not single_differences(name, manifest)
    tensors = compvis.named(meta(manifest), name)
    found = compvis.find_parts(tensors, {})
    assert {p.name: (p.kind, p.config, p.prefixes) for p in found} == SINGLE[name]
    extra, unknown = compvis.left_over(tensors, found)
    assert not unknown
    assert UNREAD.get(name, set()) - set(extra) <= COUNTERS | set(dit.IGNORED)


@pytest.mark.parametrize("name", WORDS)
def test_folder(name: str) -> None:
    import diffusers as library

    manifest = read(name)
    assert {key.split("/")[0] for key in manifest} == WORDS[name].keys() | TEXTS.get(name, {}).keys()
    for folder, words in WORDS[name].items():
        with torch.device("meta"):
            model = getattr(library, words["_class_name"]).from_config(words)
        assert shapes(model.state_dict()) == place(manifest, folder)
        if folder == "vae":
            kind, config = "autoencoder", autoencoder.from_diffusers(words, name)
            table = autoencoder.diffusers(config, ours(kind, config))
        else:
            _, kind, config, table = diffusers._network(words["_class_name"], words, name)
        assert config == EXPECTED[name][diffusers.PLACES[folder]]
        held = {k: v for k, v in place(manifest, folder).items() if k not in mmdit.IGNORED}
        assert not differences(held, ours(kind, config), table)


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, found in TEXTS.items() for folder in found])
def test_text_encoder_of_a_folder(name: str, folder: str) -> None:
    import transformers

    words, config = TEXTS[name][folder]
    manifest = place(read(name), folder)
    with torch.device("meta"):
        model = getattr(transformers, words["architectures"][0])(transformers.CLIPTextConfig(**words))
    theirs = {diffusers_text.wrapped(k): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    assert shapes(theirs) == manifest
    assert text.from_transformers(words, name, pad_id=config.pad_id) == config
    state = ours("text", config)
    assert not differences(manifest, state, text.transformers(config, state))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "inpainting", "depth", "x4", "controlnet"])
def test_ours_and_the_converters_of_diffusers_put_every_tensor_in_the_same_place(family: str) -> None:
    from diffusers.loaders import single_file_utils as library

    words, single = WORDS[f"{family}-folder"], marked(read(f"{family}-single"))
    converters: dict[str, Any] = {
        "controlnet": (library.convert_controlnet_checkpoint, unet.controlnet_diffusers),
        "unet": (library.convert_ldm_unet_checkpoint, unet.diffusers),
        "vae": (library.convert_ldm_vae_checkpoint, autoencoder.diffusers),
    }
    for folder in words:
        convert, layout = converters[folder]
        kind, config, prefixes = SINGLE[f"{family}-single"][diffusers.PLACES[folder]]
        held = {k: v for k, v in single.items() if k.startswith(prefixes)}
        native = to_native(compvis.table(kind, config, prefixes), held, family)
        written = to_foreign(layout(config, native), native)
        theirs = convert(single, words[folder])
        assert marks(written) == marks(theirs)
        assert shapes(theirs) == place(read(f"{family}-folder"), folder)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_converters_of_diffusers_turn_text_encoders_into_the_folders(family: str) -> None:
    from diffusers.loaders import single_file_utils as library

    single, folder = meta(read(f"{family}-single")), read(f"{family}-folder")
    if family != "sd21":
        first = shapes(library.convert_ldm_clip_checkpoint(single))
        assert first == place(folder, "text_encoder") | {IDS: (1, 77)}
    if family != "sd15":
        prefix, where = (compvis.TEXT_2, "text_encoder") if family == "sd21" else (compvis.PAIR[1], "text_encoder_2")
        second = library.convert_open_clip_checkpoint(None, single, prefix=prefix)
        assert shapes(second) == place(folder, where)


@pytest.mark.parametrize(("name", "prefix"), TOTALS)
def test_totals(name: str, prefix: str) -> None:
    found = [shape for key, shape in read(name).items() if key.startswith(prefix)]
    assert (len(found), sum(map(prod, found))) == TOTALS[name, prefix]


def test_the_published_sdxl_file() -> None:
    manifest = read("sdxl-single")
    digest = hashlib.sha256(json.dumps(sorted(manifest), separators=(",", ":")).encode()).hexdigest()
    assert digest == "96235265e176ec32fa4d9f86da46b83125c917460c49e4512b33021567034d44"
    assert Counter(len(shape) for shape in manifest.values()) == {0: 1, 1: 1442, 2: 949, 4: 123}
    assert 2 * sum(map(prod, manifest.values())) == 6_937_675_890  # all of it is fp16, position_ids too


@pytest.mark.parametrize(("name", "size"), [("sd15-single", 4_265_146_304), ("sd21-single", 5_214_604_494)])
def test_the_published_file_has_this_many_bytes(name: str, size: int) -> None:
    types = {"position_ids": ("I64", 8), "num_updates": ("I32", 4)}
    manifest, end = read(name), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, shape in manifest.items():
        dtype, width = types.get(key.rpartition(".")[2], ("F32", 4))
        start, end = end, end + width * prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + length + end == size
    if name == "sd15-single":
        assert (len(manifest), length) == (1145, 156_444)


@pytest.mark.parametrize("defect", ["denoiser", "autoencoder", "text", "shape", "lost", "added"])
def test_a_planted_defect_is_noticed(defect: str) -> None:
    published = read("sd15-single")
    key = {
        "autoencoder": "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "text": "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.v_proj.bias",
    }.get(defect, "model.diffusion_model.output_blocks.5.2.conv.weight")
    changed = {k: v for k, v in published.items() if k != key}
    if defect in ("shape", "added"):
        changed |= {key: (1,)} if defect == "shape" else {key: published[key], f"{key}.more": (1,)}
    elif defect != "lost":
        changed[key.replace("5.2.", "5.1.").replace("nin_", "").replace("v_", "value_")] = published[key]
    assert single_differences("sd15-single", changed) == set(changed.items()) ^ set(published.items())

"""What the files of adapters call the modules of a network: kohya's, diffusers' and peft's names, and LyCORIS' factors.

Nothing is listed here that the tables of whole models know: a module's name is that of its weight.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.checkpoints.layouts import dit, mmdit, text, unet
from ldm.checkpoints.layouts.table import Entry, Shapes
from ldm.checkpoints.model import keys_of
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.text import TextConfig, TextPairConfig
from ldm.models.unet import UNetConfig

Network = tuple[str, Any]
"""(kind, config) of a component, as in `ldm.checkpoints.model.KINDS`."""

LEAVES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
    "lora_mid.weight": "mid",
    **{name: name for name in ("hada_t1", "hada_t2", "lokr_t2")},
    **{f"hada_w{i}_{x}": f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"},
    **{f"lokr_w{i}{x}": f"lokr_w{i}{x}" for i in (1, 2) for x in ("", "_a", "_b")},
    **{name: name for name in ("down", "up", "magnitude")},  # our own
}
"""Ends of tensors' names in all dialects, and the factors that they are."""
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""How the two dialects that are written call the factors; the others have one name everywhere."""

SDXL = {
    "multipliers": (1, 2, 4), "depths": (0, 2, 10), "middle_depth": 10, "head_dim": 64, "context_dim": 2048,
    "linear_projection": True, "pooled_dim": 1280, "pooled_layers": 2, "size_dim": 256,
}  # fmt: skip
ALSO = {
    "lora_te_": ("lora_te_", "lora_te1_"),
    "lora_te1_": ("lora_te_", "lora_te1_"),
    "lora_unet_": ("lora_unet_", "lycoris_"),
    "lora_transformer_": ("lora_transformer_", "lora_unet_", "lycoris_"),
}
"""kohya's prefix, and those that people write in its place: LyCORIS by itself says lycoris_ for what is no text."""
COMFY = {
    "text_encoder.": "text_encoders.clip_l.transformer.",
    "text_encoder_2.": "text_encoders.clip_g.transformer.",
}
"""diffusers' prefix of a text encoder, and ComfyUI's."""
MMDIT = {
    "patches": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2",
    "pooled.0": "y_embedder.mlp.0", "pooled.2": "y_embedder.mlp.2", "context": "context_embedder",
    "modulation": "final_layer.adaLN_modulation.1", "out": "final_layer.linear",
}  # fmt: skip
MMDIT_BLOCK = {"modulation": "adaLN_modulation.1", "attn.out": "attn.proj", "attn2.out": "attn2.proj"}
"""Our modules in Stability AI's own files of Stable Diffusion 3; of a block, those that have another name there."""
TEXT = r"lora_te\d?_|text_encoder|(base_model\.model\.)?(text_model\.|encoder\.layers|text_projection$)"
"""How the name of a text encoder's module begins."""


@dataclass(frozen=True)
class Place:
    """A module of ours in other files: a path of diffusers and one of CompVis ("" where there is none).

    turned: the two halves of its outputs are swapped there. matrix: ours is a 1x1 convolution and theirs linear.
    """

    diffusers: str
    compvis: str = ""
    turned: bool = False
    matrix: bool = False


def places(network: Network, modules: Iterable[str]) -> dict[str, Place]:
    """Native module name -> its places, in the network of a component. Raises ValueError where there are none."""
    modules = list(modules)
    found = _places(network, modules)
    absent = [module for module in modules if module not in found]
    if absent:
        raise ValueError(f"other programs have no name for an adapter of {absent[0]}; write it as native")
    return found


def _places(network: Network, modules: list[str]) -> dict[str, Place]:
    """Those that have one. Raises ValueError for a network that other programs do not know."""
    kind, config = network
    if kind == "text_pair":
        found: dict[str, Place] = {}
        for half in ("first", "second"):
            own = [m.removeprefix(f"{half}.") for m in modules if m.startswith(f"{half}.")]
            inner = _places(("text", getattr(config, half)), own)
            found |= {f"{half}.{name}": place for name, place in inner.items()}
        return found
    keys = [_weight(module)[0] for module in modules]
    theirs = {entry.native: entry for entry in _diffusers(kind, config, keys)}
    compvis = {entry.native: entry for entry in _compvis(kind, config, keys)}
    # What they have several copies of has no one module there.
    single = [m for m in modules if theirs[_weight(m)[0]].how != "copies"]
    return {module: _place(module, theirs, compvis) for module in single}


def _weight(module: str) -> tuple[str, int]:
    """The key of a module's weight and, for a part of a fused projection, which third of it."""
    whole, _, part = module.rpartition(".")
    if part == "text_projection":  # a parameter of its own, without a layer around it
        return module, 0
    if whole.endswith(".in_proj"):
        return f"{whole}_weight", "qkv".index(part)
    return (f"{whole}.weight", "qkv".index(part)) if whole.endswith(".qkv") else (f"{module}.weight", 0)


def _place(module: str, theirs: Mapping[str, Entry], compvis: Mapping[str, Entry]) -> Place:
    key, third = _weight(module)
    entry = theirs[key]
    name = entry.foreign[third].removesuffix(".weight")
    other = compvis[key].foreign[third].removesuffix(".weight") if key in compvis else ""
    return Place(name, other, entry.how == "halves", entry.how == "matrix")


def _diffusers(kind: str, config: Any, keys: list[str]) -> list[Entry]:
    if kind == "unet":
        return unet.diffusers(_nameable(config), keys)
    if kind == "dit":
        return dit.diffusers(config, keys)
    if kind == "mmdit":
        return mmdit.diffusers(config, keys)
    if kind == "text":
        return text.transformers(config, keys)
    raise ValueError(f"other programs have no names for an adapter of a {kind}; write it as native")


def _compvis(kind: str, config: Any, keys: list[str]) -> list[Entry]:
    if kind != "unet" or not config.context_dim:
        return []
    return unet.compvis(_nameable(config), keys)


def _nameable(config: UNetConfig) -> UNetConfig:
    """Without what those formats cannot hold and what changes no name."""
    return replace(
        config, positions=False, norm_groups=32, pooled_dim=config.pooled_dim if config.pooled_layers == 2 else 0
    )


def modules_of(network: Network) -> list[str]:
    """The native names of the modules of a network that an adapter may change, and of some that it may not."""
    kind, config = network
    if kind == "text_pair":
        halves = {half: modules_of(("text", getattr(config, half))) for half in ("first", "second")}
        return [f"{half}.{name}" for half, names in halves.items() for name in names]
    if kind == "text":  # by the table: building open_clip's tower takes a second
        leaves = [f"{name}.weight" for name in text.LAYER if not name.startswith("ln")] + ["attn.in_proj_weight"]
        keys = [f"tower.transformer.resblocks.{i}.{leaf}" for i in range(config.layers) for leaf in leaves]
        keys += ["tower.text_projection"] if config.embed_dim else []
    else:
        keys = [key for key in keys_of(kind, config) if key.endswith(".weight")]
    modules: list[str] = []
    for key in keys:
        module = key.removesuffix(".weight").removesuffix("_weight")
        modules += [f"{module}.{x}" for x in "qkv"] if module.endswith((".in_proj", ".qkv")) else [module]
    return modules


def prefixes(component: str, network: Network, module: str) -> tuple[str, str]:
    """(kohya's, diffusers') prefix of a module's name."""
    if component == "text":
        if network[0] == "text_pair":
            second = module.startswith("second.")
            return ("lora_te2_", "text_encoder_2.") if second else ("lora_te1_", "text_encoder.")
        return "lora_te_", "text_encoder."
    return ("lora_unet_", "unet.") if network[0] == "unet" else ("lora_transformer_", "transformer.")


def kohya_name(component: str, network: Network, module: str, place: Place) -> str:
    """What kohya's programs call it: diffusers' path, but CompVis' in Stable Diffusion XL."""
    path = place.compvis if network[0] == "unet" and network[1].size_dim else place.diffusers
    return prefixes(component, network, module)[0] + path.replace(".", "_")


def diffusers_name(component: str, network: Network, module: str, place: Place) -> str:
    """What diffusers calls it in a file for a whole pipeline."""
    return prefixes(component, network, module)[1] + place.diffusers


def index(networks: Mapping[str, Network]) -> dict[str, tuple[str, str, Place]]:
    """Every name that any dialect has for a module -> (component, native module name, place)."""
    found: dict[str, tuple[str, str, Place]] = {}
    for component, network in networks.items():
        modules = modules_of(network)
        try:
            known = _places(network, modules)
        except ValueError:  # a network of our own, with names of our own
            known = {}
        for module in modules:
            found[f"{component}.{module}"] = (component, module, known.get(module, Place("")))
        for module, place in known.items():
            told = (component, module, place)
            for name in _spellings(component, network, module, place):
                found[name] = told
        if network[0] == "mmdit":
            found |= {name: (component, whole, Place("")) for name, whole in _original_mmdit(modules)}
    return found


def _spellings(component: str, network: Network, module: str, place: Place) -> Iterator[str]:
    kohya, diffusers = prefixes(component, network, module)
    paths = {place.diffusers, place.compvis, place.diffusers.removeprefix(text.WRAPPER)} - {""}
    for prefix in ALSO.get(kohya, (kohya,)):
        yield from (prefix + path.replace(".", "_") for path in paths)
    for path in paths - {place.compvis}:
        yield diffusers + path
        if diffusers in COMFY:
            yield COMFY[diffusers] + path
        if diffusers != "text_encoder_2.":
            yield path  # a peft folder of one network
            yield f"base_model.model.{path}"
    if place.compvis:
        yield f"diffusion_model.{place.compvis}"


def _original_mmdit(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, our module) in Stability AI's own names: queries, keys and values are one, and ours is the whole then."""
    for module in modules:
        whole = re.sub(r"(\.qkv)\.[qkv]$", r"\1", module)
        block = re.fullmatch(r"blocks\.(\d+)\.(image|text)\.(.+)", whole)
        if block:
            stream = "x_block" if block[2] == "image" else "context_block"
            path = f"joint_blocks.{block[1]}.{stream}.{MMDIT_BLOCK.get(block[3], block[3])}"
        else:
            path = MMDIT[whole]
        for name in (path, f"diffusion_model.{path}", f"lora_unet_{path.replace('.', '_')}"):
            yield name, whole


def infer(shapes: Shapes) -> dict[str, Network]:
    """The networks that the modules of an adapter's file are of, by their names and the width of the text.

    shapes: module name in the file -> (O, I) of its change. Where the width is none of a published family's, as many
    levels and layers as the names call for; CompVis' numbers are then those of two layers a level.
    """
    width = next((shape[1] for name, shape in shapes.items() if re.search(r"attn2[._]to_[kv]$", name)), 0)
    inside = [n for n in shapes if not re.match(TEXT, n)]
    outside = shapes.keys() - set(inside)
    pair = width == 2048 or any(re.match(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.", n) for n in outside)
    networks: dict[str, Network] = {}
    if inside:
        networks["denoiser"] = _denoiser(inside, width)
    if outside:
        layers = 1 + max((int(n) for name in outside for n in re.findall(r"layers[._](\d+)", name)), default=0)
        config = TextConfig(layers=layers)
        networks["text"] = ("text_pair", TextPairConfig(config, config)) if pair else ("text", config)
    return networks


def _denoiser(names: list[str], width: int) -> Network:
    joined = "\n".join(names)

    def most(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, joined)), default=0)

    if not re.search(r"(down|up|mid)_block|(in|out)put_blocks|middle_block|conv_(in|out)$|time_emb", joined):
        depth = 1 + most(r"(?:transformer|joint)_blocks[._](\d+)")
        if re.search(r"joint_blocks|add_[qkv]_proj|to_add_out|ff_context|norm1_context|context_embedder", joined):
            inner = most(r"transformer_blocks[._](\d+)[._](?:attn[._]to_add_out|ff_context)")  # not in the last block
            depth = max(depth, inner + 2)
            depth = next((published for published in (24, 38) if published >= depth), depth)  # SD 3 and 3.5
            return "mmdit", MMDiTConfig(depth=depth, dual=tuple(range(depth)), qk_norm=True)
        return "dit", DiTConfig(depth=depth, frequency_shift=1.0)
    if width in (768, 1024, 2048):
        return "unet", UNetConfig(**SDXL) if width == 2048 else UNetConfig(context_dim=width)  # type: ignore[arg-type]
    if re.search(r"(in|out)put_blocks", joined):
        levels, blocks = 4, 2
    else:
        levels = 1 + max(1, most(r"(?:down|up)_blocks[._](\d+)"))
        layer = r"_blocks[._]\d+[._](?:attentions|resnets)[._](\d+)"
        blocks = max(1, 1 + most(f"down{layer}"), most(f"up{layer}"))
    depth = 1 + most(r"transformer_blocks[._](\d+)")
    return "unet", UNetConfig(
        multipliers=tuple(range(1, levels + 1)),  # all different, so that every level has a skip convolution
        blocks=blocks,
        depths=(depth,) * levels,
        middle_depth=depth,
        context_dim=width or 768,
        pooled_dim=1280,  # with the names of what only some have
        pooled_layers=2,
    )

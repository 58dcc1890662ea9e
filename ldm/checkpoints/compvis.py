"""Single files: CompVis' and Stability's checkpoints, lllyasviel's ControlNets, the authors' DiT, lone components."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import facts, textual_inversion
from ldm.checkpoints.files import commit_file, save_tensors
from ldm.checkpoints.foreign import read_file
from ldm.checkpoints.layouts import autoencoder, dit, t2i_adapter, text, unet, unet_config
from ldm.checkpoints.layouts.table import Entry, Tensors, to_foreign, to_native
from ldm.checkpoints.model import BROKEN, KINDS, LoadedModel, build, config_of, from_plain, keys_of, kind_of
from ldm.models.text import TextConfig, TextPairConfig

DENOISER, AUTOENCODER, CONTROL, AVERAGE = "model.diffusion_model.", "first_stage_model.", "control_model.", "model_ema."
TEXT_1, TEXT_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
PAIR = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
REFINER = "conditioner.embedders.0.model."
"""Of SDXL's refiner, which hears the second of the pair alone."""

BARE = {  # a component alone in a file: the tensor that gives it away
    "control_model.": "input_hint_block.0.weight",
    "model.diffusion_model.": "input_blocks.0.0.weight",
    "first_stage_model.": "encoder.down.0.block.0.conv1.weight",
    "dit.": "y_embedder.embedding_table.weight",
    "cond_stage_model.model.": "token_embedding.weight",
    "t2i_adapter.": "body.0.block1.weight",
}
DIT, T2I = "dit.", "t2i_adapter."
EXTRA = re.compile(
    r"(cond_stage_model|conditioner)\..*(position_ids|logit_scale|attn_mask)|[^.]+|(denoiser|low_scale_model)\.[^.]+"
)
"""Tensors that no component of ours holds and that mean nothing to it; a file written again gets them back."""
DROPPED = re.compile(r"loss\..*|model_ema\..*|.*\.loss\..*|visual\..*")
"""What only training needed; of open_clip's CLIPs the image tower, whose pictures are not in our [-1, 1]."""


@dataclass(frozen=True)
class Part:
    """A component in a file: where it is, and the table and config that its tensors have."""

    name: str
    prefixes: tuple[str, ...]
    kind: str
    config: Any
    table: Callable[[], list[Entry]]  # foreign names in full, prefix included


def read(
    path: Path,
    names: Sequence[str] | None = None,
    *,
    prediction: str | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """A model from a single file. Raises ValueError naming the file and the reason; see `load_model`."""
    tensors, metadata = read_file(path)
    if textual_inversion.holds_one(tensors, metadata):
        raise ValueError(f"{path} is a textual inversion, an addition to a model, and no model")
    tensors = named(tensors, str(path))
    recorded = facts.recorded(metadata)
    try:
        parts = find_parts(tensors, recorded)
        configs = {part.name: part.config for part in parts}
        settings, notes = facts.settings(configs, tensors, metadata, prediction)
        scale = float(settings.pop("latent_scale", facts.SCALE["sd"]))
        if not scale > 0:
            raise ValueError(f"its latent scale is {scale}")
    except (*BROKEN, ValueError) as error:
        raise ValueError(f"{path} is of no family known here: {error}") from error
    if not parts:
        raise ValueError(f"{path} holds nothing known: its first tensor is {next(iter(tensors))}")
    if ema:
        tensors = averaged(tensors, parts, str(path))
    components = {}
    for part in parts:
        if names is None or part.name in names:
            native = to_native(part.table(), _below(tensors, part.prefixes), str(path))
            if part.kind == "autoencoder":
                native |= _latent_statistics(part.config.latent_channels, scale)
            components[part.name] = build(part.kind, part.config, native, f"{path}: {part.name}", dtype=dtype)
    extra, unknown = left_over(tensors, parts)
    if unknown:
        notes += (f"{len(unknown)} tensors are of no use here, such as {unknown[0]}",)
    return LoadedModel(components, settings, path.stem, path, extra, notes)


def named(tensors: Tensors, source: str) -> Tensors:
    """The tensors under their full names, also those of a component alone in its file.

    Raises ValueError saying what the file is instead, if it is no model.
    """
    keys = tensors.keys()
    if any(re.search(r"lora_(down|up|[AB])\b|\.lora\.|hada_|lokr_", k) for k in keys):
        raise ValueError(f"{source} is a LoRA, an addition to a model, and no model; see ldm adapter inspect")
    if any(re.match(r"(down_blocks|encoder\.down_blocks|transformer_blocks)\.", k) for k in keys):
        raise ValueError(f"{source} is a component of diffusers; give the folder that holds it and its config.json")
    if not any(k.startswith((DENOISER, AUTOENCODER, CONTROL)) for k in keys):
        for prefix, mark in BARE.items():
            if mark in keys:
                return {k if DROPPED.fullmatch(k) else prefix + k: v for k, v in tensors.items()}
    # Some old files of Stable Diffusion 1 leave the wrapper's name out.
    old = TEXT_1 + "embeddings."
    if any(k.startswith(old) for k in keys):
        return {re.sub(f"^{re.escape(TEXT_1)}(?!text_model)", TEXT_1 + text.WRAPPER, k): v for k, v in tensors.items()}
    return tensors


def find_parts(tensors: Mapping[str, Tensor], recorded: Mapping[str, Any]) -> list[Part]:
    """The components in a file, from what it records of them or else from its tensors' names and shapes."""
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}

    def below(prefix: str) -> dict[str, tuple[int, ...]]:
        return {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix) and not EXTRA.fullmatch(k)}

    parts = []

    def add(name: str, kind: str, prefixes: tuple[str, ...], infer: Callable[..., Any]) -> None:
        found = [below(prefix) for prefix in prefixes]
        if not all(found):
            return
        if name in recorded.get("components", {}):
            kind, config = recorded["components"][name]["kind"], recorded["components"][name]["config"]
            config = from_plain(KINDS[kind][1], config)
        else:
            config = infer(*found)
        parts.append(Part(name, prefixes, kind, config, lambda: table(kind, config, prefixes)))

    add("autoencoder", "autoencoder", (AUTOENCODER,), autoencoder.infer)
    add("text", "text", (TEXT_1,), lambda s: text.infer_transformers(s, skip=0, final_norm=True))
    add("text", "text", (TEXT_2,), lambda s: text.infer(s, skip=1, final_norm=True))
    add("text", "text_pair", PAIR, _infer_pair)
    add("text", "text", (REFINER,), lambda s: text.infer(s, skip=1, final_norm=False))
    add("denoiser", "unet", (DENOISER,), unet_config.infer)
    add("denoiser", "dit", (DIT,), lambda s: dit.infer({k: v for k, v in s.items() if k not in dit.IGNORED}))
    add("controlnet", "controlnet", (CONTROL,), unet_config.infer_controlnet)
    add("t2i_adapter", "t2i_adapter", (T2I,), t2i_adapter.infer)
    return parts


def _infer_pair(first: Any, second: Any) -> TextPairConfig:
    return TextPairConfig(
        text.infer_transformers(first, skip=1, final_norm=False), text.infer(second, skip=1, final_norm=False)
    )


def table(kind: str, config: Any, prefixes: tuple[str, ...]) -> list[Entry]:
    """The rename table of a component in a single file, their names in full."""
    keys = keys_of(kind, config)
    if kind == "text_pair":
        entries = []
        for half, prefix in zip(("first.", "second."), prefixes, strict=True):
            own = [k.removeprefix(half) for k in keys if k.startswith(half)]
            found = _text_table(getattr(config, half[:-1]), own, prefix)
            entries += [replace(entry, native=half + entry.native) for entry in found]
        return entries
    (prefix,) = prefixes
    if kind == "text":
        return _text_table(config, keys, prefix)
    tables: dict[str, Callable[[Any, Iterable[str]], list[Entry]]] = {
        "autoencoder": autoencoder.compvis,
        "unet": unet.compvis,
        "controlnet": unet.controlnet_compvis,
        "dit": dit.facebook,
        "t2i_adapter": t2i_adapter.original,
    }
    return _prefixed(tables[kind](config, keys), "" if prefix in (DIT, T2I) else prefix)


def _text_table(config: TextConfig, keys: list[str], prefix: str) -> list[Entry]:
    entries = text.open_clip(keys) if prefix.endswith("model.") else text.transformers(config, keys)
    return _prefixed(entries, prefix)


def _prefixed(entries: list[Entry], prefix: str) -> list[Entry]:
    return [replace(e, foreign=tuple(prefix + name for name in e.foreign)) for e in entries]


def _below(tensors: Tensors, prefixes: tuple[str, ...]) -> Tensors:
    found = {k: v for k, v in tensors.items() if k.startswith(prefixes) and not EXTRA.fullmatch(k)}
    if prefixes in ((DIT,), (T2I,)):  # names that files have without it
        found = {k.removeprefix(prefixes[0]): v for k, v in found.items()}
        found = {k: v for k, v in found.items() if prefixes == (T2I,) or k not in dit.IGNORED}
    return found


def left_over(tensors: Tensors, parts: list[Part]) -> tuple[Tensors, list[str]]:
    """(what no component holds and a file may have, names of what should not be there)."""
    used = {k for part in parts for k in tensors if k.startswith(part.prefixes)}
    rest = {k: v for k, v in tensors.items() if (k not in used or EXTRA.fullmatch(k)) and not DROPPED.fullmatch(k)}
    extra = {k: v for k, v in rest.items() if EXTRA.fullmatch(k)}
    return extra, sorted(set(rest) - set(extra))


def averaged(tensors: Tensors, parts: list[Part], source: str) -> Tensors:
    """The file's averaged weights in the place of the denoiser's. CompVis writes their names without dots."""
    result = dict(tensors)
    names = [name for part in parts if part.name == "denoiser" for e in part.table() for name in e.foreign]
    if not names:
        raise ValueError(f"{source} has no denoiser, and so no averaged weights of one")
    for name in names:
        average = AVERAGE + name.removeprefix("model.").replace(".", "")
        if average not in tensors:
            raise ValueError(f"{source} has no averaged weights: {average} is missing")
        result[name] = tensors[average]
    return result


def _latent_statistics(channels: int, scale: float) -> Tensors:
    shape = (channels, 1, 1)
    return {"latent_mean": torch.zeros(shape), "latent_std": torch.full(shape, 1 / scale)}


def write(model: LoadedModel, path: Path, *, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """The model as one safetensors file, atomically; returns notes on what the format made necessary.

    Raises ValueError if the format cannot hold it.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"a single file is written as .safetensors, not {path.name!r}")
    notes: tuple[str, ...] = ()
    tensors: Tensors = dict(model.extra)
    described = {}
    scale = facts.latent_scale(model.components.get("denoiser"))
    for name, module in model.components.items():
        kind, config, native = kind_of(module), config_of(module), dict(module.state_dict())
        if kind == "autoencoder":
            mean, std = native.pop("latent_mean"), native.pop("latent_std")
            native, folded = autoencoder.fold(native, mean, std, 1 / scale)
            notes += ("the latents' statistics went into the 1x1 convolutions around them",) if folded else ()
        if kind == "text" and not config.embed_dim and config.activation == "gelu":
            config, native = text.with_last_block(config, native)
            notes += ("a block of zeros stands for the text encoder's last one, which nothing reads",)
        tensors |= to_foreign(table(kind, config, _prefixes(kind, config)), native)
        if kind == "dit":
            constants = dit.constants(config, model.settings.get("size", 256) // dit.LATENT_FACTOR)
            tensors |= {k: v.to(next(iter(native.values())).dtype) for k, v in constants.items()}
        if kind == "unet":
            tensors, told = facts.marked(tensors, model.settings.get("diffusion", {}))
            notes += told
        described[name] = {"kind": kind, "config": asdict(config)}
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    settings = {**model.settings, "latent_scale": scale}
    record = {"components": described, "settings": settings, "name": model.name}
    with commit_file(path) as stage:
        save_tensors(
            stage,
            tensors,
            record,
            {"format": "pt"} | facts.modelspec(model.components.get("denoiser"), model.settings, model.name),
        )
    return notes


def _prefixes(kind: str, config: Any) -> tuple[str, ...]:
    if kind == "text" and not config.embed_dim:
        return (TEXT_1,)
    if kind == "text":
        return (TEXT_2,) if config.final_norm else (REFINER,)
    places: dict[str, tuple[str, ...]] = {
        "autoencoder": (AUTOENCODER,),
        "unet": (DENOISER,),
        "controlnet": (CONTROL,),
        "dit": (DIT,),
        "t2i_adapter": (T2I,),
        "text_pair": PAIR,
    }
    if kind not in places:
        raise ValueError(f"a CompVis file cannot hold a component of kind {kind}")
    return places[kind]

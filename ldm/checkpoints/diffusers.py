"""Folders of diffusers: whole pipelines, and single components."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints import diffusers_text
from ldm.checkpoints.files import commit, read_json, save_tensors, write_json
from ldm.checkpoints.foreign import read_component
from ldm.checkpoints.layouts import autoencoder, dit, mmdit, scheduler, t2i_adapter, unet, unet_config
from ldm.checkpoints.layouts.table import Entry, Tensors, to_foreign, to_native
from ldm.checkpoints.model import BROKEN, LoadedModel, build, config_of, keys_of, kind_of
from ldm.models.text import TextEncoder, TextPair
from ldm.models.transformers_text import TransformersText

VERSION = "0.42.0"
WEIGHTS = "diffusion_pytorch_model"

PLACES = {
    "vae": "autoencoder",
    "unet": "denoiser",
    "transformer": "denoiser",
    "controlnet": "controlnet",
    "t2i_adapter": "t2i_adapter",
}
TEXT_ENCODERS = ("T5EncoderModel", "UMT5EncoderModel", "BertModel", "RobertaModel", "XLMRobertaModel")
CONTEXT_LENGTH = 77  # tokens of a prompt for encoders that do not say how many they were used with
UNETS = ("UNet2DConditionModel", "UNet2DModel")


def is_folder(path: Path) -> bool:
    """Whether `path` is a pipeline's folder or a component's."""
    if (path / "model_index.json").is_file():
        return True
    return (path / "config.json").is_file() and not (path / "model.json").is_file()


def read(path: Path, names: Sequence[str] | None = None, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """A pipeline's folder or a component's. Raises ValueError naming the file and the reason."""
    try:
        return _read(path, names, dtype)
    except BROKEN as error:  # JSON of another shape than theirs
        raise ValueError(
            f"{path} is no folder of diffusers that can be read: {type(error).__name__} {error}"
        ) from error


def _read(path: Path, names: Sequence[str] | None, dtype: torch.dtype | None) -> LoadedModel:
    if not (path / "model_index.json").is_file():
        name, module = _component(path, dtype)
        return LoadedModel({name: module}, {}, path.name, path)
    index = read_json(path / "model_index.json")
    components: dict[str, nn.Module] = {}
    for place, name in PLACES.items():
        if (path / place / "config.json").is_file() and (names is None or name in names):
            components[name] = _component(path / place, dtype)[1]
    if names is None or "text" in names:
        components |= diffusers_text.read_all(path, dtype)
    settings, notes = _settings(path, index)
    if not components and (names is None or names):  # of none only the settings are asked for
        raise ValueError(f"{path} has none of the components known here: {', '.join(PLACES)}, text_encoder")
    return LoadedModel(components, settings, path.name, path, notes=notes)


def _component(folder: Path, dtype: torch.dtype | None) -> tuple[str, nn.Module]:
    words = read_json(folder / "config.json")
    source = f"{folder}/config.json"
    kind = words.get("_class_name") or next(iter(words.get("architectures") or ["?"]))
    if kind == "AutoencoderKL":
        return "autoencoder", _autoencoder(folder, words, source, dtype)
    if kind in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        clip = diffusers_text.read_clip(folder, _tokenizer_beside(folder, "vocab.json") or folder)
        return "text", build("text", *clip, str(folder), dtype=dtype)
    if kind in TEXT_ENCODERS:
        return "text", _transformers_text(folder, words, dtype)
    name, ours, config, table = _network(kind, words, source)
    tensors = {k: v for k, v in read_component(folder, WEIGHTS).items() if k not in (*dit.IGNORED, *mmdit.IGNORED)}
    native = to_native(table, tensors, str(folder))
    return name, build(ours, config, native, str(folder), dtype=dtype)


def _transformers_text(folder: Path, words: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    tokenizer = _tokenizer_beside(folder, "tokenizer.json")
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json, nor a tokenizer folder with one beside it")
    contents = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    config = TransformersText.config_of(words, contents, CONTEXT_LENGTH)
    tensors = {f"encoder.{name}": tensor for name, tensor in read_component(folder, "model").items()}
    for name, owner in TransformersText.tied(config).items():  # a file has one name for tied weights
        known = next((n for n in (name, owner) if n in tensors), None)
        if known is not None:
            tensors[name] = tensors[owner] = tensors[known]
    return build("transformers_text", config, tensors, str(folder), dtype=dtype)


def _tokenizer_beside(folder: Path, file: str) -> Path | None:
    """Where a lone text encoder's tokenizer is: in its own folder, or in `tokenizer` beside it."""
    return next((place for place in (folder, folder.parent / "tokenizer") if (place / file).is_file()), None)


def _network(kind: str, words: dict[str, Any], source: str) -> tuple[str, str, Any, list[Entry]]:
    """(component, our kind, its config, its table) of a denoiser or ControlNet."""
    if kind in UNETS:
        config = unet_config.from_diffusers(words, source)
        return "denoiser", "unet", config, unet.diffusers(config, keys_of("unet", config))
    if kind == "ControlNetModel":
        control = unet_config.controlnet_from_diffusers(words, source)
        return "controlnet", "controlnet", control, unet.controlnet_diffusers(control, keys_of("controlnet", control))
    if kind == "T2IAdapter":
        adapter = t2i_adapter.from_diffusers(words, source)
        return "t2i_adapter", "t2i_adapter", adapter, t2i_adapter.diffusers(adapter, keys_of("t2i_adapter", adapter))
    if kind == "DiTTransformer2DModel":
        transformer = dit.from_diffusers(words)
        return "denoiser", "dit", transformer, dit.diffusers(transformer, keys_of("dit", transformer))
    if kind == "SD3Transformer2DModel":
        joint = mmdit.from_diffusers(words)
        return "denoiser", "mmdit", joint, mmdit.diffusers(joint, keys_of("mmdit", joint))
    raise ValueError(f"{source}: {kind} is not known here")


def _autoencoder(folder: Path, words: Mapping[str, Any], source: str, dtype: torch.dtype | None) -> nn.Module:
    config = autoencoder.from_diffusers(words, source)
    tensors = {autoencoder.modern(k): v for k, v in read_component(folder, WEIGHTS).items()}
    native = to_native(autoencoder.diffusers(config, keys_of("autoencoder", config)), tensors, str(folder))
    shape = (config.latent_channels, 1, 1)
    scale = words.get("scaling_factor", autoencoder.SCALING_FACTOR)
    native["latent_mean"] = torch.full(shape, words.get("shift_factor") or 0.0)
    native["latent_std"] = torch.full(shape, 1 / scale)
    if words.get("latents_mean") and words.get("latents_std"):  # raw = latent * std / scale + mean
        native["latent_mean"] = torch.tensor(words["latents_mean"]).view(shape)
        native["latent_std"] = torch.tensor(words["latents_std"]).view(shape) / scale
    return build("autoencoder", config, native, str(folder), dtype=dtype)


def _settings(path: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    file = path / "scheduler" / "scheduler_config.json"
    diffusion, notes = scheduler.from_diffusers(read_json(file) if file.is_file() else None, str(file))
    place = next((p for p in ("unet", "transformer") if (path / p / "config.json").is_file()), "")
    size = read_json(path / place / "config.json").get("sample_size") if place else None
    factor = (
        2 ** (len(read_json(path / "vae" / "config.json")["block_out_channels"]) - 1) if (path / "vae").is_dir() else 1
    )
    xl = str(index.get("_class_name", "")).startswith("StableDiffusionXL")
    zeros = index.get("force_zeros_for_empty_prompt", xl)  # the library's default
    if not isinstance(size, int | None):
        raise ValueError(f"{path}: sample_size {size!r} must be one number")
    if (path / "text_encoder_3").is_dir():
        notes += ("its three text encoders are left out: that is not known here",)
    settings = {"size": (size or 64) * factor, "null_prompt": None if zeros else "", "diffusion": diffusion}
    low = path / "low_res_scheduler" / "scheduler_config.json"
    if low.is_file():  # the noise that an upscaler puts on what it enlarges
        settings["low_res"] = scheduler.from_diffusers(read_json(low), str(low))[0]
    return settings, notes


# --- writing ---------------------------------------------------------------------------------------------------


def write(model: LoadedModel, folder: Path) -> tuple[str, ...]:
    """The model as a folder of diffusers, atomically; returns notes on what the format made necessary.

    A text-to-image model becomes a pipeline's folder, a lone component its own. Raises ValueError if the format
    cannot hold it.
    """
    size = model.settings.get("size", 512)
    files: dict[str, Any] = {}
    notes: list[str] = []
    for name, module in model.components.items():
        files |= _files(name, module, size // _factor(model), size, notes)
    whole = {"autoencoder", "text", "denoiser"} <= set(model.components)
    if not whole and len(model.components) > 1:
        raise ValueError(
            f"a folder of diffusers is a whole pipeline or one component, not {', '.join(model.components)}"
        )
    if not whole and any(path.startswith("text_encoder_2") for path in files):
        raise ValueError("diffusers holds SDXL's text encoders in its pipelines alone: they say how they are heard")
    if whole:
        files |= {
            "scheduler/scheduler_config.json": scheduler.to_diffusers(model.settings["diffusion"]),
            "model_index.json": _index(model),
        }
    with commit(folder) as stage:
        for path, content in files.items():
            target = stage / (path if whole else path.partition("/")[2])
            if isinstance(content, str):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(content, encoding="utf-8")
            elif target.suffix == ".json":
                write_json(target, content)
            else:
                tensors, metadata = content
                save_tensors(target, tensors, metadata, {"format": "pt"})
    return tuple(notes)


def _files(name: str, module: nn.Module, latent_size: int, size: int, notes: list[str]) -> dict[str, Any]:
    kind, config, state = kind_of(module), config_of(module), dict(module.state_dict())

    if kind == "autoencoder":
        mean, std = state.pop("latent_mean"), state.pop("latent_std")
        even = not mean.any() and bool((std == std.flatten()[0]).all())
        scale = 1.0
        if even:
            scale = float(f"{1 / float(std.flatten()[0]):.6g}")
        else:
            state, _ = autoencoder.fold(state, mean, std, 1.0)
            notes.append("the latents' statistics went into the 1x1 convolutions around them")
        words = autoencoder.to_diffusers(config, size, scale, 0.0)
        return _folder("vae", words, to_foreign(autoencoder.diffusers(config, state), state))
    if isinstance(module, TextEncoder | TextPair):
        return diffusers_text.files_of(module)
    if kind == "unet":
        words = unet_config.to_diffusers(config, latent_size)
        return _folder("unet", words, to_foreign(unet.diffusers(config, state), state))
    if kind == "controlnet":
        words = unet_config.controlnet_to_diffusers(config)
        return _folder("controlnet", words, to_foreign(unet.controlnet_diffusers(config, state), state))
    if kind == "t2i_adapter":
        words = t2i_adapter.to_diffusers(config)
        return _folder("t2i_adapter", words, to_foreign(t2i_adapter.diffusers(config, state), state))
    if kind == "dit":
        words = dit.to_diffusers(config, latent_size)
        return _folder("transformer", words, to_foreign(dit.diffusers(config, state), state))
    if kind == "mmdit":
        words = mmdit.to_diffusers(config, latent_size)
        tensors = to_foreign(mmdit.diffusers(config, state), state) | mmdit.constants(config)
        return _folder("transformer", words, tensors)
    raise ValueError(f"diffusers cannot hold a component of kind {kind}")


def _folder(place: str, words: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    words = words | {"_diffusers_version": VERSION}
    return {f"{place}/config.json": words, f"{place}/{WEIGHTS}.safetensors": (tensors, {})}


def _index(model: LoadedModel) -> dict[str, Any]:
    text, denoiser = model.components["text"], model.components["denoiser"]
    if kind_of(denoiser) != "unet":
        raise ValueError("a pipeline of diffusers with a text encoder of ours needs a U-Net; convert the parts alone")
    alone, aesthetic = diffusers_text.alone_in_xl(text), config_of(denoiser).aesthetic
    if (alone or isinstance(text, TextPair)) and not config_of(denoiser).size_dim:
        which = "a lone text encoder without the final norm" if alone else "a pair of text encoders"
        raise ValueError(f"diffusers cannot hold {which} beside a U-Net that is told no sizes, as SDXL's are")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": [None, None] if alone else ["transformers", "CLIPTextModel"],
        "tokenizer": [None, None] if alone else ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler.class_of(model.settings["diffusion"])],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not alone and not isinstance(text, TextPair):
        return index | {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    index |= {"force_zeros_for_empty_prompt": model.settings.get("null_prompt") is None}
    if aesthetic:
        return index | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    return index | {"_class_name": "StableDiffusionXLPipeline"}


def _factor(model: LoadedModel) -> int:
    factor: int = getattr(model.components.get("autoencoder"), "factor", 1)
    return factor

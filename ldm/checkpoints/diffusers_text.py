"""CLIP's text encoders and their tokenizers in folders of diffusers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.files import read_json, read_tensors
from ldm.checkpoints.foreign import read_component
from ldm.checkpoints.layouts import text
from ldm.checkpoints.layouts.table import Tensors, to_foreign, to_native
from ldm.checkpoints.model import build, keys_of
from ldm.models.text import TextConfig, TextEncoder, TextPair, TextPairConfig, clip_vocabulary

LEFT_OUT = "left_out.safetensors"
"""What the library's own text encoder has no room for: the blocks that the context leaves out, the projection."""


def read_all(path: Path, dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """The text encoder or encoders of a pipeline's folder as one component; nothing if there is none known here."""
    folders = [path / name for name in ("text_encoder", "text_encoder_2") if (path / name / "config.json").is_file()]
    if not folders or (path / "text_encoder_3").is_dir():
        return {}
    clips = [read_clip(folder, path / folder.name.replace("text_encoder", "tokenizer")) for folder in folders]
    if folders[-1].name == "text_encoder_2":  # SDXL's, whose pipelines hear the last layer but one, as it is
        clips = [(replace(config, skip=1, final_norm=False), state) for config, state in clips]
    if len(clips) == 1:
        return {"text": build("text", *clips[0], str(folders[0]), dtype=dtype)}
    pair = TextPairConfig(*(config for config, _ in clips))
    state = {f"{half}.{k}": v for half, (_, s) in zip(("first", "second"), clips, strict=True) for k, v in s.items()}
    return {"text": build("text_pair", pair, state, f"{path}/text_encoder, text_encoder_2", dtype=dtype)}


def read_clip(folder: Path, tokenizer: Path) -> tuple[TextConfig, Tensors]:
    """CLIP's text tower, with what we left out of the folder when we wrote it."""
    _check_vocabulary(tokenizer)
    source = folder / "config.json"
    config = text.from_transformers(read_json(source), str(source), pad_id=_pad_id(tokenizer))
    tensors = {wrapped(k): v for k, v in read_component(folder, "model").items() if not k.endswith("position_ids")}
    state = to_native(text.transformers(config, keys_of("text", config)), tensors, str(folder))
    if (folder / LEFT_OUT).is_file():
        rest, recorded = read_tensors(folder / LEFT_OUT)
        config = replace(config, **recorded)
        state |= rest
    return config, state


def wrapped(name: str) -> str:
    """A tensor's name with the prefix that newer files leave out."""
    return name if name.startswith((text.WRAPPER, "text_projection")) else text.WRAPPER + name


def _pad_id(tokenizer: Path) -> int:
    """0 where the tokenizer pads with "!", as OpenCLIP does; else the end token, as Stable Diffusion 1 does."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file() and "pad_token" in (words := read_json(tokenizer / name)):
            pad = words["pad_token"]
            return 0 if (pad["content"] if isinstance(pad, dict) else pad) == "!" else text.END
    return text.END


def _check_vocabulary(tokenizer: Path) -> None:
    """We read prompts with CLIP's own vocabulary; a folder with another one was trained on other ids."""
    file = tokenizer / "vocab.json"
    if file.is_file() and read_json(file) != clip_vocabulary()[0]:
        raise ValueError(f"{file} is not CLIP's vocabulary, with which prompts are read here")


# --- writing ---------------------------------------------------------------------------------------------------


def files_of(module: TextEncoder | TextPair) -> dict[str, Any]:
    """Text encoders and their tokenizers, by their places in a pipeline's folder: JSON, texts, (tensors, metadata)."""
    if isinstance(module, TextEncoder):
        xl = alone_in_xl(module)
        return _files(module, "_2" if xl else "", whole=xl)
    return _files(module.first, "", whole=True) | _files(module.second, "_2", whole=True)


def alone_in_xl(module: nn.Module) -> bool:
    """Whether it is the second of SDXL's text encoders without the first, as its refiner has it."""
    if not isinstance(module, TextEncoder):
        return False
    config = module.config
    return config.skip == 1 and not config.final_norm and config.embed_dim > 0


def _files(module: TextEncoder, suffix: str, *, whole: bool) -> dict[str, Any]:
    """Unless it is `whole`, as in SDXL, its context must be its last layer: blocks beyond it go aside."""
    config, state = module.config, dict(module.state_dict())
    folder, aside = f"text_encoder{suffix}", {}
    kept = config
    if not whole:
        if not config.final_norm:
            raise ValueError("diffusers cannot hold a lone text encoder without the final norm")
        kept = replace(config, layers=config.layers - config.skip, skip=0, embed_dim=0)
        beyond = tuple(f"tower.transformer.resblocks.{i}." for i in range(kept.layers, config.layers))
        aside = {k: v for k, v in state.items() if k.startswith((*beyond, "tower.text_projection"))}
    native = {k: v for k, v in state.items() if k not in aside}
    files: dict[str, Any] = {
        f"{folder}/config.json": text.to_transformers(kept),
        f"{folder}/model.safetensors": (to_foreign(text.transformers(kept, native), native), {}),
    }
    if aside:
        recorded = {"layers": config.layers, "skip": config.skip, "embed_dim": config.embed_dim}
        files[f"{folder}/{LEFT_OUT}"] = (aside, recorded)
    vocabulary, merges = clip_vocabulary()
    pad = "!" if config.pad_id == 0 else "<|endoftext|>"
    specials = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    place = f"tokenizer{suffix}"
    return files | {
        f"{place}/vocab.json": vocabulary,
        f"{place}/merges.txt": merges,
        f"{place}/special_tokens_map.json": specials,
        f"{place}/tokenizer_config.json": specials
        | {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.context_length, "do_lower_case": True},
    }

"""The files of adapters against diffusers and peft: each dialect gives the same outputs and pictures, both ways."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters import files
from ldm.adapters.lora import attach, detach
from ldm.checkpoints.load import load_model
from tests.adapters.reference import (
    adapted,
    apart,
    folder,
    our_pictures,
    ours,
    parts_of,
    pipeline,
    their_pictures,
    theirs,
)

LIMIT = 1e-5  # of the largest output


def lora_config(targets: list[str], **changes: Any) -> Any:
    import peft

    return peft.LoraConfig(**({"r": 4, "lora_alpha": 3, "target_modules": targets} | changes))


def states(pipe: Any) -> dict[str, dict[str, Tensor]]:
    from peft import get_peft_model_state_dict

    return {name: get_peft_model_state_dict(part) for name, part in parts_of(pipe).items()}


def write_diffusers(pipe: Any, path: Path) -> Path:
    """By the library, with its metadata."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(state)
        for name, state in states(pipe).items()
    }  # fmt: skip
    type(pipe).save_lora_weights(path, **layers, **_collate_lora_metadata(parts_of(pipe)))
    return path


def write_peft_names(pipe: Any, path: Path) -> Path:
    """unet.<path>.lora_A.weight, with the configs in the metadata."""
    from diffusers.training_utils import _collate_lora_metadata

    layers = {f"{name}_lora_layers": state for name, state in states(pipe).items()}
    type(pipe).save_lora_weights(path, **layers, **_collate_lora_metadata(parts_of(pipe)))
    return path / "pytorch_lora_weights.safetensors"


def write_kohya(pipe: Any, path: Path) -> Path:
    """kohya's names, put together here from those of peft, with the prefix that transformers dropped."""
    xl = "text_encoder_2" in parts_of(pipe)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_" if xl else "lora_te_text_model_"}
    prefix["text_encoder_2"] = "lora_te2_text_model_"
    tensors = {}
    for name, state in states(pipe).items():
        for key, tensor in state.items():
            module, leaf = key.rsplit(".lora_", 1)
            kohya = prefix[name] + module.removeprefix("text_model.").replace(".", "_")
            tensors[f"{kohya}.lora_{'down' if leaf.startswith('A') else 'up'}.weight"] = tensor.contiguous()
            tensors[f"{kohya}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def write_library_kohya(pipe: Any, path: Path) -> Path:
    from diffusers.utils import convert_state_dict_to_kohya

    joined = {f"{name}.{key}": tensor for name, state in states(pipe).items() for key, tensor in state.items()}
    made = convert_state_dict_to_kohya(joined)
    made = {k: torch.tensor(3.0) if k.endswith("alpha") else v.contiguous() for k, v in made.items()}
    save_file(made, path)
    return path


def write_peft_folder(pipe: Any, path: Path) -> Path:
    """As peft's own save_pretrained writes it, a folder for each network."""
    for name, part in parts_of(pipe).items():
        (path / name).mkdir(parents=True)
        config = part.peft_config["default"]
        config.save_pretrained(path / name)
        tensors = {f"base_model.model.{k}": v.contiguous() for k, v in states(pipe)[name].items()}
        save_file(tensors, path / name / "adapter_model.safetensors")
    return path


def ldm_name(path: str, blocks: int) -> str:
    """A module of diffusers' U-Net under CompVis' numbers, by counting: each level has its layers and a resampling."""
    side, level, sort, layer, rest = re.fullmatch(
        r"(down|mid|up)_blocks?\.?(\d*)\.(attentions|resnets)\.(\d+)\.(.+)", path
    ).groups()  # type: ignore[union-attr]
    number = {
        "down": lambda: 1 + int(level) * (blocks + 1) + int(layer),
        "up": lambda: int(level) * (blocks + 1) + int(layer),
        "mid": lambda: 1 if sort == "attentions" else 2 * int(layer),
    }[side]()
    where = {"down": "input_blocks", "mid": "middle_block", "up": "output_blocks"}[side]
    inner = "" if side == "mid" else f".{int(sort == 'attentions')}"
    leaves = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    return f"{where}.{number}{inner}.{leaves.get(rest, rest)}"


def write_ldm_names(pipe: Any, path: Path) -> Path:
    """kohya's file with the U-Net under CompVis' names."""
    blocks = pipe.unet.config.layers_per_block
    tensors = load_file(write_kohya(pipe, path))
    theirs = {key.rsplit(".lora_", 1)[0] for key in states(pipe)["unet"]}
    names = {f"lora_unet_{m.replace('.', '_')}": f"lora_unet_{ldm_name(m, blocks).replace('.', '_')}" for m in theirs}
    assert all(old != new for old, new in names.items())
    renamed = {(names.get(key.split(".")[0], key.split(".")[0]), key): tensor for key, tensor in tensors.items()}
    save_file({f"{name}.{key.split('.', 1)[1]}": tensor for (name, key), tensor in renamed.items()}, path)
    return path


DIALECTS = {
    "kohya, LDM names": write_ldm_names,
    "diffusers": write_diffusers,
    "peft names": write_peft_names,
    "kohya": write_kohya,
    "library's kohya": write_library_kohya,
    "peft folder": write_peft_folder,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_dialect_says_what_diffusers_says(family: str, tmp_path: Path) -> None:
    model = folder(family, tmp_path / "model")
    plain = pipeline(model)
    base = theirs(plain, family == "sdxl")
    pipe = adapted(plain, lora_config)
    expected = theirs(pipe, family == "sdxl")
    assert apart(base, expected) > 1e-2
    pictures = their_pictures(pipe)
    assert pictures.std() > 10
    for name, write in DIALECTS.items():
        if (name, family) == ("library's kohya", "sdxl"):
            continue  # the library's converter has no second text encoder
        suffix = ".safetensors" if "kohya" in name else ""
        components = load_model(model).components
        told = components if "LDM" in name else None  # CompVis' numbers tell nothing of a network of another size
        adapter = files.read(write(pipe, tmp_path / f"{name}{suffix}"), told)
        attach(components, adapter)
        assert apart(ours(components, family == "sdxl"), expected) < LIMIT, name
        assert np.abs(our_pictures(model, adapter) - pictures).max() <= 1, name


@pytest.mark.parametrize("family", ["sd1", "sd2", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_library_reads_what_we_write(family: str, tmp_path: Path) -> None:
    """kohya and diffusers by its `load_lora_weights`, peft by peft; and we read them all back."""
    xl = family == "sdxl"
    model = folder(family, tmp_path / "model")
    pipe = adapted(pipeline(model), lora_config)
    expected, pictures = theirs(pipe, xl), their_pictures(pipe)
    adapter = files.read(write_peft_names(pipe, tmp_path / "theirs"))
    for to, place in (("kohya", "k.safetensors"), ("diffusers", "d"), ("diffusers", "d.safetensors")):
        files.write(adapter, tmp_path / place, to)
        fresh = pipeline(model)
        fresh.load_lora_weights(tmp_path / place)
        assert apart(theirs(fresh, xl), expected) < LIMIT, to
        assert np.abs(their_pictures(fresh) - pictures).max() <= 1, to
    files.write(adapter, tmp_path / "p", "peft")
    assert apart(theirs(with_peft(pipeline(model), tmp_path / "p"), xl), expected) < LIMIT
    components = load_model(model).components
    for to in ("kohya", "diffusers", "peft", "native"):
        place = tmp_path / ("n.safetensors" if to == "native" else to[0] + (".safetensors" if to == "kohya" else ""))
        if to == "native":
            files.write(adapter, place, to)
        attach(components, files.read(place, components))
        assert apart(ours(components, xl), expected) < LIMIT, to
        detach(components, "default")


def with_peft(pipe: Any, path: Path) -> Any:
    """The pipeline with a peft folder of ours on each network, loaded by peft."""
    from peft import PeftModel

    for name, part in parts_of(pipe).items():
        loaded = PeftModel.from_pretrained(part, path / name)
        setattr(pipe, name, loaded.base_model.model)
    return pipe


SLOW = ("loha", "lokr", "lokr factor", "loha tucker")
KINDS = ["dora", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW), "lokr both", "lokr tucker"]


def other_config(kind: str) -> Any:
    import peft

    def made(targets: list[str]) -> Any:
        if kind == "dora":
            return lora_config(targets, use_dora=True, lora_alpha=4)
        tucker = "tucker" in kind  # of the convolutions with a kernel
        if kind.startswith("loha"):
            return peft.LoHaConfig(r=3, alpha=5, target_modules=targets, use_effective_conv2d=tucker)
        changes = {
            "lokr both": {"decompose_both": True, "r": 1},
            "lokr factor": {"decompose_factor": 4},
            "lokr tucker": {"use_effective_conv2d": True},
        }
        return peft.LoKrConfig(**({"r": 2, "alpha": 3, "target_modules": targets} | changes.get(kind, {})))

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_say_what_peft_says(kind: str, tmp_path: Path) -> None:
    """Read from peft's folder, and written to kohya's names, to peft and as native."""
    model = folder("sd1", tmp_path / "model")
    plain = pipeline(model)
    base = theirs(plain, False)
    pipe = adapted(plain, other_config(kind))
    expected = theirs(pipe, False)
    assert apart(base, expected) > 1e-3
    components = load_model(model).components
    adapter = files.read(write_peft_folder(pipe, tmp_path / "theirs"))
    assert adapter.kind == kind.split()[0]
    cores = [
        name
        for name in load_file(tmp_path / "theirs" / "unet" / "adapter_model.safetensors")
        if "_t" in name.rpartition(".")[2]
    ]
    assert bool(cores) == ("tucker" in kind)
    files.write(adapter, tmp_path / "k.safetensors", "kohya")
    files.write(adapter, tmp_path / "n.safetensors", "native")
    files.write(adapter, tmp_path / "p", "peft")
    for place in ("theirs", "k.safetensors", "n.safetensors", "p"):
        attach(components, files.read(tmp_path / place))
        assert apart(ours(components, False), expected) < LIMIT, place
        detach(components, "default")
    assert apart(theirs(with_peft(pipeline(model), tmp_path / "p"), False), expected) < LIMIT


def test_dora_by_diffusers_and_back(tmp_path: Path) -> None:
    model = folder("sd1", tmp_path / "model")
    pipe = adapted(pipeline(model), other_config("dora"))
    expected = theirs(pipe, False)
    adapter = files.read(write_peft_names(pipe, tmp_path / "theirs"))
    components = load_model(model).components
    attach(components, adapter)
    assert apart(ours(components, False), expected) < LIMIT
    files.write(adapter, tmp_path / "d", "diffusers")
    fresh = pipeline(model)
    fresh.load_lora_weights(tmp_path / "d")
    assert apart(theirs(fresh, False), expected) < LIMIT

"""peft's folders: adapter_config.json and adapter_model.safetensors; and its configs in the metadata of diffusers."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.adapter import Adapter, Factors, folded, kind_of, kron_shape, rank_of
from ldm.checkpoints.files import commit, read_json, save_tensors, write_json
from ldm.checkpoints.foreign import read_file
from ldm.checkpoints.layouts import lora
from ldm.checkpoints.layouts.lora import Place
from ldm.checkpoints.layouts.text import WRAPPER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"  # in diffusers' files: the configs of all networks, keys prefixed by theirs
PREFIX = "base_model.model."
TYPES = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR"}
PLACES = ("unet", "transformer", "text_encoder", "text_encoder_2")
Configs = dict[str, dict[str, Any]]
"""Prefix of the modules' names ("" or unet., text_encoder., ...) -> peft's config of their network."""


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], Configs]:
    """(tensors, no metadata, configs) of a folder of peft's, or of one that holds several by the networks' names.

    Raises ValueError if it is none, or if its config says what is not known here.
    """
    found = {"": folder} if (folder / CONFIG).is_file() else {}
    found |= {f"{name}.": folder / name for name in PLACES if (folder / name / CONFIG).is_file()}
    if not found:
        raise ValueError(f"{folder} is no adapter: it has neither {CONFIG} nor pytorch_lora_weights.safetensors")
    tensors: dict[str, Tensor] = {}
    configs: Configs = {}
    for prefix, place in found.items():
        file = next((place / n for n in (WEIGHTS, "adapter_model.bin") if (place / n).is_file()), place / WEIGHTS)
        configs[prefix] = _checked(read_json(place / CONFIG), place / CONFIG)
        tensors |= {prefix + name.removeprefix(PREFIX): tensor for name, tensor in read_file(file)[0].items()}
    return tensors, {}, configs


def configs_of(metadata: Mapping[str, Any], path: Path) -> Configs:
    """The configs in the metadata of a file of diffusers; none where it has none."""
    if METADATA not in metadata:
        return {}
    try:
        told = dict(json.loads(metadata[METADATA]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its {METADATA} is no JSON: {error}") from error
    named = {f"{p}.": {k.removeprefix(f"{p}."): v for k, v in told.items() if k.startswith(f"{p}.")} for p in PLACES}
    return {prefix: _checked(config, path) for prefix, config in named.items() if config}


def _checked(config: Any, source: Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"{source} is no config of peft's")
    kind = config.get("peft_type", "LORA")
    if kind not in TYPES.values():
        raise ValueError(f"{source}: peft_type {kind!r} is not known here; known are LORA, LOHA, LOKR")
    for name in ("fan_in_fan_out", "lora_bias", "use_qalora", "layer_replication"):
        if config.get(name):
            raise ValueError(f"{source}: {name} is not known here")
    return config


def scale(name: str, factors: Factors, configs: Configs) -> None:
    """Give the factors of a module, by its name in the file, the alpha that peft's config says, if one does."""
    prefix = next((p for p in configs if p and name.startswith(p)), "")
    config = configs.get(prefix)
    if config is None:
        return
    module = name.removeprefix(prefix)
    alpha = float(_matching(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha", 8))))
    rank = rank_of(factors) or int(_matching(config.get("rank_pattern"), module, config.get("r", 8)))
    if config.get("use_rslora"):  # Kalajdzievski 2023: alpha / sqrt(r)
        alpha *= math.sqrt(rank)
    if rank_of(factors):
        factors["alpha"] = torch.tensor(alpha)
    else:
        factors["lokr_w1"] = factors["lokr_w1"] * (alpha / rank)


def _matching(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value for a module; patterns are names or ends of names, as all programs write them."""
    for name, value in (pattern or {}).items():
        if f".{module}".endswith(f".{name.removeprefix('^')}"):
            return value
    return default


def leaves(factors: Factors) -> dict[str, Tensor]:
    """The tensors of a module as peft saves them, without alpha."""
    made = {lora.PEFT.get(name, name): tensor for name, tensor in factors.items() if name != "alpha"}
    if "magnitude" in factors and factors["down"].ndim == 4:
        made[lora.PEFT["magnitude"]] = factors["magnitude"].view(1, -1, 1, 1)
    return made


def write(
    adapter: Adapter, theirs: Mapping[str, Mapping[str, tuple[Place, Factors]]], folder: Path, dtype: torch.dtype
) -> None:
    """The folder, atomically; one within for each network where there are several.

    theirs: component -> module -> its place and factors. Raises ValueError where peft has no words for it.
    """
    networks: dict[str, dict[str, Factors]] = {}
    for component, part in theirs.items():
        for module, (place, factors) in part.items():
            name = lora.prefixes(component, adapter.networks[component], module)[1].removesuffix(".")
            # transformers 5.6 dropped the wrapper of the encoder without a projection; peft wants names as they are.
            path = place.diffusers.removeprefix(WRAPPER) if name == "text_encoder" else place.diffusers
            networks.setdefault(name, {})[path] = folded(factors)
    made = {name: (_config(network), network) for name, network in networks.items()}
    with commit(folder) as stage:
        for name, (config, network) in made.items():
            inner = stage / name if len(made) > 1 else stage
            tensors = {f"{PREFIX}{m}.{k}": t.to(dtype) for m, f in network.items() for k, t in leaves(f).items()}
            write_json(inner / CONFIG, config)
            save_tensors(inner / WEIGHTS, tensors, {}, {"format": "pt"})


def _config(part: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's config of one network, whose scales are all 1."""
    kinds = {kind_of(factors) for factors in part.values()}
    if len(kinds) > 1:
        raise ValueError(f"peft has one kind in a network, and this adapter mixes {', '.join(sorted(kinds))}")
    (kind,) = kinds
    ranks = {name: rank_of(factors) or _whole_rank(factors) for name, factors in part.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "peft_type": TYPES[kind],
        "r": common,
        "target_modules": sorted(part),
        "rank_pattern": other,
        "alpha_pattern": other,
        ("lora_alpha" if kind in ("lora", "dora") else "alpha"): common,
    }
    if kind == "dora":
        config["use_dora"] = True
    if kind == "lokr":
        config |= _kronecker(part)
    return config


def _whole_rank(factors: Factors) -> int:
    """A rank at which peft too has whole factors."""
    return max(factors["lokr_w2"].shape[0], factors["lokr_w2"][0].numel())


def _kronecker(part: Mapping[str, Factors]) -> dict[str, Any]:
    """decompose_both and decompose_factor that make peft's factors these; ValueError if none do."""
    both = any("lokr_w1_a" in factors for factors in part.values())
    for factor in (-1, *range(2, 65)):
        if all(_made_so(factors, factor, both) for factors in part.values()):
            return {"decompose_both": both, "decompose_factor": factor}
    raise ValueError("peft has no words for how this LoKr splits its weights; write it to kohya")


def _made_so(factors: Factors, factor: int, both: bool) -> bool:
    (a, c), (b, d) = kron_shape(factors, "lokr_w1"), kron_shape(factors, "lokr_w2")
    rank = rank_of(factors) or _whole_rank(factors)
    # A factor [r, d k k] does not say how large the kernel is.
    kernels = (factors["lokr_w2"][0, 0].numel(),) if "lokr_w2" in factors else (1, 9, 25, 49)
    return split(a * b, factor) == (a, b) and any(
        d % kernel == 0
        and split(c * d // kernel, factor) == (c, d // kernel)
        and ("lokr_w1_a" in factors) == (both and rank < max(a, c) / 2)
        and ("lokr_w2_a" in factors) == (rank < max(b, d // kernel) / 2)
        for kernel in kernels
    )


def split(number: int, factor: int) -> tuple[int, int]:
    """The two factors, smaller first, nearest to each other; the smaller at most `factor`, or it where it divides."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    most = number if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(number) + 1) if number % d == 0 and d <= most)
    return small, number // small

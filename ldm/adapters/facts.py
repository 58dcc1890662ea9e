"""What the file of an adapter says of it, in the words other programs read: ModelSpec 1.0.1 and kohya's ss_ keys."""

import json
from collections.abc import Mapping
from typing import Any

from ldm.adapters.adapter import BASES, Adapter, base_of
from ldm.names import known

MODELSPEC = (
    "title", "author", "description", "date", "license", "usage_hint", "tags", "trigger_phrase", "merged_from",
    "thumbnail", "resolution", "implementation_version", "encoder_layer", "timestep_range", "prediction_type",
)  # fmt: skip
KOHYA = (
    "sd_model_name", "sd_model_hash", "new_sd_model_hash", "network_args", "clip_skip", "learning_rate",
    "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler", "steps", "epoch", "num_epochs", "num_train_images",
    "batch_size_per_device", "total_batch_size", "mixed_precision", "seed", "tag_frequency", "dataset_dirs",
    "bucket_info", "output_name", "training_started_at", "training_finished_at", "session_id", "training_comment",
    "resolution",
)  # fmt: skip
ARCHITECTURES = {
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2-512", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
"""(ModelSpec's, kohya's) names, by the width of the text."""


def metadata(adapter: Adapter, facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an adapter's file: `facts` and what its tensors say.

    facts: values by the names of ModelSpec and of kohya's metadata, without their prefixes; resolution is "512x512",
    prediction_type "epsilon" or "v". A value that is no text is written as JSON.
    Raises ValueError for an unknown name.
    """
    for name in facts:
        known("fact of an adapter", name, {*MODELSPEC, *KOHYA})
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    found = {f"modelspec.{name}": words[name] for name in MODELSPEC if name in words}
    found |= {f"ss_{name}": words[name] for name in KOHYA if name in words}
    return found | _modelspec(adapter, words) | _network(adapter, words)


def _modelspec(adapter: Adapter, words: Mapping[str, str]) -> dict[str, str]:
    """The keys that ModelSpec demands, for the families that it has a name for; else none."""
    width = next((width for width, name in BASES.items() if base_of(adapter).startswith(name)), 0)
    if not width:
        return {}
    architecture, version = ARCHITECTURES[width]
    if width == 1024 and words.get("prediction_type") == "v":
        architecture = "stable-diffusion-v2-768-v"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": words.get("title", words.get("output_name", "adapter")),
        "modelspec.resolution": words.get("resolution", {768: "512x512", 1024: "512x512", 2048: "1024x1024"}[width]),
        "ss_base_model_version": version,
        "ss_v2": str(width == 1024),
    }


def _network(adapter: Adapter, words: Mapping[str, str]) -> dict[str, str]:
    """What made it, in kohya's words."""
    every = [factors for part in adapter.parts.values() for factors in part.values()]
    ranks, alphas = adapter.ranks, {float(factors["alpha"]) for factors in every}
    told = {
        "ss_network_module": "lycoris.kohya" if adapter.kind in ("loha", "lokr") else "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if adapter.kind in ("loha", "lokr") and "network_args" not in words:
        told["ss_network_args"] = json.dumps({"algo": adapter.kind})
    return told

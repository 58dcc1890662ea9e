"""One door for every model: run folders, our own model folders, diffusers folders and single files."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.files import (
    newest_valid,
    read_json,
    read_tensors,
    save_tensors,
    steps,
    verify,
    write_json,
)
from ldm.checkpoints.model import BROKEN, KINDS, LoadedModel, build, config_of, from_plain, kind_of

FORMAT = 1


def find_model(path: str | Path) -> Path:
    """What `path` means: a file, a model folder of ours or of diffusers, or the newest valid checkpoint of a run.

    Raises ValueError if there is none, or if a file of ours was truncated or altered.
    """
    path = Path(path)
    if path.is_file() or diffusers.is_folder(path):
        return path
    if (path / "model.json").is_file():
        verify(path)
        return path
    if (path / "checkpoints").is_dir():
        found = newest_valid(path / "checkpoints")
        if found is None:
            broken = len(steps(path / "checkpoints"))
            raise ValueError(f"run folder {path} has no usable checkpoint ({broken} damaged)")
        return found
    if not path.exists():
        raise ValueError(f"no model at {str(path)!r}: no such file or folder")
    raise ValueError(f"{str(path)!r} is no model: give a run folder, a model folder of ours or of diffusers, or a file")


def format_of(path: Path) -> str:
    """native | diffusers | compvis: how to read what `find_model` found."""
    if path.is_file():
        return "compvis"
    return "native" if (path / "model.json").is_file() else "diffusers"


def base_of(found: Path) -> dict[str, Any] | None:
    """Of a model folder that holds only what was put on a base, or steers it: that base; None for every other model.

    -> model (its place), sha256 (by component) and the folder's settings. Raises ValueError for a damaged description.
    """
    if not (found / "model.json").is_file():
        return None
    try:
        settings = read_json(found / "model.json")["settings"]
        base = settings.get("base")
        return None if base is None else {**base, "settings": settings}
    except BROKEN as error:
        raise ValueError(f"{found} is no model folder of ours: {type(error).__name__} {error}") from error


def load_model(
    path: str | Path,
    names: Sequence[str] | None = None,
    *,
    prediction: str | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model of any format, on the CPU, in evaluation mode; only the components `names` if given.

    prediction: what the denoiser predicts, against what the file says or leaves open. ema: the averaged weights of a
    CompVis file that has both. dtype: of all floats; None keeps the file's.
    Raises ValueError, naming the file, when something is missing, altered or of another shape.
    """
    found = find_model(path)
    kind = format_of(found)
    if ema and kind != "compvis":
        raise ValueError(f"{found}: only a single file of CompVis keeps averaged weights beside the others")
    if kind == "native":
        try:
            model = _load_native(found, names, dtype)
        except BROKEN as error:  # JSON of another shape than ours
            raise ValueError(f"{found} is no model folder of ours: {type(error).__name__} {error}") from error
    elif kind == "diffusers":
        model = diffusers.read(found, names, dtype=dtype)
    else:
        model = compvis.read(found, names, prediction=prediction, ema=ema, dtype=dtype)
    if prediction and "diffusion" in model.settings:
        model.settings["diffusion"] |= {"prediction": prediction}
    if kind != "native" and _says_variance(model):
        model.settings["diffusion"] |= {"variance": "learned_range", "objective": "hybrid"}
    return model


def _says_variance(model: LoadedModel) -> bool:
    """Whether its denoiser has channels for a learned variance; no format of others says so in words."""
    config = getattr(model.components.get("denoiser"), "config", None)
    channels: int = getattr(config, "in_channels", 0)
    chain = model.settings.get("diffusion", {}).get("schedule", "flow") != "flow"
    return chain and channels > 0 and getattr(config, "out_channels", 0) == 2 * channels


def _load_native(folder: Path, names: Sequence[str] | None, dtype: torch.dtype | None) -> LoadedModel:
    description = read_json(folder / "model.json")
    if description.get("format") != FORMAT:
        raise ValueError(f"{folder}/model.json has format {description.get('format')}; this reads {FORMAT}")
    base = base_of(folder)
    if base is not None and not description["components"]:
        raise ValueError(
            f"{folder} holds no model of its own, but what was put on {base['model']}; draw with it, or merge the two "
            "with: ldm adapter merge"
        )
    wanted = [n for n in description["components"] if names is None or n in names]
    if any(Path(n).name != n for n in wanted):
        raise ValueError(f"{folder}/model.json names files outside its folder")
    components = {name: load_component(folder / f"{name}.safetensors", dtype) for name in wanted}
    extra = read_tensors(folder / "extra.safetensors")[0] if (folder / "extra.safetensors").is_file() else {}
    return LoadedModel(components, description["settings"], description["name"], folder, extra)


def load_component(file: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """One component from its own file, strictly: every tensor must be there and have its shape."""
    tensors, metadata = read_tensors(file)
    if metadata.get("kind") not in KINDS:
        raise ValueError(f"{file} has no known kind of component: {metadata.get('kind')!r}")
    try:
        config = from_plain(KINDS[metadata["kind"]][1], metadata["config"])
    except TypeError as error:
        raise ValueError(f"{file} was made by another version: {error}") from error
    return build(metadata["kind"], config, tensors, str(file), dtype=dtype)


def save_model(
    folder: Path,
    components: dict[str, nn.Module],
    settings: dict[str, Any],
    name: str,
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write components and `model.json` into `folder` (inside a `commit` block, to be atomic)."""
    for component, module in components.items():
        metadata = {"kind": kind_of(module), "config": asdict(config_of(module))}
        save_tensors(folder / f"{component}.safetensors", module.state_dict(), metadata)
    if extra:
        save_tensors(folder / "extra.safetensors", extra)
    description = {"format": FORMAT, "name": name, "components": list(components), "settings": settings}
    write_json(folder / "model.json", description)

"""Model folders: one safetensors file a component, its config in the header, and `model.json` beside them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import (
    newest_valid,
    read_json,
    read_tensors,
    save_tensors,
    steps,
    verify,
    write_json,
)
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import ImageConfig, ImageEncoder
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig

KINDS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "autoencoder": (AutoencoderKL, AutoencoderConfig),
    "text": (TextEncoder, TextConfig),
    "image": (ImageEncoder, ImageConfig),
    "unet": (UNet, UNetConfig),
}
FORMAT = 1


@dataclass(frozen=True)
class LoadedModel:
    """Components by name (autoencoder, text, image, denoiser), what they were trained with, and a name."""

    components: dict[str, nn.Module]
    settings: dict[str, Any]
    name: str
    folder: Path

    def require(self, *names: str) -> list[nn.Module]:
        """Those components, in that order. Raises ValueError saying what this model is if one is missing."""
        missing = [n for n in names if n not in self.components]
        if missing:
            raise ValueError(
                f"{self.folder} holds {', '.join(self.components)}; this needs {', '.join(missing)} as well"
            )
        return [self.components[n] for n in names]


def find_model(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or the newest valid checkpoint of a run folder.

    Raises ValueError if there is none, or if a file of it was truncated or altered.
    """
    path = Path(path)
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
    raise ValueError(f"{str(path)!r} is no model: give a run folder or a folder with a model.json")


def load_model(path: str | Path, names: Sequence[str] | None = None) -> LoadedModel:
    """Load a model folder or run folder, on the CPU, in evaluation mode; only `names` if given.

    Raises ValueError, naming the file, when something is missing, altered or of another shape.
    """
    folder = find_model(path)
    description = read_json(folder / "model.json")
    if description.get("format") != FORMAT:
        raise ValueError(f"{folder}/model.json has format {description.get('format')}; this reads {FORMAT}")
    wanted = [n for n in description["components"] if names is None or n in names]
    components = {name: load_component(folder / f"{name}.safetensors") for name in wanted}
    return LoadedModel(components, description["settings"], description["name"], folder)


def load_component(file: Path) -> nn.Module:
    """One component from its file, strictly: every tensor must be there and have its shape."""
    tensors, metadata = read_tensors(file)
    if metadata.get("kind") not in KINDS:
        raise ValueError(f"{file} has no known kind of component: {metadata.get('kind')!r}")
    module_class, config_class = KINDS[metadata["kind"]]
    try:
        config = config_class(**_tuples(metadata["config"]))
    except TypeError as error:
        raise ValueError(f"{file} was made by another version: {error}") from error
    with torch.device("meta"):  # allocate nothing and initialise nothing before the weights are known
        module = module_class(config)
    load_tensors(module, tensors, str(file), assign=True)
    return module.eval()


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Put `tensors` into `module`; ValueError listing what is missing, unknown or of another shape."""
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wrong = [f"missing {k}" for k in expected if k not in tensors]
    wrong += [f"unknown {k}" for k in tensors if k not in expected]
    wrong += [
        f"{k} is {tuple(v.shape)} instead of {expected[k]}"
        for k, v in tensors.items()
        if k in expected and tuple(v.shape) != expected[k]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(tensors, assign=assign)


def save_model(folder: Path, components: dict[str, nn.Module], settings: dict[str, Any], name: str) -> None:
    """Write components and `model.json` into `folder` (inside a `commit` block, to be atomic)."""
    for component, module in components.items():
        metadata = {"kind": _kind(module), "config": asdict(module.config)}  # type: ignore[call-overload]
        save_tensors(folder / f"{component}.safetensors", module.state_dict(), metadata)
    description = {"format": FORMAT, "name": name, "components": list(components), "settings": settings}
    write_json(folder / "model.json", description)


def _kind(module: nn.Module) -> str:
    return next(kind for kind, (module_class, _) in KINDS.items() if type(module) is module_class)


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}

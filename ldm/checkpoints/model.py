"""A loaded model: its components, built from tensors without ever being initialised."""

import hashlib
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, LatentSpace
from ldm.models.classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.models.clip import ImageConfig, ImageEncoder
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.perceptual import Perceptual, PerceptualConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.text import TextConfig, TextEncoder, TextPair, TextPairConfig
from ldm.models.transformers_text import TransformersText, TransformersTextConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vq import AutoencoderVQ, VQConfig

KINDS: dict[str, tuple[Callable[[Any], nn.Module], type[Any]]] = {
    "autoencoder": (AutoencoderKL, AutoencoderConfig),
    "autoencoder_vq": (AutoencoderVQ, VQConfig),
    "perceptual": (Perceptual, PerceptualConfig),
    "text": (TextEncoder, TextConfig),
    "text_pair": (TextPair, TextPairConfig),
    "transformers_text": (TransformersText, TransformersTextConfig),
    "image": (ImageEncoder, ImageConfig),
    "unet": (UNet, UNetConfig),
    "dit": (DiT, DiTConfig),
    "mmdit": (MMDiT, MMDiTConfig),
    "controlnet": (ControlNet, ControlNetConfig),
    "t2i_adapter": (T2IAdapter, T2IAdapterConfig),
    "classifier": (NoisyClassifier, NoisyClassifierConfig),
}


@dataclass(frozen=True)
class LoadedModel:
    """Components by name (autoencoder, text, image, denoiser, controlnet, classifier) and what they were trained with.

    settings: diffusion, size, null_prompt, ... as the training task wrote them or as `notes` say they were found.
    extra: tensors of the file that no component holds and that a file of the same layout gets back.
    """

    components: dict[str, nn.Module]
    settings: dict[str, Any]
    name: str
    folder: Path
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def require(self, *names: str) -> list[nn.Module]:
        """Those components, in that order. Raises ValueError saying what this model is if one is missing."""
        missing = [n for n in names if n not in self.components]
        if missing:
            raise ValueError(
                f"{self.folder} holds {', '.join(self.components)}; this needs {', '.join(missing)} as well"
            )
        return [self.components[n] for n in names]


BROKEN = (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError, AssertionError, OverflowError)
"""What reading JSON or metadata of an unforeseen shape raises."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kind_of(module: nn.Module) -> str:
    """The word in `KINDS` for a component."""
    return next(kind for kind, (module_class, _) in KINDS.items() if type(module) is module_class)


def config_of(module: nn.Module) -> Any:
    """A component's config."""
    return module.config


def weights_sha256(module: nn.Module) -> str:
    """Of its configuration, but for defaults, and of every weight as float32, whatever file it came from; hex.

    So a setting that a later version adds leaves the hashes of those that do not use it as they are.
    """
    digest = hashlib.sha256(json.dumps(_told(config_of(module)), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _told(config: Any) -> Any:
    """What a configuration says beyond its defaults; what is none, as it is."""
    if not is_dataclass(config):
        return config
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    given = {name: getattr(config, name) for name in usual}
    return {name: _told(value) for name, value in given.items() if value != usual[name]}


def build(
    kind: str, config: Any, tensors: Mapping[str, Tensor], source: str, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """A component around `tensors`, strictly, on the CPU, in evaluation mode; floats cast to `dtype` if given.

    Nothing is allocated or initialised before the tensors take their places. Raises ValueError, naming `source`,
    when one is missing, unknown, of another shape or not finite, or when they mix float types.
    """
    module_class, _ = KINDS[kind]
    with torch.device("meta"):
        module = module_class(config)
    types = {tensors[name].dtype for name, p in module.named_parameters() if name in tensors and p.is_floating_point()}
    if dtype is None and len(types) > 1:
        raise ValueError(f"{source} mixes {' and '.join(sorted(map(str, types)))}; choose one with --dtype")
    other = [name for name, t in tensors.items() if t.dtype not in FLOATS]
    if other and other[0] in dict(module.named_parameters()):
        raise ValueError(
            f"{source}: {other[0]} is {tensors[other[0]].dtype}; known are float16, bfloat16, float32, float64"
        )
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{source} holds NaN or infinity, first in {bad[0]}")
    load_tensors(module, tensors, source, assign=True)
    # Also when nothing is cast: a module's own buffers outside the state dict take the type of its tensors.
    cast(module, dtype or next(iter(types), torch.float32))
    return module.eval().requires_grad_(False)


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Have a component's floats in that type; None leaves them."""
    if dtype is None:
        return
    if not isinstance(module, LatentSpace):
        module.to(dtype)
        return
    mean, std = module.latent_mean.float(), module.latent_std.float()
    module.to(dtype)
    module.latent_mean, module.latent_std = mean, std  # half precision would change the latents' scale by 3e-4


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
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


def keys_of(kind: str, config: Any) -> list[str]:
    """The names of a component's tensors, without building it for real."""
    with torch.device("meta"):
        return list(KINDS[kind][0](config).state_dict())


def from_plain(schema: type[Any], value: Mapping[str, Any]) -> Any:
    """An instance of a config dataclass, nested ones included, from what JSON kept. TypeError if it does not fit."""
    hints = typing.get_type_hints(schema)
    known = {f.name for f in fields(schema)}
    if unknown := sorted(set(value) - known):
        raise TypeError(f"{schema.__name__} has no {', '.join(unknown)}")

    def restored(name: str, item: Any) -> Any:
        if is_dataclass(hints[name]):
            return from_plain(typing.cast(type[Any], hints[name]), item)
        return tuple(item) if isinstance(item, list) else item

    return schema(**{name: restored(name, item) for name, item in value.items()})

"""What is written beside a picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm import __version__
from ldm.diffusion.samplers import canonical
from ldm.models.text import TextPair
from ldm.pipeline.given import Given
from ldm.pipeline.passes import strength_of
from ldm.pipeline.request import UPSCALERS, Control, Request, Steering
from ldm.pipeline.told import scored, wanted_by

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


def settings_of(pipeline: "Pipeline", request: Request, index: int) -> dict[str, Any]:
    """What to write beside image `index`, in the words and order of AUTOMATIC1111."""
    width, height = pipeline.size_of(request)
    companions, upscale, variation = pipeline.companions, request.upscale, request.variation
    settings: dict[str, Any] = {"Prompt": request.prompts[index], "Negative prompt": request.negative}
    settings |= {"Steps": request.steps, "Sampler": request.sampler}
    settings |= {"CFG scale": request.guidance, "Seed": request.seeds[index], "Size": f"{width}x{height}"}
    spacing = request.spacing or canonical(request.sampler)[1] or pipeline.diffusion.spacing
    settings |= {"Model": pipeline.name, "Spacing": spacing, "Eta": request.eta}
    if request.variance is not None:
        settings |= {"Variance": request.variance}
    if request.clip_skip is not None:
        settings |= {"Clip skip": request.clip_skip + 1}
    if hashes := pipeline.library.hashes(wanted_by(request)[index]):
        settings |= {"Lora hashes": hashes}
    if learned := _hashes_of_words(pipeline.text, f"{request.prompts[index]} {request.negative}"):
        settings |= {"TI hashes": learned}
    if variation is not None:
        settings |= {"Variation seed": variation.seeds[index], "Variation seed strength": variation.strength}
    if request.given is not None:
        settings |= _given(request.given, strength_of(request, pipeline.kind), pipeline.kind)
    if upscale is not None:
        word = "Denoising strength" if "Denoising strength" not in settings else "Hires denoising strength"
        settings |= {word: upscale.strength, "Hires upscale": upscale.scale}
        settings |= {"Hires upscaler": UPSCALERS[upscale.how], "Hires steps": upscale.steps or request.steps}
    settings |= {f"ControlNet {i}": _control(control) for i, control in enumerate(request.controls)}
    if companions.refiner is not None:
        settings |= {"Refiner": companions.refiner.name, "Refiner switch at": request.switch}
    if scored(pipeline):
        settings |= dict(zip(("Aesthetic score", "Negative aesthetic score"), request.aesthetic, strict=True))
    if companions.weak is not None:
        settings |= {"Weak model": companions.weak_name}
    for field in fields(Steering):
        value = getattr(request.steering, field.name)
        if value != field.default:
            settings |= {f"Steering {field.name.replace('_', ' ')}": value}
    return settings | {"RNG": "CPU", "Version": f"ldm {__version__}"}


def _hashes_of_words(encoder: Any, text: str) -> str:
    """ "word: hash, ..." of the learned words in a text: the first 12 digits of the sha256 of their vectors' bytes.

    Of the vectors in float32, those of a pair of encoders one after the other.
    """
    towers = [encoder.first, encoder.second] if isinstance(encoder, TextPair) else [encoder]
    tables = [tower.words for tower in towers if hasattr(tower, "words")]
    found = dict.fromkeys(word for table in tables[:1] for _, word in table.found(text) if word)
    return ", ".join(f"{word}: {_hash([table.vectors[word] for table in tables])}" for word in found)


def _hash(vectors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for table in vectors:
        digest.update(table.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _given(given: Given, strength: float | None, kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"Given": given.way}
    if strength is not None:
        settings |= {"Denoising strength": strength, "Strength steps": given.strength_steps}
    if given.mask is not None:
        settings |= {"Mask blur": given.mask_blur}
        if strength is not None:
            settings |= {"Masked content": given.fill}
        if given.padding is not None:
            settings |= {"Inpaint area": "Only masked", "Masked area padding": given.padding}
    if given.measure:
        settings |= {"Noise": given.noise_std, "Measure scale": given.measure_scale}
    if kind == "editing":
        settings |= {"Image CFG scale": given.image_guidance}
    if kind == "enlarging":
        settings |= {"Noise level": given.noise_level}
    return settings


def _control(control: Control) -> str:
    words = {"Model": control.name, "Weight": control.weight}
    words |= {"Guidance Start": control.start, "Guidance End": control.end}
    return ", ".join(f"{key}: {value}" for key, value in words.items())

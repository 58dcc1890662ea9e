"""What a pipeline cannot do with a request, said before any work."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ldm.adapters.library import same_for_all
from ldm.diffusion.samplers import canonical
from ldm.models.controlnet import ControlNet
from ldm.models.perturbed import select
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.pipeline.companions import check_noise
from ldm.pipeline.inputs import check_kind
from ldm.pipeline.passes import Pass, stretch
from ldm.pipeline.request import Control, Request, Steering
from ldm.pipeline.told import scored, wanted_by
from ldm.prompts.encode import check_skip, check_texts
from ldm.prompts.grammar import parse

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


def check(pipeline: "Pipeline", request: Request, passes: Sequence[Pass]) -> None:
    """Raise ValueError for what this pipeline cannot do with the request."""
    steering, config = request.steering, pipeline.diffusion.config
    _check_prompts(pipeline, request, passes)
    pipeline.companions.check(request)
    if canonical(request.sampler)[0] == "tcd" and config.schedule == "edm":
        raise ValueError("tcd counts timesteps from 0, which schedule edm has not; use another sampler")
    if steering.perturb:
        select(pipeline.denoiser, steering.perturb, steering.perturb_how)
    if request.variance == "learned" and config.variance == "fixed":
        raise ValueError("variance 'learned' needs a model that learned it; this one did not: small or large")
    if request.aesthetic != Request.aesthetic and not scored(pipeline):
        raise ValueError("aesthetic scores are for SDXL's refiner, and neither this model nor its refiner is one")
    check_kind(pipeline.kind, request, getattr(getattr(pipeline.denoiser, "config", None), "classes", 0))
    if pipeline.companions.weak is not None:
        _check_weak(pipeline, pipeline.companions.weak)
    _check_sizes(pipeline, request)
    if len({c.model.config.xl for c in request.controls if isinstance(c.model, T2IAdapter)}) > 1:
        raise ValueError("T2I-adapters whose maps go to other places, SDXL's own and others, do not go together")
    for i, control in enumerate(request.controls):
        try:
            _check_control(pipeline, control)
            for way in passes:
                stretch(way.levels, control.start, control.end)
        except ValueError as error:
            raise ValueError(f"control {i} ({control.name or type(control.model).__name__}): {error}") from error
    if pipeline.companions.refiner is not None:
        _check_refiner(pipeline, pipeline.companions.refiner)
        for way in passes:
            stretch(way.levels, request.switch)
            height, width = (side * pipeline.autoencoder.factor for side in way.shape[-2:])
            if height % (multiple := pipeline.companions.refiner.multiple) or width % multiple:
                raise ValueError(f"the refiner draws multiples of {multiple} px, and this is to be {width}x{height}")


def idle(pipeline: "Pipeline", request: Request) -> list[str]:
    """What of a request does nothing because its guidance is 1.

    In CFG++ and in models for editing that guides all the same. Elsewhere a negative is heard only if the weights of
    what AND joins do not add up to 1, and perturbed layers are guidance of their own, which is rescaled too.
    """
    steering = request.steering
    if request.guidance != 1 or request.plus_plus or pipeline.kind == "editing":
        return []
    names = ["parallel", "momentum", "norm", *([] if steering.perturb else ["rescale", "interval"])]
    found = [name for name in names if getattr(steering, name) != getattr(Steering, name)]
    weights = [[branch.weight for branch in parse(prompt).branches] for prompt in request.prompts if not request.plain]
    if any(sum(each) != 1 for each in weights):
        return found
    negative = ["the negative prompt"] if request.negative else []
    negative += ["the negative's aesthetic score"] if request.aesthetic[1] != Request.aesthetic[1] else []
    return negative + found


def _check_prompts(pipeline: "Pipeline", request: Request, passes: Sequence[Pass]) -> None:
    """Raise ValueError for adapters that are not there or differ within a batch, and what an encoder cannot read."""
    shows = [request.given.shows] if request.given is not None and request.given.shows is not None else []
    read = [parse(prompt) for prompt in dict.fromkeys([*request.prompts, *shows])] if not request.plain else []
    read += [parse(request.negative, negative=True)] if not request.plain else []
    texts = {text for prompt in read for way in passes for text in prompt.texts(way.steps)}
    refiner = pipeline.companions.refiner
    for encoder in [pipeline.text] if refiner is None else [pipeline.text, refiner.text]:
        check_skip(encoder, request.clip_skip)
        check_texts(encoder, texts)
    wanted = wanted_by(request)
    for start in range(0, len(wanted), request.batch):
        pipeline.library.check(same_for_all(wanted[start : start + request.batch]))


def _check_weak(pipeline: "Pipeline", weak: Any) -> None:
    """Raise ValueError for a weak model that the pipeline's cannot be compared with."""
    if pipeline.kind == "editing":
        raise ValueError("guidance for editing is by text and picture; a weak model has no part in it")
    theirs, ours = (getattr(network, "config", None) for network in (weak, pipeline.denoiser))
    for name in ("in_channels", "out_channels", "context_dim"):
        own, other = getattr(ours, name, None), getattr(theirs, name, None)
        if own != other and None not in (own, other):
            raise ValueError(f"the weak model has {name} {other}, and the model {own}; they must agree")


def _check_sizes(pipeline: "Pipeline", request: Request) -> None:
    """Raise ValueError for a picture of another size than what is drawn."""
    width, height = pipeline.size_of(request)
    given, factor = request.given, pipeline.autoencoder.factor
    pictures = [(f"picture of control {i}", control.image) for i, control in enumerate(request.controls)]
    if request.depth is not None:
        pictures.append(("depth", request.depth))
    if given is not None and given.padding is not None:
        given.boxes(width, height)
        height, width = given.image.shape[2:]  # before they are cut
    if given is not None and given.padding is None and not given.measure and pipeline.kind != "enlarging":
        pictures.append(("given picture", given.image))
    wanted = [(name, picture, (height, width)) for name, picture in pictures]
    if given is not None and given.measure:
        seen = given.operator()(torch.zeros(1, 3, height, width))
        wanted.append(("given picture", given.image, (seen.shape[2], seen.shape[3])))
    if given is not None and pipeline.kind == "enlarging":
        wanted.append(("given picture", given.image, (height // factor, width // factor)))
    for name, picture, size in wanted:
        if tuple(picture.shape[2:]) != size:
            sizes = (f"{w}x{h}" for h, w in (picture.shape[2:], size))
            raise ValueError("the {} is {} px, and must be {}".format(name, *sizes))


def _check_control(pipeline: "Pipeline", control: Control) -> None:
    """Raise ValueError unless the network fits the U-Net and the picture the network."""
    network, denoiser = control.model, pipeline.denoiser
    if not isinstance(network, ControlNet | T2IAdapter):
        raise ValueError(f"a {type(network).__name__} is neither a ControlNet nor a T2I-adapter")
    if not isinstance(denoiser, UNet):
        raise ValueError(f"it steers a U-Net, and this model's denoiser is a {type(denoiser).__name__}")
    config = denoiser.config
    levels = tuple(config.channels * multiplier for multiplier in config.multipliers)
    if isinstance(network, T2IAdapter):
        theirs, ours = network.config.levels, levels
    else:
        own = network.encoder.config
        theirs, ours = (*network.encoder.skip_widths, own.context_dim), (*denoiser.skip_widths, config.context_dim)
    if theirs != ours:
        raise ValueError(
            f"it was made for another base model: widths {list(theirs)}, and this model's are {list(ours)}"
        )
    factor = pipeline.autoencoder.factor
    if network.hint_factor != factor:
        raise ValueError(f"it is told {network.hint_factor} px a latent, and this model's autoencoder has {factor}")
    latents = pipeline.autoencoder.latent_channels
    if isinstance(network, ControlNet) and network.config.unet.in_channels != latents:
        channels = network.config.unet.in_channels
        raise ValueError(f"it was made for latents of {channels} channels, and this model's have {latents}")
    if control.image.shape[1] != network.config.hint_channels:
        raise ValueError(f"its picture has {network.config.hint_channels} channels, not {control.image.shape[1]}")


def _check_refiner(pipeline: "Pipeline", refiner: "Pipeline") -> None:
    """Raise ValueError unless the refiner has the same latents and noise."""
    name, ours, theirs = f"the refiner {refiner.name}", pipeline.autoencoder, refiner.autoencoder
    if refiner.kind != "plain":
        raise ValueError(f"{name} is a model for {refiner.kind}; a refiner goes by prompts alone")
    if (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor):
        raise ValueError(f"{name} has latents of other channels or another factor")
    for statistic in ("latent_mean", "latent_std"):
        own, other = (getattr(a, statistic, torch.zeros(1)).float().cpu() for a in (ours, theirs))
        if not torch.allclose(own, other, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{name} has other latents: its {statistic} is not the model's")
    check_noise(name, refiner.diffusion.config, pipeline.diffusion.config, outputs=True)
    if refiner.diffusion.config.variance != pipeline.diffusion.config.variance:
        raise ValueError(f"{name} and the model must both say their variance, or neither")

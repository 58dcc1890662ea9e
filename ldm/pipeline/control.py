"""What a request does to the network and to the sampler, put together for one batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import Scale, adaptive_projected, guided, plus_plus, thresholded
from ldm.diffusion.restoration import measured, repainted, resampled
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.steering import Score, classifier_guided, estimate_guided
from ldm.models.classifier import log_prob
from ldm.models.clip_score import clip_score
from ldm.models.controlnet import controlled
from ldm.models.perturbed import perturbed
from ldm.models.typed import in_type_of
from ldm.pipeline.canvas import cells_of, interpolated
from ldm.pipeline.companions import Companions
from ldm.pipeline.given import Given
from ldm.pipeline.passes import Pass, stretch
from ldm.pipeline.request import Control, Request
from ldm.pipeline.told import Script
from ldm.prompts.grammar import parse
from ldm.types import Conditioning, Denoiser


@dataclass(frozen=True)
class Batch:
    """One batch of a request in one of its passes: what the network is told, and by what it is drawn."""

    request: Request  # as it is drawn at its size
    rows: slice  # of the request
    way: Pass
    cond: Conditioning
    uncond: Conditioning
    script: Script | None  # what the two stand for, where prompts change from step to step
    decode: Callable[[Tensor], Tensor]

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each image."""
        return self.request.prompts[self.rows]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each image."""
        return self.request.seeds[self.rows]

    def of(self, given: Tensor) -> Tensor:
        """The batch's rows of what is given, [1 or N, ...] -> [1 or B, ...]."""
        return given if len(given) == 1 else given[self.rows]

    def each(self, given: Tensor) -> Tensor:
        """The same with a row for each image, [B, ...]."""
        return self.of(given).expand(len(self.prompts), *given.shape[1:])


def steered(
    network: Denoiser, module: Any, companions: Companions, batch: Batch, editing: Conditioning | None = None
) -> Denoiser:
    """The network with all the guidance of the request around it; `module` is what its layers are looked up in.

    In this order, from within: controls, negative and perturbed, classifier, CLIP and measurement, thresholding.
    editing: what a model for editing is told instead of text and picture, to be guided by either.
    """
    request, steering, diffusion = batch.request, batch.request.steering, batch.way.diffusion
    scale: Scale = plus_plus(batch.way.levels, request.guidance) if request.plus_plus else request.guidance
    mix = None
    if steering.projected and scale != 1:
        mix = adaptive_projected(
            diffusion, scale, parallel=steering.parallel, momentum=steering.momentum, norm=steering.norm
        )
    push = None
    if steering.perturb:
        weakened = perturbed(module, steering.perturb, steering.perturb_how)
        push = _in_type(told(weakened, batch), module), steering.perturb_scale
    negative: Conditioning | Denoiser = batch.uncond
    if companions.weak is not None:
        negative = _uncontrolled(by_script(_in_type(companions.weak, companions.weak), batch))
    network = told(network, batch)
    if editing is not None:
        # e(-, -) + s_I (e(p, i) - e(-, -)) + (s_T - s_I) (e(p, i) - e(n, i)) is eq. 3 of Brooks et al. 2023
        assert request.given is not None
        scale, negative = request.given.image_guidance, editing
        push = _always(network, batch.uncond), request.guidance - scale
    denoiser = guided(
        network, negative, scale, rescale=steering.rescale, interval=steering.interval, mix=mix, perturbed=push
    )
    if steering.label:
        wish = log_prob(companions.classifier, [steering.label] * len(batch.prompts))
        denoiser = classifier_guided(denoiser, diffusion, wish, steering.label_scale)
    wishes: list[tuple[float, Score]] = []  # in one backward pass of the network, however many
    if steering.clip_scale:
        likeness = clip_score(companions.clip, _words_of(batch), batch.decode)
        wishes.append((steering.clip_scale, lambda x0, t: likeness(x0)))
    if request.given is not None and request.given.measure:
        wishes.append((request.given.measure_scale, _measurement(request.given, batch)))
    if wishes:

        def wish_of(x0: Tensor, t: Tensor) -> Tensor:
            return torch.stack([weight * score(x0, t) for weight, score in wishes]).sum(0)

        denoiser = estimate_guided(denoiser, diffusion, wish_of, 1.0)
    if steering.threshold:
        denoiser = thresholded(denoiser, diffusion, steering.threshold, steering.limit)
    return denoiser


def told(network: Denoiser, batch: Batch) -> Denoiser:
    """The network by the request's controls and prompts."""
    return by_script(by_controls(network, batch), batch)


def by_script(network: Denoiser, batch: Batch) -> Denoiser:
    """The network told what the prompts say at each step."""
    return network if batch.script is None else batch.script.around(network)


def by_controls(network: Denoiser, batch: Batch) -> Denoiser:
    """The network steered by the request's controls, each on its stretch of the steps."""
    controls = batch.request.controls
    if not controls:
        return network

    def weight(control: Control) -> float | Callable[[Tensor], Tensor]:
        if (control.start, control.end) == (0.0, 1.0):
            return control.weight
        acts = stretch(batch.way.levels, control.start, control.end)
        return lambda t: control.weight * acts(t)

    return controlled(network, [(control.model, weight(control)) for control in controls])


def hints(batch: Batch, height: int, width: int) -> tuple[Tensor, ...]:
    """The pictures of the request's controls, [B, C, height, width] each; a pass of another size has them scaled."""
    found = (batch.each(control.image) for control in batch.request.controls)
    size = height, width
    return tuple(hint if hint.shape[2:] == size else interpolated(hint, size, "bilinear") for hint in found)


def completing(take: Sampler, given: Given, batch: Batch, known: Tensor) -> Sampler:
    """The sampler that draws where the mask says so and keeps the `known` latents elsewhere.

    A latent is drawn anew if any pixel that it stands for is.
    """
    assert given.mask is not None
    cells = cells_of(batch.of(given.mask), known)
    return repainted(resampled(take, given.jump, given.resample), known, cells)


def _measurement(given: Given, batch: Batch) -> Score:
    operator = given.operator()
    return measured(lambda x0: operator(batch.decode(x0)), batch.of(given.image), given.noise_std, batch.way.diffusion)


def _words_of(batch: Batch) -> list[str]:
    """What the pictures are to show in the end, as words alone."""
    plain, steps = batch.request.plain, batch.way.steps
    return [prompt if plain else parse(prompt).words(steps) for prompt in batch.prompts]


def _always(denoiser: Denoiser, told: Conditioning) -> Denoiser:
    """The denoiser told this whatever it is told."""

    def fixed(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return denoiser(x, t, told.map(lambda value: value.expand(len(x), *value.shape[1:])))

    return fixed


def _uncontrolled(denoiser: Denoiser) -> Denoiser:
    return lambda x, t, cond: denoiser(x, t, replace(cond, control=()))


def _in_type(denoiser: Denoiser, module: Any) -> Denoiser:
    """The denoiser in its module's own type, whatever the sampler sums in."""

    def typed(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        own, told = in_type_of(module, x, cond)
        return denoiser(own, t, told).to(x.dtype)

    return typed

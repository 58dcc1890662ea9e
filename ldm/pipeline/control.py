"""What a request does to the network and to the sampler, put together for one batch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoints.load import load_model
from ldm.diffusion.guidance import adaptive_projected, guided, plus_plus, thresholded
from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion
from ldm.diffusion.restoration import measured, repainted, resampled
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.steering import classifier_guided, estimate_guided
from ldm.models.classifier import log_prob
from ldm.models.clip import CLIP
from ldm.models.clip_score import clip_score
from ldm.models.perturbed import perturbed
from ldm.pipeline.request import Given, Request
from ldm.types import Conditioning, Denoiser


@dataclass(frozen=True)
class Companions:
    """Other models that steer a pipeline: a weaker denoiser as the negative, a noisy classifier, a CLIP."""

    weak: Any = None
    classifier: Any = None
    clip: Any = None

    @classmethod
    def load(
        cls, weak: str | Path = "", classifier: str | Path = "", clip: str | Path = "", *, device: str = "cpu"
    ) -> "Companions":
        """From model or run folders; "" leaves one out. Raises ValueError for a folder without what is needed."""

        def parts(path: str | Path, *names: str, dtype: torch.dtype | None = torch.float32) -> list[Any]:
            found = load_model(path, names, dtype=dtype).require(*names)
            return [part.to(device).eval().requires_grad_(False) for part in found]

        return cls(
            parts(weak, "denoiser", dtype=torch.float32 if device == "cpu" else None)[0] if weak else None,
            parts(classifier, "classifier")[0] if classifier else None,
            CLIP(*parts(clip, "text", "image")).to(device).eval().requires_grad_(False) if clip else None,
        )

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that needs one that is not there."""
        steering = request.steering
        for wanted, there, name in (
            (steering.label, self.classifier, "label needs a classifier"),
            (steering.clip_scale, self.clip, "clip_scale needs a CLIP"),
        ):
            if wanted and there is None:
                raise ValueError(f"{name}, and the pipeline has none")
        if steering.label:
            log_prob(self.classifier, [steering.label])


@dataclass(frozen=True)
class Batch:
    """One batch of a request as it is drawn: its conditions, levels and the diffusion at its size."""

    request: Request
    rows: slice  # of the request
    cond: Conditioning
    uncond: Conditioning
    levels: NoiseLevel
    diffusion: Diffusion
    decode: Callable[[Tensor], Tensor]

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each image."""
        return self.request.prompts[self.rows]

    def of(self, given: Tensor) -> Tensor:
        """The batch's rows of what is given, [1 or N, ...] -> [1 or B, ...]."""
        return given if len(given) == 1 else given[self.rows]


def steered(network: Denoiser, module: Any, companions: Companions, batch: Batch) -> Denoiser:
    """The network with all the guidance of the request around it; `module` is what its layers are looked up in.

    In this order, from within: negative and perturbed, classifier, CLIP, measurement, thresholding.
    """
    request, steering, diffusion = batch.request, batch.request.steering, batch.diffusion
    scale = plus_plus(batch.levels, request.guidance) if request.plus_plus else request.guidance
    mix = None
    if steering.projected and scale != 1:
        mix = adaptive_projected(
            diffusion, scale, parallel=steering.parallel, momentum=steering.momentum, norm=steering.norm
        )
    push = None
    if steering.perturb:
        push = _in_type(perturbed(module, steering.perturb, steering.perturb_how), module), steering.perturb_scale
    negative = batch.uncond if companions.weak is None else _in_type(companions.weak, companions.weak)
    denoiser = guided(
        network, negative, scale, rescale=steering.rescale, interval=steering.interval, mix=mix, perturbed=push
    )
    if steering.label:
        wish = log_prob(companions.classifier, [steering.label] * len(batch.prompts))
        denoiser = classifier_guided(denoiser, diffusion, wish, steering.label_scale)
    if steering.clip_scale:
        score = clip_score(companions.clip, batch.prompts, batch.decode)
        denoiser = estimate_guided(denoiser, diffusion, lambda x0, t: score(x0), steering.clip_scale)
    if request.given is not None and request.given.measure:
        denoiser = estimate_guided(denoiser, diffusion, _measurement(request.given, batch), request.given.measure_scale)
    if steering.threshold:
        denoiser = thresholded(denoiser, diffusion, steering.threshold, steering.limit)
    return denoiser


def completing(take: Sampler, given: Given, batch: Batch, known: Tensor) -> Sampler:
    """The sampler that draws where the mask says so and keeps the `known` latents elsewhere.

    A latent is drawn anew if any pixel that it stands for is.
    """
    assert given.mask is not None
    cells = F.adaptive_max_pool2d(batch.of(given.mask).to(known), known.shape[2:])
    return repainted(resampled(take, given.jump, given.resample), known, cells)


def put_back(given: Given, rows: slice, drawn: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] with the known pixels of those rows as they were given."""
    assert given.mask is not None
    image, mask = (value if len(value) == 1 else value[rows] for value in (given.image, given.mask))
    return torch.lerp(image.to(drawn), drawn, mask.to(drawn))


def _measurement(given: Given, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    operator = given.operator()
    return measured(lambda x0: operator(batch.decode(x0)), batch.of(given.image), given.noise_std, batch.diffusion)


def _in_type(denoiser: Denoiser, module: Any) -> Denoiser:
    """The denoiser in its module's own type, whatever the sampler sums in."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def typed(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return denoiser(x.to(dtype), t, cond).to(x.dtype)

    return typed

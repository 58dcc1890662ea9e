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
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.restoration import measured, repainted, resampled
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.steering import Score, classifier_guided, estimate_guided
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
    weak_name: str = ""  # what the pictures' settings call it

    @classmethod
    def load(
        cls,
        weak: str | Path = "",
        classifier: str | Path = "",
        clip: str | Path = "",
        *,
        device: str = "cpu",
        diffusion: Diffusion | None = None,
    ) -> "Companions":
        """From model or run folders; "" leaves one out.

        diffusion: of the pipeline. Raises ValueError for a folder without what is needed, and for a weak model or a
        classifier that was trained with other noise.
        """

        def parts(path: str | Path, *names: str, dtype: torch.dtype | None = torch.float32) -> list[Any]:
            found = load_model(path, names, dtype=dtype)
            if diffusion is not None and names[0] in ("denoiser", "classifier"):
                _same_noise(path, found.settings.get("diffusion", {}), diffusion, names[0])
            return [part.to(device).eval().requires_grad_(False) for part in found.require(*names)]

        return cls(
            parts(weak, "denoiser", dtype=torch.float32 if device == "cpu" else None)[0] if weak else None,
            parts(classifier, "classifier")[0] if classifier else None,
            CLIP(*parts(clip, "text", "image")).to(device).eval().requires_grad_(False) if clip else None,
            weak_name=Path(weak).name if weak else "",
        )

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that needs one that is not there, or leaves one without effect."""
        steering = request.steering
        if self.weak is not None and request.negative:
            raise ValueError("a weak model stands in for the negative prompt; give one of the two")
        if self.weak is not None and request.guidance == 1 and not request.plus_plus:
            raise ValueError("a weak model does nothing at guidance 1; give more")
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

    In this order, from within: negative and perturbed, classifier, CLIP and measurement, thresholding.
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
    wishes: list[tuple[float, Score]] = []  # in one backward pass of the network, however many
    if steering.clip_scale:
        likeness = clip_score(companions.clip, batch.prompts, batch.decode)
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


def _measurement(given: Given, batch: Batch) -> Score:
    operator = given.operator()
    return measured(lambda x0: operator(batch.decode(x0)), batch.of(given.image), given.noise_std, batch.diffusion)


def _in_type(denoiser: Denoiser, module: Any) -> Denoiser:
    """The denoiser in its module's own type, whatever the sampler sums in."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def typed(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        own = cond.map(lambda value: value.to(dtype) if value.is_floating_point() else value)
        return denoiser(x.to(dtype), t, own).to(x.dtype)

    return typed


_NOISE = ("schedule", "train_steps", "beta_start", "beta_end", "zero_snr", "shift", "dynamic_shift")


def _same_noise(path: str | Path, settings: dict[str, Any], diffusion: Diffusion, name: str) -> None:
    """Raise ValueError unless t means the same noise to both, and outputs of denoisers the same thing."""
    own = DiffusionConfig(**{k: v for k, v in settings.items() if k in DiffusionConfig.__dataclass_fields__})
    for key in (*_NOISE, *(["prediction"] if name == "denoiser" else [])):
        theirs, ours = getattr(own, key), getattr(diffusion.config, key)
        if theirs != ours:
            raise ValueError(f"the {name} of {path} was trained with {key}={theirs}, the model with {ours}")

"""What can be asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from ldm.diffusion.guidance import check_guidance
from ldm.diffusion.samplers import canonical, sampler
from ldm.diffusion.samplers.names import says_plus_plus
from ldm.names import known
from ldm.pipeline.given import Given
from ldm.prompts.grammar import parse, pieces

UPSCALERS = {
    "nearest": "Latent (nearest-exact)",
    "bilinear": "Latent (antialiased)",
    "bicubic": "Latent (bicubic antialiased)",
    "lanczos": "Lanczos",
}
"""Ways to upscale, and what AUTOMATIC1111 calls them."""


def pairs(prompts: Sequence[str], count: int = 1, seed: int = 0) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The prompts and seeds of a Request: `count` images a prompt, image k of each from seed + k."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a sequence of prompts, got a single string")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    seeds = range(seed, seed + count)
    return tuple(p for p in prompts for _ in seeds), tuple(s for _ in prompts for s in seeds)


@dataclass(frozen=True)
class Steering:
    """What acts on the network's estimate besides the guidance scale; as it stands, nothing."""

    rescale: float = 0.0  # pull the spread of guided outputs back to that of the plain ones
    interval: tuple[float, float] | None = None  # guide only where t, as the network is told it, lies in it
    parallel: float = 1.0  # share of guidance along the estimate; below 1 saturates less (adaptive projected guidance)
    momentum: float = 0.0  # of the guidance of earlier steps; -0.5 with parallel 0 is the paper's
    norm: float = 0.0  # longest guidance, as a vector; 0 = any
    plus_plus: bool = False  # CFG++: the guidance is then a share in 0..1
    threshold: float = 0.0  # dynamic thresholding: the share of each estimate that stays as it is; 0 = off
    limit: float = 4.0  # to what thresholding scales down: latents of unit variance reach to about 4
    perturb: str = ""  # layers, such as "mid" or "7,8,9", whose absence the picture is pushed away from
    perturb_how: str = "identity"  # identity: without their attention; skip: without them
    perturb_scale: float = 3.0
    label: str = ""  # the class that the pipeline's classifier is to see
    label_scale: float = 1.0
    clip_scale: float = 0.0  # towards the prompt in the eyes of the pipeline's CLIP

    def __post_init__(self) -> None:
        known("perturb_how", self.perturb_how, ("identity", "skip"))
        numbers = (f.name for f in fields(self) if isinstance(f.default, float))
        for name in numbers:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.norm < 0:
            raise ValueError(f"norm must be 0 (any) or more, got {self.norm}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, got {self.threshold}")
        if self.limit <= 0:
            raise ValueError(f"limit must be above 0, got {self.limit}")

    @property
    def projected(self) -> bool:
        """Whether it asks for adaptive projected guidance."""
        return (self.parallel, self.momentum, self.norm) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet or T2I-adapter and the picture that it steers by, such as edges.

    model: the network, where and in the type it is to run. image [1 or N, C, H, W] in [0, 1], of the request's size.
    start, end: the share of the steps at which it begins and ends. name: what the pictures' settings call it.
    """

    model: Any
    image: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if self.image.ndim != 4:
            raise ValueError(f"the picture of a control must be [1 or N, C, H, W], got {[*self.image.shape]}")
        if not (self.image.min() >= 0 and self.image.max() <= 1):
            raise ValueError(
                f"the picture of a control must be in 0..1, got {self.image.min():.4g}..{self.image.max():.4g}"
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of a control must be a finite number, got {self.weight}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"a control acts from a share of the steps to a later one, got {self.start}..{self.end}")


@dataclass(frozen=True)
class Variation:
    """Other start noise near that of the request's seeds: its way towards the noise of seeds[i], on the sphere."""

    seeds: tuple[int, ...]  # one an image
    strength: float  # 0 is the request's own noise, 1 that of these seeds

    def __post_init__(self) -> None:
        _check_seeds("variation seeds", self.seeds)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"the strength of a variation must be in 0..1, got {self.strength}")


@dataclass(frozen=True)
class Upscale:
    """A second pass at a larger size: the first one's result scaled, noised to `strength` and drawn on."""

    scale: float = 2.0  # of each side, to the nearest size that the model can draw
    strength: float = 0.7  # in (0, 1], as that of a given picture
    how: str = "bicubic"  # latents by nearest, bilinear, bicubic; pixels, decoded and encoded again, by lanczos
    steps: int | None = None  # None is as many as in the first pass

    def __post_init__(self) -> None:
        known("way to upscale", self.how, UPSCALERS)
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"the scale to upscale by must be at least 1, got {self.scale}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"the strength after upscaling must be above 0 and at most 1, got {self.strength}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps after upscaling must be at least 1, got {self.steps}")

    def size_of(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """The height and width to scale to, of latents, each the nearest multiple."""
        return round(height * self.scale / multiple) * multiple, round(width * self.scale / multiple) * multiple


@dataclass(frozen=True, eq=False)
class Request:
    """What to draw: one image per (prompt, seed). Raises ValueError, saying what is allowed, when made.

    Prompts and the negative are in AUTOMATIC1111's grammar: (weights:1.2), [from:to:0.5], [a|b], AND, BREAK,
    <lora:name:0.8>; with `plain` they are text alone, and too long ones lose their tail.

    Image i depends on its own prompt and seed, not on what else is asked for. On one machine that holds to the
    byte at batch 1; in larger batches torch may sum in another order, which moves values by some 1e-6 and now
    and then a pixel by 1 of 255; with dpm_adaptive, which decides by them how long its steps are, at times by more.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str = ""  # "" means the model's own null prompt
    plain: bool = False  # brackets and words in capitals are text like any other
    clip_skip: int | None = None  # last blocks of the text encoder to leave out; None is as the model was trained
    steps: int = 50
    sampler: str = "ddim"
    eta: float = 0.0  # ddim: share of noise drawn anew each step
    variance: str | None = None  # ddpm: small | large | learned; None is learned where the model has it, else small
    guidance: float = 5.0  # 1 turns it off
    steering: Steering = Steering()
    given: Given | None = None
    depth: Tensor | None = None  # [1 or N, 1, H, W], near is high: for models that are shown it
    controls: tuple[Control, ...] = ()
    variation: Variation | None = None
    upscale: Upscale | None = None
    switch: float = 0.8  # the share of the steps after which the pipeline's refiner, if it has one, takes over
    aesthetic: tuple[float, float] = (6.0, 2.5)  # SDXL's refiner is told: scores of the prompts and of the negative
    spacing: str | None = None  # None means what the sampler's name says ("DPM++ 2M Karras"), or the model's own
    width: int | None = None  # px; None means the size of the given picture, or the size the model was trained at
    height: int | None = None
    batch: int = 16  # images at a time

    def __post_init__(self) -> None:
        if not self.prompts or not isinstance(self.prompts, tuple):
            raise ValueError(f"prompts must be a tuple of one or more prompts, got {self.prompts!r}")
        if len(self.prompts) != len(self.seeds):
            raise ValueError(f"each image needs a prompt and a seed, got {len(self.prompts)} and {len(self.seeds)}")
        _check_seeds("seeds", self.seeds)
        if self.variation is not None and len(self.variation.seeds) != len(self.seeds):
            raise ValueError(f"give {len(self.seeds)} variation seeds, one an image, not {len(self.variation.seeds)}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        sampler(self.sampler, eta=self.eta, variance=self.variance)
        check_guidance(self.guidance, self.steering.rescale, self.steering.interval)
        if self.plus_plus and not 0 <= self.guidance <= 1:
            raise ValueError(f"the guidance of CFG++ must be in 0..1, got {self.guidance}")
        if self.steering.momentum and canonical(self.sampler)[0] == "dpm_adaptive":
            raise ValueError(
                "momentum remembers each step, also those that dpm_adaptive takes back; use another sampler"
            )
        if not 0 < self.switch < 1:
            raise ValueError(f"the switch to the refiner must be a share of the steps in 0..1, got {self.switch}")
        if len(self.aesthetic) != 2 or not all(map(math.isfinite, self.aesthetic)):
            raise ValueError(
                f"aesthetic is two scores, of the prompts and of the negative, such as 6 and 2.5; got {self.aesthetic}"
            )
        if self.plain and self.clip_skip is not None:
            raise ValueError("plain prompts are read as the model was trained: without clip_skip")
        if not self.plain:
            self._check_texts()
        self._check_pictures()

    def _check_texts(self) -> None:
        """Raise ValueError for what is no prompt in the grammar, at any step of any pass."""
        shows = self.given.shows if self.given is not None else None
        read = [parse(prompt) for prompt in dict.fromkeys(self.prompts)]
        read.append(parse(self.negative, negative=True))
        if shows is not None:
            read.append(parse(shows))
            if read[-1].adapters:
                raise ValueError(f"what a picture shows is said without adapters, got {shows!r}")
        several = {self.steps} if self.upscale is None else {self.steps, self.upscale.steps or self.steps}
        for text in {text for prompt in read for steps in several for text in prompt.texts(steps)}:
            pieces(text)

    def _check_pictures(self) -> None:
        pictures = [(f"picture for control {i}", control.image) for i, control in enumerate(self.controls)]
        if self.depth is not None:
            pictures.append(("depth", self.depth))
            if self.depth.ndim != 4 or self.depth.shape[1] != 1:
                raise ValueError(f"a depth must be [1 or N, 1, H, W], got {[*self.depth.shape]}")
        if self.given is not None:
            pictures.append(("picture", self.given.image))
            if self.given.mask is not None:
                pictures.append(("mask", self.given.mask))
            if self.variation is not None and self.given.shows is not None:
                raise ValueError("a variation is of noise that is drawn; that of what a picture shows is found")
            if self.upscale is not None and not self.given.plain:
                raise ValueError(f"upscale goes with prompts and plain pictures, not with {self.given.way}")
        for name, value in pictures:
            if len(value) not in (1, len(self.prompts)):
                raise ValueError(f"give 1 {name}, or one an image: {len(self.prompts)}, not {len(value)}")

    def at(self, width: int, height: int) -> "Request":
        """As it is drawn at that size: with a padding, the part around the mask of every picture; the mask blurred."""
        if self.given is None:
            return self
        given, controls, depth = self.given, self.controls, self.depth
        if given.padding is not None:
            controls = tuple(replace(c, image=given.part_of(c.image, width, height).clamp(0, 1)) for c in controls)
            depth = None if depth is None else given.part_of(depth, width, height)
        return replace(self, given=given.at(width, height), controls=controls, depth=depth)

    @property
    def plus_plus(self) -> bool:
        """Whether its guidance is that of CFG++, by its steering or by the name of its sampler."""
        return self.steering.plus_plus or says_plus_plus(self.sampler)

    @property
    def batches(self) -> int:
        """How many batches its images make."""
        return -(-len(self.prompts) // self.batch)


def _check_seeds(name: str, seeds: tuple[int, ...]) -> None:
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"{name} must be in 0..2^63-1, got {min(seeds)}..{max(seeds)}")

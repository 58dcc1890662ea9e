"""What can be asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ldm.diffusion.guidance import check_guidance
from ldm.diffusion.restoration import Operator, blur, downscale
from ldm.diffusion.samplers import canonical, sampler
from ldm.diffusion.samplers.names import says_plus_plus
from ldm.names import known

MEASURES = ("downscale", "blur")


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
class Given:
    """A picture to go by, in one of three ways: with a mask, a measure or what it shows.

    image [1 or N, 3, H, W] in [-1, 1]: N as many as the request's.
    mask [1 or N, 1, H, W] in 0..1: 1 is drawn anew, 0 stays as it is, to the pixel.
    measure: "downscale:4" or "blur:2.5" (pixels): the image is this of the picture that is asked for.
    shows: the prompt that fits the image; its noise is found first, and the request's prompt drawn from that.
    """

    image: Tensor
    mask: Tensor | None = None
    resample: int = 1  # mask: times to go down each stretch of `jump` steps, so that the parts agree (RePaint)
    jump: int = 10
    measure: str = ""
    noise_std: float = 0.0  # of the measurement
    measure_scale: float = 1.0
    shows: str | None = None

    def __post_init__(self) -> None:
        ways = (self.mask is not None) + bool(self.measure) + (self.shows is not None)
        if ways != 1:
            raise ValueError(f"a given picture needs one of mask, measure and what it shows; got {ways} of them")
        if self.image.ndim != 4 or self.image.shape[1] != 3:
            raise ValueError(f"a given picture must be [1 or N, 3, H, W], got {[*self.image.shape]}")
        if self.mask is not None:
            _check_mask(self.mask, self.image)
        elif self.resample != 1:
            raise ValueError(f"resample={self.resample} goes with a mask")
        if not (math.isfinite(self.measure_scale) and 0 <= self.noise_std < math.inf):
            raise ValueError(
                f"measure_scale must be finite and noise_std 0 or more, got {self.measure_scale} and {self.noise_std}"
            )
        if self.resample < 1 or self.jump < 1:
            raise ValueError(f"resample and jump must be at least 1, got {self.resample} and {self.jump}")
        if self.measure:
            self.operator()

    @property
    def way(self) -> str:
        """How it is gone by, in a few words."""
        if self.mask is not None:
            return "mask" if self.resample == 1 else f"mask, {self.resample} times by {self.jump} steps"
        return self.measure or f"shows {self.shows}"

    def operator(self) -> Operator:
        """What `measure` says. Raises ValueError for anything else."""
        word, _, number = self.measure.partition(":")
        known("measure", word, MEASURES)
        try:
            return downscale(int(number)) if word == "downscale" else blur(float(number))
        except ValueError as error:
            raise ValueError(
                f"measure must be downscale:FACTOR or blur:RADIUS, got {self.measure!r} ({error})"
            ) from error


def _check_mask(mask: Tensor, image: Tensor) -> None:
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask must be [1 or N, 1, H, W], got {[*mask.shape]}")
    if mask.shape[2:] != image.shape[2:]:
        sizes = (f"{w}x{h}" for h, w in (mask.shape[2:], image.shape[2:]))
        raise ValueError("the mask is {} px and the picture {}; they must be of one size".format(*sizes))
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"a mask must be in 0..1, got {mask.min():.4g}..{mask.max():.4g}")


@dataclass(frozen=True)
class Request:
    """What to draw: one image per (prompt, seed). Raises ValueError, saying what is allowed, when made.

    Image i depends on its own prompt and seed, not on what else is asked for. On one machine that holds to the
    byte at batch 1; in larger batches torch may sum in another order, which moves values by some 1e-6 and now
    and then a pixel by 1 of 255.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str = ""  # "" means the model's own null prompt
    steps: int = 50
    sampler: str = "ddim"
    eta: float = 0.0  # ddim: share of noise drawn anew each step
    variance: str | None = None  # ddpm: small | large | learned; None is learned where the model has it, else small
    guidance: float = 5.0  # 1 turns it off
    steering: Steering = Steering()
    given: Given | None = None
    spacing: str | None = None  # None means what the sampler's name says ("DPM++ 2M Karras"), or the model's own
    width: int | None = None  # px; None means the size of the given picture, or the size the model was trained at
    height: int | None = None
    batch: int = 16  # images at a time

    def __post_init__(self) -> None:
        if not self.prompts or not isinstance(self.prompts, tuple):
            raise ValueError(f"prompts must be a tuple of one or more prompts, got {self.prompts!r}")
        if len(self.prompts) != len(self.seeds):
            raise ValueError(f"each image needs a prompt and a seed, got {len(self.prompts)} and {len(self.seeds)}")
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"seeds must be in 0..2^63-1, got {min(self.seeds)}..{max(self.seeds)}")
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
        if self.given is not None:
            for name, value in (("picture", self.given.image), ("mask", self.given.mask)):
                if value is not None and len(value) not in (1, len(self.prompts)):
                    raise ValueError(f"give 1 {name}, or one an image: {len(self.prompts)}, not {len(value)}")

    @property
    def plus_plus(self) -> bool:
        """Whether its guidance is that of CFG++, by its steering or by the name of its sampler."""
        return self.steering.plus_plus or says_plus_plus(self.sampler)

    @property
    def batches(self) -> int:
        """How many batches its images make."""
        return -(-len(self.prompts) // self.batch)

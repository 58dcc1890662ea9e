"""From prompts to pictures: one request, one pipeline, one loop that belongs to the caller."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.checkpoints.load import load_model
from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.guidance import adaptive_projected, check_guidance, guided
from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import Step, canonical, sampler
from ldm.nn.cpu import for_cpu
from ldm.types import Conditioning, Denoiser

log = logging.getLogger(__name__)


def pairs(prompts: Sequence[str], count: int = 1, seed: int = 0) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The prompts and seeds of a Request: `count` images a prompt, image k of each from seed + k."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a sequence of prompts, got a single string")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    seeds = range(seed, seed + count)
    return tuple(p for p in prompts for _ in seeds), tuple(s for _ in prompts for s in seeds)


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
    guidance: float = 5.0  # 1 turns it off
    rescale: float = 0.0  # pull the spread of guided outputs back to that of the plain ones
    interval: tuple[float, float] | None = None  # guide only where t, as the network is told it, lies in it
    parallel: float = 1.0  # share of guidance along the estimate; below 1 saturates less (adaptive projected guidance)
    momentum: float = 0.0  # of the guidance of earlier steps; -0.5 with parallel 0 is the paper's
    norm: float = 0.0  # longest guidance, as a vector; 0 = any
    spacing: str | None = None  # None means what the sampler's name says ("DPM++ 2M Karras"), or the model's own
    width: int | None = None  # px; None means the size the model was trained at
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
        sampler(self.sampler, eta=self.eta)
        check_guidance(self.guidance, self.rescale, self.interval)

    @property
    def batches(self) -> int:
        """How many batches its images make."""
        return -(-len(self.prompts) // self.batch)


class Pipeline:
    """An autoencoder, a text encoder, a denoiser and the diffusion it was trained with.

    The modules run as they are, where they are: put them in evaluation mode first (`load` does).
    size: side in pixels that the model was trained at. null_prompt: what it was trained to see as "no prompt"; None
    if that was a conditioning of zeros (SDXL).
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        text: nn.Module,
        denoiser: nn.Module,
        diffusion: Diffusion,
        *,
        size: int,
        null_prompt: str | None = "",
        name: str = "",
    ) -> None:
        # `Any`: what a pipeline asks of its modules is their methods, not their classes
        self.autoencoder: Any = autoencoder
        self.text: Any = text
        self.denoiser: Any = denoiser
        self.diffusion = diffusion
        self.size, self.null_prompt, self.name = size, null_prompt, name

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        prediction: str | None = None,
        ema: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Pipeline":
        """Load a text-to-image model of any format; on a CPU, which is slow at anything else, in float32.

        Raises ValueError if there is none, or one without all three parts. See `load_model` for the options.
        """
        parts = ("autoencoder", "text", "denoiser")
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        model = load_model(path, parts, prediction=prediction, ema=ema, dtype=dtype)
        for note in model.notes:
            log.info("%s: %s", model.name, note)
        autoencoder, text, denoiser = (for_cpu(part.to(device).eval()) for part in model.require(*parts))
        try:
            diffusion = Diffusion.from_config(DiffusionConfig(**model.settings["diffusion"]))
            size, null_prompt = model.settings["size"], model.settings["null_prompt"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} was made by another version, its settings do not fit: {error}") from error
        latent = autoencoder.latent_channels
        channels = getattr(getattr(denoiser, "config", None), "in_channels", latent)
        if channels != latent:
            raise ValueError(
                f"{path}: its denoiser takes {channels} channels and its latents have {latent}: "
                "it draws into a given picture, which this pipeline cannot ask for yet"
            )
        return cls(autoencoder, text, denoiser, diffusion, size=size, null_prompt=null_prompt, name=model.name)

    def __call__(self, request: Request, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Draw every image: [N, 3, H, W] in [-1, 1], float32 on the CPU; progress(steps done, of how many)."""
        images, steps = [], self.steps(request)
        for step in self.stream(request):
            if progress is not None:
                progress(step.index + 1, steps * request.batches)
            if (step.index + 1) % steps == 0:
                images.append(self.decode(step.x))
        return torch.cat(images)

    def steps(self, request: Request) -> int:
        """Steps of each batch: as many as asked for, but for spacing `compvis`, which takes what it can."""
        return len(self._levels(request).t) - 1

    def stream(self, request: Request) -> Iterator[Step]:
        """The steps of the request, batch after batch, numbered through from 0.

        Step k belongs to batch b = k // `steps(request)`, images [batch * b : ...]; the x of a batch's last step is
        its result. `decode` turns x, or the estimate x0 for a preview, into pictures. Checks the request at
        once, raising ValueError before any work; the caller may stop whenever it likes.
        """
        return self._steps(request, self._levels(request), self._latent_shape(request))

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, 3, H, W] in [-1, 1], float32 on the CPU."""
        device, dtype = _home(self.autoencoder)
        image: Tensor = self.autoencoder.decode(latent.to(device, dtype))
        return image.float().clamp(-1, 1).cpu()

    def settings(self, request: Request, index: int) -> dict[str, Any]:
        """What to write beside image `index`, in the words and order of AUTOMATIC1111."""
        _, height, width = (self.autoencoder.factor * side for side in self._latent_shape(request))
        settings: dict[str, Any] = {"Prompt": request.prompts[index], "Negative prompt": request.negative}
        settings |= {"Steps": request.steps, "Sampler": request.sampler}
        settings |= {"CFG scale": request.guidance, "Seed": request.seeds[index], "Size": f"{width}x{height}"}
        settings |= {
            "Model": self.name,
            "Spacing": request.spacing or canonical(request.sampler)[1] or self.diffusion.spacing,
        }
        settings |= {"Eta": request.eta, "CFG rescale": request.rescale}
        if request.interval is not None:
            settings |= {"CFG interval": f"{request.interval[0]:g}-{request.interval[1]:g}"}
        for name in ("parallel", "momentum", "norm"):
            if getattr(request, name) != getattr(Request, name):
                settings |= {f"CFG {name}": getattr(request, name)}
        return settings | {"RNG": "CPU", "Version": f"ldm {__version__}"}

    @torch.inference_mode()  # of a generator, torch enters the mode for each step and leaves it at each yield
    def _steps(self, request: Request, levels: NoiseLevel, shape: tuple[int, ...]) -> Iterator[Step]:
        device, _ = _home(self.denoiser)
        take = sampler(request.sampler, eta=request.eta)
        distinct = list(dict.fromkeys(request.prompts))
        encoded = self._encode(distinct, request.batch)
        row = {prompt: i for i, prompt in enumerate(distinct)}
        uncond = Conditioning()
        if request.guidance != 1:
            uncond = self._told_sizes(self._uncond(request.negative), shape)
        for number, start in enumerate(range(0, len(request.prompts), request.batch)):
            batch = slice(start, start + request.batch)
            noise = BrownianNoise(request.seeds[batch], shape)
            cond = self._told_sizes(encoded[[row[prompt] for prompt in request.prompts[batch]]], shape)
            denoise = self.diffusion.denoise(self._guided(request, uncond), cond)
            for step in take(denoise, noise().to(device), levels, noise=noise, at=self.diffusion.schedule.at_ratio):
                yield Step(number * (len(levels.t) - 1) + step.index, step.x, step.x0)

    def _levels(self, request: Request) -> NoiseLevel:
        return self.diffusion.trajectory(request.steps, request.spacing or canonical(request.sampler)[1])

    def _guided(self, request: Request, uncond: Conditioning) -> Denoiser:
        """The guided network for one batch: guidance with momentum remembers its steps."""
        mix = None
        if (request.parallel, request.momentum, request.norm) != (1.0, 0.0, 0.0):
            mix = adaptive_projected(
                self.diffusion,
                request.guidance,
                parallel=request.parallel,
                momentum=request.momentum,
                norm=request.norm,
            )
        return guided(
            self._network, uncond, request.guidance, rescale=request.rescale, interval=request.interval, mix=mix
        )

    def _network(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # the network runs in its own type, the sampler's sums in float32
        output: Tensor = self.denoiser(x.to(_home(self.denoiser)[1]), t, cond)
        return output.to(x.dtype)

    def _encode(self, prompts: list[str], batch: int) -> Conditioning:
        device, dtype = _home(self.denoiser)
        parts = [self.text(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        return Conditioning.cat(parts).map(lambda v: v.to(device, dtype if v.is_floating_point() else v.dtype))

    def _uncond(self, negative: str) -> Conditioning:
        if negative or self.null_prompt is not None:
            return self._encode([negative or self.null_prompt or ""], 1)
        return self._encode([""], 1).map(lambda v: torch.zeros_like(v) if v.is_floating_point() else v)

    def _told_sizes(self, cond: Conditioning, shape: tuple[int, ...]) -> Conditioning:
        """With the sizes that SDXL asks for."""
        if not getattr(getattr(self.denoiser, "config", None), "size_dim", 0):
            return cond
        height, width = (side * self.autoencoder.factor for side in shape[-2:])
        return cond.sized(height, width)

    def _latent_shape(self, request: Request) -> tuple[int, ...]:
        factor: int = self.autoencoder.factor
        multiple = factor * getattr(self.denoiser, "factor", 1)
        height = self.size if request.height is None else request.height
        width = self.size if request.width is None else request.width
        if min(width, height) < 1 or width % multiple or height % multiple:
            raise ValueError(f"width and height must be multiples of {multiple} px, got {width}x{height}")
        return self.autoencoder.latent_channels, height // factor, width // factor


def _home(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module is and the type it computes in."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32

"""The pipeline: the modules, and the one loop that draws with them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import __version__
from ldm.checkpoints.load import load_model
from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.inversion import invert
from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion, DiffusionConfig, Estimate
from ldm.diffusion.samplers import Step, canonical, sampler
from ldm.models.perturbed import select
from ldm.nn.cpu import for_cpu
from ldm.pipeline.control import Batch, Companions, completing, put_back, steered
from ldm.pipeline.request import Request, Steering
from ldm.types import Conditioning

log = logging.getLogger(__name__)


class Pipeline:
    """An autoencoder, a text encoder, a denoiser and the diffusion it was trained with.

    The modules run as they are, where they are: put them in evaluation mode first (`load` does).
    size: side in pixels that the model was trained at. null_prompt: what it was trained to see as "no prompt"; None
    if that was a conditioning of zeros (SDXL). companions: other models that requests may be steered by; set at will.
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
        self.companions = Companions()

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
                images.append(self.pictures(request, step))
        return torch.cat(images)

    def steps(self, request: Request) -> int:
        """Steps of each batch: as many as asked for, but for spacing `compvis`, which takes what it can."""
        return len(self._levels(request, self._latent_shape(request)).t) - 1

    def pictures(self, request: Request, step: Step) -> Tensor:
        """The pictures [B, 3, H, W] of a batch's last step, in [-1, 1], with the known pixels of a given one."""
        drawn = self.decode(step.x)
        if request.given is None or request.given.mask is None:
            return drawn
        start = step.index // self.steps(request) * request.batch
        return put_back(request.given, slice(start, start + len(drawn)), drawn)

    def stream(self, request: Request) -> Iterator[Step]:
        """The steps of the request, batch after batch, numbered through from 0.

        Step k belongs to batch b = k // `steps(request)`, images [batch * b : ...]; the x of a batch's last step is
        its result, which `pictures` decodes; `decode` shows any x, or the estimate x0 for a preview. Checks the
        request at once, raising ValueError before any work; the caller may stop whenever it likes.
        """
        shape = self._latent_shape(request)
        levels = self._levels(request, shape)
        self._check(request)
        return self._steps(request, levels, shape)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, 3, H, W] in [-1, 1], float32 on the CPU."""
        return self._decode(latent).clamp(-1, 1).cpu()

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, c, h, w], float32, where the denoiser is.

        Means of the posterior, or with standard normal `noise` of the latents' shape samples of it.
        """
        device, dtype = _home(self.autoencoder)
        drawn = () if noise is None else (noise.to(device, dtype),)
        latent: Tensor = self.autoencoder.encode(image.to(device, dtype), *drawn)
        return latent.to(_home(self.denoiser)[0]).float()

    @torch.no_grad()
    def estimate(self, prompts: Sequence[str], shape: Sequence[int]) -> Estimate:
        """What a sampler calls, for latents [B, *shape] of these B prompts, without guidance."""
        cond = self._told_sizes(self._encode(list(prompts), len(prompts)), tuple(shape))
        return self.diffusion.for_size(*shape[-2:]).denoise(self._network, cond)

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
        settings |= {"Eta": request.eta}
        if request.variance is not None:
            settings |= {"Variance": request.variance}
        if self.companions.weak is not None:
            settings |= {"Weak model": self.companions.weak_name}
        for field in fields(Steering):
            value = getattr(request.steering, field.name)
            if value != field.default:
                settings |= {f"Steering {field.name.replace('_', ' ')}": value}
        if request.given is not None:
            settings |= {"Given": request.given.way}
            if request.given.measure:
                settings |= {"Noise": request.given.noise_std, "Measure scale": request.given.measure_scale}
        return settings | {"RNG": "CPU", "Version": f"ldm {__version__}"}

    @torch.no_grad()  # of a generator, torch enters the mode for each step and leaves it at each yield
    def _steps(self, request: Request, levels: NoiseLevel, shape: tuple[int, ...]) -> Iterator[Step]:
        device, _ = _home(self.denoiser)
        diffusion = self.diffusion.for_size(*shape[-2:])
        distinct = list(dict.fromkeys(request.prompts))
        encoded = self._encode(distinct, request.batch)
        row = {prompt: i for i, prompt in enumerate(distinct)}
        uncond = Conditioning()
        if self.companions.weak is None and (request.guidance != 1 or request.plus_plus):
            uncond = self._told_sizes(self._uncond(request.negative), shape)
        for number, start in enumerate(range(0, len(request.prompts), request.batch)):
            rows = slice(start, start + request.batch)
            cond = self._told_sizes(encoded[[row[prompt] for prompt in request.prompts[rows]]], shape)
            batch = Batch(request, rows, cond, uncond, levels, diffusion, self._decode)
            noise = BrownianNoise(request.seeds[rows], shape)
            take, x = sampler(request.sampler, eta=request.eta, variance=request.variance), noise().to(device)
            if request.given is not None and not request.given.measure:
                known = self.encode(batch.of(request.given.image))
                if request.given.mask is not None:
                    take = completing(take, request.given, batch, known)
                else:
                    x = self._noise_of(known, request.given.shows or "", batch)
            # guidance with momentum remembers its steps: one for each batch
            denoiser = steered(self._network, self.denoiser, self.companions, batch)
            denoise = diffusion.denoise(denoiser, cond)
            for step in take(denoise, x, levels, noise=noise, at=diffusion.schedule.at_ratio):
                yield Step(number * (len(levels.t) - 1) + step.index, step.x, step.x0)

    def _check(self, request: Request) -> None:
        """Raise ValueError for what this model cannot do with the request."""
        self.companions.check(request)
        if canonical(request.sampler)[0] == "tcd" and self.diffusion.config.schedule == "edm":
            raise ValueError("tcd counts timesteps from 0, which schedule edm has not; use another sampler")
        if request.steering.perturb:
            select(self.denoiser, request.steering.perturb, request.steering.perturb_how)
        if request.variance == "learned" and self.diffusion.config.variance == "fixed":
            raise ValueError("variance 'learned' needs a model that learned it; this one did not: small or large")
        given = request.given
        if given is None:
            return
        _, height, width = (self.autoencoder.factor * side for side in self._latent_shape(request))
        seen = torch.zeros(1, 3, height, width)
        needed = given.operator()(seen).shape[2:] if given.measure else seen.shape[2:]
        if given.image.shape[2:] != needed:
            sizes = (f"{w}x{h}" for h, w in (given.image.shape[2:], needed))
            raise ValueError("the given picture is {} px, and must be {}".format(*sizes))

    def _noise_of(self, known: Tensor, shows: str, batch: Batch) -> Tensor:
        """The noise that draws the known latents with the prompt they show, without guidance, on the same levels."""
        rows = len(batch.prompts)
        x = known.expand(rows, *known.shape[1:])
        for step in invert(self.estimate([shows] * rows, known.shape[1:]), x, batch.levels):
            x = step.x
        return x

    def _levels(self, request: Request, shape: tuple[int, ...]) -> NoiseLevel:
        spacing = request.spacing or canonical(request.sampler)[1]
        return self.diffusion.for_size(*shape[-2:]).trajectory(request.steps, spacing)

    def _network(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # the network runs in its own type, the sampler's sums in float32
        output: Tensor = self.denoiser(x.to(_home(self.denoiser)[1]), t, cond)
        return output.to(x.dtype)

    def _decode(self, latent: Tensor) -> Tensor:
        device, dtype = _home(self.autoencoder)
        image: Tensor = self.autoencoder.decode(latent.to(device, dtype))
        return image.float()

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
        height, width = (self.size, self.size)
        if request.given is not None and not request.given.measure:
            height, width = request.given.image.shape[2:]
        height = height if request.height is None else request.height
        width = width if request.width is None else request.width
        if min(width, height) < 1 or width % multiple or height % multiple:
            raise ValueError(f"width and height must be multiples of {multiple} px, got {width}x{height}")
        return self.autoencoder.latent_channels, height // factor, width // factor


def _home(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module is and the type it computes in."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32

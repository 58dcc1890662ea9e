"""The pipeline: the modules, and the one loop that draws with them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.library import Library, same_for_all
from ldm.adapters.tuned import load_tuned
from ldm.checkpoints.model import cast
from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.inversion import invert
from ldm.diffusion.noise import ImageNoise, NoiseSchedule
from ldm.diffusion.process import Diffusion, DiffusionConfig, Estimate
from ldm.diffusion.samplers import Sampler, Step, sampler
from ldm.models.tiling import tile
from ldm.models.typed import in_type_of
from ldm.nn.cpu import for_cpu
from ldm.nn.offload import at_work, offload
from ldm.pipeline.begin import begun, enlarged
from ldm.pipeline.checks import check, idle
from ldm.pipeline.companions import Companions
from ldm.pipeline.control import Batch, by_script, completing, steered
from ldm.pipeline.inputs import home, kind_of, reseeded, shown
from ldm.pipeline.passes import Pass, handed_over, on_the_sphere, passes_of, strength_of, stretch
from ldm.pipeline.request import Request
from ldm.pipeline.settings import settings_of
from ldm.pipeline.told import Teller, sized, wanted_by
from ldm.types import Conditioning, Denoiser

log = logging.getLogger(__name__)


class Pipeline:
    """An autoencoder, a text encoder, a denoiser and the diffusion it was trained with.

    The modules run as they are, where they are: put them in evaluation mode first (`load` does).
    size: side in pixels that the model was trained at. null_prompt: what it was trained to see as "no prompt"; None
    if that was a conditioning of zeros (SDXL). Raises ValueError for a denoiser of another number of channels than the
    pipeline knows what to show. Set at will: companions, other models that requests may be steered by, and low_res, the
    noise on the small picture that a model enlarges, at first that of Stable Diffusion's x4 upscaler.
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
        low_res = DiffusionConfig(schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
        self.low_res: NoiseSchedule = Diffusion.from_config(low_res).schedule
        self.kind = kind_of(denoiser, autoencoder)
        self.companions = Companions()
        self.library = Library({"denoiser": self.denoiser, "text": self.text})
        self._told_idle: set[str] = set()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        prediction: str | None = None,
        ema: bool = False,
        dtype: torch.dtype | None = None,
        low_memory: bool = False,
    ) -> "Pipeline":
        """Load a text-to-image model of any format; on a CPU, which is slow at anything else, in float32.

        low_memory: the autoencoder in tiles; and on another device than a CPU weights in float16, unless `dtype` says
        otherwise, but for the autoencoder's, each network there only while it works, and the denoiser layer by layer.
        Raises ValueError if there is none, or one without all three parts. See `load_model` for the options.
        """
        parts = ("autoencoder", "text", "denoiser")
        elsewhere = torch.device(device).type != "cpu"
        if dtype is None and (low_memory or not elsewhere):
            dtype = torch.float16 if elsewhere else torch.float32
        model = load_tuned(path, parts, prediction=prediction, ema=ema, dtype=dtype)
        for note in model.notes:
            log.info("%s: %s", model.name, note)
        resting = "cpu" if low_memory else device
        autoencoder, text, denoiser = (part.to(resting).eval() for part in model.require(*parts))
        if low_memory:
            tile(autoencoder)
            if dtype == torch.float16:
                cast(autoencoder, torch.float32)  # what SDXL's computes is too large for half precision
        for part in (autoencoder, text, denoiser):
            if elsewhere and low_memory:
                offload(part, device, by_layer=part is denoiser)
            else:
                for_cpu(part)
        try:
            diffusion = Diffusion.from_config(DiffusionConfig(**model.settings["diffusion"]))
            size, null_prompt = model.settings["size"], model.settings["null_prompt"]
            low_res = DiffusionConfig(**model.settings["low_res"]) if "low_res" in model.settings else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} was made by another version, its settings do not fit: {error}") from error
        try:
            pipeline = cls(autoencoder, text, denoiser, diffusion, size=size, null_prompt=null_prompt, name=model.name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if low_res is not None:
            pipeline.low_res = Diffusion.from_config(low_res).schedule
        return pipeline

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
        """Steps of each batch in all its passes.

        As many as asked for, but for spacing `compvis` and strength_steps `part`, which take what they can.
        """
        return sum(way.steps for way in self._passes(request))

    def pictures(self, request: Request, step: Step) -> Tensor:
        """The pictures [B, 3, H, W] of a batch's last step, in [-1, 1], with the known pixels of a given one."""
        drawn = self.decode(step.x)
        if request.given is None:
            return drawn
        start = step.index // self.steps(request) * request.batch
        return request.given.put_back(drawn, slice(start, start + len(drawn)))

    def stream(self, request: Request) -> Iterator[Step]:
        """The steps of the request, batch after batch, numbered through from 0.

        Step k belongs to batch b = k // `steps(request)`, images [batch * b : ...]; the x of a batch's last step is
        its result, which `pictures` decodes; `decode` shows any x, or the estimate x0 for a preview. Checks the
        request at once, raising ValueError before any work; the caller may stop whenever it likes.
        """
        passes = self._passes(request)
        check(self, request, passes)
        unused = ", ".join(idle(self, request))
        if unused and unused not in self._told_idle:  # once, and not for every cell of a grid
            self._told_idle.add(unused)
            log.warning("at guidance 1 these have no effect: %s", unused)
        return self._steps(request, passes)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, 3, H, W] in [-1, 1], float32 on the CPU.

        Raises ValueError for pictures that are not finite: of such latents, or out of an autoencoder that overflows.
        """
        image = self._decode(latent).cpu()
        if not image.isfinite().all():
            source = "the autoencoder, which may need float32," if latent.isfinite().all() else "the denoiser"
            raise ValueError(f"a picture is not finite: {source} gave values that are not")
        return image.clamp(-1, 1)

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, c, h, w], float32, where the denoiser is.

        Means of the posterior, or with standard normal `noise` of the latents' shape samples of it.
        """
        device, dtype = home(self.autoencoder)
        drawn = () if noise is None else (noise.to(device, dtype),)
        with at_work(self.autoencoder):
            latent: Tensor = self.autoencoder.encode(image.to(device, dtype), *drawn)
        return latent.to(home(self.denoiser)[0]).float()

    @torch.no_grad()
    def estimate(self, prompts: Sequence[str], shape: Sequence[int]) -> Estimate:
        """What a sampler calls, for latents [B, *shape] of these B prompts, without guidance.

        Raises ValueError for a model that is shown more than prompts.
        """
        if self.kind != "plain":
            raise ValueError(f"{self.name or 'this model'} is for {self.kind}: prompts alone do not make its estimate")
        with at_work(self.text):
            told = self._placed(self.text(list(prompts)))
        height, width = (side * self.autoencoder.factor for side in shape[-2:])
        cond = sized(self.denoiser, told, height, width, Request.aesthetic[0])
        return self.diffusion.for_size(*shape[-2:]).denoise(self._network, cond)

    @property
    def adapters(self) -> dict[str, Path]:
        """What prompts may ask for: where adapters are, by name."""
        return self.library.paths

    @adapters.setter
    def adapters(self, paths: dict[str, Path]) -> None:
        self.library.paths = paths

    def attach(self, path: str | Path, weight: float = 1.0) -> None:
        """Have an adapter on for every picture. Raises ValueError for one that does not fit the model."""
        self.library.put_on(path, weight)

    @property
    def multiple(self) -> int:
        """What the width and height of pictures, px, must be multiples of."""
        return int(self.autoencoder.factor * getattr(self.denoiser, "factor", 1))

    def size_of(self, request: Request) -> tuple[int, int]:
        """Width and height, px, at which the request is first drawn. Raises ValueError for one that cannot be."""
        factor, multiple = self.autoencoder.factor, self.multiple
        given, width, height = request.given, self.size, self.size
        if given is not None and not given.measure and given.padding is None:
            height, width = given.image.shape[2:]
            if self.kind == "enlarging":
                height, width = height * factor, width * factor
        width = width if request.width is None else request.width
        height = height if request.height is None else request.height
        if min(width, height) < 1 or width % multiple or height % multiple:
            raise ValueError(f"width and height must be multiples of {multiple} px, got {width}x{height}")
        return width, height

    def settings(self, request: Request, index: int) -> dict[str, Any]:
        """What to write beside image `index`, in the words and order of AUTOMATIC1111."""
        return settings_of(self, request, index)

    def _passes(self, request: Request) -> list[Pass]:
        width, height = (side // self.autoencoder.factor for side in self.size_of(request))
        sizes = [(height, width)]
        if request.upscale is not None:
            sizes.append(request.upscale.size_of(height, width, self.multiple // self.autoencoder.factor))
        shapes = [(self.autoencoder.latent_channels, *size) for size in sizes]
        return passes_of(request, self.diffusion, shapes, strength_of(request, self.kind))

    @torch.no_grad()  # of a generator, torch enters the mode for each step and leaves it at each yield
    def _steps(self, request: Request, passes: list[Pass]) -> Iterator[Step]:
        request = request.at(*self.size_of(request))
        refiner: Pipeline | None = self.companions.refiner
        adapters, wanted = wanted_by(request), None
        tell_refiner = None if refiner is None else refiner._teller(request)
        done = 0
        try:
            for start in range(0, len(request.prompts), request.batch):
                rows, before = slice(start, start + request.batch), None
                if wanted != (wanted := same_for_all(adapters[rows])):
                    self.library.use(wanted)
                    tell = self._teller(request, negative=self.companions.weak is None)
                for way in passes:
                    batch, editing = shown(self, self._batch(request, rows, way, tell))
                    # guidance with momentum remembers its steps: one for each pass of each batch
                    denoiser = steered(self._network, self.denoiser, self.companions, batch, editing)
                    if refiner is not None and tell_refiner is not None:
                        denoiser = refiner._refining(denoiser, self.companions, batch, tell_refiner)
                    with at_work(self.denoiser):
                        for step in self._draw(batch, way.diffusion.denoise(denoiser, batch.cond), before):
                            yield Step(done + step.index, step.x, step.x0)
                            self.library.use(wanted)  # what is drawn meanwhile may have others on
                    done, before = done + way.steps, step.x
        finally:
            self.library.use(())

    def _draw(self, batch: Batch, denoise: Estimate, before: Tensor | None) -> Iterator[Step]:
        """The steps of one pass; `before` is the result of the one before."""
        request, way, given = batch.request, batch.way, batch.request.given
        noise = BrownianNoise(_seeds(batch.seeds, before), way.shape)
        x = noise()
        if request.variation is not None:
            others = _seeds(request.variation.seeds[batch.rows], before)
            x = on_the_sphere(x, ImageNoise(others, way.shape)(), request.variation.strength)
        x = x.to(home(self.denoiser)[0])
        take: Sampler = sampler(request.sampler, eta=request.eta, variance=request.variance)
        if before is not None:
            x = way.diffusion.add_noise(enlarged(self, before, way.shape, request), x, way.levels[0])
        elif given is not None:
            keeps = given.mask is not None and self.kind != "inpainting"
            begins = strength_of(request, self.kind) is not None
            if keeps or begins or given.shows is not None:
                known = self.encode(batch.of(given.image))
            if keeps:
                take = completing(take, given, batch, known)
            if given.shows is not None:
                x = self._noise_of(known, given.shows, batch)
            if begins:
                x = way.diffusion.add_noise(begun(self, known, given, batch), x, way.levels[0])
        return take(denoise, x, way.levels, noise=noise, at=way.diffusion.schedule.at_ratio)

    def _refining(self, first: Denoiser, companions: Companions, batch: Batch, tell: Teller) -> Denoiser:
        """A denoiser of another pipeline, and this one's for the last steps: by prompts, without controls."""
        own = self._batch(_without_layers(batch.request), batch.rows, batch.way, tell)
        second = steered(self._network, self.denoiser, replace(companions, weak=None), own)
        return handed_over(first, second, own.cond, stretch(batch.way.levels, batch.request.switch))

    def _noise_of(self, known: Tensor, shows: str, batch: Batch) -> Tensor:
        """The noise that draws the known latents with the prompt they show, without guidance, on the same levels."""
        asked = replace(batch.request, prompts=(shows,) * len(batch.request.prompts))
        own = self._batch(asked, batch.rows, batch.way, self._teller(asked, negative=False))
        estimate = batch.way.diffusion.denoise(by_script(self._network, own), own.cond)
        x = known.expand(len(batch.prompts), *known.shape[1:])
        for step in invert(estimate, x, batch.way.levels):
            x = step.x
        return x

    def _network(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # the network runs in its own type, the sampler's sums in float32
        own, told = in_type_of(self.denoiser, x, cond)
        with at_work(self.denoiser):
            output: Tensor = self.denoiser(own, t, told)
        return output.to(x)

    def _decode(self, latent: Tensor) -> Tensor:
        device, dtype = home(self.autoencoder)
        with at_work(self.autoencoder):
            image: Tensor = self.autoencoder.decode(latent.to(device, dtype))
        return image.float()

    def _teller(self, request: Request, *, negative: bool = True) -> Teller:
        guided = request.guidance != 1 or request.plus_plus or self.kind == "editing"
        return Teller(self.text, request, self._placed, self.null_prompt, negative=negative and guided)

    def _batch(self, request: Request, rows: slice, way: Pass, tell: Teller) -> Batch:
        height, width = (side * self.autoencoder.factor for side in way.shape[-2:])

        def with_sizes(cond: Conditioning, negative: bool) -> Conditioning:
            return sized(self.denoiser, cond, height, width, request.aesthetic[negative])

        told = tell(rows, way.levels).sized(with_sizes)
        return Batch(request, rows, way, told.cond, told.uncond, told.script, self._decode)

    def _placed(self, told: Conditioning) -> Conditioning:
        device, dtype = home(self.denoiser)
        return told.map(lambda v: v.to(device, dtype if v.is_floating_point() else v.dtype))


def _seeds(seeds: tuple[int, ...], before: Tensor | None) -> tuple[int, ...]:
    """Of a pass: a second one has noise of its own."""
    return seeds if before is None else reseeded(seeds, "second pass")


def _without_layers(request: Request) -> Request:
    """What the refiner draws of a request: neither controls nor perturbed layers, which are of the first network."""
    return replace(request, controls=(), steering=replace(request.steering, perturb=""))

"""The latent denoiser: text to latents, in the space of a frozen autoencoder."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.load import load_model
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vq import AutoencoderVQ
from ldm.names import known
from ldm.pipeline import Pipeline, Request
from ldm.training.importance import LossSecondMoment
from ldm.training.latents import latents_of
from ldm.training.randomness import SampleRandomness
from ldm.training.statistics import misfit
from ldm.training.tasks import Metrics, Task, TaskConfig, bare, freeze
from ldm.types import Conditioning

log = logging.getLogger(__name__)

ARCHITECTURES: dict[str, Callable[[Any], nn.Module]] = {"unet": UNet, "dit": DiT, "mmdit": MMDiT}


@dataclass(frozen=True)
class DenoisingTaskConfig(TaskConfig):
    """The denoiser, the noise, and where the frozen models come from."""

    kind: str = "denoising"
    autoencoder: str = "???"  # model or run folder that has one
    text: str = "???"  # model or run folder that has one
    architecture: str = "unet"  # which of the next three is trained: unet | dit | mmdit
    unet: UNetConfig = field(default_factory=UNetConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    dropout: float = 0.1  # share of captions replaced by the null prompt, for classifier-free guidance
    null_prompt: str = ""
    previews: tuple[str, ...] = ()  # prompts; seeds are 0, 1, 2, ...
    preview_steps: int = 25
    preview_guidance: float = 4.0

    def __post_init__(self) -> None:
        known("task.architecture", self.architecture, ARCHITECTURES)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"task.dropout must be in [0, 1), not {self.dropout}")


class DenoisingTask(Task):
    """Trains a U-Net to undo noise on latents, told the text (Rombach et al. 2022, eq. 3)."""

    trained = ("denoiser",)

    def __init__(self, config: DenoisingTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        self.config, self.size, self.seed = config, size, seed
        (autoencoder,) = load_model(config.autoencoder, ["autoencoder"], dtype=torch.float32).require("autoencoder")
        (text,) = load_model(config.text, ["text"], dtype=torch.float32).require("text")
        assert isinstance(autoencoder, AutoencoderKL | AutoencoderVQ)
        self.autoencoder, self.text = autoencoder, text
        freeze(autoencoder), freeze(text)
        self.network: Any = getattr(config, config.architecture)
        self.diffusion = Diffusion.from_config(config.diffusion).for_size(*[size // autoencoder.factor] * 2)
        self._check_fit()
        self.denoiser = ARCHITECTURES[config.architecture](self.network)
        self._embeddings: dict[str, Conditioning] = {}
        self._latents_checked = False
        self.importance = LossSecondMoment()
        if config.diffusion.timesteps == "loss_second_moment":
            self.remembered = ("importance",)

    def _check_fit(self) -> None:
        """Raise ValueError, before any work, where the denoiser cannot work with the frozen models."""
        if self.size % self.autoencoder.factor:
            raise ValueError(
                f"picture size {self.size} must be a multiple of the latent factor {self.autoencoder.factor}"
            )
        latent, text = self.autoencoder.latent_channels, cast(Any, self.text)
        said = latent if self.config.diffusion.variance == "fixed" else 2 * latent
        needed = {"in_channels": latent, "out_channels": said, "classes": 0}
        needed |= {"context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
        for name, value in needed.items():
            given = getattr(self.network, name, 0)
            optional = name == "pooled_dim" and given == 0 and self.config.architecture != "mmdit"
            if given != value and not optional:
                raise ValueError(
                    f"task.{self.config.architecture}.{name} is {given}; the frozen models and captions need {value}"
                )

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        loss = self._loss(batch, step)
        if batch.weights is not None:
            loss = loss * batch.weights
        loss = loss.mean()
        yield "denoiser", loss, {"loss": loss.detach()}

    def validate(self, batch: Batch) -> Metrics:
        """The loss on fixed noise, at levels spread evenly over the batch, nothing dropped."""
        random = SampleRandomness(self.seed, batch.positions)
        latent, cond = self._encode(batch, random, dropout=0.0)
        u = (torch.arange(len(batch), device=latent.device) + 0.5) / len(batch)
        return {"loss": self._diffused(latent, cond, random, u).mean()}

    def preview(self, batch: Batch) -> Tensor | None:
        if not self.config.previews:
            return None
        request = Request(
            prompts=tuple(self.config.previews),
            seeds=tuple(range(len(self.config.previews))),
            steps=self.config.preview_steps,
            guidance=self.config.preview_guidance,
        )
        pipeline = Pipeline(
            self.autoencoder,
            self.text,
            bare(self.denoiser),
            self.diffusion,
            size=self.size,
            null_prompt=self.config.null_prompt,
        )
        return pipeline(request)

    def components(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "text": self.text, "denoiser": bare(self.denoiser)}

    def settings(self) -> dict[str, object]:
        return {
            "size": self.size,
            "diffusion": asdict(self.config.diffusion),
            "null_prompt": self.config.null_prompt,
            "caption_dropout": self.config.dropout,
        }

    def _loss(self, batch: Batch, step: int) -> Tensor:
        """[B]: the diffusion loss of every sample."""
        random = SampleRandomness(self.seed, batch.positions)
        latent, cond = self._encode(batch, random, self.config.dropout)
        u = random.uniform("timestep")
        if not self.remembered:
            return self._diffused(latent, cond, random, u)
        u, weight = self.importance.draw(u, step)
        loss = self._diffused(latent, cond, random, u)
        self.importance.learn(u, loss)
        return weight * loss

    def _diffused(self, latent: Tensor, cond: Conditioning, random: SampleRandomness, u: Tensor) -> Tensor:
        noise = random.normal("noise", tuple(latent.shape[1:]))
        diffusion = self.diffusion.for_size(*latent.shape[-2:])
        return diffusion.loss(self.denoiser, latent, cond, noise=noise, u=u, more=random.normal)

    @torch.no_grad()
    def _encode(self, batch: Batch, random: SampleRandomness, dropout: float) -> tuple[Tensor, Conditioning]:
        cond = self._told(batch, random.uniform("caption dropout") < dropout)
        if batch.moments is None:
            height, width = (side // self.autoencoder.factor for side in batch.image.shape[-2:])
        else:
            height, width = batch.moments.shape[-2:]
        if getattr(self.network, "size_dim", 0):
            pixels = (height * self.autoencoder.factor, width * self.autoencoder.factor)
            cond = cond.sized(*pixels) if batch.sizes is None else replace(cond, sizes=batch.sizes)
        noise = random.normal("posterior", (self.autoencoder.latent_channels, height, width))
        if batch.moments is None:
            latent = self.autoencoder.encode(batch.image, noise)
        else:
            assert isinstance(self.autoencoder, AutoencoderKL)  # no other has a posterior to keep
            latent = latents_of(self.autoencoder, batch.moments, noise)
        if not self._latents_checked:
            self._latents_checked = True
            if (warning := misfit(latent, self.config.autoencoder)) is not None:
                log.warning("%s", warning)
        return latent, cond

    def _told(self, batch: Batch, dropped: Tensor) -> Conditioning:
        """What the text encoder makes of the captions, or made of them before; `dropped` [B] get the null prompt."""
        prompts = [
            self.config.null_prompt if drop else caption
            for drop, caption in zip(dropped.tolist(), batch.captions, strict=True)
        ]
        if not batch.text:
            told: Conditioning = self.text(prompts)
            return told
        rows: dict[str, Any] = dict(batch.text)
        empty = torch.tensor([not caption for caption in batch.captions], device=dropped.device)
        for prompt, where in ((self.config.null_prompt, dropped), ("", empty & ~dropped)):
            if where.any():
                known = self._embedding(prompt)
                rows = {
                    name: torch.where(where.view(-1, *[1] * (v.dim() - 1)), getattr(known, name).to(v), v)
                    for name, v in rows.items()
                }
        return Conditioning(**rows)

    def _embedding(self, prompt: str) -> Conditioning:
        """Of one prompt that comes again and again, computed once."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.text([prompt])
        return self._embeddings[prompt]

"""The latent denoiser: text to latents, in the space of a frozen autoencoder."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.precompute import TEXT
from ldm.checkpoints.load import load_model
from ldm.diffusion.process import Aim, Diffusion, DiffusionConfig, Instead
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.text_record import check_record, text_record
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vq import AutoencoderVQ
from ldm.names import known
from ldm.nn.transfer import to_device
from ldm.pipeline import Pipeline, Request
from ldm.training.importance import LossSecondMoment
from ldm.training.joint_text import JointDenoiser, Unread
from ldm.training.latents import latents_of
from ldm.training.randomness import SampleRandomness
from ldm.training.statistics import misfit
from ldm.training.tasks import Metrics, Task, TaskConfig, bare, freeze
from ldm.types import Conditioning

log = logging.getLogger(__name__)

NEW = "new"
"""task.text for an encoder without weights of its own to start from."""

ARCHITECTURES: dict[str, Callable[[Any], nn.Module]] = {"unet": UNet, "dit": DiT, "mmdit": MMDiT}


@dataclass(frozen=True)
class LatentTaskConfig(TaskConfig):
    """What every training of a denoiser is told of captions and previews."""

    dropout: float = 0.1  # share of captions replaced by the null prompt, for classifier-free guidance
    previews: tuple[str, ...] = ()  # prompts; seeds are 0, 1, 2, ...
    preview_steps: int = 25
    preview_guidance: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"task.dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True)
class DenoisingTaskConfig(LatentTaskConfig):
    """The denoiser, the noise, and where the frozen models come from."""

    kind: str = "denoising"
    autoencoder: str = "???"  # model or run folder that has one
    text: str = "???"  # model or run folder that has one; or new, with random weights: task.text_model
    text_model: TextConfig = field(default_factory=TextConfig)
    train_text: bool = False  # the text encoder learns with the denoiser
    architecture: str = "unet"  # which of the next three is trained: unet | dit | mmdit
    unet: UNetConfig = field(default_factory=UNetConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    null_prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        known("task.architecture", self.architecture, ARCHITECTURES)
        if self.text == NEW and not self.train_text:
            raise ValueError("task.text=new is a text encoder that has learned nothing: task.train_text=true as well")


class LatentTask(Task):
    """What every training of a denoiser has in common: latents, noise, captions, validation and previews.

    denoiser: the network that pictures are drawn with; trained: the submodule that has it, or is it. null_prompt: what
    dropped captions become; None: a conditioning of zeros. reads: whether the prompts are read within the trained
    submodule, as they are when the text encoder, or a word of it, learns.
    """

    trained = ("denoiser",)
    reads: bool = False
    validated: int | None = None  # samples that are validated together; None: all that are given
    denoiser: nn.Module
    source: str  # where the autoencoder is from

    def __init__(
        self, config: LatentTaskConfig, autoencoder: nn.Module, text: nn.Module, diffusion: DiffusionConfig, size: int
    ) -> None:
        super().__init__()
        assert isinstance(autoencoder, AutoencoderKL | AutoencoderVQ)
        self.about, self.size = config, size
        self.autoencoder, self.text = autoencoder, text
        freeze(autoencoder), freeze(text)
        if size % autoencoder.factor:
            raise ValueError(f"picture size {size} must be a multiple of the latent factor {autoencoder.factor}")
        self.diffusion = Diffusion.from_config(diffusion).for_size(*[size // autoencoder.factor] * 2)
        self.null_prompt: str | None = ""
        self._embeddings: dict[str, Conditioning] = {}
        self._latents_checked = False
        self.importance = LossSecondMoment()
        if diffusion.timesteps == "loss_second_moment":
            self.remembered = ("importance",)

    def check_data(self, config: DataConfig) -> None:
        """Raise ValueError where batches made as `config` says would not hold what the task needs."""

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        loss = self._loss(batch, step)
        if batch.weights is not None:
            loss = loss * batch.weights
        loss = loss.mean()
        yield self.trained[0], loss, {"loss": loss.detach()}

    def validate(self, batch: Batch) -> Metrics:
        """The loss on fixed noise, at levels spread evenly over the batch, nothing dropped.

        And that of each fifth of the samples, from the least noise to the most: `loss/0` to `loss/4`.
        """
        u = (torch.arange(len(batch), device=batch.image.device) + 0.5) / len(batch)
        parts = batch.split(-(-len(batch) // (self.validated or len(batch))))
        found = []
        for part, levels in zip(parts, u.split([len(part) for part in parts]), strict=True):
            random = SampleRandomness(self.seed, part.positions, part.image.device)
            latent, cond = self._encode(part, random, dropout=0.0)
            found.append(self._diffused(part, latent, cond, random, levels))
        loss = torch.cat(found)
        fifths = loss[self.diffusion.for_size(*latent.shape[-2:]).levels(u).t.argsort(stable=True)].tensor_split(5)
        split = {f"loss/{k}": fifth.mean() for k, fifth in enumerate(fifths)} if len(batch) >= 5 else {}
        return {"loss": loss.mean(), **split}

    def preview(self, batch: Batch) -> Tensor | None:
        prompts = self.preview_prompts()
        if not prompts:
            return None
        request = Request(
            prompts=prompts,
            seeds=tuple(range(len(prompts))),
            plain=True,
            steps=self.about.preview_steps,
            guidance=self.about.preview_guidance,
        )
        return self.pipeline()(request)

    def preview_prompts(self) -> tuple[str, ...]:
        """What the previews show, in the order of the sheet."""
        return tuple(self.about.previews)

    def pipeline(self) -> Pipeline:
        """What draws with the models as they stand."""
        denoiser = bare(self.denoiser)
        return Pipeline(
            self.autoencoder, self.text, denoiser, self.diffusion, size=self.size, null_prompt=self.null_prompt
        )

    def components(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "text": self.text, "denoiser": bare(self.denoiser)}

    def settings(self) -> dict[str, object]:
        return {
            "size": self.size,
            "diffusion": asdict(self.diffusion.config),
            "null_prompt": self.null_prompt,
            "caption_dropout": self.about.dropout,
            "text": text_record(self.text),
        }

    def _loss(self, batch: Batch, step: int) -> Tensor:
        """[B]: the diffusion loss of every sample."""
        random = SampleRandomness(self.seed, batch.positions, batch.image.device)
        latent, cond = self._encode(batch, random, self.about.dropout)
        u = random.uniform("timestep")
        if not self.remembered:
            return self._diffused(batch, latent, cond, random, u)
        u, weight = self.importance.draw(u, step)
        loss = self._diffused(batch, latent, cond, random, u)
        self.importance.learn(u, loss)
        return weight * loss

    def _diffused(
        self, batch: Batch, latent: Tensor, cond: Conditioning, random: SampleRandomness, u: Tensor
    ) -> Tensor:
        noise = random.normal("noise", tuple(latent.shape[1:]))
        diffusion = self.diffusion.for_size(*latent.shape[-2:])
        network = getattr(self, self.trained[0])
        mask = batch.mask
        if mask is not None:  # a latent pixel counts as much as the pixels it stands for, in the mean
            mask = F.adaptive_avg_pool2d(mask, (latent.shape[-2], latent.shape[-1]))
        aim = Aim(mask, self._instead(batch, cond))
        return diffusion.loss(network, latent, cond, noise=noise, u=u, more=random.normal, aim=aim)

    def _instead(self, batch: Batch, cond: Conditioning) -> Instead | None:
        """What the denoiser is to say of these samples, where that is not what the noise tells."""
        return None

    @torch.no_grad()
    def _encode(self, batch: Batch, random: SampleRandomness, dropout: float) -> tuple[Tensor, Conditioning]:
        cond = self._told(batch, self._dropped(batch, random, dropout))
        if batch.moments is None:
            height, width = (side // self.autoencoder.factor for side in batch.image.shape[-2:])
        else:
            height, width = batch.moments.shape[-2:]
        if getattr(bare(self.denoiser).config, "size_dim", 0):
            cond = replace(cond, sizes=self._sizes(batch, height, width))
        noise = random.normal("posterior", (self.autoencoder.latent_channels, height, width))
        if batch.moments is None:
            latent = self.autoencoder.encode(batch.image, noise)
        else:
            assert isinstance(self.autoencoder, AutoencoderKL)  # no other has a posterior to keep
            latent = latents_of(self.autoencoder, batch.moments, noise)
        if not self._latents_checked:
            self._latents_checked = True
            if (warning := misfit(latent, self.source)) is not None:
                log.warning("%s", warning)
        return latent, self._shown(batch, cond, random, dropout)

    def _dropped(self, batch: Batch, random: SampleRandomness, dropout: float) -> list[bool]:
        """[B]: whose captions are dropped, which happens with that probability."""
        return [u < dropout for u in random.fractions("caption dropout")]

    def _shown(self, batch: Batch, cond: Conditioning, random: SampleRandomness, dropout: float) -> Conditioning:
        """The conditioning with what else the denoiser is told, besides the text; here nothing."""
        return cond

    def _sizes(self, batch: Batch, height: int, width: int) -> Tensor:
        """[B, 6], as in a batch; for latents of height x width of pictures that were never larger, nor cropped."""
        if bare(self.denoiser).config.aesthetic:
            raise ValueError("SDXL's refiner is told how a picture is liked, which no batch says: it cannot be trained")
        if batch.sizes is not None:
            return batch.sizes
        sides = [side * self.autoencoder.factor for side in (height, width)]
        return to_device(torch.tensor([*sides, 0, 0, *sides]).repeat(len(batch), 1), batch.image.device)

    def _told(self, batch: Batch, dropped: list[bool]) -> Conditioning:
        """What the text encoder makes of the captions, or made of them before; `dropped` [B] get the null prompt."""
        null = self.null_prompt or ""
        prompts = [null if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)]
        if self.reads:
            if batch.text:
                raise ValueError(
                    "task.train_text: data.cache holds what the text encoder said before it learned; "
                    "make one without --text"
                )
            return Unread(prompts=tuple(prompts), untold=tuple(dropped) if self.null_prompt is None else ())
        if not batch.text:
            told: Conditioning = self.text(prompts)
            return told if self.null_prompt is not None else self._replaced(told, self._unconditional(), dropped)
        empty = [not caption and not drop for drop, caption in zip(dropped, batch.captions, strict=True)]
        rows: dict[str, Any] = dict(batch.text)
        stored = self._replaced(Conditioning(**rows), self._unconditional(), dropped)
        return self._replaced(stored, self._embedding(""), empty)

    def _unconditional(self) -> Conditioning:
        """What the denoiser is told where a caption is dropped: one row."""
        if self.null_prompt is not None:
            return self._embedding(self.null_prompt)
        return self._embedding("").map(lambda v: torch.zeros_like(v) if v.is_floating_point() else v)

    @staticmethod
    def _replaced(cond: Conditioning, row: Conditioning, where: list[bool]) -> Conditioning:
        """The conditioning, its rows there replaced by the given one."""
        if not any(where):
            return cond
        changed: dict[str, Any] = {}
        for name in TEXT:
            if (values := getattr(cond, name)) is not None:
                chosen = to_device(torch.tensor(where), values.device).view(-1, *[1] * (values.dim() - 1))
                changed[name] = torch.where(chosen, getattr(row, name).to(values), values)
        return replace(cond, **changed)

    def _embedding(self, prompt: str) -> Conditioning:
        """Of one prompt that comes again and again, computed once."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.text([prompt])
        return self._embeddings[prompt]


class DenoisingTask(LatentTask):
    """Trains a denoiser to undo noise on latents, told the text (Rombach et al. 2022, eq. 3).

    The text encoder is frozen, or learns too: then the two are "joint.text" and "joint.denoiser" of what is trained.
    """

    def __init__(self, config: DenoisingTaskConfig, *, size: int, seed: int) -> None:
        (autoencoder,) = load_model(config.autoencoder, ["autoencoder"], dtype=torch.float32).require("autoencoder")
        super().__init__(config, autoencoder, _text_encoder(config), config.diffusion, size)
        self.config, self.seed, self.source, self.null_prompt = config, seed, config.autoencoder, config.null_prompt
        network = getattr(config, config.architecture)
        self._check_fit(network)
        self.denoiser = ARCHITECTURES[config.architecture](network)
        if config.train_text:
            self.text.requires_grad_(True)
            self.joint, self.trained, self.reads = JointDenoiser(self.text, self.denoiser), ("joint",), True

    def _check_fit(self, network: Any) -> None:
        """Raise ValueError, before any work, where the denoiser cannot work with the frozen models."""
        latent, text = self.autoencoder.latent_channels, cast(Any, self.text)
        said = latent if self.config.diffusion.variance == "fixed" else 2 * latent
        needed = {"in_channels": latent, "out_channels": said, "classes": 0}
        needed |= {"context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
        for name, value in needed.items():
            given = getattr(network, name, 0)
            optional = name == "pooled_dim" and given == 0 and self.config.architecture != "mmdit"
            if given != value and not optional:
                raise ValueError(
                    f"task.{self.config.architecture}.{name} is {given}; the frozen models and captions need {value}"
                )


def _text_encoder(config: DenoisingTaskConfig) -> nn.Module:
    """The one to start from. Raises ValueError if there is none, or its settings tell of another."""
    if config.text == NEW:
        return TextEncoder(config.text_model)
    found = load_model(config.text, ["text"], dtype=torch.float32)
    (text,) = found.require("text")
    check_record(found.settings.get("text"), text, f"task.text={config.text}")
    return text

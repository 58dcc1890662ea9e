"""Fine-tuning: a finished model, or something small put on it, learns from a few pictures."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, sample_rng
from data_pipeline.config import DataConfig
from data_pipeline.masks import random_mask
from ldm.adapters.adapter import Adapter
from ldm.adapters.lora import adapter_of, bypassed, inject
from ldm.adapters.textual_inversion import teach
from ldm.adapters.tuned import ADAPTER, save_adapter, save_word
from ldm.checkpoints.load import load_model, save_model
from ldm.checkpoints.model import weights_sha256
from ldm.checkpoints.textual_inversion import WORD, TextualInversion
from ldm.diffusion.process import DiffusionConfig, Instead
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import Controlled, ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.nn.transfer import to_device
from ldm.pipeline import Control, Given, Request
from ldm.pipeline.inputs import around_the_mask
from ldm.training.additions import begun, controlnet_for, t2i_adapter_for, wider
from ldm.training.denoising import LatentTask
from ldm.training.joint_text import JointDenoiser, TaughtDenoiser
from ldm.training.methods import CONTROLS, HELD, PARTIAL, PREDICTION, FinetuningTaskConfig
from ldm.training.quantize import hold, quantize
from ldm.training.randomness import SampleRandomness
from ldm.training.tasks import bare, freeze
from ldm.types import Conditioning

PARTS = ("autoencoder", "text", "denoiser")
VALIDATED = 4
"""Samples that are validated together: as few as fit wherever a large model is tuned."""
PREVIEWED = 4
"""Pictures of the data that the previews of a model which goes by one show."""
UNTOLD = 0.1
"""Share of the captions of what the base knows that are dropped, where it says itself what is right."""


class FinetuningTask(LatentTask):
    """A base model of which all, or a part that is added to it, learns; the loss is that of any denoiser.

    full: the denoiser (and the text encoder). adapter: small matrices beside its own (Hu et al. 2022). Both: and the
    vectors of a new word, where one is given. textual_inversion: such vectors alone (Gal et al. 2023). controlnet: a
    copy of the encoder that hears a picture (Zhang et al. 2023). t2i_adapter: a small network that does (Mou et al.
    2023). inpainting: the denoiser, told which pixels it is to draw and what the others are (Rombach et al. 2022, sec.
    4.5). instruct: the denoiser, told the picture to edit (Brooks et al. 2023).

    Samples that show what the base knows (Ruiz et al. 2023, sec. 3.2) may teach what it says of them itself, at their
    noise, in place of what they are: no noise is in that, and a model that has forgotten nothing learns nothing.
    """

    def __init__(self, config: FinetuningTaskConfig, *, size: int, seed: int) -> None:
        found = load_model(config.model, PARTS, dtype=torch.float32)
        autoencoder, text, denoiser = found.require(*PARTS)
        sha256 = {name: weights_sha256(module) for name, module in found.components.items()}
        super().__init__(config, autoencoder, text, _noise(found.settings, config), size)
        self.config, self.seed, self.source, self.sha256 = config, seed, config.model, sha256
        self.null_prompt = found.settings.get("null_prompt", "")
        self.denoiser = denoiser.requires_grad_(False)
        self.partial, self.validated = config.method in PARTIAL, VALIDATED
        self.columns = 2 if config.unrelated else 0
        latent = self.autoencoder.latent_channels
        extra = {"inpainting": 1 + latent, "instruct": latent}.get(config.method, 0)
        if extra and self._extra() != extra:
            self._widen(extra)
        self._check_told()
        {
            "adapter": self._adapter,
            "textual_inversion": self._read,
            "controlnet": self._controlnet,
            "t2i_adapter": self._t2i_adapter,
        }.get(config.method, self._full)()
        if config.held != "float32":
            hold(self.denoiser, HELD[config.held])
        self.before: nn.Module | None = None
        if config.prior == PREDICTION and config.method == "full":
            text = deepcopy(self.text) if config.train_text else self.text  # one that stays as it is serves both
            denoiser = deepcopy(self.denoiser)
            self.before = freeze(JointDenoiser(text, denoiser) if self.reads else denoiser)

    def _full(self) -> None:
        self.denoiser.requires_grad_(True)
        self.text.requires_grad_(self.config.train_text)
        if self.config.train_text or self.config.word:
            self._read()

    def _adapter(self) -> None:
        config = self.config
        if config.quantize:
            quantize(self.denoiser, config.quantize)
        inject({"denoiser": self.denoiser} | ({"text": self.text} if config.adapter.text else {}), config.adapter)
        if config.adapter.text or config.word:
            self._read()

    def _read(self) -> None:
        """Have the prompts read in the pass of what is trained, so that their reading, or a word, can learn."""
        config = self.config
        self.trained, self.reads = ("joint",), True
        if not config.word:
            self.joint = JointDenoiser(self.text, self.denoiser)
            return
        vectors = begun(self.text, config.initial, config.vectors)
        teach(self.text, config.word, vectors)
        self.joint = TaughtDenoiser(self.text, self.denoiser, vectors)

    def _controlnet(self) -> None:
        self._control(controlnet_for(self._unet(), self.autoencoder.factor))

    def _t2i_adapter(self) -> None:
        self._control(t2i_adapter_for(self._unet(), self.autoencoder.factor))

    def _control(self, control: ControlNet | T2IAdapter) -> None:
        if self._extra():
            raise ValueError(f"task.method={self.config.method} steers a plain model; {self.config.model} is told more")
        self.controlled, self.trained = Controlled(self._unet(), control), ("controlled",)

    def _widen(self, more: int) -> None:
        unet = self._unet()
        if self._extra():
            raise ValueError(f"{self.config.model} takes {unet.config.in_channels} channels: give what it was made of")
        self.denoiser = wider(unet, more)

    def _computing(self, device: torch.device) -> AbstractContextManager[object]:
        """Within the block the denoiser works, whatever its weights are held in."""
        held = HELD[self.config.held]
        return nullcontext() if held == torch.float32 else torch.autocast(device.type, dtype=held)

    def _loss(self, batch: Batch, step: int) -> Tensor:
        loss = super()._loss(batch, step)
        if batch.prior is None:
            return loss
        return loss * to_device(torch.where(batch.prior, self.config.prior_weight, 1.0), loss.device)

    def _diffused(
        self, batch: Batch, latent: Tensor, cond: Conditioning, random: SampleRandomness, u: Tensor
    ) -> Tensor:
        with self._computing(latent.device):
            return super()._diffused(batch, latent, cond, random, u)

    def _instead(self, batch: Batch, cond: Conditioning) -> Instead | None:
        if batch.prior is None or not batch.prior.any() or self.config.prior != PREDICTION:
            return None
        known = batch.prior.nonzero()[:, 0]

        def said(x: Tensor, t: Tensor, target: Tensor) -> Tensor:
            rows = to_device(known, x.device)
            told = cond[known if self.reads else rows]
            with torch.no_grad(), self._as_it_was() as network:
                answer = network(x[rows], t[rows], told)
            return target.index_copy(0, rows, answer[:, : target.shape[1]].to(target))

        return said

    @contextmanager
    def _as_it_was(self) -> Iterator[nn.Module]:
        """Within the block, what is trained, as it was before."""
        network = bare(getattr(self, self.trained[0]))
        with nullcontext() if self.before else bypassed(network):
            yield self.before or network

    def _unet(self) -> UNet:
        if not isinstance(self.denoiser, UNet):
            raise ValueError(f"task.method={self.config.method} is for a U-Net, not a {type(self.denoiser).__name__}")
        return self.denoiser

    def _extra(self) -> int:
        """Channels that the denoiser takes beside the noisy latents'."""
        config: Any = bare(self.denoiser).config
        return int(config.in_channels) - self.autoencoder.latent_channels

    def _check_told(self) -> None:
        latent = self.autoencoder.latent_channels
        if self._extra() not in (0, latent, latent + 1):
            raise ValueError(
                f"{self.config.model}: its denoiser takes {self._extra()} channels beside {latent} of noise, which "
                "no method here fills (0: plain; a picture's: instruct; those and a mask: inpainting)"
            )
        if self._edits and not isinstance(self.autoencoder, AutoencoderKL):
            raise ValueError("a model for editing is told the means of a KL autoencoder; this one has a codebook")
        if self._edits and self.config.dropout > 1 / 3:
            raise ValueError(f"task.dropout is three times dropped in editing: at most 1/3, not {self.config.dropout}")

    # what the denoiser is told

    @property
    def _edits(self) -> bool:
        """Whether the denoiser is told a picture to edit."""
        return self._extra() == self.autoencoder.latent_channels

    @property
    def paired(self) -> bool:
        """Whether each picture comes with another."""
        return self.config.method in CONTROLS or self._edits

    def check_data(self, config: DataConfig) -> None:
        """Raise ValueError where batches made as `config` says would not hold what the method needs."""
        if self.paired and not config.condition:
            raise ValueError(
                f"task.method={self.config.method} needs another picture with each: data.condition=stored, or one "
                "that is made of it, edges or segments"
            )
        if self._extra() > self.autoencoder.latent_channels and config.caches:
            raise ValueError("inpainting encodes pictures with holes, which no cache holds: leave data.cache out")
        aimed = config.prior and self.config.prior == PREDICTION
        if (config.mask or aimed) and self.diffusion.config.objective != "simple":
            what = "data.mask" if config.mask else "task.prior=prediction"
            raise ValueError(f"{what} needs another objective than this model's: task.diffusion.objective=simple")

    def _dropped(self, batch: Batch, random: SampleRandomness, dropout: float) -> list[bool]:
        share = 2 * dropout if self._edits else dropout
        prior = [False] * len(batch) if batch.prior is None or self.config.prior != PREDICTION else batch.prior.tolist()
        drawn = zip(random.fractions("caption dropout"), prior, strict=True)
        return [u < (UNTOLD if kept else share) for u, kept in drawn]

    def _shown(self, batch: Batch, cond: Conditioning, random: SampleRandomness, dropout: float) -> Conditioning:
        extra, latent = self._extra(), self.autoencoder.latent_channels
        if extra > latent:
            return replace(cond, concat=self._holes(batch))
        if not self.paired:
            return cond
        assert batch.condition is not None
        if self.config.method in CONTROLS:
            return replace(cond, control=(batch.condition,))
        # Of three equal shares one loses its caption, one both, and one its picture (Brooks et al. 2023, sec. 3.2.1).
        kept = torch.tensor([not dropout <= u < 3 * dropout for u in random.fractions("caption dropout")])
        before = self._before(batch.condition)
        return replace(cond, concat=before * kept.to(before)[:, None, None, None])

    def _before(self, picture: Tensor) -> Tensor:
        """A picture [B, 3, H, W] in [0, 1] -> the means of its raw latents, as InstructPix2Pix is told them."""
        assert isinstance(self.autoencoder, AutoencoderKL)
        return self.autoencoder.posterior(2 * picture - 1).mean

    def _holes(self, batch: Batch) -> Tensor:
        """[B, 1 + C, h, w]: where the picture is to be drawn, each sample's own place, and what is around it."""
        height, width = batch.image.shape[-2:]
        rngs = [sample_rng(self.seed, position, "hole") for position in batch.positions.tolist()]
        holes = to_device(torch.stack([random_mask(height, width, rng) for rng in rngs]), batch.image.device)
        factor = self.autoencoder.factor
        return around_the_mask(batch.image, holes, self.autoencoder.encode, (height // factor, width // factor))

    # what is kept and shown

    def preview_prompts(self) -> tuple[str, ...]:
        """Subject and unrelated prompts, in turns."""
        if not self.config.unrelated:
            return super().preview_prompts()
        return tuple(p for pair in zip(self.config.previews, self.config.unrelated, strict=True) for p in pair)

    def preview(self, batch: Batch) -> Tensor | None:
        """Of a model that goes by a picture: a row of such pictures, and below each what is drawn by it."""
        computing, network = self._computing(batch.image.device), bare(self.denoiser)

        def enter(*_: object) -> None:
            computing.__enter__()

        def leave(*_: object) -> None:
            computing.__exit__(None, None, None)

        # around the denoiser alone: text is read, and pictures decoded, as they will be by whoever draws with the model
        hooks = [network.register_forward_pre_hook(enter), network.register_forward_hook(leave, always_call=True)]
        try:
            return self._preview(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _preview(self, batch: Batch) -> Tensor | None:
        if not self._extra() and self.config.method not in CONTROLS:
            return super().preview(batch)
        count = self.columns = min(PREVIEWED, len(batch))
        seen, size = batch.image[:count].cpu(), tuple(batch.image.shape[-2:])
        request = Request(
            tuple(batch.captions[:count]),
            tuple(range(count)),
            plain=True,
            steps=self.config.preview_steps,
            guidance=self.config.preview_guidance,
            height=size[0],
            width=size[1],
        )
        if not self.paired:
            hole = torch.zeros(1, 1, *size)
            hole[..., size[1] // 2 :] = 1  # the right half
            request, seen = replace(request, given=Given(seen, mask=hole)), seen * (1 - hole)
        else:
            assert batch.condition is not None
            condition = batch.condition[:count].cpu()
            seen = 2 * condition - 1
            if self.config.method in CONTROLS:
                request = replace(request, controls=(Control(self.controlled_by(), condition),))
            else:
                request = replace(request, given=Given(seen))
        return torch.cat([seen, self.pipeline()(request)])

    def foundations(self) -> dict[str, str]:
        return {f"the {name} of {self.config.model}": value for name, value in self.sha256.items()}

    def settings(self) -> dict[str, object]:
        found: dict[str, object] = {**super().settings(), "method": self.config.method}
        if self.partial:
            found["base"] = {"model": os.path.abspath(self.config.model), "sha256": self.sha256}
        return found

    def save(self, folder: Path, settings: dict[str, Any], name: str) -> None:
        config = self.config
        if self.partial:
            control = {"controlnet": self.controlled_by()} if config.method in CONTROLS else {}
            save_model(folder, control, settings, name)
        else:
            super().save(folder, settings, name)
        if config.method == "adapter":
            save_adapter(self.adapter(), folder / ADAPTER)
        if config.word:
            save_word(self.inversion(), folder / WORD)

    def controlled_by(self) -> nn.Module:
        """The ControlNet or T2I-adapter, as it is now."""
        control: nn.Module = bare(self.controlled).controlnet
        return control

    def adapter(self) -> Adapter:
        """The adapter as it is now, on the CPU."""
        return adapter_of({"denoiser": bare(self.denoiser), "text": self.text})

    def inversion(self) -> TextualInversion:
        """The word as it is now, on the CPU."""
        vectors = bare(self.joint).vectors
        return TextualInversion(self.config.word, tuple(v.detach().float().cpu().clone() for v in vectors))


def _noise(settings: dict[str, Any], config: FinetuningTaskConfig) -> DiffusionConfig:
    """The base's own, with what the training changes. Raises ValueError."""
    try:
        return DiffusionConfig(**settings["diffusion"] | dict(config.diffusion))
    except (KeyError, TypeError) as error:
        raise ValueError(f"task.diffusion or the settings of {config.model} do not fit: {error}") from error

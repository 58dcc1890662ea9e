"""The first stage: pictures to latents and back."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.perceptual import load_perceptual
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.discriminator import LOSSES, PatchDiscriminator, logits_for_generator
from ldm.models.vq import AutoencoderVQ, CodebookConfig, Quantized, VQConfig, perplexity
from ldm.names import known
from ldm.training.adversary import AdversaryConfig, adaptive_weight, judge
from ldm.training.gathering import over_ranks, processes
from ldm.training.randomness import SampleRandomness, generator
from ldm.training.statistics import Autoencoder, Latent, track
from ldm.training.tasks import Metrics, Task, TaskConfig, bare, freeze


@dataclass(frozen=True)
class AutoencoderTaskConfig(TaskConfig):
    """The loss is reconstruction + kl_weight * KL + adversary; a codebook's loss stands in for the KL.

    normalisation: "mean" divides reconstruction and KL alike by the picture's number of values V; "sum" leaves sums
    over values, means over pictures, as CompVis does. Their ratio is the same, so that a `kl_weight` means the same in
    both, and what CompVis's means; but gradients are V times longer, which `optimizer.clip` notices.
    learn_logvar: the reconstruction's error E becomes E / exp(s) + s, s one learned number (CompVis; Dai & Wipf 2019).
    decoder_only: the encoder, what follows it, the codebook and the latents' statistics stay as `init` brought them.
    statistics: one mean and deviation of latents a "channel", or a "scalar" for all.
    """

    kind: str = "autoencoder"
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)  # entries above 0 make it an AutoencoderVQ
    reconstruction: str = "l1"  # l1 | l2
    perceptual: str = "none"  # none | random | a folder with VGG16's and LPIPS's weights
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6  # nats per value of the picture
    normalisation: str = "mean"  # mean | sum
    learn_logvar: bool = False
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    decoder_only: bool = False
    statistics: str = "channel"  # channel | scalar
    previews: int = 8

    def __post_init__(self) -> None:
        known("task.reconstruction", self.reconstruction, ("l1", "l2"))
        known("task.normalisation", self.normalisation, ("mean", "sum"))
        known("task.statistics", self.statistics, ("channel", "scalar"))


class WithVariance(nn.Module):
    """An autoencoder and the log-variance of its errors, which one optimizer trains together."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Latent]:
        """What the autoencoder says."""
        return self.autoencoder(image, noise)


class AutoencoderTask(Task):
    """Trains an AutoencoderKL or an AutoencoderVQ (Rombach et al. 2022, eq. 25 and app. G; Esser et al. 2021)."""

    trained: tuple[str, ...] = ("autoencoder",)

    def __init__(self, config: AutoencoderTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        self.config, self.size, self.seed = config, size, seed
        model: Autoencoder = (
            AutoencoderVQ(VQConfig(**asdict(config.model) | {"codebook": config.codebook}))
            if config.codebook.entries
            else AutoencoderKL(config.model)
        )
        self.factor = model.factor
        if size % self.factor:
            raise ValueError(f"picture size {size} must be a multiple of the latent factor {self.factor}")
        if config.decoder_only:
            for name in ("encoder", "quant", "codebook"):
                freeze(getattr(model, name, nn.Identity()))
        self.autoencoder = WithVariance(model) if config.learn_logvar else model
        self.discriminator: nn.Module | None = None
        if config.adversary.weight:
            self.discriminator = self._adversary()
            self.trained = ("autoencoder", "discriminator")
        self.perceptual: nn.Module | None = None
        if config.perceptual != "none":
            self.perceptual = load_perceptual(config.perceptual)
            if size < 16:
                raise ValueError(f"picture size {size}: a perceptual loss needs at least 16 px")

    def _adversary(self) -> PatchDiscriminator:
        found = PatchDiscriminator(self.config.adversary.model, self.config.model.image_channels)
        if self.size < found.smallest_px:
            raise ValueError(
                f"picture size {self.size} is too small for a discriminator of {found.config.layers} layers, which "
                f"needs {found.smallest_px} px; lower task.adversary.model.layers"
            )
        return found

    @property
    def _model(self) -> Autoencoder:
        module = bare(self.autoencoder)
        model: Autoencoder = module.autoencoder if self.config.learn_logvar else module
        return model

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        image, adversary = batch.image, self.config.adversary
        reconstruction, latent = self.autoencoder(image, self._noise(batch))
        scale = image[0].numel() if self.config.normalisation == "sum" else 1
        error, metrics = self._error(image, reconstruction)
        regulariser, said = self._regulariser(image, latent)
        if not self.config.decoder_only:
            self._learn(latent, step)
        loss = scale * (error + regulariser)
        playing = self.discriminator is not None and step >= adversary.start_step
        if playing:
            assert self.discriminator is not None
            logits = logits_for_generator(bare(self.discriminator), reconstruction)
            fooling = LOSSES[adversary.loss][1](logits)
            weight = torch.full_like(fooling, adversary.weight)
            if adversary.adaptive:
                weight = weight * adaptive_weight(scale * error, fooling, self._model.decoder.conv_out.weight)
            loss = loss + weight * fooling
            said |= {"fooling": fooling.detach(), "fooling_weight": weight}
        yield "autoencoder", loss, {"loss": loss.detach(), **metrics, **said}
        if playing:
            assert self.discriminator is not None
            yield "discriminator", *judge(self.discriminator, adversary, image, reconstruction.detach())

    def _error(self, image: Tensor, reconstruction: Tensor) -> tuple[Tensor, Metrics]:
        """What the reconstruction misses, a mean over values."""
        difference = reconstruction - image
        error = difference.abs().mean() if self.config.reconstruction == "l1" else difference.square().mean()
        metrics = {self.config.reconstruction: error.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, image).mean()
            error = error + self.config.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        if self.config.learn_logvar:
            logvar = bare(self.autoencoder).logvar
            error = error * (-logvar).exp() + logvar
            metrics["logvar"] = logvar.detach().clone()
        return error, metrics

    def _regulariser(self, image: Tensor, latent: Latent) -> tuple[Tensor, Metrics]:
        """The weighed KL, a sum over latents divided by the picture's number of values; or the codebook's loss."""
        if isinstance(latent, Quantized):
            loss = latent.loss(self.config.codebook)
            return loss, {"codebook": loss.detach()}
        kl = latent.kl().mean() / image[0].numel()
        return self.config.kl_weight * kl, {"kl": kl.detach()}

    @torch.no_grad()
    def _learn(self, latent: Latent, step: int) -> None:
        """What is learnt of the latents without gradients, from all ranks: their statistics, a codebook's means."""
        model = self._model
        track(model, latent, step, scalar=self.config.statistics == "scalar")
        if isinstance(latent, Quantized) and self.config.codebook.decay:
            assert isinstance(model, AutoencoderVQ)
            tally = over_ranks(model.codebook.tally(latent), "sum")
            model.codebook.update(tally, self._candidates(latent.raw, step))

    def _candidates(self, raw: Tensor, step: int) -> Tensor:
        """A latent of the step for each code [K, C]: code k's is of sample k (modulo their number), at a random place.

        Every rank fills in those of its own samples, the r-th part of the batch, so that one process finds the same.
        """
        entries, (rank, world) = self.config.codebook.entries, processes()
        place = torch.randint(raw[0, 0].numel(), (entries,), generator=generator(self.seed, step, "restart"))
        sample = torch.arange(entries) % (world * len(raw)) - rank * len(raw)
        mine = ((sample >= 0) & (sample < len(raw))).to(raw.device)
        rows = raw.detach().float().flatten(2).transpose(1, 2)  # [B, h w, C]
        found = rows[sample.clamp(0, len(raw) - 1).to(raw.device), place.to(raw.device)]  # [K, C]
        return over_ranks(found * mine[:, None], "sum")

    def validate(self, batch: Batch) -> Metrics:
        image = batch.image
        reconstruction, latent = self.autoencoder(image, self._noise(batch))
        error = (reconstruction.clamp(-1, 1) - image).square().flatten(1).mean(1)  # [B], range 2
        metrics = {
            "l1": (reconstruction - image).abs().mean(),
            "psnr": (10 * torch.log10(4 / error.clamp(min=1e-10))).mean(),
        }
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image).mean()
        if isinstance(latent, Quantized):
            counts = torch.bincount(latent.index.flatten(), minlength=self.config.codebook.entries)
            return metrics | {"codebook": latent.loss(self.config.codebook), "perplexity": perplexity(counts.float())}
        return metrics | {"kl": latent.kl().mean() / image[0].numel()}

    def preview(self, batch: Batch) -> Tensor:
        """Pictures above their reconstructions."""
        images = batch.image[: self.config.previews]
        with torch.no_grad():
            return torch.cat([images, self._model.decode(self._model.encode(images))])

    def components(self) -> dict[str, nn.Module]:
        return {"autoencoder": self._model}

    def settings(self) -> dict[str, object]:
        return {"size": self.size}

    def _noise(self, batch: Batch) -> Tensor | None:
        if self.config.codebook.entries:
            return None  # nothing is sampled
        side = self.size // self.factor
        shape = (self.config.model.latent_channels, side, side)
        return SampleRandomness(self.seed, batch.positions, batch.image.device).normal("posterior", shape)

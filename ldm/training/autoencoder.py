"""The first stage: pictures to latents and back."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, Posterior
from ldm.training.randomness import SampleRandomness
from ldm.training.tasks import Metrics, Task, TaskConfig, bare


@dataclass(frozen=True)
class AutoencoderTaskConfig(TaskConfig):
    """L1 and KL. Both are means over the picture's values (Rombach et al. sum; divide their weight by 3 H W)."""

    kind: str = "autoencoder"
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    kl_weight: float = 1e-6  # nats per value of the picture
    previews: int = 8


class AutoencoderTask(Task):
    """Trains an AutoencoderKL on L1 + kl_weight * KL (Rombach et al. 2022, eq. 25 without the GAN)."""

    trained = ("autoencoder",)

    def __init__(self, config: AutoencoderTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        self.config, self.size, self.seed = config, size, seed
        self.autoencoder = AutoencoderKL(config.model)
        self.factor = self.autoencoder.factor
        if size % self.factor:
            raise ValueError(f"picture size {size} must be a multiple of the latent factor {self.factor}")

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        reconstruction, posterior = self.autoencoder(batch.image, self._noise(batch))
        l1 = (reconstruction - batch.image).abs().mean()
        kl = posterior.kl().mean() / batch.image[0].numel()
        self._track(posterior, step)
        loss = l1 + self.config.kl_weight * kl
        yield "autoencoder", loss, {"loss": loss.detach(), "l1": l1.detach(), "kl": kl.detach()}

    def validate(self, batch: Batch) -> Metrics:
        reconstruction, posterior = self.autoencoder(batch.image, self._noise(batch))
        error = (reconstruction.clamp(-1, 1) - batch.image).square().flatten(1).mean(1)  # [B], range 2
        return {
            "l1": (reconstruction - batch.image).abs().mean(),
            "psnr": (10 * torch.log10(4 / error.clamp(min=1e-10))).mean(),
            "kl": posterior.kl().mean() / batch.image[0].numel(),
        }

    def preview(self, batch: Batch) -> Tensor:
        """Pictures above their reconstructions."""
        model, images = bare(self.autoencoder), batch.image[: self.config.previews]
        with torch.no_grad():
            return torch.cat([images, model.decode(model.encode(images))])

    def components(self) -> dict[str, nn.Module]:
        return {"autoencoder": bare(self.autoencoder)}

    def settings(self) -> dict[str, object]:
        return {"size": self.size}

    def _noise(self, batch: Batch) -> Tensor:
        side = self.size // self.factor
        shape = (self.config.model.latent_channels, side, side)
        return SampleRandomness(self.seed, batch.positions).normal("posterior", shape)

    @torch.no_grad()
    def _track(self, posterior: Posterior, step: int) -> None:
        """Keep the latents' mean and standard deviation per channel, so the model can normalise them.

        The mean of the last ~100 steps, over all ranks. The variance is that of a sample: of the means, plus
        what the posterior adds. It is kept in the model's own buffers and so resumes exactly.
        """
        model: AutoencoderKL = bare(self.autoencoder)
        mean = posterior.mean.float().mean((0, 2, 3))
        square = (posterior.mean.float() ** 2 + posterior.logvar.float().exp()).mean((0, 2, 3))
        moments = torch.stack([mean, square])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
            moments /= torch.distributed.get_world_size()
        keep = min(0.99, (1 + step) / (10 + step))
        old_mean = model.latent_mean.flatten()
        old_square = model.latent_std.flatten() ** 2 + old_mean**2
        mean = torch.lerp(moments[0], old_mean, keep)
        square = torch.lerp(moments[1], old_square, keep)
        model.latent_mean.copy_(mean[:, None, None])
        model.latent_std.copy_((square - mean**2).clamp(min=1e-8).sqrt()[:, None, None])

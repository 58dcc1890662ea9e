"""The mean and standard deviation of an autoencoder's latents: measured in its training, checked by who uses it."""

import torch
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL, Posterior
from ldm.models.vq import AutoencoderVQ, Quantized
from ldm.training.gathering import over_ranks

Latent = Posterior | Quantized
Autoencoder = AutoencoderKL | AutoencoderVQ


@torch.no_grad()
def moments(latent: Latent) -> Tensor:
    """[2, C]: the mean of each channel and of its square. A posterior's variance is that of a sample."""
    if isinstance(latent, Quantized):
        raw = latent.raw.float()
        return torch.stack([raw.mean((0, 2, 3)), raw.square().mean((0, 2, 3))])
    mean = latent.mean.float().mean((0, 2, 3))
    square = (latent.mean.float() ** 2 + latent.logvar.float().exp()).mean((0, 2, 3))
    return torch.stack([mean, square])


@torch.no_grad()
def track(model: Autoencoder, latent: Latent, step: int, *, scalar: bool) -> None:
    """Keep the latents' mean and standard deviation in the model's own buffers, so that it can normalise them.

    The mean of the last ~100 steps, over all ranks; a function of the training so far, which resumes exactly.
    scalar: one mean and one deviation for all channels, as Stable Diffusion has, instead of one a channel.
    """
    measured = over_ranks(moments(latent), "mean")
    if scalar:
        measured = measured.mean(1, keepdim=True).expand_as(measured)
    keep = min(0.99, (1 + step) / (10 + step))
    old_mean = model.latent_mean.flatten()
    old_square = model.latent_std.flatten() ** 2 + old_mean**2
    mean = torch.lerp(measured[0], old_mean, keep)
    square = torch.lerp(measured[1], old_square, keep)
    model.latent_mean.copy_(mean[:, None, None])
    model.latent_std.copy_((square - mean**2).clamp(min=1e-8).sqrt()[:, None, None])


def misfit(latent: Tensor, source: str) -> str | None:
    """A warning if normalised latents [B, C, h, w] are far from mean 0 and deviation 1, which noise is scaled to.

    Far: a deviation over all values outside [0.5, 2], or a mean beyond 0.5. Stable Diffusion's are within.
    """
    mean, std = float(latent.float().mean()), float(latent.float().std())
    if 0.5 <= std <= 2 and abs(mean) <= 0.5:
        return None
    return (
        f"the latents of {source} have mean {mean:.3g} and standard deviation {std:.3g} on this data, not 0 and 1; "
        "measure them with: ldm evaluate autoencoder MODEL DATA --statistics channel --out FOLDER"
    )

"""The KL-regularised autoencoder of Stable Diffusion (Rombach et al. 2022, sec. 3.1), in any size."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import Downsample, PixelAttention, ResidualBlock, Upsample


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes; the defaults are Stable Diffusion's KL-f8: 83,653,863 parameters."""

    image_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; each level but the last halves the size
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    attention_levels: tuple[int, ...] = ()  # levels, 0 = full size, with attention after each residual block
    quant: bool = True  # 1x1 convolutions around the latents (not in Stable Diffusion 3)
    norm_groups: int = 32


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; mean and logvar [B, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def from_moments(moments: Tensor) -> "Posterior":
        """From the encoder's output [B, 2 C, h, w]; logvar is clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the mean's shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(posterior || N(0, 1)) in nats, summed over C, h and w -> [B] (Kingma & Welling 2014, app. B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, groups=groups, eps=1e-6)
        self.attention = PixelAttention(channels, groups=groups)
        self.block2 = ResidualBlock(channels, channels, groups=groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention or none, then a change of resolution or none."""

    def __init__(self, widths: list[int], groups: int, *, attend: bool, resample: nn.Module | None) -> None:
        super().__init__()
        pairs = pairwise(widths)
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups=groups, eps=1e-6) for a, b in pairs)
        self.attentions = nn.ModuleList(
            PixelAttention(w, groups=groups) if attend else nn.Identity() for w in widths[1:]
        )
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip(self.blocks, self.attentions, strict=True):
            x = attend(block(x))
        return self.resample(x)


class Encoder(nn.Module):
    """image [B, 3, H, W] -> features [B, 2 C, H / f, W / f]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        width = config.channels
        for i, out in enumerate(widths):
            down = Downsample(out, symmetric=False) if i < len(widths) - 1 else None
            attend = i in config.attention_levels
            self.levels.append(Level([width] + [out] * config.blocks, groups, attend=attend, resample=down))
            width = out
        self.middle = Middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """latent [B, C, h, w] -> image [B, 3, h f, w f]; its levels run from the lowest resolution up."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, [config.channels * m for m in reversed(config.multipliers)]
        width = widths[0]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = Middle(width, groups)
        self.levels = nn.ModuleList()
        for i, out in enumerate(widths):
            up = Upsample(out) if i < len(widths) - 1 else None
            attend = len(widths) - 1 - i in config.attention_levels
            self.levels.append(Level([width] + [out] * (config.blocks + 1), groups, attend=attend, resample=up))
            width = out
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LatentSpace(nn.Module):
    """What autoencoders have in common: they own the shift and scale of their latents, one per channel.

    So nobody else handles a raw latent. `latent_mean` and `latent_std` are measured in training; Stable Diffusion's
    single factor 0.18215 is mean 0, std 1 / 0.18215. Files keep them in float32 beside weights of any type.
    """

    config: AutoencoderConfig
    encoder: nn.Module
    quant: nn.Module
    latent_mean: Tensor
    latent_std: Tensor

    def measure_latents(self, mean: Tensor, std: Tensor) -> None:
        """Register the statistics, [C, 1, 1] each."""
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_std", std)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.config.multipliers) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encoded(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> what the encoder says. Raises ValueError unless `factor` divides H and W."""
        if image.shape[-1] % self.factor or image.shape[-2] % self.factor:
            raise ValueError(f"picture size {image.shape[-1]}x{image.shape[-2]} must be a multiple of {self.factor}")
        said: Tensor = self.quant(self.encoder(image))
        return said

    def normalised(self, raw: Tensor) -> Tensor:
        """Raw latents -> latents of zero mean and unit variance."""
        return ((raw - self.latent_mean) / self.latent_std).to(raw.dtype)

    def raw_of(self, latent: Tensor) -> Tensor:
        """The way back."""
        return (latent * self.latent_std + self.latent_mean).to(latent.dtype)


class AutoencoderKL(LatentSpace):
    """Pictures in [-1, 1] to latents of zero mean and unit variance, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * c, 2 * c, 1) if config.quant else nn.Identity()
        self.post_quant = nn.Conv2d(c, c, 1) if config.quant else nn.Identity()
        self.decoder = Decoder(config)
        self.measure_latents(torch.zeros(c, 1, 1), torch.ones(c, 1, 1))

    def posterior(self, image: Tensor) -> Posterior:
        """image [B, 3, H, W] in [-1, 1], H and W multiples of `factor` -> distribution of raw latents."""
        return Posterior.from_moments(self.encoded(image))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> normalised latent [B, C, H / f, W / f].

        With standard normal `noise` of the latent's shape it is a sample of the posterior, else its mean.
        """
        posterior = self.posterior(image)
        return self.normalised(posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, latent: Tensor) -> Tensor:
        """normalised latent [B, C, h, w] -> image [B, 3, h f, w f], near [-1, 1] but not clamped."""
        return self.decoder(self.post_quant(self.raw_of(latent)))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The training path: image, noise -> (reconstruction, posterior)."""
        posterior = self.posterior(image)
        return self.decoder(self.post_quant(posterior.sample(noise))), posterior

"""The vector-quantised autoencoder (van den Oord et al. 2017), as the first stage of latent diffusion uses it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, Decoder, Encoder, LatentSpace

CHUNK = 4096  # latents whose distances to all codes are held at a time
SMOOTHING = 1e-5  # counts added to every code, so that an unused one can be divided by


@dataclass(frozen=True)
class CodebookConfig:
    """entries: codes to choose from; 0: no codebook.

    decay: 0 learns the codes by gradient; else they are running means of the latents that chose them, over about
    1 / (1 - decay) batches (van den Oord et al. 2017, app. A.1). restart: a code chosen by fewer latents a batch than
    this, in the running mean, is put on a latent of the batch (Dhariwal et al. 2020, sec. 3.2); 0: never.
    """

    entries: int = 0
    commitment: float = 0.25  # beta
    decay: float = 0.0
    restart: float = 0.0

    def __post_init__(self) -> None:
        if self.entries < 0 or self.entries == 1:
            raise ValueError(f"codebook.entries must be 0 (no codebook) or at least 2, not {self.entries}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"codebook.decay must be in [0, 1), not {self.decay}")
        if self.restart < 0 or (self.restart and not self.decay):
            raise ValueError(f"codebook.restart={self.restart} must be at least 0, and needs codebook.decay above 0")


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """Sizes, and the codebook; `latent_channels` is the length of a code."""

    codebook: CodebookConfig = field(default_factory=lambda: CodebookConfig(entries=8192))


@dataclass(frozen=True)
class Quantized:
    """Latents [B, C, h, w] before and after they moved to their nearest codes; index [B, h, w]: which codes."""

    raw: Tensor
    codes: Tensor
    index: Tensor

    def straight_through(self) -> Tensor:
        """The codes, with the gradient of the raw latents (van den Oord et al. 2017, sec. 3.2)."""
        return self.raw + (self.codes - self.raw).detach()

    def loss(self, config: CodebookConfig) -> Tensor:
        """|sg(z) - e|^2 + commitment |z - sg(e)|^2, means over values (van den Oord et al. 2017, eq. 3).

        The first term trains the codes, and falls away where they are running means.
        """
        commitment = config.commitment * (self.raw - self.codes.detach()).square().mean()
        if config.decay:
            return commitment
        return (self.raw.detach() - self.codes).square().mean() + commitment


class Codebook(nn.Module):
    """The codes [K, C], and, where they are running means, the counts [K] and sums [K, C] behind them."""

    count: Tensor
    total: Tensor

    def __init__(self, config: CodebookConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        codes = torch.empty(config.entries, channels).uniform_(-1 / config.entries, 1 / config.entries)
        self.codes = nn.Parameter(codes, requires_grad=config.decay == 0)
        if config.decay:
            self.register_buffer("count", torch.ones(config.entries))
            self.register_buffer("total", codes.clone())

    def forward(self, raw: Tensor) -> Quantized:
        """raw [B, C, h, w] -> each pixel's nearest code."""
        rows = raw.permute(0, 2, 3, 1)  # [B, h, w, C]
        index = self._nearest(rows.flatten(0, 2)).view(rows.shape[:3])
        codes = F.embedding(index, self.codes).permute(0, 3, 1, 2)
        return Quantized(raw, codes.to(raw.dtype), index)

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        """[N, C] -> [N]; in float32 also where the network computes in less, as near codes differ by little."""
        with torch.autocast(rows.device.type, enabled=False):
            codes = self.codes.float()
            lengths = codes.square().sum(1)
            return torch.cat([(lengths - 2 * part.float() @ codes.T).argmin(1) for part in rows.split(CHUNK)])

    @torch.no_grad()
    def tally(self, latent: Quantized) -> Tensor:
        """[K, 1 + C]: how many latents chose each code, and their sum. Tallies of processes add up."""
        index, rows = latent.index.flatten(), latent.raw.permute(0, 2, 3, 1).flatten(0, 2).float()
        ones = torch.cat([rows.new_ones(len(rows), 1), rows], dim=1)
        return rows.new_zeros(len(self.codes), ones.shape[1]).index_add_(0, index, ones)

    @torch.no_grad()
    def update(self, tally: Tensor, candidates: Tensor) -> None:
        """Move the running means by a batch's tally; codes too rarely chosen go to their `candidates` [K, C].

        van den Oord et al. 2017, eq. 6-8, with the counts smoothed as Laplace would.
        """
        decay = self.config.decay
        self.count.lerp_(tally[:, 0], 1 - decay)
        self.total.lerp_(tally[:, 1:], 1 - decay)
        dead = self.count < self.config.restart
        self.count.masked_fill_(dead, 1.0)
        self.total.copy_(torch.where(dead[:, None], candidates, self.total))
        everything = self.count.sum()
        smooth = (self.count + SMOOTHING) / (everything + len(self.count) * SMOOTHING) * everything
        self.codes.copy_(self.total / smooth[:, None])


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of how often codes were chosen, counts [K]: 1 for one code, K for all alike."""
    share = counts / counts.sum()
    return (-torch.special.xlogy(share, share).sum()).exp()


class AutoencoderVQ(LatentSpace):
    """Pictures in [-1, 1] to latents of zero mean and unit variance, and back through a codebook.

    As in latent diffusion (Rombach et al. 2022, sec. 3.1) the latents are those before the codebook, and `decode`
    moves them to their nearest codes: a denoiser works in a continuous space. Its interface is AutoencoderKL's.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        # There is no variance to tell: half the channels of a Gaussian's encoder.
        self.encoder.conv_out = nn.Conv2d(self.encoder.conv_out.in_channels, c, 3, padding=1)
        self.quant = nn.Conv2d(c, c, 1) if config.quant else nn.Identity()
        self.codebook = Codebook(config.codebook, c)
        self.post_quant = nn.Conv2d(c, c, 1) if config.quant else nn.Identity()
        self.decoder = Decoder(config)
        self.measure_latents(torch.zeros(c, 1, 1), torch.ones(c, 1, 1))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> normalised latent [B, C, H / f, W / f], not yet quantised.

        There is nothing to sample: `noise` is taken as AutoencoderKL's is, and changes nothing.
        """
        return self.normalised(self.encoded(image))

    def decode(self, latent: Tensor) -> Tensor:
        """normalised latent [B, C, h, w] -> image [B, 3, h f, w f] of its nearest codes, near [-1, 1], not clamped."""
        return self.decoder(self.post_quant(self.codebook(self.raw_of(latent)).codes))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """The training path: image -> (reconstruction, latents before and after the codebook)."""
        latent = self.codebook(self.encoded(image))
        return self.decoder(self.post_quant(latent.straight_through())), latent

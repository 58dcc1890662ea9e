"""What a first stage loses: how near its reconstructions are, and how its latents lie."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loader import DataConfig, Loader
from data_pipeline.reader import ShardReader
from ldm.evaluation.metrics import psnr

BATCH = 16
SHOWN = 64  # pictures kept to be looked at
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, px

Distance = Callable[[Tensor, Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1], each with its pair -> [B]
Extractor = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1] -> features [B, D]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures [B, C, H, W] in [-1, 1], each with its pair: [B], 1 for equal ones.

    Wang et al. 2004, eq. 13, with their constants: a Gaussian window of 11 px and sigma 1.5, K 0.01 and 0.03; the
    mean over channels and over the windows that lie within the picture. Raises ValueError for different shapes and
    for pictures below 11 px.
    """
    if a.shape != b.shape or min(a.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pairs of at least {WINDOW} px, got {tuple(a.shape)} and {tuple(b.shape)}")
    offset = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    weights = (-(offset**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()

    def local(x: Tensor) -> Tensor:
        """The weighed mean around each pixel."""
        rows = F.conv2d(x.flatten(0, 1)[:, None], weights.view(1, 1, -1, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, -1)).view(*x.shape[:2], x.shape[2] - 10, x.shape[3] - 10)

    x, y = (a.double() + 1) / 2, (b.double() + 1) / 2  # SSIM's means are those of values from 0 up
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features [N, D] and [M, D]: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)).

    Dowson & Landau 1982; with Inception's features it is the FID (Heusel et al. 2017, eq. 6). Computed in float64
    by symmetric matrices, (A B)^(1/2) having the trace of (A^(1/2) B A^(1/2))^(1/2). Raises ValueError below two
    rows. It is biased upwards for few rows, so only counts of equal size compare.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 pictures a side, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T).reshape(a.shape[1], -1))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    second = torch.cov(b.T).reshape(b.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float((shift + values.sum() + second.trace() - 2 * cross).clamp(min=0))


@dataclass(frozen=True)
class Judges:
    """What looks at pictures besides arithmetic, each with the name that its numbers go under."""

    distance: Distance | None = None
    distance_name: str = "lpips"
    extractor: Extractor | None = None
    extractor_name: str = ""


@dataclass(frozen=True)
class Reconstructed:
    """Scores by name; raw latents' mean and deviation by channel [C]; some pictures and what they became."""

    scores: dict[str, Any]
    latent_mean: Tensor
    latent_std: Tensor
    images: Tensor
    rebuilt: Tensor


@torch.no_grad()
def evaluate_autoencoder(autoencoder: Any, batches: Iterable[Tensor], judges: Judges) -> Reconstructed:
    """Send pictures [B, 3, H, W] in [-1, 1] through an autoencoder and back, by the mean of their latents, and measure.

    Scores: images; psnr (dB, mean over pictures), ssim; `distance_name`; rfid, the Frechet distance by the `extractor`;
    latent_mean and latent_std, over all values of sampled normalised latents, which is what a denoiser is trained on:
    they should be 0 and 1.
    """
    generator = torch.Generator().manual_seed(0)
    weight = next(autoencoder.parameters())
    sums: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, Tensor]] = []
    moments = torch.zeros(3, autoencoder.latent_channels, dtype=torch.float64)  # count, sum, sum of squares
    for batch in batches:
        image = batch.to(weight.device, weight.dtype)
        latent = autoencoder.encode(image)
        rebuilt, real = autoencoder.decode(latent).float().clamp(-1, 1), image.float()
        found = {"psnr": psnr(real, rebuilt), "ssim": ssim(real, rebuilt)}
        if judges.distance is not None:
            found[judges.distance_name] = judges.distance(real, rebuilt)
        if judges.extractor is not None:
            found |= {"real": judges.extractor(real), "made": judges.extractor(rebuilt)}
        for name, value in found.items():
            sums.setdefault(name, []).append(value.double().cpu())
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        z = autoencoder.encode(image, noise).double().cpu().transpose(0, 1).flatten(1)  # [C, B h w]
        moments += torch.stack([torch.full((len(z),), z.shape[1]), z.sum(1), z.square().sum(1)])
        if sum(len(a) for a, _ in shown) < SHOWN:
            shown.append((real.cpu(), rebuilt.cpu()))
    if not sums:
        raise ValueError("there are no pictures to evaluate")
    features = {name: torch.cat(sums.pop(name)) for name in ("real", "made") if name in sums}
    scores: dict[str, Any] = {"images": sum(map(len, sums["psnr"]))}
    scores |= {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    if features:
        scores |= {"rfid": frechet_distance(features["real"], features["made"]), "extractor": judges.extractor_name}
    mean, std = _normal(moments)
    whole_mean, whole_std = _normal(moments.mean(1, keepdim=True))
    scores |= {"latent_mean": float(whole_mean), "latent_std": float(whole_std)}
    own_mean, own_std = (x.double().cpu().flatten() for x in (autoencoder.latent_mean, autoencoder.latent_std))
    images, pictures = (torch.cat(side)[:SHOWN] for side in zip(*shown, strict=True))
    return Reconstructed(scores, mean * own_std + own_mean, std * own_std, images, pictures)


def _normal(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation from counts, sums and sums of squares [3, C]."""
    count, total, squares = moments
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt()


@torch.no_grad()
def set_statistics(autoencoder: Any, found: Reconstructed, kind: str) -> None:
    """Make the measured latents those of mean 0 and deviation 1: each "channel" by itself, or all by one "scalar"."""
    mean, std = found.latent_mean, found.latent_std
    if kind == "scalar":
        square = (std**2 + mean**2).mean()
        mean = mean.mean().expand_as(mean)
        std = (square - mean**2).sqrt()
    for buffer, value in ((autoencoder.latent_mean, mean), (autoencoder.latent_std, std.clamp(min=1e-4))):
        buffer.copy_(value.view_as(buffer))


def pictures(data: Path, size: int | None, count: int) -> Iterable[Tensor]:
    """`count` different pictures of a shard folder in a fixed random order, BATCH at a time. Raises ValueError."""
    dataset = ShardReader(data)
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count={count}: {data} has {len(dataset)} pictures")
    batch = min(BATCH, count)
    loader = Loader(dataset, DataConfig(path=str(data), size=size), batch_size=batch, seed=0)
    parts = islice(iter(loader), -(-count // batch))
    return (part.image[: count - batch * i] for i, part in enumerate(parts))


def table(scores: dict[str, Any]) -> str:
    """The scores as text, a line each."""
    return "\n".join(f"{k:<16}{v:.5g}" if isinstance(v, float) else f"{k:<16}{v}" for k, v in scores.items())

"""How many bits a model needs for pictures it has not seen."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import DataConfig, fixed_batch
from data_pipeline.reader import ShardReader
from ldm.diffusion.likelihood import bits_per_dim, log_likelihood
from ldm.diffusion.noise import DiscreteSchedule, ImageNoise
from ldm.diffusion.process import Estimate
from ldm.diffusion.variational import prior_bits, step_bits
from ldm.names import known
from ldm.pipeline import Pipeline

METHODS = ("vlb", "ode")
BATCH = 16


@dataclass(frozen=True)
class Counting:
    """How bits are counted: vlb, the variational bound of a chain, or ode, the probability-flow ODE."""

    method: str = "vlb"
    steps: int = 100  # vlb: evaluations an image; ode: steps of 4 evaluations and backward passes
    probes: int = 1  # ode: backward passes an evaluation
    seed: int = 0

    def __post_init__(self) -> None:
        known("method", self.method, METHODS)
        if self.steps < 2 or self.probes < 1:
            raise ValueError(f"steps must be at least 2 and probes at least 1, got {self.steps} and {self.probes}")


def evaluate_nll(pipeline: Pipeline, data: str, count: int, counting: Counting) -> dict[str, Any]:
    """Bits per dimension of the latents of `count` pictures, told their captions, without guidance.

    Latents are numbers, not bytes: what is counted is their density, in the units that the autoencoder scales them to,
    so that models on one autoencoder compare, and bits may be negative. It says nothing of what the autoencoder loses.
    Returns the mean, its standard error over the pictures, and for vlb the mean of the prior's and the last step's
    part. Raises ValueError for a vlb of a model that is not trained on a chain of levels.
    """
    schedule = pipeline.diffusion.schedule
    if counting.method == "vlb" and not isinstance(schedule, DiscreteSchedule):
        raise ValueError("the variational bound is that of a chain of levels; with this model use --method ode")
    samples = fixed_batch(ShardReader(Path(data)), DataConfig(data, pipeline.size), count)
    found: dict[str, list[Tensor]] = {}
    for part in samples.split(-(-count // BATCH)):
        seeds = [counting.seed + position for position in part.positions.tolist()]
        side = pipeline.size // pipeline.autoencoder.factor
        noise = ImageNoise(seeds, (pipeline.autoencoder.latent_channels, side, side))
        x0 = pipeline.encode(part.image, noise())
        estimate = pipeline.estimate(part.captions, x0.shape[1:])
        if counting.method == "vlb":
            assert isinstance(schedule, DiscreteSchedule)
            bits = bound(estimate, x0, schedule, noise, counting.steps)
        else:
            diffusion = pipeline.diffusion.for_size(*x0.shape[2:])
            levels = diffusion.trajectory(counting.steps, "exponential")
            at = diffusion.schedule.at_ratio
            nats = log_likelihood(estimate, x0, levels, at=at, probes=counting.probes, seeds=seeds).nats
            bits = {"bits_per_dim": bits_per_dim(nats, x0[0].numel())}
        for name, value in bits.items():
            found.setdefault(name, []).append(value.double().cpu())
    total = torch.cat(found["bits_per_dim"])
    result = {name: torch.cat(values).mean().item() for name, values in found.items()}
    result["standard_error"] = total.std().item() / math.sqrt(count) if count > 1 else math.nan
    return result | {"pictures": count, "dimensions": x0[0].numel(), "method": counting.method}


@torch.no_grad()
def bound(
    estimate: Estimate, x0: Tensor, schedule: DiscreteSchedule, noise: ImageNoise, evaluations: int
) -> dict[str, Tensor]:
    """The variational bound of each image [B], bits per dimension, and two of its parts.

    Without bias from `evaluations` levels: the last step to the data, and others spread evenly over the rest, whose
    mean stands for all of them. The spread's offset is drawn from the first number of each image's noise.
    """
    total = len(schedule.alpha_bar)
    result = {"prior": prior_bits(schedule, x0), "last_step": _term(estimate, x0, schedule, 0, noise)}
    others = min(evaluations - 1, total - 1)
    offset = torch.special.ndtr(noise().flatten(1)[:, 0].double())
    stride = (total - 1) / others
    rest = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for k in range(others):
        index = 1 + ((k + offset) * stride).long().clamp(max=total - 2)
        rest += _term(estimate, x0, schedule, index, noise)
    return {"bits_per_dim": result["prior"] + result["last_step"] + rest * (total - 1) / others, **result}


def _term(estimate: Estimate, x0: Tensor, schedule: DiscreteSchedule, index: Tensor | int, noise: ImageNoise) -> Tensor:
    """The cost [B] of the step from those levels, at noise of its own."""
    index = torch.as_tensor(index).expand(len(x0)).to(x0.device)
    level = schedule.at(index)
    wide = level.like(x0)
    x = wide.alpha * x0 + wide.sigma * noise().to(x0)
    told = getattr(estimate, "with_variance", None)
    guess, v = (estimate(x, level), None) if told is None else told(x, level)
    return step_bits(schedule, index, x0, guess, v)

"""Optimizers, and the learning rate as a pure function of the step. The only importer of bitsandbytes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ldm.names import known


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then a cosine or a constant rate."""

    kind: str = "adamw"  # adamw | adamw8bit (bitsandbytes)
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    warmup_steps: int = 0
    schedule: str = "cosine"  # cosine | constant, after the warm-up
    final: float = 0.0  # share of lr that the cosine ends at

    def __post_init__(self) -> None:
        known("optimizer", self.kind, ("adamw", "adamw8bit"))
        known("optimizer schedule", self.schedule, ("cosine", "constant"))


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (0-based) of `total`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over the module's trainable parameters; only matrices and kernels decay.

    Norms, biases and embeddings of one dimension do not (as in GPT-2 and open_clip).
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("optimizer 'adamw8bit' needs bitsandbytes: pip install 'ldm[gpu]'") from error
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr

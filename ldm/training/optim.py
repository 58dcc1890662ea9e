"""Which optimizer steps which parameters, and the rate as a pure function of the step. The importer of bitsandbytes."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ldm.names import known
from ldm.training.optimizers import Adafactor, Lion, Prodigy

KINDS = ("adamw", "adamw8bit", "lion", "adafactor", "prodigy", "sgd")
SCHEDULES = ("cosine", "constant", "linear", "wsd")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own rate or decay: all those in whose name, such as `denoiser.conv_in.weight`, `match` is.

    A parameter belongs to the first group that matches it.
    """

    match: str = "???"  # regular expression, found anywhere in the name
    lr_scale: float = 1.0  # times optimizer.lr, whatever the schedule
    weight_decay: float | None = None  # instead of optimizer.weight_decay; none = that one

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"optimizer.groups: {self.match!r} is no regular expression: {error}") from error
        if self.lr_scale < 0 or (self.weight_decay or 0) < 0:
            raise ValueError(f"optimizer.groups: lr_scale and weight_decay of {self.match!r} must not be negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, by default AdamW (Loshchilov & Hutter 2019), and its rate: linear warm-up, then a schedule."""

    kind: str = "adamw"  # adamw | adamw8bit (bitsandbytes) | lion | adafactor | prodigy | sgd
    lr: float = 1e-4  # lion wants 3 to 10 times less than adamw, adafactor about as much; prodigy: 1
    betas: tuple[float, float] = (0.9, 0.999)  # lion's authors: 0.9, 0.99; sgd: the first is its momentum
    eps: float = 1e-8  # of adamw and prodigy
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    warmup_steps: int = 0
    schedule: str = "cosine"  # cosine | constant | linear | wsd, after the warm-up
    final: float = 0.0  # share of lr that cosine, linear and wsd end at
    decay_share: float = 0.1  # wsd: share of all steps, the last ones, that it goes down in
    groups: list[ParameterGroup] = field(default_factory=list)

    def __post_init__(self) -> None:
        known("optimizer", self.kind, KINDS)
        known("optimizer schedule", self.schedule, SCHEDULES)
        if self.lr < 0 or self.weight_decay < 0 or self.clip < 0 or self.warmup_steps < 0 or self.eps < 0:
            raise ValueError("optimizer: lr, eps, weight_decay, clip and warmup_steps must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), not {list(self.betas)}")
        if not (0 <= self.final <= 1 and 0 < self.decay_share <= 1):
            raise ValueError(
                f"optimizer.final must be in [0, 1] and decay_share in (0, 1], not {self.final} and {self.decay_share}"
            )
        if self.kind == "prodigy" and 0 < self.lr < 0.1:
            raise ValueError(f"prodigy finds the rate itself and optimizer.lr multiplies it: give 1, not {self.lr}")


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (0-based) of `total`; neither ranks nor the batch size come into it.

    cosine (Loshchilov & Hutter 2017, eq. 5) and linear go from lr to final * lr between the warm-up and `total`; wsd
    (warm-up, stable, decay: Hu et al. 2024, sec. 4) stays at lr until the last decay_share of the steps, which go down
    linearly (Hägele et al. 2024, sec. 3).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, total - round(config.decay_share * total))
    progress = min(max(0, step - start) / max(1, total - start), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final + (1 - config.final) * left)


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Set the rate of every parameter group, times the scale of that group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(module: nn.Module, config: OptimizerConfig, part: str = "") -> Optimizer:
    """An optimizer over the trainable parameters of a module, which `config.groups` know as `part`.name.

    Only matrices and kernels decay: norms, biases and embeddings of one dimension do not (as in GPT-2 and open_clip).
    Raises ValueError for an optimizer that is not installed.
    """
    groups, betas = parameter_groups(module, config, part), config.betas
    optimizer: Optimizer
    if config.kind == "adamw8bit":
        return _adamw8bit(groups, config)
    if config.kind == "lion":
        optimizer = Lion(groups, lr=config.lr, betas=betas)
    elif config.kind == "adafactor":
        optimizer = Adafactor(groups, lr=config.lr)
    elif config.kind == "prodigy":
        optimizer = Prodigy(groups, lr=config.lr, betas=betas, eps=config.eps)
    elif config.kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=betas[0], fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    optimizer.register_load_state_dict_post_hook(_like_the_parameters)
    return optimizer


def parameter_groups(module: nn.Module, config: OptimizerConfig, part: str = "") -> list[dict[str, Any]]:
    """What torch's optimizers take: the parameters that no group matches, then each group's, decaying and not."""
    found: list[list[nn.Parameter]] = [[] for _ in range(2 * len(config.groups) + 2)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matching = (i for i, g in enumerate(config.groups, 1) if re.search(g.match, f"{part}.{name}"))
            found[2 * next(matching, 0) + (parameter.ndim < 2)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": found[0], "weight_decay": config.weight_decay},
        {"params": found[1], "weight_decay": 0.0},
    ]
    for group, matrices, others in zip(config.groups, found[2::2], found[3::2], strict=True):
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        for parameters, weight_decay in ((matrices, decay), (others, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": weight_decay, "lr_scale": group.lr_scale})
    return groups


def check_groups(modules: dict[str, nn.Module], config: OptimizerConfig) -> None:
    """Raise ValueError if a group matches no trainable parameter of the modules, which are given by part."""
    names = [f"{part}.{n}" for part, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]
    for group in config.groups:
        if not any(re.search(group.match, name) for name in names):
            raise ValueError(
                f"optimizer.groups: {group.match!r} matches none of the {len(names)} trained parameters "
                f"({names[0]}, ..., {names[-1]})"
            )


def import_bitsandbytes(what: str) -> Any:
    """The library. Raises ValueError, saying `what` needs it, where it is missing or does not work."""
    try:
        import bitsandbytes
    except Exception as error:  # it also fails where it is installed and does not find its native library
        raise ValueError(f"{what} needs bitsandbytes: pip install 'ldm[gpu]' ({error})") from error
    return bitsandbytes


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """AdamW with its moments in 8 bits, in blocks with a scale each (Dettmers et al. 2022)."""
    bitsandbytes = import_bitsandbytes("optimizer 'adamw8bit'")

    class Flat(bitsandbytes.optim.AdamW8bit):  # type: ignore[name-defined]
        """Its state is in one level, as torch's; bitsandbytes puts another below, to hide it from FSDP."""

        def state_dict(self) -> dict[str, Any]:
            return Optimizer.state_dict(self)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            _like_the_parameters(self)

    return Flat(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _like_the_parameters(optimizer: Optimizer) -> None:
    """Lay loaded state out in memory as its parameters are: fused kernels walk through both side by side."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same_kind = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same_kind and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

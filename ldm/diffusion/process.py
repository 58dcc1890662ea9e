"""A noise schedule and a prediction type in one object, so training and sampling cannot disagree."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.coupling import COUPLINGS, nearest, optimal_transport
from ldm.diffusion.noise import (
    BETAS,
    EDM_SPACINGS,
    FLOW_SPACINGS,
    SPACINGS,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    NoiseLevel,
    NoiseSchedule,
    discrete,
    zero_terminal_snr,
)
from ldm.diffusion.objective import WEIGHTINGS, cosmap, logit_normal, mode, squared_or_huber
from ldm.diffusion.prediction import PREDICTIONS, determinant, target, to_x0
from ldm.diffusion.variational import step_bits
from ldm.names import known
from ldm.types import Conditioning, Denoiser

MODE_SCALE_MAX = 2 / (math.pi - 2)
TIMESTEPS = ("uniform", "logit_normal", "mode", "cosmap", "loss_second_moment")
OBJECTIVES = ("simple", "hybrid", "vlb")
VARIANCES = ("fixed", "learned_range")
SHIFT_TOKENS = (256, 4096)
SHIFT_MU = (0.5, 1.15)
"""Between which numbers of 2 x 2 patches of latent the logarithm of the shift rises, and from what to what: as the
published flow models of Stability AI and Black Forest Labs were sampled."""


More = Callable[[str, tuple[int, ...]], Tensor]
"""(purpose, shape) -> standard normal [B, *shape], each sample's from its own seed."""

Instead = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B], the target of each [B, C, H, W]) -> what the network is to say instead, same shape."""


@dataclass(frozen=True)
class Aim:
    """What a loss asks of the network, where that is not the target in all pixels alike; with objective simple alone.

    mask [B, 1, H, W] in [0, 1]: how much each pixel counts in the mean over a sample.
    """

    mask: Tensor | None = None
    instead: Instead | None = None

    def __bool__(self) -> bool:
        return self.mask is not None or self.instead is not None


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything about the noise; `dataclasses.asdict` of it goes into the checkpoint."""

    schedule: str = "scaled_linear"  # scaled_linear | linear | cosine | sqrt | sigmoid | flow | edm
    prediction: str = "eps"  # eps | x0 | v | flow
    train_steps: int = 1000  # discrete schedules
    beta_start: float = 0.00085  # scaled_linear, linear, sqrt and sigmoid
    beta_end: float = 0.012
    zero_snr: bool = False  # rescale a discrete schedule so that its last level is pure noise; not with eps
    sigma_min: float = 0.002  # edm: the lowest and the highest sigma / alpha of sampling
    sigma_max: float = 80.0
    log_mean: float = -1.2  # edm: of ln(sigma / alpha) in training
    log_std: float = 1.2
    shift: float = 1.0  # flow: above 1 spends more time at high noise
    dynamic_shift: bool = False  # flow: shift by the size of the picture instead
    timesteps: str = (
        "uniform"  # how training draws its levels: uniform | logit_normal | mode | cosmap | loss_second_moment
    )
    logit_mean: float = 0.0  # logit_normal: above 0 draws more noise
    logit_std: float = 1.0
    mode_scale: float = 1.29  # mode
    objective: str = "simple"  # simple | hybrid (and vlb_weight times the variational bound) | vlb (the bound alone)
    variance: str = "fixed"  # fixed | learned_range: the network says it too, in as many channels again
    vlb_weight: float = 0.001
    weighting: str = "none"  # of the simple objective: none | min_snr | soft_min_snr | p2 | edm | debiased
    min_snr_gamma: float = 5.0  # min_snr and soft_min_snr
    p2_gamma: float = 1.0
    huber: float = 0.0  # errors above it count in proportion, not squared; 0 = all squared
    coupling: str = "independent"  # of pictures and noise: independent | optimal_transport | nearest
    candidates: int = 4  # nearest: draws to choose from
    noise_offset: float = 0.0  # noise that a whole channel shares, for very dark and very bright pictures
    input_perturbation: float = 0.0  # more noise in the input than the network is told of (Ning et al. 2023)
    spacing: str = "trailing"  # default for sampling: leading | trailing | linspace | karras | ...


@dataclass(frozen=True)
class Diffusion:
    """How much noise, what the network predicts, how training weighs it and where sampling steps."""

    schedule: NoiseSchedule
    config: DiffusionConfig

    @property
    def prediction(self) -> str:
        """eps | x0 | v | flow."""
        return self.config.prediction

    @property
    def spacing(self) -> str:
        """Where sampling steps unless told otherwise."""
        return self.config.spacing

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> "Diffusion":
        """Build from the settings. Raises ValueError for an unknown word or a pair that cannot work."""
        _check(config)
        if config.schedule == "flow":
            return cls(FlowSchedule(config.shift), config)
        if config.schedule == "edm":
            return cls(EDMSchedule(config.sigma_min, config.sigma_max, config.log_mean, config.log_std), config)
        schedule = discrete(config.schedule, config.train_steps, config.beta_start, config.beta_end)
        return cls(zero_terminal_snr(schedule) if config.zero_snr else schedule, config)

    def for_size(self, height: int, width: int) -> "Diffusion":
        """The same for latents of height x width: itself, unless it has a dynamic shift.

        shift = exp(mu), mu linear in the number of patches, as with more pixels of one picture the same noise hides
        less of it (Esser et al. 2024, eq. 23).
        """
        if not self.config.dynamic_shift:
            return self
        share = (height * width / 4 - SHIFT_TOKENS[0]) / (SHIFT_TOKENS[1] - SHIFT_TOKENS[0])
        return replace(self, schedule=FlowSchedule(math.exp(SHIFT_MU[0] + share * (SHIFT_MU[1] - SHIFT_MU[0]))))

    def add_noise(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """x_t = alpha * x0 + sigma * noise: [B, C, H, W], level scalar or [B]."""
        level = level.like(x0)
        return level.alpha * x0 + level.sigma * noise

    def levels(self, u: Tensor) -> NoiseLevel:
        """u [B], uniform in [0, 1) -> the levels [B] that training uses."""
        config = self.config
        if config.timesteps == "logit_normal":
            u = logit_normal(u, config.logit_mean, config.logit_std)
        elif config.timesteps == "mode":
            u = mode(u, config.mode_scale)
        elif config.timesteps == "cosmap":
            u = cosmap(u)
        return self.schedule.sample(u)

    def weight(self, level: NoiseLevel) -> Tensor:
        """The weight [B] of the squared error of the network's output.

        The weightings are of the error of x0. The same error of the output is det / sigma times as large: for eps,
        min_snr is then min(SNR, gamma) / SNR, and for v it is divided by SNR + 1.
        """
        config = self.config
        if config.weighting == "none":
            return torch.ones_like(level.alpha)
        gamma = config.p2_gamma if config.weighting == "p2" else config.min_snr_gamma
        weighted = WEIGHTINGS[config.weighting](level.alpha.square(), level.sigma.square(), gamma)
        # 0 / 0 where an x0 network meets a level without noise: it has nothing to learn there
        return weighted / determinant(self.prediction, level).square().clamp(min=1e-12)

    def loss(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        cond: Conditioning,
        *,
        noise: Tensor,
        u: Tensor,
        more: More | None = None,
        aim: Aim = Aim(),
    ) -> Tensor:
        """The loss of each sample, the mean over its values: x0, noise [B, C, H, W], u [B] -> [B].

        `noise` is standard normal, `u` uniform in [0, 1). The caller draws both, from each sample's own seed, and
        with `more(purpose, shape)` what coupling, noise_offset and input_perturbation need besides. Raises ValueError
        for an aim with another objective than simple.
        """
        config, level, channels = self.config, self.levels(u), x0.shape[1]
        if aim and config.objective != "simple":
            raise ValueError(f"a mask, or another aim, of the loss needs objective 'simple', not {config.objective!r}")
        noise = self._noise(x0, noise, more)
        x = self.add_noise(x0, noise, level)
        if config.input_perturbation:
            assert more is not None
            extra = more("input perturbation", tuple(x0.shape[1:])).to(x)
            x = x + level.like(x0).sigma * config.input_perturbation * extra
        t, wanted = _told(level, x0), target(self.prediction, x0, noise, level)
        if aim.instead is not None:
            wanted = aim.instead(x, t, wanted)
        output = denoiser(x, t, cond)
        predicted, v = output[:, :channels], output[:, channels:] if config.variance == "learned_range" else None
        error = predicted - wanted
        each = _mean(squared_or_huber(error, config.huber), aim.mask)
        simple = self.weight(level).to(each) * each
        if config.objective == "simple":
            return simple
        assert isinstance(self.schedule, DiscreteSchedule)
        if config.objective == "hybrid":  # the bound teaches the variance alone (Nichol & Dhariwal 2021, sec. 3.1)
            predicted = predicted.detach()
        bits = step_bits(self.schedule, level.t.long(), x0, to_x0(self.prediction, predicted, x, level), v)
        bound = len(self.schedule.alpha_bar) * bits  # of which this is one term of so many
        return bound if config.objective == "vlb" else simple + config.vlb_weight * bound

    def _noise(self, x0: Tensor, noise: Tensor, more: More | None) -> Tensor:
        """The noise that x0 is trained with: dealt by the coupling, and with its offset."""
        config = self.config
        if config.coupling == "optimal_transport":
            noise = optimal_transport(x0, noise)
        elif config.coupling == "nearest":
            assert more is not None
            first, shape = noise, tuple(x0.shape[1:])
            noise = nearest(x0, lambda k: more(f"noise {k}", shape).to(first) if k else first, config.candidates)
        if config.noise_offset:  # Guttenberg 2023
            assert more is not None
            noise = noise + config.noise_offset * more("noise offset", (x0.shape[1], 1, 1)).to(noise)
        return noise

    def denoise(self, denoiser: Denoiser, cond: Conditioning) -> "Estimate":
        """What a sampler calls: (x_t [B, C, H, W], scalar level) -> x0 [B, C, H, W]."""
        kind = VaryingEstimate if self.config.variance == "learned_range" else Estimate
        return kind(self.prediction, denoiser, cond)

    def x0_of(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that a network's output means at x: all [B, C, H, W], t [B]."""
        return to_x0(self.prediction, output[:, : x.shape[1]], x, self.schedule.at(t))

    def output_of(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What a network would have said to mean x0 at x; the inverse of `x0_of`."""
        level = self.schedule.at(t).like(x)
        return target(self.prediction, x0, (x - level.alpha * x0) / level.sigma, self.schedule.at(t))

    def trajectory(self, steps: int, spacing: str | None = None) -> NoiseLevel:
        """Levels [steps + 1] from noisy to clean, in this model's own spacing unless another is named."""
        return self.schedule.trajectory(steps, self.spacing if spacing is None else spacing)


@dataclass(frozen=True)
class Estimate:
    """A network as samplers see it: (x_t [B, C, H, W], level, scalar or [B]) -> the estimate of x0, same shape.

    In at least float32, whatever the type of x, in which the network runs.
    """

    prediction: str
    denoiser: Denoiser
    cond: Conditioning

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self._x0(self._output(x, level)[:, : x.shape[1]], x, level)

    def _output(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.denoiser(x, _told(level, x), self.cond)

    def _x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        return to_x0(self.prediction, output.to(work), x.to(work), level)


class VaryingEstimate(Estimate):
    """The same of a network that learned its variance as well, [B, 2 C, H, W]."""

    def with_variance(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The estimate of x0, and where the network puts its variance: -1 the smallest, 1 the largest."""
        prediction, v = self._output(x, level).chunk(2, dim=1)
        return self._x0(prediction, x, level), v


def _check(config: DiffusionConfig) -> None:
    """Raise ValueError for an unknown word, a number outside its range or a pair that cannot work."""
    known("schedule", config.schedule, (*BETAS, "flow", "edm"))
    known("prediction", config.prediction, PREDICTIONS)
    known("timesteps", config.timesteps, TIMESTEPS)
    known("objective", config.objective, OBJECTIVES)
    known("variance", config.variance, VARIANCES)
    known("weighting", config.weighting, ("none", *WEIGHTINGS))
    known("coupling", config.coupling, COUPLINGS)
    known("spacing", config.spacing, {"flow": FLOW_SPACINGS, "edm": EDM_SPACINGS}.get(config.schedule, SPACINGS))
    flow, chain = config.schedule == "flow", config.schedule in BETAS
    if (flow or config.zero_snr) and config.prediction == "eps":
        # at the noisy end there is no signal, and x0 = (x - sigma * eps) / alpha has no answer
        start = "'flow'" if flow else "zero_snr"
        raise ValueError(f"prediction 'eps' cannot start from the pure noise of {start}; use flow, v or x0")
    for name, needed in (("zero_snr", chain), ("dynamic_shift", flow)):
        if getattr(config, name) and not needed:
            raise ValueError(f"{name} cannot be used with schedule {config.schedule!r}")
    if not chain and config.objective != "simple":
        raise ValueError(f"objective {config.objective!r} needs a chain ({', '.join(BETAS)}), not {config.schedule!r}")
    if (config.objective, config.variance) in (("simple", "learned_range"), ("hybrid", "fixed")):
        raise ValueError(f"objective {config.objective!r} does not go with variance {config.variance!r}")
    for name in ("shift", "min_snr_gamma", "p2_gamma", "logit_std", "log_std", "sigma_min", "candidates"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
    for name in ("huber", "noise_offset", "input_perturbation", "vlb_weight"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be below 0, got {getattr(config, name)}")
    if not config.sigma_min < config.sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {config.sigma_min} and {config.sigma_max}")
    if not -1 <= config.mode_scale <= MODE_SCALE_MAX:
        raise ValueError(f"mode_scale must be in -1..{MODE_SCALE_MAX:.2f}, got {config.mode_scale}")


def _mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """errors [B, C, H, W] -> each sample's mean [B], weighted by mask [B, 1, H, W]; 0 where that is 0 all over."""
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.to(errors).expand_as(errors).flatten(1)
    return (weights * errors.flatten(1)).sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)


def _told(level: NoiseLevel, x: Tensor) -> Tensor:
    # at least float32: bfloat16 cannot tell t = 999 from t = 1000
    dtype = torch.promote_types(x.dtype, torch.float32)
    return level.t.to(x.device, dtype).expand(len(x))

"""A noise schedule and a prediction type in one object, so training and sampling cannot disagree."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.noise import (
    BETAS,
    FLOW_SPACINGS,
    SPACINGS,
    FlowSchedule,
    NoiseLevel,
    NoiseSchedule,
    discrete,
    zero_terminal_snr,
)
from ldm.diffusion.objective import WEIGHTINGS, cosmap, logit_normal, mode, squared_or_huber
from ldm.diffusion.prediction import PREDICTIONS, determinant, target, to_x0
from ldm.names import known
from ldm.types import Conditioning, Denoise, Denoiser

MODE_SCALE_MAX = 2 / (math.pi - 2)
TIMESTEPS = ("uniform", "logit_normal", "mode", "cosmap")


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything about the noise; `dataclasses.asdict` of it goes into the checkpoint."""

    schedule: str = "scaled_linear"  # scaled_linear | linear | cosine | sqrt | sigmoid | flow
    prediction: str = "eps"  # eps | x0 | v | flow
    train_steps: int = 1000  # discrete schedules
    beta_start: float = 0.00085  # scaled_linear and linear
    beta_end: float = 0.012
    zero_snr: bool = False  # rescale a discrete schedule so that its last level is pure noise; not with eps
    timesteps: str = "uniform"  # how training draws its levels: uniform | logit_normal | mode | cosmap
    logit_mean: float = 0.0  # logit_normal: above 0 draws more noise
    logit_std: float = 1.0
    mode_scale: float = 1.29  # mode
    shift: float = 1.0  # flow: above 1 spends more time at high noise
    weighting: str = "none"  # none | min_snr | soft_min_snr | p2 | edm | debiased
    min_snr_gamma: float = 5.0  # min_snr and soft_min_snr
    p2_gamma: float = 1.0
    huber: float = 0.0  # errors above it count in proportion, not squared; 0 = all squared
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
        known("schedule", config.schedule, (*BETAS, "flow"))
        known("prediction", config.prediction, PREDICTIONS)
        known("timesteps", config.timesteps, TIMESTEPS)
        known("weighting", config.weighting, ("none", *WEIGHTINGS))
        flow = config.schedule == "flow"
        known("spacing", config.spacing, FLOW_SPACINGS if flow else SPACINGS)
        if (flow or config.zero_snr) and config.prediction == "eps":
            # at the noisy end there is no signal, and x0 = (x - sigma * eps) / alpha has no answer
            start = "'flow'" if flow else "zero_snr"
            raise ValueError(f"prediction 'eps' cannot start from the pure noise of {start}; use flow, v or x0")
        for name in ("shift", "min_snr_gamma", "p2_gamma", "logit_std"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
        for name in ("huber", "noise_offset", "input_perturbation"):
            if getattr(config, name) < 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(config, name)}")
        if not -1 <= config.mode_scale <= MODE_SCALE_MAX:
            raise ValueError(f"mode_scale must be in -1..{MODE_SCALE_MAX:.2f}, got {config.mode_scale}")
        if flow:
            return cls(FlowSchedule(config.shift), config)
        schedule = discrete(config.schedule, config.train_steps, config.beta_start, config.beta_end)
        return cls(zero_terminal_snr(schedule) if config.zero_snr else schedule, config)

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
        more: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    ) -> Tensor:
        """The weighted mean error of each sample: x0, noise [B, C, H, W], u [B] -> [B].

        `noise` is standard normal, `u` uniform in [0, 1). The caller draws both, from each sample's own seed, and
        with `more(purpose, shape)` what noise_offset and input_perturbation need besides.
        """
        config, level = self.config, self.levels(u)
        if config.noise_offset:  # Guttenberg 2023
            assert more is not None
            noise = noise + config.noise_offset * more("noise offset", (x0.shape[1], 1, 1)).to(noise)
        x = self.add_noise(x0, noise, level)
        if config.input_perturbation:
            assert more is not None
            extra = more("input perturbation", tuple(x0.shape[1:])).to(x)
            x = x + level.like(x0).sigma * config.input_perturbation * extra
        error = denoiser(x, _told(level, x0), cond) - target(self.prediction, x0, noise, level)
        each = squared_or_huber(error, config.huber).flatten(1).mean(1)
        return self.weight(level).to(each) * each

    def denoise(self, denoiser: Denoiser, cond: Conditioning) -> Denoise:
        """What a sampler calls: (x_t [B, C, H, W], scalar level) -> x0 [B, C, H, W].

        Of a network that learned its variance as well, [B, 2 C, H, W], the prediction is the first half.
        """

        def x0_at(x: Tensor, level: NoiseLevel) -> Tensor:
            output = denoiser(x, _told(level, x), cond)[:, : x.shape[1]]
            return to_x0(self.prediction, output, x, level)

        return x0_at

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


def _told(level: NoiseLevel, x: Tensor) -> Tensor:
    # at least float32: bfloat16 cannot tell t = 999 from t = 1000
    dtype = torch.promote_types(x.dtype, torch.float32)
    return level.t.to(x.device, dtype).expand(len(x))

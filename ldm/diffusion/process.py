"""A noise schedule and a prediction type in one object, so training and sampling cannot disagree."""

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
from ldm.diffusion.prediction import PREDICTIONS, determinant, target, to_x0
from ldm.names import known
from ldm.types import Conditioning, Denoise, Denoiser

TIMESTEPS = ("uniform", "logit_normal")
WEIGHTINGS = ("none", "min_snr")


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything about the noise; `dataclasses.asdict` of it goes into the checkpoint."""

    schedule: str = "scaled_linear"  # scaled_linear | linear | cosine | sqrt | sigmoid | flow
    prediction: str = "eps"  # eps | x0 | v | flow
    train_steps: int = 1000  # discrete schedules
    beta_start: float = 0.00085  # scaled_linear and linear
    beta_end: float = 0.012
    zero_snr: bool = False  # rescale a discrete schedule so that its last level is pure noise; not with eps
    timesteps: str = "uniform"  # how training draws its levels: uniform | logit_normal
    shift: float = 1.0  # flow: above 1 spends more time at high noise
    weighting: str = "none"  # none | min_snr
    min_snr_gamma: float = 5.0
    spacing: str = "trailing"  # default for sampling: leading | trailing | linspace | karras | ...


@dataclass(frozen=True)
class Diffusion:
    """How much noise, what the network predicts, how training weighs it and where sampling steps."""

    schedule: NoiseSchedule
    prediction: str = "eps"
    timesteps: str = "uniform"
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    spacing: str = "trailing"

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> "Diffusion":
        """Build from the settings. Raises ValueError for an unknown word or a pair that cannot work."""
        known("schedule", config.schedule, (*BETAS, "flow"))
        known("prediction", config.prediction, PREDICTIONS)
        known("timesteps", config.timesteps, TIMESTEPS)
        known("weighting", config.weighting, WEIGHTINGS)
        flow = config.schedule == "flow"
        known("spacing", config.spacing, FLOW_SPACINGS if flow else SPACINGS)
        if (flow or config.zero_snr) and config.prediction == "eps":
            # at the noisy end there is no signal, and x0 = (x - sigma * eps) / alpha has no answer
            start = "'flow'" if flow else "zero_snr"
            raise ValueError(f"prediction 'eps' cannot start from the pure noise of {start}; use flow, v or x0")
        if config.shift <= 0 or config.min_snr_gamma <= 0:
            raise ValueError(f"shift and min_snr_gamma must be above 0, got {config.shift} and {config.min_snr_gamma}")
        schedule: NoiseSchedule = FlowSchedule(config.shift)
        if not flow:
            schedule = discrete(config.schedule, config.train_steps, config.beta_start, config.beta_end)
            schedule = zero_terminal_snr(schedule) if config.zero_snr else schedule
        return cls(
            schedule,
            config.prediction,
            config.timesteps,
            config.weighting,
            config.min_snr_gamma,
            config.spacing,
        )

    def add_noise(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """x_t = alpha * x0 + sigma * noise: [B, C, H, W], level scalar or [B]."""
        level = level.like(x0)
        return level.alpha * x0 + level.sigma * noise

    def levels(self, u: Tensor) -> NoiseLevel:
        """u [B], uniform in [0, 1) -> the levels [B] that training uses."""
        if self.timesteps == "logit_normal":  # Esser et al. 2024, eq. 19, m = 0, s = 1: its inverse CDF
            u = torch.special.ndtri(u.double()).sigmoid()
        return self.schedule.sample(u)

    def weight(self, level: NoiseLevel) -> Tensor:
        """The weight [B] of the squared error of the network's output.

        min_snr: min(SNR, gamma) on the error of x0 (Hang et al. 2023). The same error of the output is
        det / sigma times as large: for eps this is min(SNR, gamma) / SNR, for v it is divided by SNR + 1.
        """
        if self.weighting == "none":
            return torch.ones_like(level.alpha)
        signal, noise = level.alpha.square(), level.sigma.square()
        det = determinant(self.prediction, level)
        # 0 / 0 where an x0 network meets a level without noise: it has nothing to learn there
        return torch.minimum(signal, self.min_snr_gamma * noise) / det.square().clamp(min=1e-12)

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, *, noise: Tensor, u: Tensor) -> Tensor:
        """The weighted mean squared error of each sample: x0, noise [B, C, H, W], u [B] -> [B].

        `noise` is standard normal, `u` uniform in [0, 1). The caller draws both, from each sample's own seed.
        """
        level = self.levels(u)
        output = denoiser(self.add_noise(x0, noise, level), _told(level, x0), cond)
        error = (output - target(self.prediction, x0, noise, level)).square().flatten(1).mean(1)
        return self.weight(level).to(error) * error

    def denoise(self, denoiser: Denoiser, cond: Conditioning) -> Denoise:
        """What a sampler calls: (x_t [B, C, H, W], scalar level) -> x0 [B, C, H, W].

        Of a network that learned its variance as well, [B, 2 C, H, W], the prediction is the first half.
        """

        def x0_at(x: Tensor, level: NoiseLevel) -> Tensor:
            output = denoiser(x, _told(level, x), cond)[:, : x.shape[1]]
            return to_x0(self.prediction, output, x, level)

        return x0_at

    def trajectory(self, steps: int, spacing: str | None = None) -> NoiseLevel:
        """Levels [steps + 1] from noisy to clean, in this model's own spacing unless another is named."""
        return self.schedule.trajectory(steps, self.spacing if spacing is None else spacing)


def _told(level: NoiseLevel, x: Tensor) -> Tensor:
    # at least float32: bfloat16 cannot tell t = 999 from t = 1000
    dtype = torch.promote_types(x.dtype, torch.float32)
    return level.t.to(x.device, dtype).expand(len(x))

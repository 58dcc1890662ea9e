"""How much signal and how much noise: levels, the schedules that yield them, and each image's own noise.

Every formula is in (alpha, sigma) coordinates, x_t = alpha * x0 + sigma * eps, which stay finite at both ends
of a trajectory. Tables and trajectories are float64 on the CPU: a scalar level there multiplies a tensor of
any float type on any device without changing its type and without a device synchronisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.spacings import RATIO_SPACINGS, Spacing, beta_times, interpolate
from ldm.names import known

BETAS = ("scaled_linear", "linear", "cosine", "sqrt", "sigmoid")
STRIDES = ("leading", "trailing", "linspace")
SPACINGS = (*STRIDES, "compvis", "sgm_uniform", "beta", *RATIO_SPACINGS)
FITTED = ("leading", "compvis", "ays", "ays_sdxl", "ays_video")  # to chains of levels; a flow has none
FLOW_SPACINGS = tuple(spacing for spacing in SPACINGS if spacing not in FITTED)
EDM_SPACINGS = tuple(spacing for spacing in RATIO_SPACINGS if spacing not in FITTED)
FLOW_TIME_SCALE = 1000.0  # a flow network is told 1000 * time: one timestep embedding serves every schedule


@dataclass(frozen=True)
class NoiseLevel:
    """x_t = alpha * x0 + sigma * eps, and the `t` the network is told.

    All three have one shape: scalars for one level, [B] in training, [N+1] along a trajectory.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __getitem__(self, index: int) -> "NoiseLevel":
        """The level at one place of a trajectory."""
        return NoiseLevel(self.t[index], self.alpha[index], self.sigma[index])

    def steps_of(self, t: Tensor) -> Tensor:
        """Of a trajectory: t [B], as the network is told it -> the step of each, from 0, int64 [B] on the CPU.

        Between two levels it is that of the upper one.
        """
        upper = self.t[:-1].double().cpu() + 1e-4  # what a network is told is rounded to float32
        return ((upper >= t.double().cpu()[:, None]).sum(1) - 1).clamp(min=0)

    def like(self, x: Tensor) -> "NoiseLevel":
        """Levels [B] shaped to multiply x [B, ...], in its type, on its device; a scalar level as it is."""
        if self.alpha.ndim == 0:
            return self
        shape = (-1,) + (1,) * (x.ndim - 1)
        return NoiseLevel(self.t, self.alpha.to(x).view(shape), self.sigma.to(x).view(shape))


class NoiseSchedule(Protocol):
    """Noise levels for training and for sampling."""

    def at(self, t: Tensor | float) -> NoiseLevel:
        """The level of the `t` that the network is told."""
        ...

    def sample(self, u: Tensor) -> NoiseLevel:
        """u [B] in [0, 1) -> levels [B], uniform in time when `u` is uniform."""
        ...

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The levels with those ratios sigma / alpha, any shape, float64."""
        ...

    def trajectory(self, steps: int, spacing: str) -> NoiseLevel:
        """Levels [steps + 1] from noisy to clean."""
        ...


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """A variance-preserving chain of T levels, alpha^2 + sigma^2 = 1 (Ho et al. 2020, eq. 4); t is 0..T-1.

    alpha_bar [T], float64: the share of the signal's variance that is left, falling in [0, 1).
    """

    alpha_bar: Tensor

    def at(self, t: Tensor | float) -> NoiseLevel:
        """The level of `t` in 0..T-1, alpha_bar interpolated between whole t. ValueError outside."""
        t = torch.as_tensor(t, dtype=torch.float64)
        last = len(self.alpha_bar) - 1
        if t.numel() and not (t.min() >= 0 and t.max() <= last):
            raise ValueError(f"t must be in 0..{last}, got {t.min():g}..{t.max():g}")
        low = t.long()
        table = self.alpha_bar.to(t.device)
        return _preserving(t, torch.lerp(table[low], table[(low + 1).clamp(max=last)], t - low))

    def sample(self, u: Tensor) -> NoiseLevel:
        """u [B] in [0, 1) -> the levels [B] of t = floor(u * T)."""
        steps = len(self.alpha_bar)
        index = (u.double() * steps).long().clamp(max=steps - 1)
        return _preserving(index.double(), self.alpha_bar.to(u.device, non_blocking=True)[index])

    def trajectory(self, steps: int, spacing: str) -> NoiseLevel:
        """Levels [steps + 1], noisy to clean, for every number of steps in 1..T. Raises ValueError outside.

        trailing: T-1 and down in equal strides, then exactly clean (alpha 1, sigma 0; Lin et al. 2024, §3.3).
        linspace: T-1 ... 0 with both ends, then exactly clean.
        leading: floor(i * T / steps) + 1, ending at alpha_bar[0]: the timesteps of Stable Diffusion (CompVis,
            and diffusers with offset 1 and set_alpha_to_one False) where `steps` divides T; elsewhere theirs
            miss the number of steps. With steps = T there is no room for the + 1: T-1 ... 0, then clean.
        compvis: 1 + k * floor(T / steps), as CompVis' code has it: as many steps as fit below T, and its ValueError
            where the last would be T itself.
        sgm_uniform: T-1 and down in equal strides of (T - 1) / steps, not rounded, then clean.
        beta, karras, exponential, ...: see `spacings`; between whole t, then clean.
        The clean level says t = 0 and no sampler asks the network there.
        """
        known("spacing", spacing, SPACINGS)
        total = len(self.alpha_bar)
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be in 1..{total} for this noise schedule, got {steps}")
        end = torch.ones(1, dtype=torch.float64)
        if spacing in RATIO_SPACINGS:
            return self._by_ratio(RATIO_SPACINGS[spacing], steps, spacing)
        if spacing in ("sgm_uniform", "beta"):
            share = (
                beta_times(steps) if spacing == "beta" else torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
            )
            return _joined(self.at((total - 1) * share), _clean())
        if spacing == "compvis":
            t = torch.arange(0, total, total // steps, dtype=torch.float64).flip(0) + 1
            if t[0] >= total:
                raise ValueError(f"spacing 'compvis' has no {steps} steps: its first would be t = {total}")
            return _joined(_preserving(t, self.alpha_bar[t.long()]), _preserving(t.new_zeros(1), self.alpha_bar[:1]))
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "linspace":
            t = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round()
        elif spacing == "trailing" or steps == total:
            t = (total - i * total / steps).round() - 1
        else:
            t, end = (i * total / steps).floor().flip(0) + 1, self.alpha_bar[:1]
        alpha_bar = torch.cat([self.alpha_bar[t.long()], end])
        return _preserving(torch.cat([t, torch.zeros(1, dtype=torch.float64)]), alpha_bar)

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The levels with those ratios sigma / alpha; their t is between the nearest whole ones, or at an end."""
        ratio = ratio.double()
        table = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()  # rising with t, infinite where there is no signal
        whole = torch.arange(len(table), dtype=torch.float64)[table.isfinite()]
        t = interpolate(ratio.log(), table[table.isfinite()].log(), whole)
        return _preserving(t, 1 / (1 + ratio.square()))

    def _by_ratio(self, spacing: Spacing, steps: int, name: str) -> NoiseLevel:
        if len(self.alpha_bar) < 2:
            raise ValueError(f"spacing {name!r} needs a schedule of at least 2 levels")
        if self.alpha_bar[-1] <= 0:
            raise ValueError(f"spacing {name!r} needs signal at the noisiest level; with zero_snr use trailing")
        ratio = ((1 - self.alpha_bar[[0, -1]]) / self.alpha_bar[[0, -1]]).sqrt()
        chosen = spacing(steps, float(ratio[0]), float(ratio[1]))
        if chosen[0] > 1.01 * ratio[1]:
            raise ValueError(
                f"spacing {name!r} starts at sigma / alpha {chosen[0]:g}; this schedule ends at {ratio[1]:g}"
            )
        return _joined(self.at_ratio(chosen), _clean())


@dataclass(frozen=True)
class FlowSchedule:
    """Straight lines from data to noise, alpha = 1 - time, sigma = time (Liu et al. 2023, eq. 1).

    The network is told t = 1000 * time. `shift` > 1 spends more of the time at high noise, as larger images
    need, in training and sampling alike: time -> shift * time / (1 + (shift - 1) * time) (Esser et al. 2024,
    eq. 23).
    """

    shift: float = 1.0

    def at(self, t: Tensor | float) -> NoiseLevel:
        """The level of `t` in 0..1000; `shift` is already in it. Raises ValueError outside."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if t.numel() and not (t.min() >= 0 and t.max() <= FLOW_TIME_SCALE):
            raise ValueError(f"t must be in 0..{FLOW_TIME_SCALE:g}, got {t.min():g}..{t.max():g}")
        time = t / FLOW_TIME_SCALE
        return NoiseLevel(t, 1 - time, time)

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The levels with those ratios sigma / alpha."""
        time = ratio.double() / (1 + ratio.double())
        return NoiseLevel(FLOW_TIME_SCALE * time, 1 - time, time)

    def sample(self, u: Tensor) -> NoiseLevel:
        """u [B] in [0, 1) -> the levels [B] of time = shifted(u)."""
        return self._shifted(u.double())

    def trajectory(self, steps: int, spacing: str) -> NoiseLevel:
        """Levels [steps + 1] from pure noise to exactly clean, for every steps >= 1, else ValueError.

        trailing: equal strides 1 ... 0.  linspace: 1 ... 0.001 with both ends, then 0.
        sgm_uniform: 1 ... 0.001 in equal strides without the lower end, then 0.
        beta: see `spacings`. karras, exponential, ...: as there, with the time between 1 and 0.001 for the ratio.
        leading, compvis and the ays tables are refused: they belong to chains whose first level still holds signal.
        """
        known("spacing of a flow", spacing, FLOW_SPACINGS)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        zero = torch.zeros(1, dtype=torch.float64)
        if spacing in RATIO_SPACINGS:
            time = RATIO_SPACINGS[spacing](steps, 1 / FLOW_TIME_SCALE, 1.0)
            return self._shifted(torch.cat([torch.ones_like(zero), time[1:], zero]))  # a 1 that is not rounded
        if spacing == "beta":
            return self._shifted(torch.cat([beta_times(steps), zero]))
        if spacing == "sgm_uniform":
            time = torch.linspace(1, 1 / FLOW_TIME_SCALE, steps + 1, dtype=torch.float64)[:-1]
            return self._shifted(torch.cat([time, zero]))
        if spacing == "trailing":
            return self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        time = torch.linspace(1, 1 / FLOW_TIME_SCALE, steps, dtype=torch.float64)
        return self._shifted(torch.cat([time, torch.zeros(1, dtype=torch.float64)]))

    def _shifted(self, time: Tensor) -> NoiseLevel:
        more = self.shift * time
        time = more / (more + (1 - time))  # exact at both ends
        return NoiseLevel(FLOW_TIME_SCALE * time, 1 - time, time)


@dataclass(frozen=True)
class EDMSchedule:
    """Ratios sigma / alpha that are log-normal in training (Karras et al. 2022, table 1), alpha^2 + sigma^2 = 1.

    For data of unit variance, which latents are, the preconditioning of that paper is prediction v with the sign
    turned: c_in scales x to these coordinates, c_skip is alpha^2 and c_out sigma, and its loss is that of v without a
    weighting. The network is told t = ln(ratio) / 4, their c_noise.
    """

    sigma_min: float = 0.002  # lowest and highest ratio of a trajectory
    sigma_max: float = 80.0
    log_mean: float = -1.2  # of ln(ratio) in training
    log_std: float = 1.2

    def at(self, t: Tensor | float) -> NoiseLevel:
        """The level of any finite `t`. Raises ValueError for one that is not."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if not t.isfinite().all():
            raise ValueError(f"t must be finite, got {t.min():g}..{t.max():g}")
        return self.at_ratio((4 * t).exp())

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The levels with those ratios sigma / alpha, above 0."""
        ratio = ratio.double()
        alpha = (1 + ratio.square()).rsqrt()
        return NoiseLevel(ratio.log() / 4, alpha, ratio * alpha)

    def sample(self, u: Tensor) -> NoiseLevel:
        """u [B] in [0, 1) -> the levels [B] at that quantile of the log-normal distribution."""
        quantile = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))  # 5.2 standard deviations either way
        return self.at_ratio((self.log_mean + self.log_std * quantile).exp())

    def trajectory(self, steps: int, spacing: str) -> NoiseLevel:
        """Levels [steps + 1] from sigma_max to sigma_min, spaced by ratio, then exactly clean. ValueError else."""
        known("spacing of edm", spacing, EDM_SPACINGS)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return _joined(self.at_ratio(RATIO_SPACINGS[spacing](steps, self.sigma_min, self.sigma_max)), _clean())


class ImageNoise:
    """Noise in which image i depends on seeds[i] alone, so it is the same alone and in any batch.

    Each call returns a fresh [len(seeds), *shape] float32 tensor on the CPU; the first is the starting noise.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


def discrete(kind: str, steps: int, beta_start: float, beta_end: float) -> DiscreteSchedule:
    """A discrete schedule from its betas, in float64. Raises ValueError for an unknown kind or bad betas.

    scaled_linear: square roots of the betas in equal strides (Rombach et al. 2022, called "linear" there).
    linear: the betas themselves in equal strides (Ho et al. 2020).
    sqrt: square roots of values in equal strides.
    sigmoid: a logistic curve over -6..6 between start and end.
    cosine: alpha_bar = cos^2, betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17); ignores start and end.
    """
    known("noise schedule", kind, BETAS)
    if steps < 1:
        raise ValueError(f"train_steps must be at least 1, got {steps}")
    if kind == "cosine":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        signal = torch.cos((time + 0.008) / 1.008 * torch.pi / 2).square()
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    else:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < start <= end < 1, got {beta_start} and {beta_end}")
        if kind == "sigmoid":
            curve = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
            betas = beta_start + curve * (beta_end - beta_start)
        else:
            root, power = {"scaled_linear": (2.0, 2.0), "linear": (1.0, 1.0), "sqrt": (1.0, 0.5)}[kind]
            ends = beta_start ** (1 / root), beta_end ** (1 / root)
            betas = torch.linspace(*ends, steps, dtype=torch.float64) ** power
    return DiscreteSchedule(torch.cumprod(1 - betas, dim=0))


def zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """The schedule with its last level moved to pure noise, its first kept (Lin et al. 2024, algorithm 1)."""
    if len(schedule.alpha_bar) < 2:
        raise ValueError("zero_snr needs a schedule of at least 2 levels")
    signal = schedule.alpha_bar.sqrt()
    first, last = signal[0], signal[-1]
    return DiscreteSchedule(((signal - last) * first / (first - last)).square())


def _clean() -> NoiseLevel:
    return _preserving(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def _joined(levels: NoiseLevel, end: NoiseLevel) -> NoiseLevel:
    parts = ((levels.t, end.t), (levels.alpha, end.alpha), (levels.sigma, end.sigma))
    return NoiseLevel(*(torch.cat(pair) for pair in parts))


def _preserving(t: Tensor, alpha_bar: Tensor) -> NoiseLevel:
    return NoiseLevel(t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

"""What samplers cost without a network, and how near they come with few evaluations of one that is exact.

    python -m benchmarks.samplers --out samplers.json --picture samplers.png

Run it from the repository's root. The data is a mixture of Gaussians, whose denoiser and samples are known exactly.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.instruments import machine
from ldm.diffusion.brownian import BrownianNoise
from ldm.diffusion.noise import NoiseLevel, discrete
from ldm.diffusion.samplers import SAMPLERS, traits

BUDGETS = (4, 8, 20, 50)
"""Evaluations of the network."""
SPACINGS = ("trailing", "karras", "exponential")
SAMPLES, SEEDS = 64, 64
"""Points of each image, and images: one random path each."""
PEERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class Mixture:
    """Equal Gaussians of spread `spread` on the plane at `means` [K, 2]: a ring of 8 and a centre."""

    means: Tensor
    spread: float = 0.08

    @staticmethod
    def ring() -> "Mixture":
        """Eight on a circle and one in the middle, of unit variance together."""
        angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
        means = torch.cat([torch.stack([angles.cos(), angles.sin()], 1) * 1.5, torch.zeros(1, 2, dtype=torch.float64)])
        return Mixture(means)

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t]: x [B, 2, 1, N]."""
        points = x.squeeze(2).transpose(1, 2).double()  # [B, N, 2]
        alpha, sigma = level.alpha.double(), level.sigma.double()
        variance = alpha**2 * self.spread**2 + sigma**2
        away = points[:, :, None] - alpha * self.means  # [B, N, K, 2]
        share = (-away.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        each = self.means + alpha * self.spread**2 / variance * away
        return (share * each).sum(2).transpose(1, 2).unsqueeze(2).to(x.dtype)

    def sample(self, count: int) -> Tensor:
        """[count, 2]."""
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        return self.means[chosen] + self.spread * torch.randn(count, 2, dtype=torch.float64, generator=generator)


def distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-2 distance of two sets of points [N, 2], over 64 directions (Bonneel et al. 2015)."""
    angles = torch.arange(64, dtype=torch.float64) * torch.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])  # [2, 64]
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def run(name: str, steps: int, spacing: str) -> Tensor:
    """Points [N, 2] that the sampler makes of its own noise in `steps` steps."""
    schedule, mixture = discrete("scaled_linear", 1000, 0.00085, 0.012), Mixture.ring()
    noise = BrownianNoise(range(SEEDS), (2, 1, SAMPLES))
    levels = schedule.trajectory(steps, spacing)
    x = levels.sigma[0] * noise().double()
    *_, last = SAMPLERS[name](mixture.denoise, x, levels, noise=noise, at=schedule.at_ratio)
    return last.x.squeeze(2).transpose(1, 2).reshape(-1, 2).double()


def errors() -> dict[str, dict[int, dict[str, float]]]:
    """sampler -> evaluations -> spacing -> distance to the data; NaN where the budget allows no step."""
    data = Mixture.ring().sample(SEEDS * SAMPLES)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in SAMPLERS:
        if not traits(name).evaluations:
            continue  # the adaptive one has no budget
        found[name] = {}
        for budget in BUDGETS:
            steps = budget // traits(name).evaluations
            found[name][budget] = {s: distance(run(name, steps, s), data) for s in SPACINGS}
    return found


def floor() -> float:
    """The distance of two sets of true samples: no sampler gets below it but by chance."""
    both = Mixture.ring().sample(2 * SEEDS * SAMPLES)
    return distance(both[::2], both[1::2])


def overhead(repeats: int = 30, steps: int = 20) -> dict[str, dict[str, float]]:
    """Seconds of a step on [1, 4, 64, 64] with a network that costs nothing, ours and diffusers', interleaved."""
    from ldm.models.text import import_open_clip

    import_open_clip()
    import diffusers

    schedule = discrete("scaled_linear", 1000, 0.00085, 0.012)
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))

    def ours(name: str) -> Callable[[], None]:
        levels = schedule.trajectory(steps, "leading")

        def once() -> None:
            for _ in SAMPLERS[name](lambda x, level: x, x, levels):
                pass

        return once

    def theirs(kind: str) -> Callable[[], None]:
        words = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        scheduler: Any = getattr(diffusers, kind)(**words)

        def once() -> None:
            scheduler.set_timesteps(steps)
            latent = x
            for t in scheduler.timesteps:
                latent = scheduler.step(x, t, scheduler.scale_model_input(latent, t)).prev_sample

        return once

    result = {}
    for name, kind in PEERS.items():
        subjects = {"ours": ours(name), "diffusers": theirs(kind)}
        times: dict[str, list[float]] = {who: [] for who in subjects}
        for _ in range(repeats):
            for who, once in subjects.items():
                start = time.perf_counter()
                once()
                times[who].append((time.perf_counter() - start) / steps)
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["diffusers"], strict=True))
        result[name] = {who: statistics.median(t) for who, t in times.items()} | {"ratio": ratio}
    return result


def report(found: dict[str, dict[int, dict[str, float]]], cost: dict[str, dict[str, float]]) -> str:
    """Both as Markdown tables; the best spacing of each cell is named."""
    lines = ["| sampler | " + " | ".join(f"{b} evaluations" for b in BUDGETS) + " |", "|---|" + "---|" * len(BUDGETS)]
    for name, rows in found.items():
        cells = []
        for budget in BUDGETS:
            spacing, value = min(rows[budget].items(), key=lambda item: item[1])
            cells.append(f"{value:.3f} {spacing}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| | ours, ms a step | diffusers, ms a step | ratio |", "|---|--:|--:|--:|"]
    for name, row in cost.items():
        lines.append(f"| {name} | {1e3 * row['ours']:.3f} | {1e3 * row['diffusers']:.3f} | {row['ratio']:.1f} |")
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Where the points of six samplers lie after 8 and 20 evaluations, over the data in grey."""
    from PIL import Image

    names, cell = ("ddim", "heun", "dpmpp_2m", "unipc", "euler_a", "dpmpp_2m_sde"), 150
    sheet = torch.full((2 * cell, len(names) * cell), 255, dtype=torch.uint8)

    def draw(points: Tensor, row: int, column: int, grey: int) -> None:
        at = ((points / 2 + 1) / 2 * cell).long().clamp(1, cell - 2)
        sheet[row * cell + at[:, 1], column * cell + at[:, 0]] = grey

    for column, name in enumerate(names):
        for row, budget in enumerate((8, 20)):
            draw(Mixture.ring().sample(SEEDS * SAMPLES), row, column, 205)
            draw(run(name, budget // traits(name).evaluations, "karras"), row, column, 0)
    Image.fromarray(sheet.numpy()).save(path)


def main(
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    image: Annotated[Path | None, typer.Option("--picture", help="PNG of where the points lie")] = None,
) -> None:
    """Measure, print two tables, and write what is asked for."""
    found, cost = errors(), overhead()
    typer.echo(report(found, cost))
    typer.echo(f"\nfloor: {floor():.3f}")
    if out is not None:
        out.write_text(json.dumps({"errors": found, "overhead": cost, "machine": machine()}, indent=1) + "\n")
    if image is not None:
        picture(image)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

"""The passes of a request: where each steps, and at which size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion
from ldm.diffusion.samplers import canonical
from ldm.pipeline.given import STRENGTH
from ldm.pipeline.request import Request
from ldm.types import Conditioning, Denoiser


@dataclass(frozen=True)
class Pass:
    """One way down from noise to latents of a size."""

    shape: tuple[int, ...]  # of an image's latents, [C, h, w]
    levels: NoiseLevel
    diffusion: Diffusion  # at that size

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.levels.t) - 1


def strength_of(request: Request, kind: str) -> float | None:
    """How far up in noise the request starts from what is given; None is from noise alone. kind: of the model."""
    given = request.given
    if given is None or given.measure or given.shows is not None:
        return None
    if given.strength is None and given.mask is None and kind not in ("editing", "enlarging"):
        return STRENGTH
    return given.strength


def passes_of(
    request: Request, diffusion: Diffusion, shapes: Sequence[tuple[int, ...]], strength: float | None
) -> list[Pass]:
    """First from noise or, with a strength, from what is given; then, with an upscale, from that, at a larger size."""
    spacing = request.spacing or canonical(request.sampler)[1]
    part = request.given is not None and request.given.strength_steps == "part"
    asked = [(request.steps, 1.0 if strength is None else strength, part)]
    if request.upscale is not None:
        asked.append((request.upscale.steps or request.steps, request.upscale.strength, False))
    passes = []
    for shape, (steps, share, some) in zip(shapes, asked, strict=True):
        at_size = diffusion.for_size(*shape[-2:])
        passes.append(Pass(shape, lowest(at_size, spacing, steps, share, part=some), at_size))
    return passes


def lowest(
    diffusion: Diffusion, spacing: str | None, steps: int, strength: float = 1.0, *, part: bool = False
) -> NoiseLevel:
    """The levels of the lower `strength` of a trajectory, 1 being all of it.

    `steps` of them, the end of a trajectory of round(steps / strength) steps; with `part` the last
    int(steps * strength) of a trajectory of `steps`. Raises ValueError for one that has not so many, or none.
    """
    total = steps if part else round(steps / strength)
    try:
        levels = diffusion.trajectory(total, spacing)
    except ValueError as error:
        if total == steps:
            raise
        raise ValueError(f"{steps} steps at strength {strength} are the last of {total}: {error}") from error
    count = int(steps * strength) if part else steps
    if count < 1:
        raise ValueError(f"strength {strength} leaves none of {steps} steps; give more of either")
    if strength == 1:
        return levels  # spacing `compvis` takes as many as it can
    return NoiseLevel(*(values[-1 - count :] for values in (levels.t, levels.alpha, levels.sigma)))


def stretch(levels: NoiseLevel, start: float, end: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Whether t [B] belongs to a step from share `start` to share `end` of a trajectory's N steps: -> bool [B].

    Step i belongs if start <= i / N and (i + 1) / N <= end, as in diffusers; what a sampler evaluates between two
    levels goes with the upper one. Raises ValueError if there is none.
    """
    count = len(levels.t) - 1
    inside = [i for i in range(count) if start <= i / count and (i + 1) / count <= end]
    if not inside:
        raise ValueError(f"from share {start} to share {end} of {count} steps there is none")

    def belongs(t: Tensor) -> Tensor:
        step = levels.steps_of(t)
        return ((step >= inside[0]) & (step <= inside[-1])).to(t.device)

    return belongs


def handed_over(first: Denoiser, second: Denoiser, told: Conditioning, late: Callable[[Tensor], Tensor]) -> Denoiser:
    """The first denoiser, and where `late(t)` says so the second, which is told something of its own."""

    def denoiser(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        over = late(t)
        if over.all():
            return second(x, t, told)
        if not over.any():
            return first(x, t, cond)
        return torch.where(over.view(-1, 1, 1, 1), second(x, t, told), first(x, t, cond))

    return denoiser


def on_the_sphere(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise a to noise b [B, ...] along the great circle, each image by itself (Shoemake 1985, eq. 3.3)."""
    shape = (-1, *[1] * (a.ndim - 1))
    first, second = a.double().flatten(1), b.double().flatten(1)
    angle = torch.nn.functional.cosine_similarity(first, second, dim=1).clamp(-1, 1).acos()
    sine = angle.sin()
    near = sine < 1e-6  # one noise twice: the circle has no length
    safe = sine.clamp(min=1e-6)
    of_a = torch.where(near, 1 - share, ((1 - share) * angle).sin() / safe)
    of_b = torch.where(near, share, (share * angle).sin() / safe)
    return (of_a.view(shape) * a + of_b.view(shape) * b).to(a)

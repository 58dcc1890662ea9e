"""From a picture back to the noise that makes it: the steps of `ddim`, undone one by one."""

import itertools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.samplers.base import Step, accurate, along, eps_of, ratio, towards
from ldm.types import Denoise

log = logging.getLogger(__name__)

MEMORY = 3
"""How many differences of earlier iterations an accelerated one mixes."""
RIDGE = 1e-12
"""Keeps the least squares of an image that has already settled solvable; relative to unit columns."""


@accurate
def invert(
    denoise: Denoise, x0: Tensor, levels: NoiseLevel, *, iterations: int = 10, tolerance: float = 1e-6
) -> Iterator[Step]:
    """x0 [B, C, H, W] at levels[-1] -> one Step per level above; the last Step's x, at levels[0], is the noise.

    `ddim` on the same levels leads from there back to x0: exactly, where the iterations settle. Each of its steps is
    an equation for the x above it, solved by fixed-point iteration with Anderson acceleration (Pan et al. 2023, AIDI)
    from what the eps below says. That start alone, iterations = 0, is plain DDIM inversion: Euler's method up the
    ODE, of first order (Song et al. 2021, sec. 4.3; Dhariwal & Nichol 2021, app. F).
    An image rests where its x would move by at most `tolerance`, root mean square; a network in float16 allows no
    less than some 1e-4, in bfloat16 1e-3. 1 to 1 + iterations evaluations a step, and one at first. What has not
    settled is logged as a warning: more iterations, more levels or less guidance help.
    Raises ValueError for a negative number of iterations, and for a single step from pure noise to clean, whose
    result does not depend on the noise.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if levels[-1].sigma == 0 and levels[-2].alpha == 0:
        raise ValueError("a single step from pure noise to clean cannot be inverted; take at least 2 steps")
    x = x0
    left: list[Tensor] = []
    eps = _first_eps(denoise, x, levels)
    last = len(levels.t) - 1
    for index in range(last):
        level, below = levels[last - index - 1], levels[last - index]
        start = along(x, eps, below, level)
        x, estimate, rest = _solve(denoise, start, x, (level, below), iterations, tolerance)
        eps = eps_of(x, estimate, level)
        left.append(rest.max())
        yield Step(index, x, estimate)
    worst = float(torch.stack(left).max())
    if iterations and not worst <= tolerance:
        log.warning(
            "inversion: a step was left moving by %.1g (root mean square) after %d iterations", worst, iterations
        )


def _first_eps(denoise: Denoise, x: Tensor, levels: NoiseLevel) -> Tensor:
    """The eps at the end of the trajectory; of a clean end, that of the level above it, at the mean x has there."""
    end = levels[-1]
    if end.sigma == 0:
        end = levels[-2]
        x = end.alpha * x
    return eps_of(x, denoise(x, end), end)


def _solve(
    denoise: Denoise,
    x: Tensor,
    x_below: Tensor,
    step: tuple[NoiseLevel, NoiseLevel],
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The x at `level` from which ddim steps to x_below, its estimate of x0, and by how much it still moves [B]."""
    level, below = step
    # For data N(0, s^2) the error of x shrinks by (r - r') r / (s^2 + r^2) if the step is solved for eps, and by
    # (r / r' - 1) s^2 / (s^2 + r^2) if for x0; r, r' are the ratios above and below, s about 1.
    by_eps = ratio(level) * ratio(below) < 1
    history: list[tuple[Tensor, Tensor]] = []
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(iterations + 1):
        x0 = denoise(x, level)
        wanted = along(x_below, eps_of(x, x0, level), below, level) if by_eps else towards(x_below, x0, below, level)
        moves = (wanted - x).flatten(1).square().mean(1).sqrt()
        if best is None:
            best = (x, x0, moves)
        else:
            better = ~(moves >= best[2])
            best = (_where(better, x, best[0]), _where(better, x0, best[1]), _where(better, moves, best[2]))
        resting = best[2] <= tolerance
        if resting.all():
            break
        history = [*history[-MEMORY:], (x, wanted - x)]
        x = _where(resting, x, _anderson(history))
    assert best is not None
    return best


def _anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The next x of each image, from earlier (x, how far it moves) (Walker & Ni 2011, type II)."""
    x, move = history[-1]
    if len(history) == 1:
        return x + move
    steps, turns = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(history)), strict=True)
    rows = torch.stack([turn.flatten(1) for turn in turns], dim=1).double()  # [B, M, D]
    length = rows.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rows = rows / length
    gram = rows @ rows.mT + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64, device=x.device)
    weights = torch.linalg.solve_ex(gram, rows @ move.flatten(1).double().unsqueeze(2))[0] / length  # [B, M, 1]
    mixed = x + move
    for weight, step, turn in zip(weights.to(x).unbind(1), steps, turns, strict=True):
        mixed = mixed - weight.view(-1, *[1] * (x.ndim - 1)) * (step + turn)
    return mixed


def _where(images: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where with one answer an image: images [B]."""
    return torch.where(images.view(-1, *[1] * (yes.ndim - 1)), yes, no)

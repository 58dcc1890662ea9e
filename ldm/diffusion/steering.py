"""Steering by gradients: denoisers around a denoiser that pull its estimate of x0 towards a wish.

A gradient g added to the score of x moves the estimate of x0 by sigma^2 / alpha * g and that of eps by -sigma * g
(Tweedie's formula), whatever the network predicts. At alpha = 0, where x says nothing of x0, nothing is moved.
Put them around `guided`, not inside it: there the batch is doubled. The caller may be in torch.no_grad, not in
torch.inference_mode; parameters get no gradients. Of a network that predicts its variance as well, [B, 2 C, H, W],
that half passes unchanged.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.prediction import determinant
from ldm.diffusion.process import Diffusion
from ldm.types import Conditioning, Denoiser

Score = Callable[[Tensor, Tensor], Tensor]
"""(x or x0 [B, C, H, W], t [B] as the network is told it) -> [B], differentiable: the higher, the better."""


def classifier_guided(denoiser: Denoiser, space: Diffusion, log_prob: Score, scale: float) -> Denoiser:
    """Classifier guidance: eps - scale * sigma * grad log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 2).

    log_prob(x_t, t): of what is wanted, log p(y | x_t), from a classifier of noisy x; scale 1 is Bayes' rule.
    Raises ValueError unless `scale` is finite, and later if log_prob does not return one differentiable value an image.
    """
    _check_scale(scale)

    def guide(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        gradient = _gradient("log_prob", log_prob, x, t)
        return _moved(denoiser(x, t, cond), scale * gradient, space, t)

    return guide


def estimate_guided(denoiser: Denoiser, space: Diffusion, score: Score, scale: float) -> Denoiser:
    """Guidance by a score of the estimate: score + scale * grad_x score(x0(x), t), through the network.

    Chung et al. 2023 (DPS) if `score` is the log-likelihood of a measurement; CLIP guidance if it is a
    similarity. The estimate reaches `score` in at least float32. Costs a backward pass of the network a call.
    Raises ValueError unless `scale` is finite, and later if score does not return one differentiable value an image
    or the network lets no gradient through.
    """
    _check_scale(scale)

    def guide(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        with torch.enable_grad():
            noisy = x.detach().requires_grad_()
            output = denoiser(noisy, t, cond)
            if not output.requires_grad:
                raise ValueError("the denoiser lets no gradient through, which guidance by its estimate needs")
            x0 = space.x0_of(output.to(work), noisy.to(work), t)
            wish = _gradient("score", score, x0, t)
            # through the network at unit size: float16 would lose small values and overflow with large ones
            size = wish.abs().amax(tuple(range(1, x.ndim)), keepdim=True).clamp(min=torch.finfo(work).tiny)
            (gradient,) = torch.autograd.grad(x0, noisy, wish / size)
        return _moved(output.detach(), scale * size * gradient, space, t)

    return guide


def _gradient(name: str, score: Score, x: Tensor, t: Tensor) -> Tensor:
    """The gradient of each image's score with respect to that image, like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = score(x, t)
        if value.shape != (len(x),) or not value.requires_grad:
            kind = "differentiable" if value.requires_grad else "constant"
            raise ValueError(
                f"{name} must return a differentiable [{len(x)}], one value an image; got a {kind} {[*value.shape]}"
            )
        return torch.autograd.grad(value, x, torch.ones_like(value))[0]


def _moved(output: Tensor, gradient: Tensor, space: Diffusion, t: Tensor) -> Tensor:
    """The output that means x0 + sigma^2 / alpha * gradient; `determinant` says how output and x0 move together."""
    level = space.schedule.at(t)
    factor = -determinant(space.prediction, level) * level.sigma / level.alpha
    work = torch.promote_types(gradient.dtype, torch.float32)
    shape = (-1,) + (1,) * (gradient.ndim - 1)
    shift = torch.where(level.alpha.view(shape) > 0, factor.to(work).view(shape) * gradient, 0.0)
    channels = gradient.shape[1]
    return torch.cat([(output[:, :channels] + shift).to(output.dtype), output[:, channels:]], dim=1)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")

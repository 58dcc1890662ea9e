"""Optimizers that torch lacks, or has only in a form that makes the host wait for the device in every step."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """The sign of a momentum that looks ahead (Chen et al. 2023, alg. 2), with decoupled weight decay."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients at hand."""
        for group, parameters, gradients in _with_gradients(self):
            lr, (beta1, beta2) = group["lr"], group["betas"]
            momenta = _kept(self, "momentum", parameters)
            direction = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(direction)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, direction, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)


class Adafactor(Optimizer):
    """Adam's second moment as the product of its row and column means (Shazeer & Stern 2018, alg. 4).

    No first moment; steps of the size that `lr` says, not relative to the parameters'. A kernel [O, I, h, w] is the
    matrix [O, I h w]. `clip`: largest root mean square of an update before it is multiplied by lr (sec. 6).
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, clip: float = 1.0) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, clip=clip))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients at hand."""
        for group, parameters, gradients in _with_gradients(self):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                update = self._scaled(gradient, state, new=state["step"] ** -0.8)
                size = update.square().mean().sqrt()
                update /= (size / group["clip"]).clamp(min=1.0)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])

    @staticmethod
    def _scaled(gradient: Tensor, state: dict[str, Any], new: float) -> Tensor:
        """The gradient over the root of its second moment, into which its square goes with the weight `new`."""
        square = gradient.square() + 1e-30
        if gradient.ndim < 2:
            moment = state.setdefault("moment", torch.zeros_like(gradient)).lerp_(square, new)
            return gradient * moment.rsqrt()
        matrix = square.flatten(1)  # [O, rest]
        rows = state.setdefault("rows", torch.zeros_like(matrix[:, 0])).lerp_(matrix.mean(1), new)
        columns = state.setdefault("columns", torch.zeros_like(matrix[0])).lerp_(matrix.mean(0), new)
        scaled = gradient.flatten(1) * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()
        return scaled.view(gradient.shape)


class Prodigy(Optimizer):
    """AdamW that estimates how far the solution is, and steps by that (Mishchenko & Defazio 2023, alg. 4).

    `lr` multiplies the estimate and carries the schedule: 1, best without a warm-up, which the estimate makes of its
    own. The estimate `d` never falls, is one for all parameters, and stays on their device: a step waits for nothing
    (the authors' package waits twice for every parameter). As r and s of the paper only meet in a quotient, and m and v
    too, all four are kept divided by powers of d0, away from float32's smallest numbers.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, d0=d0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients at hand."""
        estimate = self._estimate()
        if estimate is None:
            return
        d, correlation = estimate["d"].clone(), estimate["correlation"]  # d_k; r_k of the paper
        distance = torch.zeros_like(d)  # |s_{k+1}|_1
        correlation.mul_(math.sqrt(self.defaults["betas"][1]))
        for group, parameters, gradients in _with_gradients(self):
            lr, (beta1, beta2), keep = group["lr"], group["betas"], math.sqrt(group["betas"][1])
            first = _kept(self, "first", parameters)
            second = _kept(self, "second", parameters)
            sums = _kept(self, "sum", parameters)
            starts = _kept(self, "start", parameters, torch.clone)
            share = d / group["d0"]
            scaled = torch._foreach_mul(gradients, share)

            torch._foreach_lerp_(first, scaled, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, scaled, scaled, 1 - beta2)
            way = torch._foreach_mul(torch._foreach_sub(starts, parameters), scaled)  # <g, x_0 - x_k>, not yet summed
            correlation.add_(torch.stack([w.sum() for w in way]).sum() * (share * lr * (1 - keep)))
            torch._foreach_lerp_(sums, torch._foreach_mul(scaled, share * lr), 1 - keep)
            distance += torch.stack(torch._foreach_norm(sums, 1)).sum()

            spread = torch._foreach_sqrt(second)
            torch._foreach_add_(spread, share * group["eps"])
            step = torch._foreach_div(first, spread)
            torch._foreach_mul_(step, d * lr)
            torch._foreach_mul_(parameters, 1 - d * (lr * group["weight_decay"]))
            torch._foreach_sub_(parameters, step)
        tiny = torch.finfo(d.dtype).tiny
        torch.maximum(d, correlation / distance.clamp(min=tiny), out=estimate["d"])

    def _estimate(self) -> dict[str, Tensor] | None:
        """d and r, which belong to no parameter, are kept with the first one; None if there is no parameter."""
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is None:
            return None
        state = self.state[first]
        if "d" not in state:
            state["d"] = first.new_full((), self.defaults["d0"])
            state["correlation"] = first.new_zeros(())
        return state


def _with_gradients(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
    """Each group that has any, its parameters that have a gradient, and those."""
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            yield group, parameters, [p.grad for p in parameters]


def _kept(optimizer: Optimizer, name: str, parameters: list[Tensor], start: Any = torch.zeros_like) -> list[Tensor]:
    """What the optimizer keeps under that name for each parameter; at first, what `start` makes of it."""
    for parameter in parameters:
        if name not in optimizer.state[parameter]:
            optimizer.state[parameter][name] = start(parameter.detach())
    return [optimizer.state[p][name] for p in parameters]

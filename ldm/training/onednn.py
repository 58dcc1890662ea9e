"""Linear layers by oneDNN's kernels also in training, on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class TrainedOneDNNLinear(nn.Linear):
    """A linear layer by oneDNN, forward and backward: x [..., in] -> [..., out].

    torch sends float32 linear layers to MKL, which on processors that are not Intel's is about half as fast. Anything
    but float32 on a CPU is left to torch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # beside a frozen weight x may go
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])  # [N, out]
        for_x = _product(gradient.contiguous(), weight.t()) if ctx.needs_input_grad[0] else None
        for_weight = None if x is None else _outer(rows, x.reshape(len(rows), -1))
        for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias


def _outer(rows: Tensor, inputs: Tensor) -> Tensor:
    """rows^T inputs: [N, out], [N, in] -> [out, in]. The kernel copies its first argument: the smaller comes first."""
    if rows.shape[1] <= inputs.shape[1]:
        return _product(rows.t(), inputs.t())
    return _product(inputs.t(), rows.t()).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [..., in], [out, in] -> [..., out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def train_by_onednn(module: nn.Module) -> bool:
    """Turn the module's linear layers into oneDNN's; False, and no change, where torch lacks the kernel."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = TrainedOneDNNLinear
    return True

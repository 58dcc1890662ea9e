"""Faster inference on a CPU, applied to a finished model from outside."""

import torch
from torch import Tensor, nn


class OneDNNLinear(nn.Linear):
    """A linear layer by oneDNN's kernel, which knows no gradients: x [..., in] -> [..., out]; with them, by torch's.

    torch sends convolutions there and float32 linear layers to MKL, which on processors that are not Intel's does not
    use AVX-512: less than half the speed.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def for_cpu(module: nn.Module) -> nn.Module:
    """The module, changed for float32 inference on a CPU: channels last, and linear layers by oneDNN.

    What it says changes by rounding alone. Elsewhere than on a CPU, in another type or with a torch that lacks the
    kernel, it is returned as it is.
    """
    kernel = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not kernel or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in module.parameters()):
        return module
    # With channels last, oneDNN finds its own layout in a convolution's input and weights, and need not make it.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear
    return module

"""What a frozen base's weights are kept in: 16 bits, or 4 or 8 below an adapter (Dettmers et al. 2023, QLoRA)."""

from typing import Any

import torch
from torch import nn

from ldm.training.optim import import_bitsandbytes

FORMS = ("", "nf4", "int8")
FUSED = "qkv"
"""A projection that an adapter takes apart, which packed weights do not allow."""


BLOCK = 64
"""Inputs that share a scale in nf4: a layer of another width stays as it is."""


def quantize(module: nn.Module, form: str) -> None:
    """Have the linear layers of a frozen module hold nf4 (QLoRA) or int8 weights (LLM.int8).

    Convolutions, norms and fused projections stay. Raises ValueError where bitsandbytes is missing, or nothing fits.
    """
    bitsandbytes = import_bitsandbytes(f"task.quantize={form}")
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            fits = form == "int8" or (type(child) is nn.Linear and child.in_features % BLOCK == 0)
            if type(child) is nn.Linear and name != FUSED and fits:
                setattr(parent, name, _quantized(bitsandbytes, child, form))
                count += 1
    if not count:
        raise ValueError(f"task.quantize={form}: this model has no linear layers of {BLOCK} inputs or a multiple")


def _quantized(bitsandbytes: Any, layer: nn.Linear, form: str) -> nn.Module:
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if form == "nf4":
        made: nn.Module = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4")
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to(layer.weight.device).requires_grad_(False)  # it is quantised by its first move to a device


def hold(network: nn.Module, dtype: torch.dtype) -> None:
    """Have a network's frozen kernels in 16 bits: autocast rounds them so anyway, in every pass."""
    for layer in network.modules():
        for parameter in layer.parameters(recurse=False) if isinstance(layer, nn.Linear | nn.Conv2d) else ():
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

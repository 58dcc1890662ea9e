"""Networks of one floating-point type that are told things of another."""

from typing import Any

import torch
from torch import Tensor

from ldm.types import Conditioning


def type_of(module: Any) -> torch.dtype:
    """The floating-point type that a module's weights are in; float32 for one without."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def in_type_of(module: Any, x: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
    """x and the conditioning in the module's type; what is not floating-point stays as it is."""
    dtype = type_of(module)
    return x.to(dtype), cond.map(lambda value: value.to(dtype) if value.is_floating_point() else value)

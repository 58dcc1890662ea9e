"""What the processes of a run hold together: sums, means, and rows with the gradients of all their losses."""

from typing import Any

import torch
from torch import Tensor, distributed


def processes() -> tuple[int, int]:
    """(the number of this process, how many there are)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def over_ranks(tensor: Tensor, operation: str) -> Tensor:
    """The "sum" or the "mean" of a tensor that every process holds a part of; itself where there is one process."""
    count = processes()[1]
    if count == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / count if operation == "mean" else total


def gather(x: Tensor) -> Tensor:
    """x [B, ...], of one shape on all processes -> [processes * B, ...], in their order; every process must call it.

    A row's gradient is the sum of what the losses of all processes say of it. So where each process's loss is a mean
    over its own rows, DDP's mean of the processes' gradients is the gradient of the mean over all rows.
    """
    return x if processes()[1] == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(processes()[1])]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()  # contiguous, and not the graph's own, which the sum would overwrite
        distributed.all_reduce(total)
        rank, world = processes()
        return total.chunk(world)[rank]

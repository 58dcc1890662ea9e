"""From the host's memory to the device's, without making the host wait."""

from itertools import chain

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`; for a GPU from page-locked memory, so that the copy runs beside the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def own(module: nn.Module) -> None:
    """Where some weights have memory of torch's, copy there those that lie in a file that is mapped into memory.

    The file stays mapped as a whole as long as one tensor lies in it, and with it what the others were copied from.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    mapped = [t for t in tensors if not t.untyped_storage().resizable()]
    for tensor in mapped if len(mapped) < len(tensors) else ():
        tensor.data = tensor.data.clone()

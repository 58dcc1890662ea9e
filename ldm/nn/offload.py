"""Networks that rest in the CPU's memory and are brought to a device to work: for GPUs smaller than a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DEVICE, _BY_LAYER, _BLOCKS, _RESTING = "_works_on", "_by_layer", "_blocks_at_work", "_resting"
Place = tuple[dict[str, Any], str, Tensor]
"""A layer's table of tensors, a name in it, and what stands there at rest."""


def offload(module: nn.Module, device: torch.device | str, *, by_layer: bool = False) -> None:
    """From now on the module, which is on the CPU, works on `device`, and is there only meanwhile.

    Whole, within `at_work`; or by_layer, each layer for its own turn: least memory, and slow. What changes its weights
    must do so between its turns. Raises ValueError if it is not on the CPU.
    """
    if any(tensor.device.type != "cpu" for tensor in [*module.parameters(), *module.buffers()]):
        raise ValueError("a module to be offloaded must be on the CPU first")
    setattr(module, _DEVICE, torch.device(device))
    setattr(module, _BY_LAYER, by_layer)
    if by_layer:
        for layer in module.modules():
            if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
                _bring_for_its_turn(layer, torch.device(device))


def works_on(module: nn.Module) -> torch.device:
    """Where the module computes."""
    found = module.__dict__.get(_DEVICE)
    return found or next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


@contextmanager
def at_work(module: nn.Module) -> Iterator[None]:
    """Within the block an offloaded module is where it works; one that is not, or goes by layers, stays.

    Blocks may lie in one another or overlap, as those of two generators do: it is brought for the first that is
    entered, and put back after the last that is left.
    """
    device = module.__dict__.get(_DEVICE)
    if device is None or module.__dict__[_BY_LAYER]:
        yield
        return
    state = module.__dict__
    if not state.get(_BLOCKS):
        state[_RESTING] = _bring(module.modules(), device)
    state[_BLOCKS] = state.get(_BLOCKS, 0) + 1
    try:
        yield
    finally:
        state[_BLOCKS] -= 1
        if not state[_BLOCKS]:
            _put_back(state.pop(_RESTING))


def _bring_for_its_turn(layer: nn.Module, device: torch.device) -> None:
    resting: list[Place] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        resting.extend(_bring([layer], device))
        moved = tuple(_moved(value, device) for value in args)
        return moved, {name: _moved(value, device) for name, value in kwargs.items()}

    def after(*_: Any) -> None:
        _put_back(resting)
        resting.clear()

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, always_call=True)


def _bring(layers: Iterable[nn.Module], device: torch.device) -> list[Place]:
    """Put copies on the device in the place of these layers' own tensors; what was there."""
    resting: list[Place] = []
    for layer in layers:
        tables: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
        for store in tables:
            for name, tensor in store.items():
                if tensor is not None:
                    copy = tensor.detach().to(device, non_blocking=True)
                    resting.append((store, name, tensor))
                    store[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
    return resting


def _put_back(resting: list[Place]) -> None:
    for store, name, tensor in resting:
        store[name] = tensor


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value

"""Parts whose parameters are spread over the processes (FSDP2, torch's fully_shard): what is whole, and what a shard.

Of a part that is not sharded everything here is what it was: the functions return what they are given.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.training.joint_text import TaughtDenoiser
from ldm.training.memory import BLOCKS, SpeedConfig
from ldm.training.tasks import Task

OPTIMIZERS = ("adamw", "lion")
"""Those that work on shards: others take means of whole tensors, or (sgd) have a kernel that torch does not split."""


def check(task: Task, optimizer: str, precision: str, speed: SpeedConfig, plugin: Any) -> None:
    """Raise ValueError, before any work, for what does not go with accelerate's FSDP `plugin`."""
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP: only its second version is supported: fsdp_version: 2")
    for key in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        if getattr(plugin, key):
            raise ValueError(f"FSDP2: fsdp_{key} must be false (recomputing is speed.checkpointing=true)")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP2: fsdp_offload_params must be false")
    if len(task.trained) > 1:
        raise ValueError(f"FSDP2 is for one trained part, not {' and '.join(task.trained)}: start without it")
    if task.partial:
        raise ValueError(
            "FSDP2 is for a part that learns as a whole, not for a few numbers on a base: start without it"
        )
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"FSDP2: optimizer.kind must be {', '.join(OPTIMIZERS)}, not {optimizer}")
    if precision == "fp16":
        raise ValueError("FSDP2: precision must be bf16 or no, not fp16")
    if speed.channels_last or speed.compile:
        raise ValueError("FSDP2: speed.channels_last and speed.compile are not supported with it")
    for part in task.trained:
        if isinstance(getattr(task, part), TaughtDenoiser):
            raise ValueError("FSDP2 would part the vectors of task.word from the text encoder: start without it")
        for name, module in getattr(task, part).named_modules():
            own = dict(module.named_parameters(recurse=False))
            where = f"{part}.{name}".rstrip(".")
            if scalars := [n for n, p in own.items() if not p.ndim]:
                raise ValueError(
                    f"FSDP2 cannot share out a single number, as {where}.{scalars[0]} is: start without it"
                )
            if list(module.buffers(recurse=False)) and not all(p.requires_grad for p in own.values()):
                raise ValueError(f"FSDP2: {where} learns without gradients, which needs it whole: start without it")


def by_blocks(module: nn.Module) -> nn.Module:
    """The module, which now tells accelerate of its blocks: each is gathered when its turn comes, and let go after.

    accelerate's words for it are transformers' (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP).
    """
    kinds = {type(m).__name__ for m in module.modules() if isinstance(m, BLOCKS)}
    module._no_split_modules = sorted(kinds)  # type: ignore[assignment]
    return module


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, of shards that all processes bring."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard, in the same memory; outside of autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def scattered(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's shard of a whole tensor that all processes have, if `like` is sharded; a copy. Nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def scattered_state(state: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps, "index of the parameter.name" -> tensor, with shards where the parameters have them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for key, value in state.items():
        parameter = parameters[int(key.partition(".")[0])]
        found[key] = scattered(value, parameter if value.shape == parameter.shape else None)
    return found


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within the block any method of the module may be called, not only `forward`, by all processes alike.

    Its blocks gather themselves when they are called. On both sides of the block its weights may be changed.
    """
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        yield
        return
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for shard in shards[:1]:  # the module itself, which has what is in no block
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()


@contextmanager
def whole(modules: Iterable[nn.Module], tables: Iterable[MutableMapping[str, Any]], *, keep: bool) -> Iterator[None]:
    """Within the block the modules, and what stands in the tables, are whole, in the process that is to `keep` them.

    Every process must enter it; tensor by tensor they bring their shards, and that one has them on its CPU, under the
    same names, in modules of the classes that they were. They are to be read, not called.
    """
    parts = [m for module in modules for m in module.modules()]
    tables = [*(m._parameters for m in parts), *tables]
    shards = [(table, name, v) for table in tables for name, v in table.items() if isinstance(v, DTensor)]
    found: dict[int, Tensor] = {}  # one that stands in two places stays one
    for _, _, shard in shards:
        if id(shard) not in found:
            gathered = full(shard.detach())
            found[id(shard)] = gathered.cpu() if keep else gathered.new_empty(0)
    classes = [(m, type(m)) for m in parts if isinstance(m, FSDPModule)] if keep else []
    for table, name, shard in shards if keep else []:
        table[name] = found[id(shard)]
    for module, kind in classes:
        module.__class__ = kind.__mro__[2]  # fully_shard made it of FSDPModule and this
    try:
        yield
    finally:
        for table, name, shard in shards:
            table[name] = shard
        for module, kind in classes:
            module.__class__ = kind

"""Speed and memory, applied from outside to the finished models of a task: none of it changes what a model is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiTBlock
from ldm.models.mmdit import JointBlock
from ldm.models.unet import UNetLayer
from ldm.names import known
from ldm.nn.blocks import PixelAttention, ResidualBlock
from ldm.nn.transfer import own
from ldm.training.onednn import train_by_onednn
from ldm.training.tasks import Task
from ldm.types import Conditioning

log = logging.getLogger(__name__)

BLOCKS = (UNetLayer, DiTBlock, JointBlock, ResidualBlock, PixelAttention)
COMPILE_MODES = ("", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SpeedConfig:
    """What makes a run faster or smaller. All but checkpointing change its numbers, by rounding."""

    checkpointing: bool = False  # make activations again in the backward pass: a third more work, far less memory
    compile: str = ""  # default | reduce-overhead | max-autotune | max-autotune-no-cudagraphs; empty = no
    channels_last: bool = False  # layout of images and kernels: what GPUs' tensor cores want
    tf32: bool = False  # matrix products of float32 in TF32, on NVIDIA GPUs from Ampere on
    frozen: str = "no"  # no | bf16 | fp16: frozen models compute in that; their weights stay float32
    sdpa_order: tuple[str, ...] = ()  # cudnn | flash | efficient | math, first wins where it can; empty = torch's order
    fast_cpu: bool = True  # on a CPU: linear layers by oneDNN, frozen models in channels_last; 1.2 times as fast

    def __post_init__(self) -> None:
        known("speed.compile", self.compile, COMPILE_MODES)
        known("speed.frozen", self.frozen, PRECISIONS)
        for name in self.sdpa_order:
            known("attention kernel in speed.sdpa_order", name, SDPA)
        if len(set(self.sdpa_order)) < len(self.sdpa_order):
            raise ValueError(f"speed.sdpa_order names a kernel twice: {', '.join(self.sdpa_order)}")


def check_device(config: SpeedConfig, precision: str, device: torch.device) -> None:
    """Raise ValueError, before any work, for what this device cannot do."""
    for name, wanted in (("precision", precision), ("speed.frozen", config.frozen)):
        if wanted == "fp16" and device.type == "cpu":
            raise ValueError(f"{name}=fp16 needs a GPU, and this run is on a CPU: use bf16 or no")
        if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(
                f"{name}=bf16 needs a GPU from Ampere on, not {torch.cuda.get_device_name(device)}: use fp16"
            )
    if config.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ValueError(f"speed.tf32 needs an NVIDIA GPU from Ampere on, and this run is on {device.type}")


def speed_up(task: Task, config: SpeedConfig, device: torch.device) -> None:
    """Apply the config to the task's models, which are on their device; before optimizers see the parameters.

    Raises ValueError for checkpointing where the trained models have no blocks to checkpoint.
    """
    trained = {name: getattr(task, name) for name in task.trained}
    if config.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if config.channels_last:
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.frozen != "no":
        for name, module in task.named_children():
            weights = list(module.parameters())
            if weights and name not in task.trained and not any(p.requires_grad for p in weights):
                compute_in(module, PRECISIONS[config.frozen], device)
    if config.fast_cpu and device.type == "cpu" and not config.compile:  # a compiler takes kernels of its own
        for name, module in task.named_children():
            changing = name in task.trained or any(p.requires_grad for p in module.parameters())
            if not changing:  # weights that change would be copied back and forth
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                own(module)
        if not train_by_onednn(task):
            log.info("speed.fast_cpu: this torch lacks oneDNN's linear layers; going on without")
    if config.checkpointing and not sum(checkpoint_blocks(module) for module in trained.values()):
        raise ValueError(f"speed.checkpointing: {', '.join(trained)} has no blocks to checkpoint")
    if config.compile:
        for name, module in trained.items():
            compile_forward(module, config.compile, name)


def sdpa_order(order: tuple[str, ...]) -> AbstractContextManager[None]:
    """Within the block torch's attention takes the first of these kernels that can do what is asked."""
    if not order:
        return nullcontext()
    log.info("attention by sdpa takes the first that can: %s", ", ".join(order))
    return sdpa_kernel([SDPA[name] for name in order], set_priority=True)


def checkpoint_blocks(module: nn.Module) -> int:
    """Have every outermost block keep its input alone, and run again in the backward pass (Chen et al. 2016).

    Gradients are the same bit for bit, dropout included. -> how many blocks.
    """
    blocks = list(_outermost(module))
    for block in blocks:
        block.forward = _recomputed(block.forward)
    towers = [m for m in module.modules() if hasattr(m, "grad_checkpointing")]  # open_clip's own switch
    for tower in towers:
        tower.grad_checkpointing = True  # type: ignore[assignment]
    return len(blocks) + len(towers)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, BLOCKS):
            yield child
        else:
            yield from _outermost(child)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def compile_forward(module: nn.Module, mode: str, name: str) -> None:
    """Compile the module's forward pass for training, for the shapes it meets; validation and previews stay eager.

    Where the compiler fails, one line says so, and the module goes on uncompiled.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    eager = module.forward
    compiled = torch.compile(eager, mode=mode, dynamic=False)
    failed = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not module.training or not torch.is_grad_enabled() or failed:
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("speed.compile=%s does not work for %s (%s); going on without", mode, name, reason)
            failed = True
            return eager(*args, **kwargs)

    module.forward = run


def compute_in(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Have a frozen module compute in a 16-bit type, where autocast finds that safe, and answer in float32.

    Its weights stay float32, so a checkpoint holds them unaltered. An autoencoder's latents are drawn and scaled in
    float32: only its networks are changed.
    """
    for part in module.children() if isinstance(module, AutoencoderKL) else [module]:
        part.forward = _cast(part.forward, dtype, device)


def _cast(forward: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            out = forward(*args)
        return _widened(out)

    return run


def _widened(value: Any) -> Any:
    """Tensors, or what holds them, with 16-bit floats made float32."""
    if isinstance(value, Conditioning):
        return value.map(_widened)
    if isinstance(value, tuple):
        return tuple(_widened(v) for v in value)
    return value.float() if isinstance(value, Tensor) and value.dtype in PRECISIONS.values() else value

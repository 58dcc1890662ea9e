"""A run: from a config to a task, its data and a folder of its own."""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, fixed_batch, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.samples import size_of
from ldm.checkpoints.load import load_model
from ldm.checkpoints.model import load_tensors
from ldm.config import load_config, plain, to_yaml
from ldm.names import known
from ldm.nn.attention import BACKENDS, set_backend
from ldm.training.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from ldm.training.classifier import ClassifierTask, ClassifierTaskConfig
from ldm.training.contrastive import ContrastiveTask, ContrastiveTaskConfig
from ldm.training.denoising import DenoisingTask, DenoisingTaskConfig
from ldm.training.engine import Inspection, TrainConfig, train
from ldm.training.latents import check_cache
from ldm.training.memory import check_device
from ldm.training.metrics import clock
from ldm.training.randomness import seed_torch
from ldm.training.state import TrainState
from ldm.training.tasks import Task, TaskConfig

log = logging.getLogger(__name__)

TASKS: dict[str, tuple[type[Any], type[Any]]] = {
    "autoencoder": (AutoencoderTask, AutoencoderTaskConfig),
    "contrastive": (ContrastiveTask, ContrastiveTaskConfig),
    "denoising": (DenoisingTask, DenoisingTaskConfig),
    "classifier": (ClassifierTask, ClassifierTaskConfig),
}

FREE = (
    "samples",
    "log_steps",
    "validate_steps",
    "preview_steps",
    "save_steps",
    "keep",
    "data.workers",
    "data.copies",
    "data.copies_mb",
    "speed.checkpointing",
    "init",
)
"""Settings that may differ when a run is resumed; any other change would make it another run."""


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """Everything `ldm train` is told."""

    out: str = "???"
    task: TaskConfig = field(default_factory=TaskConfig, metadata={"kinds": {k: c for k, (_, c) in TASKS.items()}})
    data: DataConfig = field(default_factory=lambda: DataConfig(path="???"))
    validation: str = ""  # a shard folder that is never trained on
    validation_samples: int = 256
    init: str = ""  # start from this model's weights (fine-tuning); ignored once the run has a checkpoint
    attention: str = "sdpa"  # sdpa | xformers | math

    def __post_init__(self) -> None:
        known("precision", self.precision, ("no", "bf16", "fp16"))
        known("attention back-end", self.attention, BACKENDS)
        for name in ("samples", "batch_size", "accumulate", "keep", "validation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def run(config: RunConfig) -> TrainState:
    """Train as `config` says, in `config.out`, resuming what stands there. ValueError before any work if it cannot."""
    accelerator = Accelerator(mixed_precision=config.precision)
    rank, world = accelerator.process_index, accelerator.num_processes
    check_device(config.speed, config.precision, accelerator.device)
    set_backend(config.attention, accelerator.device)
    out = Path(config.out)
    data, task = build(config)
    loader_arguments = dict(batch_size=config.batch_size, seed=config.seed, rank=rank, world=world)
    loader = Loader(data, config.data, **loader_arguments)  # refuses what cannot work before anything is written
    check_data(loader, task)
    if (config.batch_size // world) < config.accumulate:
        raise ValueError(
            f"accumulate={config.accumulate} needs at least that many samples per process; "
            f"batch_size={config.batch_size} over {world} gives {config.batch_size // world}"
        )

    if isinstance(config.task, AutoencoderTaskConfig):
        if config.task.decoder_only and not config.init:
            raise ValueError("task.decoder_only keeps the encoder as it is: give the model to start from, init=MODEL")
        if config.task.adversary.weight and config.precision == "fp16":
            raise ValueError("an adversary does not train with precision=fp16, whose scaler is one for both; use bf16")

    with own_folder(out, config, main=accelerator.is_main_process):
        if config.init and not (out / "checkpoints").is_dir():
            start_from(task, config.init)
        text = summary(config, data, task)  # on every process: counting FLOP runs the losses, which gather
        if accelerator.is_main_process:
            log.info("%s\nattention: %s", text, config.attention)

        def batches(start: int) -> Iterator[Batch]:
            return iter(Loader(data, config.data, start=start, **loader_arguments))

        return train(task, batches, inspection(config, data), config, out, accelerator)


def build(config: RunConfig) -> tuple[list[ShardReader], Task]:
    """The data and the task with its initial weights, which depend on the seed alone."""
    data = open_data(config.data)
    task_class, _ = TASKS[config.task.kind]
    size = size_of(data, config.data)
    seed_torch(config.seed, "initial weights")
    return data, task_class(config.task, size=size, seed=config.seed)


def check_data(loader: Loader, task: Task) -> None:
    """Raise ValueError where the task cannot learn from such batches."""
    config = loader.config
    if not isinstance(task, DenoisingTask):
        if config.buckets or config.caches:
            raise ValueError("data.buckets and data.cache are for task.kind=denoising")
        return
    multiple = task.autoencoder.factor * getattr(task.denoiser, "factor", 1)
    for width, height in loader.shapes:
        if width % multiple or height % multiple:
            raise ValueError(f"pictures of {width} x {height} px: the sides must be multiples of {multiple}")
    for cache in loader.caches:
        check_cache(cache, task.autoencoder, task.text)


def inspection(config: RunConfig, data: list[ShardReader]) -> Inspection:
    """Fixed samples to validate on, and to picture (from the validation data if there is any)."""
    if not config.validation:
        return Inspection(None, fixed_batch(data, config.data, min(16, sum(map(len, data)))))
    plain_data = replace(config.data, path=config.validation, size=size_of(data, config.data))
    held_out = open_data(plain_data)
    validation = fixed_batch(held_out, plain_data, min(config.validation_samples, sum(map(len, held_out))))
    return Inspection(validation, validation.split(-(-len(validation) // 16))[0])


def start_from(task: Task, model: str) -> None:
    """Put the weights of an existing model, of any format, into the task's components of the same name."""
    own = {id(m) for name in task.trained for m in getattr(task, name).modules()}
    trained = {name: module for name, module in task.components().items() if id(module) in own}
    found = load_model(model, list(trained), dtype=torch.float32)
    for name, module in trained.items():
        if name not in found.components:
            raise ValueError(f"init={model!r} has no {name}, which this task trains")
        load_tensors(module, found.components[name].state_dict(), f"init={model!r}, {name}")
    log.info("starting from %s: %s", found.folder, ", ".join(trained))


def summary(config: RunConfig, data: list[ShardReader], task: Task) -> str:
    """Parameter counts, memory and arithmetic of the run, as text."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in task.components().items()}
    trained = sum(p.numel() for name in task.trained for p in getattr(task, name).parameters())
    frozen = max(0, sum(counts.values()) - trained)
    # float32 weights, gradients, two moments and the average; activations come on top
    gib = (trained * 4 * 5 + frozen * 4) / 2**30
    flop = flop_per_sample(task, data, config.data)
    lines = [f"{name}: {count / 1e6:.2f} M parameters" for name, count in counts.items()]
    lines.append(f"trained: {trained / 1e6:.2f} M; weights, optimizer and average take {gib:.2f} GiB")
    lines.append(
        f"{flop / 1e9:.2f} GFLOP a sample, forward and backward; {flop * config.samples / 1e12:.1f} TFLOP in all "
        f"(at 100 GFLOP/s: {clock(flop * config.samples / 1e11)})"
    )
    samples = sum(map(len, data))
    lines.append(f"{samples} samples in {', '.join(config.data.paths)}; {config.samples / samples:.1f} epochs")
    return "\n".join(lines)


def flop_per_sample(task: Task, data: list[ShardReader], config: DataConfig) -> float:
    """Matrix and convolution FLOP of a training step, per sample (1 multiply-add = 2)."""
    batch = fixed_batch(data, config, min(2, sum(map(len, data))))
    buffers = {name: b.clone() for name, b in task.named_buffers()}
    counter = FlopCounterMode(display=False)
    with counter:
        for _, loss, _ in task.losses(batch, 0):
            loss.backward()
    task.zero_grad(set_to_none=True)
    for name, b in task.named_buffers():
        b.copy_(buffers[name])  # running statistics must not notice
    return counter.get_total_flops() / len(batch)


@contextmanager
def own_folder(out: Path, config: RunConfig, *, main: bool) -> Iterator[None]:
    """Hold the run folder `out` for this run alone; write its config, and its log beside the terminal's.

    Raises ValueError if another process holds it, or if it holds a run with other settings.
    """
    if not main:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(f"{out} is in use by another run (process {lock.read().strip()})") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        _refuse_other_settings(out, config)
        (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            log.info("%s", " ".join(sys.argv))
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _refuse_other_settings(out: Path, config: RunConfig) -> None:
    if not (out / "checkpoints").is_dir():
        return
    before = _flat(plain(load_config(RunConfig, [out / "config.yaml"], [])))
    now = _flat(plain(config))
    changed = [k for k in now if before.get(k) != now[k] and k not in FREE]
    if changed:
        listed = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in changed[:3])
        raise ValueError(f"{out} holds a run with other settings ({listed}); give another out=")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def describe(config: RunConfig) -> str:
    """What `--dry-run` prints: the resolved config, then the summary. Writes nothing."""
    data, task = build(config)
    return f"{to_yaml(config)}\n{summary(config, data, task)}"

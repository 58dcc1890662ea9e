"""A run: from a config to a task, its data and a folder of its own."""

import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, parse_flag_from_env

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, fixed_batch, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.samples import STORED, size_of
from ldm.checkpoints.files import steps
from ldm.checkpoints.load import load_model
from ldm.checkpoints.model import load_tensors
from ldm.config import load_config, plain, to_yaml
from ldm.names import known
from ldm.nn.attention import BACKENDS, set_backend
from ldm.training.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from ldm.training.checks import check_data, check_finetuning
from ldm.training.classifier import ClassifierTask, ClassifierTaskConfig
from ldm.training.contrastive import ContrastiveTask, ContrastiveTaskConfig
from ldm.training.costs import estimate, summarise
from ldm.training.denoising import DenoisingTask, DenoisingTaskConfig
from ldm.training.engine import Inspection, TrainConfig, train
from ldm.training.finetuning import FinetuningTask
from ldm.training.memory import check_device
from ldm.training.methods import FinetuningTaskConfig
from ldm.training.metrics import Meter
from ldm.training.peaks import peak_flops
from ldm.training.randomness import seed_torch
from ldm.training.report import reported
from ldm.training.runs import environment, flat, read_record
from ldm.training.state import TrainState
from ldm.training.tasks import Task, TaskConfig

log = logging.getLogger(__name__)

TASKS: dict[str, tuple[type[Any], type[Any]]] = {
    "autoencoder": (AutoencoderTask, AutoencoderTaskConfig),
    "contrastive": (ContrastiveTask, ContrastiveTaskConfig),
    "denoising": (DenoisingTask, DenoisingTaskConfig),
    "classifier": (ClassifierTask, ClassifierTaskConfig),
    "finetuning": (FinetuningTask, FinetuningTaskConfig),
}

FREE = (
    "out",
    "samples",
    "log_steps",
    "validate_steps",
    "preview_steps",
    "save_steps",
    "keep",
    "trackers",
    "max_skips",
    "timeout_seconds",
    "data.workers",
    "data.copies",
    "data.copies_mb",
    "speed.checkpointing",
    "init",
)
"""Settings that may differ when a run is resumed; any other change would make it another run."""

FEWEST_VALIDATED = 64
"""Rows of a validation in fine-tuning: at one level and with one noise, a picture's loss says nothing of the model."""


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """Everything `ldm train` is told."""

    out: str = "???"
    task: TaskConfig = field(default_factory=TaskConfig, metadata={"kinds": {k: c for k, (_, c) in TASKS.items()}})
    data: DataConfig = field(default_factory=lambda: DataConfig(path="???"))
    validation: str = ""  # a shard folder that is never trained on
    validation_samples: int = 256
    forgetting: str = ""  # fine-tuning: shards of the base model's own samples; validated as kept/loss
    init: str = ""  # start from this model's weights (fine-tuning); ignored once the run has a checkpoint
    attention: str = "sdpa"  # sdpa | xformers | math
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, ... as well as metrics.jsonl

    def __post_init__(self) -> None:
        known("precision", self.precision, ("no", "bf16", "fp16"))
        if not self.out:
            raise ValueError("out= must name the folder of the run")
        known("attention back-end", self.attention, BACKENDS)
        for name in self.trackers:
            known("tracker", name, [str(t) for t in LoggerType if t is not LoggerType.ALL])
        for name in (
            "samples",
            "batch_size",
            "accumulate",
            "keep",
            "validation_samples",
            "max_skips",
            "timeout_seconds",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def run(config: RunConfig) -> TrainState:
    """Train as `config` says, in `config.out`, resuming what stands there. ValueError before any work if it cannot."""
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * config.timeout_seconds))  # see ldm.training.watch
    check_trackers(config.trackers)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        kwargs_handlers=[patience],
        log_with=list(config.trackers) or None,
        project_dir=config.out,
    )
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
    if task.whole and config.accumulate > 1:
        raise ValueError(
            f"accumulate={config.accumulate} would compare each part with itself alone, which is another loss; "
            "use task.micro_batch, which is the same loss in less memory"
        )
    check_finetuning(config, task)
    if isinstance(config.task, AutoencoderTaskConfig):
        if config.task.decoder_only and not config.init:
            raise ValueError("task.decoder_only keeps the encoder as it is: give the model to start from, init=MODEL")
        if config.task.adversary.weight and config.precision == "fp16":
            raise ValueError("an adversary does not train with precision=fp16, whose scaler is one for both; use bf16")

    with own_folder(out, config, main=accelerator.is_main_process):
        facts: dict[str, Any] = {"sources": sources(task, data)}
        _refuse_other_sources(out, facts["sources"])
        if config.init and not steps(out / "checkpoints"):
            start_from(task, config.init)
        summary = summarise(task, data, config, config.data)  # on every process: its losses gather
        if accelerator.is_main_process:
            log.info("%s\nattention: %s", summary, config.attention)

        def batches(start: int) -> Iterator[Batch]:
            return iter(Loader(data, config.data, start=start, **loader_arguments))

        device = accelerator.device
        peak = peak_flops(device, config.precision, tf32=config.speed.tf32)
        meter = Meter(device, config.batch_size, summary.flop_per_sample, peak)
        facts |= {"summary": asdict(summary), "environment": environment(device, world)}
        with reported(out, facts, main=accelerator.is_main_process) as record:
            state = train(task, batches, inspection(config, data), config, out, accelerator, meter)
            record["state"] = "stopped" if state.stopped else "finished"
        return state


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            hint = "pip install 'ldm[track]'" if name in ("tensorboard", "wandb") else "install its package"
            raise ValueError(f"trackers: {name} is not installed: {hint}, or leave it out")


def build(config: RunConfig) -> tuple[list[ShardReader], Task]:
    """The data and the task with its initial weights, which depend on the seed alone."""
    data = open_data(config.data)
    task_class, _ = TASKS[config.task.kind]
    size = size_of(data, config.data)
    seed_torch(config.seed, "initial weights")
    return data, task_class(config.task, size=size, seed=config.seed)


def inspection(config: RunConfig, data: list[ShardReader]) -> Inspection:
    """Fixed samples to validate on, and to picture (from the validation data if there is any).

    In fine-tuning, where few are held out, each is validated several times, at other levels and with other noise.
    """

    def fixed(path: str, count: int, plain_data: DataConfig) -> Batch:
        plain_data = replace(plain_data, path=path, size=size_of(data, config.data))
        readers = open_data(plain_data)
        return fixed_batch(readers, plain_data, min(count, sum(map(len, readers))))

    def often(batch: Batch) -> Batch:
        times = -(-FEWEST_VALIDATED // len(batch)) if isinstance(config.task, FinetuningTaskConfig) else 1
        return Batch.cat([replace(batch, positions=batch.positions + i * len(batch)) for i in range(times)])

    forgetting = None
    if config.forgetting:  # drawn pictures, of which there is neither condition nor mask but what is made of them
        made = "" if config.data.condition == STORED else config.data.condition
        plain_data = replace(config.data, condition=made, mask="")
        forgetting = often(fixed(config.forgetting, config.validation_samples, plain_data))
    if not config.validation:
        return Inspection(None, fixed_batch(data, config.data, min(16, sum(map(len, data)))), forgetting)
    validation = fixed(config.validation, config.validation_samples, config.data)
    return Inspection(often(validation), validation.split(-(-len(validation) // 16))[0], forgetting)


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
        if not _held(lock):
            lock.seek(0)
            raise ValueError(f"{out} is in use by another run (process {lock.read().strip()})")
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
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


def _held(lock: IO[str]) -> bool:
    """Take the lock, or say that another has it; `ldm runs` has it only for an instant."""
    for wait in (0.1, 0.1, 0.0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
    return False


def _refuse_other_settings(out: Path, config: RunConfig) -> None:
    if not steps(out / "checkpoints"):
        return
    before = flat(plain(load_config(RunConfig, [out / "config.yaml"], [])))
    now = flat(plain(config))
    changed = [k for k in now if before.get(k) != now[k] and k not in FREE]
    if changed:
        listed = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in changed[:3])
        raise ValueError(f"{out} holds a run with other settings ({listed}); give another out=")


def sources(task: Task, data: list[ShardReader]) -> dict[str, str]:
    """What a run stands on and does not change: fingerprints of its data, hashes of its frozen models."""
    return {reader.path: reader.fingerprint for reader in data} | task.foundations()


def _refuse_other_sources(out: Path, now: dict[str, str]) -> None:
    before = read_record(out).get("sources", {})
    if steps(out / "checkpoints"):
        for name, value in now.items():
            if before.get(name, value) != value:
                raise ValueError(f"{name} is not what it was when the run in {out} began; give another out=")


def describe(config: RunConfig, tflops: float = 0.0) -> str:
    """What `--dry-run` prints: the resolved config, then what the run will cost; see `estimate`. Writes nothing."""
    return f"{to_yaml(config)}\n{cost(config, tflops)}"


def cost(config: RunConfig, tflops: float = 0.0) -> str:
    """The run's parameters, memory, time and disk in a few lines; see `estimate`. ValueError for what cannot be."""
    data, task = build(config)
    check_data(Loader(data, config.data, batch_size=config.batch_size, seed=config.seed), task)
    return estimate(task, data, config, config.data, tflops)


@contextmanager
def main_first(config: RunConfig) -> Iterator[bool]:
    """Within the block the main process is alone; then the others go through it, and find what it made.

    Yields whether this is the main process.
    """
    patience = timedelta(seconds=2 * config.timeout_seconds)
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=patience)
    with processes.main_process_first():
        yield processes.is_main_process

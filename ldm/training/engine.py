"""The one training loop. The only importer of accelerate, with the state it saves."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_

from data_pipeline.batch import Batch
from ldm.images import grid, save_png
from ldm.training.ema import EMA
from ldm.training.memory import SpeedConfig, check_device, sdpa_order, speed_up
from ldm.training.metrics import Means, MetricsFile, Progress, floats
from ldm.training.optim import (
    OptimizerConfig,
    build_optimizer,
    check_groups,
    learning_rate,
    set_learning_rate,
)
from ldm.training.posthoc import save_snapshot
from ldm.training.randomness import seed_torch
from ldm.training.state import TrainState
from ldm.training.tasks import Metrics, Task

log = logging.getLogger(__name__)

VALIDATION_CHUNK = 64
"""Samples validated at a time: fixed, so that the number does not depend on the batch size."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and how often to look."""

    samples: int = 100_000  # length of the run; a run can be made longer by resuming it with more
    batch_size: int = 32  # samples per optimizer step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    precision: str = "no"  # no | bf16 | fp16
    ema: float = 0.999  # decay of the average that is validated, drawn from, and the model
    ema_decays: tuple[float, ...] = ()  # further averages, kept in checkpoints for `ldm average`
    snapshot_steps: int = 0  # steps between snapshots, from which averages of any width are made later; 0 = none
    snapshot_sigmas: tuple[float, ...] = (0.05, 0.10)  # relative widths of the averages in a snapshot
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    log_steps: int = 20
    validate_steps: int = 500
    preview_steps: int = 500
    save_steps: int = 500
    keep: int = 2  # checkpoints


@dataclass(frozen=True)
class Inspection:
    """What the loop looks at now and then: held-out samples, and those to picture."""

    validation: Batch | None
    preview: Batch


def train(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    inspection: Inspection,
    config: TrainConfig,
    out: Path,
    accelerator: Accelerator,
) -> TrainState:
    """Train until `config.samples` are consumed, resuming what stands in `out`; returns the final state.

    `batches(start)` yields this process's share of every global batch from sample `start` on. SIGTERM
    and SIGINT stop after the step under way, with a checkpoint. All randomness is a function of
    (seed, samples consumed), so N steps, a resume and N more give the bytes that 2N steps give.
    """
    state = prepare(task, config, accelerator)
    resumed = state.resume(out)
    total_steps = -(-config.samples // config.batch_size)
    main = accelerator.is_main_process
    metrics = MetricsFile(out / "metrics.jsonl", state.samples if resumed else -1) if main else None
    progress = Progress(state.samples, total_steps * config.batch_size, shown=main)
    means, stop = Means(), _StopSignal()

    def every(steps: int) -> bool:
        return bool(steps) and (state.step % steps == 0 or state.step == total_steps)

    with stop, sdpa_order(config.speed.sdpa_order):
        if state.step < total_steps:
            stream = batches(state.samples)
        while state.step < total_steps and not stop.asked(accelerator):
            batch = next(stream).to(accelerator.device, non_blocking=True)
            seed_torch(config.seed, "step", state.samples, accelerator.process_index)
            lr = learning_rate(config.optimizer, state.step, total_steps)
            set_learning_rate(state.optimizers.values(), lr)

            update(state, batch, config, means)
            for ema in state.emas.values():
                ema.update(state.step)
            state.step += 1
            state.samples += config.batch_size
            progress.advance(config.batch_size)

            if every(config.log_steps):
                numbers = floats(_over_ranks(means.pop(), accelerator))
                _require_finite(numbers, state.step, batch)
                progress.report(state.step, numbers)
                _write(metrics, state, "train", {**numbers, "lr": lr, "samples_per_second": progress.rate()})
            if inspection.validation is not None and every(config.validate_steps):
                numbers = validate(state, inspection.validation)
                progress.report(state.step, {f"validation {k}": v for k, v in numbers.items()})
                _write(metrics, state, "validation", numbers)
            if main and every(config.preview_steps):
                preview(state, inspection.preview, out)
            if main and every(config.snapshot_steps):
                save_snapshot(state.emas, out, state.step)
            if every(config.save_steps):
                _save(state, config, out)
        if stop.asked(accelerator) and state.step < total_steps:
            _save(state, config, out)
            log.info("stopped at step %d of %d; run the same command to go on", state.step, total_steps)
    progress.close()
    return state


def prepare(task: Task, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """Move the task to its device, wrap what is trained, and give each part its optimizer and average."""
    check_device(config.speed, config.precision, accelerator.device)
    check_groups({name: getattr(task, name) for name in task.trained}, config.optimizer)
    task.to(accelerator.device)
    speed_up(task, config.speed, accelerator.device)
    optimizers, emas = {}, {}
    for name in task.trained:
        module = getattr(task, name).train()
        emas[name] = EMA(module, config.ema, config.ema_decays, config.snapshot_sigmas if config.snapshot_steps else ())
        optimizer = build_optimizer(module, config.optimizer, name)
        module, optimizers[name] = accelerator.prepare(module, optimizer)
        setattr(task, name, module)
    return TrainState(task, optimizers, emas, accelerator)


def update(state: TrainState, batch: Batch, config: TrainConfig, means: Means) -> None:
    """One optimizer step per trained part, from gradients accumulated over the micro-batches."""
    accelerator, task = state.accelerator, state.task
    micro_batches = batch.split(config.accumulate)
    for i, micro in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with ExitStack() as stack:
            if not last:  # gradients cross the network once a step
                for name in task.trained:
                    stack.enter_context(accelerator.no_sync(getattr(task, name)))
            for name, loss, metrics in task.losses(micro, state.step):
                accelerator.backward(loss * (len(micro) / len(batch)))
                means.add(metrics, len(micro))
                if last:
                    optimizer = state.optimizers[name]
                    if config.optimizer.clip:
                        accelerator.unscale_gradients(optimizer)
                        norm = clip_grad_norm_(getattr(task, name).parameters(), config.optimizer.clip)
                        means.add({"gradient": norm})
                    optimizer.step()
                    optimizer.zero_grad()


@torch.no_grad()
def validate(state: TrainState, batch: Batch) -> dict[str, float]:
    """Means over `batch` with the averaged weights; every rank computes the same."""
    means = Means()
    chunks = batch.split(-(-len(batch) // VALIDATION_CHUNK))
    with state.averaged(), _evaluating(state.task):
        for chunk in chunks:
            means.add(state.task.validate(chunk.to(state.accelerator.device)), len(chunk))
    return floats(means.pop())


def preview(state: TrainState, batch: Batch, out: Path) -> None:
    """Write `previews/step-N.png` with the averaged weights, if the task draws any."""
    with state.averaged(), _evaluating(state.task):
        images = state.task.preview(batch.to(state.accelerator.device))
    if images is not None:
        columns = 8 if len(images) > 4 else len(images)
        path = out / "previews" / f"step-{state.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid(images.float().cpu(), columns, scale=max(1, 128 // images.shape[-1])), path)


class _StopSignal:
    """Turns SIGTERM and SIGINT into a flag that all ranks agree on; a second one acts at once."""

    def __init__(self) -> None:
        self.seen = False
        self.previous: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        self.seen = True
        signal.signal(number, self.previous[number])  # type: ignore[arg-type]

    def asked(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes == 1:
            return self.seen
        flag = torch.tensor(int(self.seen), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


def _save(state: TrainState, config: TrainConfig, out: Path) -> None:
    if state.accelerator.is_main_process:
        state.save(out, name=out.name, keep=config.keep)
    state.accelerator.wait_for_everyone()


def _write(metrics: MetricsFile | None, state: TrainState, kind: str, numbers: dict[str, float]) -> None:
    if metrics is not None:
        metrics.write(step=state.step, samples=state.samples, kind=kind, **numbers)


def _over_ranks(metrics: Metrics, accelerator: Accelerator) -> Metrics:
    if accelerator.num_processes == 1:
        return metrics
    return {name: accelerator.reduce(value, "mean") for name, value in metrics.items()}


def _require_finite(numbers: dict[str, float], step: int, batch: Batch) -> None:
    if not torch.isfinite(torch.tensor(numbers["loss"])):
        raise RuntimeError(
            f"the loss is {numbers['loss']} at step {step} (last samples: {', '.join(batch.keys[:4])}, ...); "
            "lower optimizer.lr, or use precision=no; the last checkpoint is from before"
        )


def _evaluating(task: Task) -> ExitStack:
    """Evaluation mode for the trained parts, training mode again afterwards."""
    stack = ExitStack()
    for name in task.trained:
        module = getattr(task, name)
        module.eval()
        stack.callback(module.train)
    return stack

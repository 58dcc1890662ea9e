"""The one training loop. The only importer of accelerate, with the state it saves."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from data_pipeline.batch import Batch
from ldm.images import grid, save_png
from ldm.training.ema import EMA
from ldm.training.faults import Outcome, Saves, Skips, gradient_norms, step_unless
from ldm.training.gathering import over_ranks
from ldm.training.memory import SpeedConfig, check_device, sdpa_order, speed_up
from ldm.training.metrics import Console, Means, Meter, MetricsFile, floats, rates
from ldm.training.microbatch import gradients
from ldm.training.optim import (
    OptimizerConfig,
    build_optimizer,
    check_groups,
    learning_rate,
    set_learning_rate,
)
from ldm.training.posthoc import save_snapshot
from ldm.training.ranks import Ranks
from ldm.training.report import Reporter
from ldm.training.runs import flat
from ldm.training.sharding import by_blocks, check, full
from ldm.training.state import TrainState
from ldm.training.stopping import StopSignal
from ldm.training.tasks import Task, bare
from ldm.training.trackers import start_trackers, stop_trackers, track, track_picture
from ldm.training.watch import Watch

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
    best: bool = False  # keep the checkpoint of the lowest validation loss besides; each is then validated
    max_skips: int = 10  # steps in a row with a loss or a gradient that is not finite, before the run gives up
    timeout_seconds: float = 1800.0  # without progress in any process, before the run gives up


@dataclass(frozen=True)
class Inspection:
    """What the loop looks at now and then: held-out samples, and those to picture.

    forgetting: the base model's own samples, in fine-tuning: a loss that rises there tells what is forgotten.
    """

    validation: Batch | None
    preview: Batch
    forgetting: Batch | None = None


def train(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    inspection: Inspection,
    config: TrainConfig,
    out: Path,
    accelerator: Accelerator,
    meter: Meter,
) -> TrainState:
    """Train until `config.samples` are consumed, resuming what stands in `out`; returns the final state.

    `batches(start)` yields this process's share of every global batch from sample `start` on. SIGTERM, SIGINT
    and SIGUSR1 stop after the step under way, with a checkpoint (`TrainState.stopped`). All randomness is a function
    of (seed, samples consumed), so N steps, a resume and N more give the bytes that 2N steps give. RuntimeError, on
    all processes, where going on makes no sense: see `Skips`, `Saves` and `gradients`.
    """
    state = prepare(task, config, accelerator)
    resumed = state.resume(out)
    total_steps = -(-config.samples // config.batch_size)
    main = accelerator.is_main_process
    metrics = MetricsFile(out / "metrics.jsonl", state.samples if resumed else -1) if main else None
    console = Console(state.samples, total_steps * config.batch_size, shown=main)
    reporter = Reporter(out, wanted=main)
    start_trackers(accelerator, out, state.step, flat(asdict(config)))
    means, stop = Means(), StopSignal()
    inspected = inspection.validation is not None or inspection.forgetting is not None
    skips = Skips(config.max_skips, scaled=accelerator.scaler is not None)
    saves = Saves(out, config.keep, saved=state.step if resumed else -1)

    def every(steps: int) -> bool:
        return bool(steps) and (state.step % steps == 0 or state.step == total_steps)

    def look() -> None:
        for step, keys in skips.look(state.ranks).items():
            samples = state.samples - (state.step - step) * config.batch_size
            _say_skipped(metrics, step, samples, keys)
        skips.check()

    def save(*, last: bool) -> None:
        look()
        state.mark("saving")
        with state.whole():
            problem = saves.save(state, last=last)
        if problem:
            _write(metrics, state, "failed save", {"reason": problem})

    with stop, sdpa_order(config.speed.sdpa_order), Watch(state, out, config.timeout_seconds):
        if state.step < total_steps:
            stream = batches(state.samples)
        while state.step < total_steps:
            if stop.asked(state.ranks):
                state.stopped = True
                break
            state.mark("loading data")
            batch = meter.next(stream).to(accelerator.device, non_blocking=True)
            lr = learning_rate(config.optimizer, state.step, total_steps)
            set_learning_rate(state.optimizers.values(), lr)

            outcome = update(state, batch, config, means)
            for ema in state.emas.values():
                ema.update(state.step, outcome.skipped)
            state.step += 1
            state.samples += config.batch_size
            skips.note(state.step, outcome)
            meter.end()
            console.advance(config.batch_size)

            if skips.full or every(config.log_steps):
                look()
            if every(config.log_steps):
                numbers = _finite(floats({k: over_ranks(v, "mean") for k, v in means.pop().items()}))
                numbers |= {"lr": lr, **rates(state.optimizers), **meter.read(state.ranks, total_steps - state.step)}
                console.show(state.step, numbers)
                _write(metrics, state, "train", numbers)
            if inspected and (every(config.validate_steps) or (config.best and every(config.save_steps))):
                state.mark("validating")
                numbers = inspect(state, inspection)
                if config.best and "loss" in numbers:
                    state.held_out = (state.step, numbers["loss"])
                console.show(state.step, {f"validation {k}": v for k, v in numbers.items()})
                _write(metrics, state, "validation", numbers)
                reporter.update()
            if every(config.preview_steps):
                state.mark("drawing previews")
                if main or accelerator.is_fsdp2:  # which needs all
                    _attempt("preview", lambda: preview(state, inspection.preview, out))
            if every(config.snapshot_steps):
                state.mark("saving a snapshot")
                with state.whole():
                    if main:
                        _attempt("snapshot", lambda: save_snapshot(state.emas, out, state.step))
            if every(config.save_steps):
                save(last=state.step == total_steps)
                reporter.update()
        look()
        if state.stopped:
            save(last=True)
            if main:
                log.info("stopped at step %d of %d; run the same command to go on", state.step, total_steps)
    console.close()
    stop_trackers(accelerator)
    return state


def prepare(task: Task, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """Move the task to its device, wrap or shard what is trained, and give each part its optimizer and average."""
    check_device(config.speed, config.precision, accelerator.device)
    _share_out(task, config, accelerator)
    check_groups({name: getattr(task, name) for name in task.trained}, config.optimizer)
    task.to(accelerator.device)
    speed_up(task, config.speed, accelerator.device)
    optimizers, emas = {}, {}
    for name in task.trained:
        module = getattr(task, name).train()
        optimizer = build_optimizer(module, config.optimizer, name)
        if accelerator.is_fsdp2:
            module = accelerator.prepare_model(by_blocks(module), evaluation_mode=True)  # precision by autocast
        module, optimizers[name] = accelerator.prepare(module, optimizer)
        setattr(task, name, module)
        sigmas = config.snapshot_sigmas if config.snapshot_steps else ()
        emas[name] = EMA(bare(module), config.ema, config.ema_decays, sigmas)
    ranks = Ranks(2 * config.timeout_seconds)  # the watch, which says more, comes first
    return TrainState(task, optimizers, emas, accelerator, ranks=ranks, accumulate=config.accumulate)


def _share_out(task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError for what accelerate's config asks and cannot be done; else see that FSDP2 is had where asked."""
    asked = {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"}
    if "DEEPSPEED" in asked:
        raise ValueError(
            "DeepSpeed is not supported: use FSDP2, scripts/accelerate/fsdp2.yaml, which shares out what ZeRO does "
            "(fsdp_reshard_after_forward: false is its stage 2, true its stage 3)"
        )
    state = accelerator.state
    if "FSDP" in asked and state.distributed_type == DistributedType.MULTI_CPU:  # where accelerate leaves it out
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type == DistributedType.FSDP:
        check(task, config.optimizer.kind, config.precision, config.speed, state.fsdp_plugin)
        # By autocast as everywhere: accelerate's policy would round what goes in, timesteps too, to 16 bits.
        state.fsdp_plugin.mixed_precision_policy = None


def update(state: TrainState, batch: Batch, config: TrainConfig, means: Means) -> Outcome:
    """One optimizer step of every trained part, from gradients accumulated over the micro-batches; or of none.

    If a gradient is not finite no part steps, on any process, and no buffer has changed. Nothing waits for the device.
    """
    before = [(buffer, buffer.clone()) for buffer in state.changing()]

    @torch.no_grad()
    def undo() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    finite, measured = gradients(state, batch, config.seed, undo)
    for metrics, samples in measured:
        means.add(metrics, samples)
    norms = {name: full(norm) for name, norm in gradient_norms(state, config.optimizer.clip).items()}
    skipped = ~torch.stack(list(norms.values())).isfinite().all()
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(torch.where(skipped, value, buffer))
    for name, norm in norms.items():
        means.add({"gradient": norm})
        step_unless(skipped, state.optimizers[name])
    return Outcome(skipped, finite, [micro.keys for micro in batch.split(len(finite))])


def inspect(state: TrainState, inspection: Inspection) -> dict[str, float]:
    """The numbers of the held-out samples, and those of the base model's own under "kept/"."""
    numbers: dict[str, float] = {}
    if inspection.validation is not None:
        numbers |= validate(state, inspection.validation)
    if inspection.forgetting is not None:
        numbers |= {f"kept/{name}": value for name, value in validate(state, inspection.forgetting).items()}
    return numbers


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
    if images is not None and state.accelerator.is_main_process:
        columns = state.task.columns or (8 if len(images) > 4 else len(images))
        path = out / "previews" / f"step-{state.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = grid(images.float().cpu(), columns, scale=max(1, 128 // images.shape[-1]))
        save_png(sheet, path)
        track_picture(state.accelerator, state.step, sheet)


def _attempt(what: str, write: Callable[[], object]) -> None:
    """What a run can do without: a disk that is full, or a GPU, is warned of."""
    try:
        write()
    except (OSError, torch.OutOfMemoryError) as error:
        log.warning("no %s: %s; going on", what, " ".join(str(error).split()))


def _say_skipped(metrics: MetricsFile | None, step: int, samples: int, keys: list[str]) -> None:
    """A line in the log and one in `metrics.jsonl`, by the main process."""
    if metrics is None:
        return
    why = f"the loss is not finite, of some of {len(keys)} samples" if keys else "the gradient is not finite"
    shown = f": {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else ""
    log.warning("step %d was skipped, as %s%s", step, why, shown)
    values: dict[str, Any] = {"step": step, "samples": samples, "kind": "skipped", "keys": keys}
    _attempt("line of metrics", lambda: metrics.write(**values))


def _write(metrics: MetricsFile | None, state: TrainState, kind: str, numbers: Mapping[str, float | str]) -> None:
    if metrics is not None:
        values = {"step": state.step, "samples": state.samples, "kind": kind, **numbers}
        _attempt("line of metrics", lambda: metrics.write(**values))
        track(state.accelerator, kind, state.step, numbers)


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    """Without means that a skipped step has spoilt."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _evaluating(task: Task) -> ExitStack:
    """Evaluation mode for the trained parts, training mode again afterwards."""
    stack = ExitStack()
    for name in task.trained:
        module = getattr(task, name)
        module.eval()
        stack.callback(module.train)
    return stack

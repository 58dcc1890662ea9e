"""The gradients of a step, a micro-batch at a time, in as many as memory asks for."""

import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from ldm.training.randomness import seed_torch
from ldm.training.ranks import alone
from ldm.training.state import TrainState
from ldm.training.tasks import Metrics, bare

log = logging.getLogger(__name__)

Measured = list[tuple[Metrics, int]]
"""Metrics, and of how many samples they are means."""


def gradients(state: TrainState, batch: Batch, seed: int, undo: Callable[[], None]) -> tuple[Tensor, Measured]:
    """Leave in the parameters the gradients of the mean loss over `batch`; step nothing.

    -> [micro-batches] bool, on the device: whether each one's losses are finite; and what was measured. One that is not
    finite makes its gradients NaN, which the mean over processes carries to all of them.

    Out of memory, the batch is cut into twice as many micro-batches and done again, after `undo`, which puts the
    buffers back as they were: the gradients are those of the whole. Several processes can only do so together, so a
    batch of a new shape is tried before. RuntimeError where that does not help: where one sample is too much, the task
    needs its batch whole, or memory ran out later.
    """
    if tried(state) and (shape := _shape(batch)) not in state.shapes:
        while state.ranks.largest(not _fits(state, batch, seed, undo)):
            _split_more(state, batch)
        state.shapes.add(shape)
    while True:
        try:
            return _accumulated(state, batch, seed)
        except torch.OutOfMemoryError as error:
            if state.ranks.count > 1:
                raise RuntimeError(
                    f"rank {state.ranks.rank} (process {os.getpid()} on {socket.gethostname()}) is out of memory at "
                    f"step {state.step}; start again with {_smaller(state)} ({error})"
                ) from error
        _drop(state, undo)  # only here: an exception that is being handled holds on to tensors
        _split_more(state, batch)


def tried(state: TrainState) -> bool:
    """Whether batches of a new shape are tried: where torch can say that memory is out, instead of being killed.

    Not with shards, which all processes gather together, so that none can be alone.
    """
    return state.accelerator.device.type == "cuda" and not state.accelerator.is_fsdp2


def _accumulated(state: TrainState, batch: Batch, seed: int) -> tuple[Tensor, Measured]:
    accelerator, task = state.accelerator, state.task
    measured: Measured = []
    finite = []
    seed_torch(seed, "step", state.samples, state.ranks.rank)
    micro_batches = batch.split(state.accumulate)
    for micro in micro_batches:
        share = len(micro) / len(batch)
        good = torch.ones((), dtype=torch.bool, device=accelerator.device)
        with ExitStack() as stack:
            if micro is not micro_batches[-1]:  # gradients cross the network once a step
                for name in task.trained:
                    stack.enter_context(accelerator.no_sync(getattr(task, name)))
            state.mark("in a forward pass")
            for _, loss, metrics in task.losses(micro, state.step):
                state.mark("in a backward pass")
                fine = loss.detach().isfinite()
                accelerator.backward(loss * torch.where(fine, share, torch.nan))
                good = good & fine
                measured.append((metrics, len(micro)))
        finite.append(good)
    return torch.stack(finite), measured


def _fits(state: TrainState, batch: Batch, seed: int, undo: Callable[[], None]) -> bool:
    """Whether the passes of one micro-batch fit into memory: tried by each process alone, leaving no trace.

    Before the first step the optimizers' memory is not taken yet: two numbers a parameter, as AdamW's, stand in for it.
    """
    task = state.task
    wrapped = {name: getattr(task, name) for name in task.trained}
    micro = max(batch.split(state.accumulate), key=len)
    seed_torch(seed, "step", state.samples, state.ranks.rank)
    try:
        with alone():
            for name, module in wrapped.items():
                setattr(task, name, bare(module))
            new = [o for o in state.optimizers.values() if not o.state]
            taken = [torch.empty_like(p) for o in 2 * new for group in o.param_groups for p in group["params"]]
            for _, loss, _ in task.losses(micro, state.step):
                loss.backward()
            del taken
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for name, module in wrapped.items():
            setattr(task, name, module)
        _drop(state, undo)


def _split_more(state: TrainState, batch: Batch) -> None:
    if state.task.whole:
        raise RuntimeError(f"out of memory at step {state.step}; start again with {_smaller(state)}")
    if state.accumulate >= len(batch):
        raise RuntimeError(
            "out of memory with one sample in a micro-batch; use speed.checkpointing=true, precision=bf16, "
            "smaller pictures or a smaller model"
        )
    state.accumulate = min(2 * state.accumulate, len(batch))
    if state.ranks.rank == 0:
        log.warning("out of memory at step %d: going on with %d micro-batches", state.step, state.accumulate)


def _smaller(state: TrainState) -> str:
    return "task.micro_batch, or a lower one" if state.task.whole else f"accumulate={2 * state.accumulate}"


def _drop(state: TrainState, undo: Callable[[], None]) -> None:
    for optimizer in state.optimizers.values():
        optimizer.zero_grad()
    undo()
    if state.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _shape(batch: Batch) -> tuple[torch.Size, ...]:
    tensors = [batch.image, batch.moments, *batch.text.values()]
    return tuple(t.shape for t in tensors if t is not None)

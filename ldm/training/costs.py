"""What a run costs before it is begun: parameters, arithmetic, memory, time and disk."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.reader import ShardReader
from ldm.training.engine import TrainConfig
from ldm.training.memory import checkpoint_blocks
from ldm.training.metrics import clock
from ldm.training.optim import OptimizerConfig
from ldm.training.peaks import peak_flops
from ldm.training.tasks import Task

ASSUMED_SHARE = 0.35
"""Of a GPU's peak: what good training codes reach on U-Nets of this kind."""

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "lion": 4.0, "prodigy": 16.0, "sgd": 4.0}
"""What an optimizer keeps of each parameter; of Adafactor see `optimizer_bytes`."""


@dataclass(frozen=True)
class Summary:
    """Parameters by component, and of what is trained; FLOP of a sample and of the run; samples of the data."""

    parameters: dict[str, int]
    trained: int
    flop_per_sample: float
    flop: float
    data: str
    data_samples: int
    epochs: float

    def __str__(self) -> str:
        lines = [f"{name}: {count / 1e6:.2f} M parameters" for name, count in self.parameters.items()]
        lines.append(f"trained: {self.trained / 1e6:.2f} M")
        each, total = self.flop_per_sample / 1e9, self.flop / 1e12
        lines.append(f"{each:.2f} GFLOP a sample, forward and backward; {total:.1f} TFLOP in all")
        lines.append(f"{self.data_samples} samples in {self.data}; {self.epochs:.1f} epochs")
        return "\n".join(lines)


class Trial:
    """A training step's forward and backward passes over two samples of the data, on this machine's CPU, in float32.

    As late in the run as can be, when everything that is to be trained is. Nothing in the task is changed. On several
    processes all must do the same, as losses gather.
    """

    def __init__(self, task: Task, data: list[ShardReader], config: TrainConfig, data_config: DataConfig) -> None:
        self.task, self.step = task, -(-config.samples // config.batch_size)
        loader = Loader(data, replace(data_config, workers=0), batch_size=min(2, config.batch_size), seed=config.seed)
        self.batch = next(iter(loader))

    def flop(self) -> float:
        """FLOP of matrix products and convolutions, of a sample; 1 multiply-add = 2."""
        counter = FlopCounterMode(display=False)
        with counter:
            self._passes()
        return counter.get_total_flops() / len(self.batch)

    def saved_bytes(self) -> float:
        """What the forward pass keeps for the backward pass, parameters apart, of a sample."""
        parameters = {p.untyped_storage().data_ptr() for p in self.task.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in parameters:
                saved[place] = tensor  # held, so that no other takes its place
            return tensor

        def peak() -> None:
            sizes.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
            saved.clear()

        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._passes(peak)
        return max(sizes) / len(self.batch)

    def seconds(self) -> float:
        """The time of both passes, of a sample."""
        began = time.perf_counter()
        self._passes()
        return (time.perf_counter() - began) / len(self.batch)

    def _passes(self, between: Callable[[], None] = lambda: None) -> None:
        changing = list(self.task.buffers())  # and what a part that is trained changes by itself, such as a codebook
        for name in () if self.task.partial else self.task.trained:
            changing += [p for p in getattr(self.task, name).parameters() if not p.requires_grad]
        before = [tensor.clone() for tensor in changing]
        for _, loss, _ in self.task.losses(self.batch, self.step):
            between()
            loss.backward()
        self.task.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)


def summarise(task: Task, data: list[ShardReader], config: TrainConfig, data_config: DataConfig) -> Summary:
    """What is known of a run at its start; makes one trial, see there."""
    flop, samples = Trial(task, data, config, data_config).flop(), sum(map(len, data))
    return Summary(
        parameters={name: _count(module) for name, module in task.components().items()},
        trained=_kept(task) if task.partial else sum(_count(getattr(task, name)) for name in task.trained),
        flop_per_sample=flop,
        flop=flop * config.samples,
        data=", ".join(data_config.paths),
        data_samples=samples,
        epochs=config.samples / samples,
    )


def memory_bytes(task: Task, config: TrainConfig) -> dict[str, float]:
    """What a device must hold besides activations, in bytes by what it is."""
    trained = [p for name in task.trained for p in getattr(task, name).parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    found = {
        "weights": float(sum(p.numel() * p.element_size() for p in task.parameters())),
        "gradients": 4.0 * numbers,
        "optimizer": optimizer_bytes(trained, config.optimizer),
        "averages": 4.0 * numbers * _averages(config),
    }
    if config.precision != "no":
        found["16-bit copies of trained weights"] = 2.0 * numbers  # which autocast keeps until the step is over
    return found


def peak_bytes(trial: Trial, config: TrainConfig) -> dict[str, float]:
    """What a device must hold in a step, in bytes by what it is: `memory_bytes` and a micro-batch's activations."""
    micro = -(-config.batch_size // config.accumulate)
    return memory_bytes(trial.task, config) | {f"activations of {micro} samples": trial.saved_bytes() * micro}


def optimizer_bytes(parameters: list[nn.Parameter], config: OptimizerConfig) -> float:
    """What the optimizer keeps of these parameters, but for a few numbers, in bytes."""
    if config.kind == "adafactor":  # of a matrix [O, rest], its row and its column means
        return 4.0 * sum(p.shape[0] + p[0].numel() if p.ndim > 1 else p.numel() for p in parameters)
    if config.kind == "sgd" and not config.betas[0]:
        return 0.0
    return STATE_BYTES[config.kind] * sum(p.numel() for p in parameters)


def checkpoint_bytes(task: Task, config: TrainConfig) -> float:
    """The size of one checkpoint: what is trained with its averages and optimizer, and the model of all components."""
    memory = memory_bytes(task, config)
    own = 4.0 * _kept(task)
    model = own if task.partial else 4.0 * sum(_count(module) for module in task.components().values())
    return own + memory["averages"] + memory["optimizer"] + model


def estimate(task: Task, data: list[ShardReader], config: TrainConfig, data_config: DataConfig, tflops: float) -> str:
    """The summary, and what the run will take of memory, time and disk, as text; the task is of no use afterwards.

    tflops: TFLOP/s that the device sustains; 0: a share of a known GPU's peak, else what this machine's CPU just did.
    """
    summary = summarise(task, data, config, data_config)
    if config.speed.checkpointing:
        for name in task.trained:
            checkpoint_blocks(getattr(task, name))
    trial = Trial(task, data, config, data_config)
    memory = peak_bytes(trial, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, config.precision, tf32=config.speed.tf32)
    if tflops:
        rate, why = tflops * 1e12, "as given"
    elif peak:
        rate, why = ASSUMED_SHARE * peak, f"{ASSUMED_SHARE:.0%} of the peak of {torch.cuda.get_device_name(device)}"
    else:
        rate, why = summary.flop_per_sample / trial.seconds(), "as this CPU has just done"
    checkpoint = checkpoint_bytes(task, config)
    steps = -(-config.samples // config.batch_size)
    snapshots = -(-steps // config.snapshot_steps) if config.snapshot_steps else 0  # the last step has one, too
    disk = (config.keep + 1 + config.best) * checkpoint
    disk += snapshots * len(config.snapshot_sigmas) * memory["gradients"]  # of the size of the trained parameters
    halved = " (in 16 bits between half and all of that)" if config.precision != "no" else ""
    parts = ", ".join(f"{what} {_size(count)}" for what, count in memory.items())
    return "\n".join(
        [
            str(summary),
            f"memory: {_size(sum(memory.values()))}: {parts}{halved}",
            f"time: {clock(summary.flop / rate)} at {rate / 1e12:.3g} TFLOP/s, {why}; data and validation come on top",
            f"disk: {_size(checkpoint)} a checkpoint, {_size(disk)} at most for {config.keep} and one being written"
            + (f" and {snapshots} snapshots" if snapshots else ""),
        ]
    )


def _averages(config: TrainConfig) -> int:
    return 1 + len(config.ema_decays) + (len(config.snapshot_sigmas) if config.snapshot_steps else 0)


def _kept(task: Task) -> int:
    """Numbers that a checkpoint keeps of what is trained, to go on from it."""
    return sum(tensor.numel() for name in task.trained for tensor in task.kept(getattr(task, name)).values())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, least in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= least:
            return f"{count / least:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"

"""A task so small that a run takes a moment, with a place to plant faults; and a program that is one process of a run.

RANK=0 WORLD_SIZE=2 ... python -m tests.training.planted OUT FAULT key=value ...
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.training.gathering import over_ranks
from ldm.training.tasks import Metrics, Task, bare

BATCH = 8
Plant = Callable[[Batch, int], None]


class Line(nn.Module):
    """A linear layer that remembers the mean of its inputs."""

    mean: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer = nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.dropout(x, self.dropout, self.training))  # of the global generator


class TinyTask(Task):
    """Regression on the pictures' mirror images; `plant` sees every micro-batch before anything is computed."""

    trained = ("line",)
    seed = 0

    def __init__(self, plant: Plant | None = None, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = Line(dropout)
        self.plant = plant
        self.offset = 0.0  # added to the loss, and no matter to its gradient

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        if self.plant is not None:
            self.plant(batch, step)
        x = batch.image.flatten(1)
        with torch.no_grad():
            bare(self.line).mean.lerp_(over_ranks(x.mean(0), "mean"), 0.1)
        loss = (self.line(x) - x.flip(1)[:, :3]).square().mean() + self.offset
        yield "line", loss, {"loss": loss.detach()}

    def validate(self, batch: Batch) -> Metrics:
        return {"loss": self.line(batch.image.flatten(1)).square().mean()}

    def preview(self, batch: Batch) -> Tensor | None:
        return None

    def components(self) -> dict[str, nn.Module]:
        return {}

    def settings(self) -> dict[str, object]:
        return {}


def batches(
    rank: int = 0, world: int = 1, size: int = BATCH, stuck: Path | None = None
) -> Callable[[int], Iterator[Batch]]:
    """The data: position p is a picture of its own, drawn from p.

    stuck: in rank 1 there is none from step 3 on; this file appears then.
    """

    def picture(position: int) -> Tensor:
        return torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(position)) * 2 - 1

    def stream(start: int) -> Iterator[Batch]:
        while True:
            places = range(start + rank * size // world, start + (rank + 1) * size // world)
            names = [f"s{p}" for p in places]
            if stuck is not None and rank == 1 and start >= 3 * size:
                stuck.touch()
                time.sleep(1000)
            yield Batch(torch.stack([picture(p) for p in places]), names, torch.tensor(list(places)), names)
            start += size

    return stream


def tiny_run(out: Path, plant: Plant | None = None, **settings: Any) -> Any:
    """Train the tiny task as `settings` of TrainConfig say; -> its state."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ldm.training.engine import Inspection, TrainConfig, train
    from ldm.training.metrics import Meter

    dropout, stuck = settings.pop("dropout", 0.25), settings.pop("stuck", None)
    given = settings.pop("source", None)
    settings = {
        "batch_size": BATCH,
        "samples": 6 * BATCH,
        "log_steps": 1,
        "save_steps": 2,
        "preview_steps": 0,
    } | settings
    config = TrainConfig(**settings)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * config.timeout_seconds))
    accelerator = Accelerator(cpu=True, mixed_precision=config.precision, kwargs_handlers=[patience])
    source = given or batches(accelerator.process_index, accelerator.num_processes, config.batch_size, stuck)
    out.mkdir(parents=True, exist_ok=True)
    meter = Meter(accelerator.device, config.batch_size)
    return train(
        TinyTask(plant, dropout), source, Inspection(None, next(batches()(0))), config, out, accelerator, meter
    )


def planted(fault: str, mark: Path) -> Plant:
    """What befalls rank 1 in its step 3; "memory:N" befalls it whenever a batch has more than N samples.

    The file `mark` appears when it does.
    """
    word, _, number = fault.partition(":")
    rank = int(os.environ.get("RANK", "0"))

    def plant(batch: Batch, step: int) -> None:
        if word == "memory" and rank == 1 and len(batch) > int(number):
            raise torch.OutOfMemoryError("planted")
        if rank != 1 or step != 3:
            return
        mark.touch()
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if word == "raise":
            raise ValueError("planted here")
        if word == "late memory":
            raise torch.OutOfMemoryError("planted")
        if word == "nan":
            batch.image[0, 0] = float("nan")
        if word == "term":
            os.kill(os.getpid(), signal.SIGTERM)

    return plant


def main() -> None:
    """Run as the command line says; exit as `ldm train` does."""
    import logging

    from ldm.training import microbatch
    from ldm.training.optim import OptimizerConfig
    from ldm.training.ranks import part
    from ldm.training.stopping import STOPPED

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    out, fault, *words = sys.argv[1:]
    settings: dict[str, Any] = {w.partition("=")[0]: float(w.partition("=")[2]) for w in words}
    settings = {key: int(value) if value.is_integer() else value for key, value in settings.items()}
    settings["stuck"] = Path(f"{out}-fault") if fault == "stuck" else None
    if "memory" in fault:
        microbatch.tried = lambda state: True
        settings["dropout"] = 0.0
        settings["optimizer"] = OptimizerConfig(kind="sgd", lr=1.0, betas=(0.0, 0.0), clip=0.0, weight_decay=0.0)
    state = tiny_run(Path(out), planted(fault, Path(f"{out}-fault")), **settings)
    part()
    sys.exit(STOPPED if state.stopped else 0)


if __name__ == "__main__":
    main()

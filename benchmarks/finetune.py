"""LoRA fine-tuning, ours against diffusers and peft: trained parameters, time of a step, memory, our estimate of it.

    OMP_NUM_THREADS=1 python -m benchmarks.finetune --out finetune.json            # Stable Diffusion 1 at a fifth
    OMP_NUM_THREADS=1 python -m benchmarks.finetune --size sd15 --blocks 3         # 1.5 at its size; 24 GB of memory

Run it from the repository's root; `--help` lists the options. A step goes from latents and text, computed before, to
the stepped adapter. Theirs is that of diffusers' `train_text_to_image_lora.py`, put together from the public classes
that the script calls, in its order; ours is that of `ldm finetune lora`. Both load one folder of weights and start from
the same adapter. Ours counts only if one step with the same noise gives the same loss, gradients and adapter. Memory is
measured on each side in a process of its own, with the autoencoder and the text encoder loaded, as both keep them.
"""

import gc
import importlib
import json
import logging
import multiprocessing
import re
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from torch import Tensor

from benchmarks.data import photographs
from benchmarks.harness import Comparison, Schedule, Subject, compare, table, write
from benchmarks.instruments import MB, instruments
from benchmarks.peers import SIZES as NETWORKS
from benchmarks.peers import ZERO_STD, Sizes
from benchmarks.training import WEIGHT_TYPE, Draws, make_bench
from data_pipeline.batch import Batch
from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, open_data
from data_pipeline.sources.folder import FolderConfig, FolderSource
from ldm.adapters.lora import AdapterConfig
from ldm.checkpoints.layouts import unet as unet_layout
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text import TextConfig, import_open_clip
from ldm.models.unet import UNetConfig
from ldm.training.costs import Trial, peak_bytes
from ldm.training.engine import TrainConfig, prepare, update
from ldm.training.finetuning import FinetuningTask
from ldm.training.memory import SpeedConfig, checkpoint_blocks
from ldm.training.methods import FinetuningTaskConfig
from ldm.training.metrics import Means, floats
from ldm.training.optim import OptimizerConfig, learning_rate, set_learning_rate
from ldm.training.randomness import SampleRandomness

SIZES = {
    "tiny": replace(NETWORKS["tiny"], image_px=16),
    "small": Sizes(
        UNetConfig(channels=64, context_dim=256),
        AutoencoderConfig(channels=24, norm_groups=8),
        TextConfig(width=256, layers=4, heads=4, embed_dim=0, activation="quick_gelu", pad_id=49_407),
        latent_px=32,
        image_px=256,
        batch=4,
    ),
    "sd15": replace(NETWORKS["sd15"], batch=1),
}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
RANK = 4  # the script's default, and its alpha
OPTIMIZER = OptimizerConfig(schedule="constant")  # but for that, the script's defaults
EMA_DECAY = 0.99  # of `ldm finetune`; the script has no average
TOLERANCE = {"no": 1e-3, "bf16": 2e-1}
LOG_STEPS = 20
STEPS_MEASURED = 3
"""From the first to where the optimizer and the kernels' buffers stand."""
IMPORTED = (
    "peft",
    "diffusers.models.autoencoders.vae",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.optimization",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.training_utils",
    "transformers.models.clip.modeling_clip",
)
"""By both sides, before memory is counted, as all are loaded lazily."""
OURS, THEIRS = "ours", "diffusers + peft"


@dataclass(frozen=True)
class Bench:
    """Where and at what size the steps are: the folder of weights, the device, and what both sides are told."""

    folder: Path
    sizes: Sizes
    device: torch.device
    checkpointing: bool = False
    channels_last: bool = False

    @property
    def precision(self) -> str:
        """no | bf16"""
        return "bf16" if self.device.type == "cuda" else "no"

    def batch(self) -> Batch:
        """Latents' moments and text as if computed before: noise, the same in every process."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(0)
        side, channels, count = sizes.latent_px, sizes.autoencoder.latent_channels, sizes.batch
        mean, logvar = torch.randn(2, count, channels, side, side, generator=generator)
        context = torch.randn(count, sizes.text.context_length, sizes.unet.context_dim, generator=generator)
        names = [f"picture {i}" for i in range(count)]
        return Batch(
            torch.empty(count, 3, 0, 0),
            names,
            torch.arange(count),
            names,
            moments=torch.cat([mean, logvar - 4], dim=1),
            text={"context": context},
        ).to(self.device)


class Ours:
    """The step of `ldm finetune lora`, by the loop's own functions; `changed` are settings of the loop."""

    def __init__(self, bench: Bench, **changed: Any) -> None:
        self.config = replace(training_of(bench), **changed)
        self.task = task_of(bench)
        self.state = prepare(self.task, self.config, Accelerator(mixed_precision=bench.precision))
        self.ema, self.optimizer = self.state.emas["denoiser"], self.state.optimizers["denoiser"]
        self.batch, self.means = bench.batch(), Means()
        self.parameters = {named_as_theirs(bench.sizes.unet, n): p for n, p in self.ema.parameters.items()}
        self.start: dict[str, Tensor] = {}

    def step(self) -> Tensor:
        """One turn of the loop, without what it only does now and then, but for the log."""
        state, config = self.state, self.config
        set_learning_rate(state.optimizers.values(), learning_rate(config.optimizer, state.step, config.samples))
        outcome = update(state, self.batch, config, self.means)
        self.ema.update(state.step, outcome.skipped)
        state.step += 1
        state.samples += len(self.batch)
        if state.step % LOG_STEPS == 0:
            floats(self.means.pop())
        return outcome.skipped

    def proof(self) -> list[Tensor]:
        """What one step from `start` makes: see `moved`."""
        restart(self.parameters, self.start, self.optimizer)
        self.means = Means()
        self.step()
        return moved(self.means.pop()["loss"], self.start, self.parameters, self.optimizer)

    def subject(self, start: dict[str, Tensor]) -> Subject:
        """To be timed, its step checked from that adapter on, which has diffusers' names."""
        self.start = start
        return Subject(self.step, lambda _: self.proof())


class Theirs:
    """The step of diffusers 0.42's examples/text_to_image/train_text_to_image_lora.py, from the same public classes."""

    def __init__(self, bench: Bench) -> None:
        import_open_clip()  # declares what diffusers' imports need beside a CPU build of torch
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        from transformers import CLIPTextModel

        self.bench, batch = bench, bench.batch()
        self.accelerator = Accelerator(mixed_precision=bench.precision)
        self.scheduler = DDPMScheduler.from_pretrained(bench.folder, subfolder="scheduler")
        self.vae: Any = AutoencoderKL.from_pretrained(bench.folder, subfolder="vae")
        self.text: Any = CLIPTextModel.from_pretrained(bench.folder, subfolder="text_encoder")
        unet: Any = UNet2DConditionModel.from_pretrained(bench.folder, subfolder="unet")
        frozen: Any
        for frozen in (self.vae, self.text, unet):
            frozen.requires_grad_(False)
            frozen.to(bench.device, WEIGHT_TYPE[bench.precision])
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
        cast_training_params(unet, dtype=torch.float32)
        for part in (self.vae, self.text):  # a step of the script reads them; this one leaves them in a mapped file
            sum(p.sum() for p in part.parameters())
        if bench.channels_last:
            unet.to(memory_format=torch.channels_last)
        if bench.checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        adam, trained = OPTIMIZER, [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay, eps=adam.eps
        )
        rate = get_scheduler("constant", optimizer)
        self.unet, self.optimizer, self.rate = self.accelerator.prepare(unet, optimizer, rate)
        named = self.accelerator.unwrap_model(self.unet).named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.trained = trained
        assert batch.moments is not None
        self.posterior, self.context = DiagonalGaussianDistribution(batch.moments), batch.text["context"]
        self.positions = batch.positions
        self.start = started(self.parameters)

    def step(self, draws: Draws | None = None) -> Tensor:
        """The script's inner loop in its order; `draws` instead of its own random numbers."""
        weight_type = WEIGHT_TYPE[self.bench.precision]
        with self.accelerator.accumulate(self.unet):
            known = self.posterior
            latents = known.sample() if draws is None else known.mean + known.std * draws.posterior
            latents = (latents * self.vae.config.scaling_factor).to(weight_type)
            noise, steps = torch.randn_like(latents), self.scheduler.config.num_train_timesteps
            t = torch.randint(0, steps, (len(latents),), device=latents.device).long()
            if draws is not None:
                noise, t = draws.noise.to(noise), draws.t
            noisy = self.scheduler.add_noise(latents, noise, t)
            predicted = self.unet(noisy, t, self.context.to(weight_type), return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            self.accelerator.gather(loss.repeat(len(latents))).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, OPTIMIZER.clip)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        loss.detach().item()  # for its progress bar
        return loss.detach()

    def proof(self) -> list[Tensor]:
        """What one step from `start` makes: see `moved`."""
        restart(self.parameters, self.start, self.optimizer)
        random = SampleRandomness(0, self.positions, self.bench.device)
        shape = tuple(self.posterior.mean.shape[1:])
        t = (random.uniform("timestep").double() * self.scheduler.config.num_train_timesteps).long()
        loss = self.step(Draws(random.normal("posterior", shape), random.normal("noise", shape), t))
        return moved(loss, self.start, self.parameters, self.optimizer)

    def subject(self) -> Subject:
        """To be timed, its step checked from `start` on."""
        return Subject(self.step, lambda _: self.proof())


def task_of(bench: Bench) -> FinetuningTask:
    """What `ldm finetune lora` trains, with the script's adapter: rank, alpha and targets."""
    config = FinetuningTaskConfig(
        model=str(bench.folder),
        method="adapter",
        adapter=AdapterConfig(rank=RANK, alpha=RANK),
        held="bf16" if bench.precision == "bf16" else "float32",
        dropout=0.0,
    )
    return FinetuningTask(config, size=bench.sizes.image_px, seed=0)


def training_of(bench: Bench) -> TrainConfig:
    """How `ldm finetune lora` trains, with the script's optimizer."""
    return TrainConfig(
        batch_size=bench.sizes.batch,
        precision=bench.precision,
        ema=EMA_DECAY,
        optimizer=OPTIMIZER,
        speed=SpeedConfig(checkpointing=bench.checkpointing, channels_last=bench.channels_last),
    )


def named_as_theirs(config: UNetConfig, name: str) -> str:
    """The name of one of our adapter's parameters in diffusers' U-Net."""
    module, _, factor = name.partition(".lora_")
    (entry,) = unet_layout.diffusers(config, [f"{module}.weight"])
    return f"{entry.foreign[0].removesuffix('.weight')}.lora_{factor}"


def started(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter to start the check from: these, but for matrices of zeros, which would hide what comes before them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: p.detach().clone() if p.any() else torch.randn(p.shape, generator=generator).to(p) * ZERO_STD
        for name, p in parameters.items()
    }


@torch.no_grad()
def restart(parameters: Mapping[str, Tensor], start: dict[str, Tensor], optimizer: Any) -> None:
    """Put the adapter back to `start` and have the optimizer forget. Raises ValueError for other names or shapes."""
    if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in start.items()}:
        raise ValueError(f"the adapters differ: {len(parameters)} matrices against {len(start)}, or their shapes")
    for name, parameter in parameters.items():
        parameter.copy_(start[name])
    optimizer.optimizer.state.clear()


def moved(loss: Tensor, start: dict[str, Tensor], parameters: Mapping[str, Tensor], optimizer: Any) -> list[Tensor]:
    """What is compared: the loss; how far each matrix went, root mean square; AdamW's first moments.

    Those are the clipped gradients. Single numbers go as far for a gradient of rounding errors as for any other.
    """
    names = sorted(start)
    way = [(parameters[n].detach() - start[n]).double().square().mean().sqrt() for n in names]
    state = optimizer.optimizer.state
    return [loss, torch.stack(way) / OPTIMIZER.lr, *(state[parameters[n]]["exp_avg"] for n in names)]


@dataclass(frozen=True)
class Memory:
    """Of one side in a process of its own, in MB above what that holds with everything imported.

    loading: the most until models, adapter and optimizer stand. resting: after some steps, between two. step: the most
    in those. trained: numbers that learn.
    """

    loading: float
    resting: float
    step: float
    trained: int


class Gauge:
    """Memory in MB: on a GPU what torch has allocated, on a CPU what of the process is resident, by Linux's count."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> float:
        """What is held."""
        return torch.cuda.memory_allocated() / MB if self.cuda else self._status("VmRSS")

    def peak(self) -> float:
        """The most that was held since the last `reset`."""
        return torch.cuda.max_memory_allocated() / MB if self.cuda else self._status("VmHWM")

    def reset(self) -> None:
        """Have `peak` begin anew."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)

    @staticmethod
    def _status(name: str) -> float:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        assert found is not None
        return int(found[1]) * 1024 / MB


def memory_of(side: str, bench: Bench) -> Memory:
    """Load one side and do a few steps, in this process, which has done nothing before."""
    import_open_clip()  # declares what their imports need beside a CPU build of torch
    for module in IMPORTED:
        importlib.import_module(module)
    gauge = Gauge(bench.device)
    before = gauge.now()
    gauge.reset()
    subject = {OURS: Ours, THEIRS: Theirs}[side](bench)
    loading = gauge.peak()
    gauge.reset()
    for _ in range(STEPS_MEASURED):
        subject.step()
    gc.collect()
    trained = sum(p.numel() for p in subject.parameters.values())
    return Memory(loading - before, gauge.now() - before, gauge.peak() - before, trained)


def alone(side: str, bench: Bench) -> Memory:
    """`memory_of` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(memory_of, side, bench).result()


def estimated(bench: Bench, folder: Path) -> dict[str, float]:
    """What `ldm finetune lora --dry-run` says of memory, MB by what it is, on a few pictures that it writes there."""
    count = max(2, bench.sizes.batch)
    source = FolderSource(FolderConfig(str(photographs(folder / "photographs", count))))
    build(source, BuildConfig(size=bench.sizes.image_px), folder / "shards")
    data = DataConfig(str(folder / "shards"), size=bench.sizes.image_px)
    task, config = task_of(bench), training_of(bench)
    if bench.checkpointing:
        checkpoint_blocks(task.denoiser)
    trial = Trial(task, open_data(data), config, data)
    return {name: count / MB for name, count in peak_bytes(trial, config).items()}


def summary(steps: Comparison, memory: dict[str, Memory], estimate: dict[str, float]) -> list[str]:
    """A Markdown table of both sides and their ratios, and what our estimate of memory is worth."""
    rows = [steps.row(side) for side in (THEIRS, OURS)]
    theirs, ours = memory[THEIRS], memory[OURS]
    pairs: list[tuple[str, float | None, float | None]] = [
        ("trained parameters", theirs.trained, ours.trained),
        ("s/step, median", rows[0].median_s, rows[1].median_s),
        ("a step above resting, MB", rows[0].subject.peak_mb, rows[1].subject.peak_mb),
        ("most while loading, MB", theirs.loading, ours.loading),
        ("between steps, MB", theirs.resting, ours.resting),
        ("most in steps, MB", theirs.step, ours.step),
        ("most of the process, MB", max(theirs.loading, theirs.step), max(ours.loading, ours.step)),
    ]
    lines = [f"| | {THEIRS} | {OURS} | theirs / ours |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {_cell(a)} | {_cell(b)} | {f'{a / b:.3f}' if a and b else '-'} |" for name, a, b in pairs]
    total, parts = sum(estimate.values()), ", ".join(f"{name} {count:.0f}" for name, count in estimate.items())
    lines += ["", f"Speed-up: {rows[1].speedup:.3f} ({rows[1].low:.3f} to {rows[1].high:.3f})."] * bool(rows[1].speedup)
    lines += ["", f"Estimate of a dry run: {total:.0f} MB, {total / ours.step - 1:+.1%} of the most in steps: {parts}."]
    return [*lines, "Memory but for a step's is that of a process of its own, above what it holds with all imported."]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(
    size: Annotated[Literal["tiny", "small", "sd15"], typer.Option(help="tiny: to try it")] = "small",
    latent_px: Annotated[int, typer.Option(help="side of the latents; 0: the size's own")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="activations made again, on both sides")
    ] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="memory layout of both sides' U-Nets")] = False,
    blocks: Annotated[int, typer.Option(help="timed blocks of each subject")] = 10,
    min_block_s: Annotated[float, typer.Option(help="shortest block, s")] = 2.0,
    cpu_time: Annotated[
        bool, typer.Option(help="steps by this process's CPU seconds, for a CPU that others use as well; 1 thread")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON with every raw block")] = None,
) -> None:
    """Measure memory of both sides, then steps; print the tables, and write what is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = Accelerator().device
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        typer.echo("error: --cpu-time is for one thread on a CPU: set OMP_NUM_THREADS=1", err=True)
        raise typer.Exit(1)
    sizes = SIZES[size]
    if latent_px:
        factor = sizes.image_px // sizes.latent_px
        sizes = replace(sizes, latent_px=latent_px, image_px=factor * latent_px)
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as work:
        folder = make_bench(Path(work) / "model", sizes, device).folder
        bench = Bench(folder, sizes, device, checkpointing, channels_last)
        memory = {side: alone(side, bench) for side in (THEIRS, OURS)}
        estimate = estimated(bench, Path(work))
        gc.collect()
        tools = instruments(device, 8192 if device.type == "cuda" else 1024)
        if cpu_time:
            tools = replace(tools, clock=time.process_time)
        theirs, ours = Theirs(bench), Ours(bench)
        steps = compare(
            {THEIRS: theirs.subject(), OURS: ours.subject(theirs.start)},
            baseline=THEIRS,
            tolerance=TOLERANCE[bench.precision],
            title=f"LoRA step, {size}, latents of {sizes.latent_px} px, {bench.precision}{', CPU seconds' * cpu_time}",
            schedule=Schedule(blocks=blocks, min_block_s=min_block_s),
            tools=tools,
        )
    typer.echo("\n".join([table(steps), "", *summary(steps, memory, estimate)]))
    if out is not None:
        write(steps, out)
        document = json.loads(out.read_text(encoding="utf-8"))
        document |= {"memory_mb": {side: asdict(found) for side, found in memory.items()}, "estimate_mb": estimate}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

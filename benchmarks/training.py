"""One training step of a text-to-image model, ours against that of diffusers' `train_text_to_image.py`.

    OMP_NUM_THREADS=1 python -m benchmarks.training --out training.json      # a small model, on a CPU or a GPU
    python -m benchmarks.training --full --out training.json                 # Stable Diffusion 2 at 512 px, on a GPU

Run it from the repository's root; `--help` lists the options. A step goes from pictures and captions to the averaged
weights: encoders, U-Net forward and backward, clipping, AdamW, average. Theirs is put together from the public classes
that the script calls, in its order. Both start from one folder of weights. A row counts only if one step from there,
with the same noise, gives the same loss, gradients, weights and averages. Then reading shards, and saving, are timed.
"""

import gc
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.data import photographs
from benchmarks.harness import Comparison, Schedule, Subject, compare, table, write
from benchmarks.instruments import count_flop, instruments
from benchmarks.peers import SIZES as NETWORKS
from benchmarks.peers import ZERO_STD, Sizes
from data_pipeline.batch import Batch
from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, Loader, open_data
from data_pipeline.precompute import dump_array, load_array
from data_pipeline.sources.folder import FolderConfig, FolderSource
from ldm.checkpoints import diffusers as folders
from ldm.checkpoints.layouts import unet as unet_layout
from ldm.checkpoints.layouts.table import to_foreign
from ldm.checkpoints.model import LoadedModel
from ldm.diffusion.process import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text import TextConfig, TextEncoder, import_open_clip
from ldm.models.unet import UNet, UNetConfig
from ldm.training.denoising import DenoisingTask, DenoisingTaskConfig
from ldm.training.engine import TrainConfig, prepare, update
from ldm.training.memory import SpeedConfig
from ldm.training.metrics import Means, floats
from ldm.training.optim import OptimizerConfig, learning_rate, set_learning_rate
from ldm.training.randomness import SampleRandomness
from ldm.training.run import start_from

SIZES = {
    "tiny": replace(NETWORKS["tiny"], image_px=16),
    # Stable Diffusion 2 at a fifth of its width; the encoders' share of the FLOP is as there at 512 px, about a third.
    "small": Sizes(
        UNetConfig(channels=64, context_dim=256, head_dim=64, linear_projection=True),
        AutoencoderConfig(channels=24, norm_groups=8),
        TextConfig(width=256, layers=4, heads=4, embed_dim=0, activation="quick_gelu", pad_id=49_407),
        latent_px=32,
        image_px=256,
        batch=4,
    ),
    "sd2": Sizes(
        UNetConfig(context_dim=1024, head_dim=64, linear_projection=True),
        AutoencoderConfig(),
        TextConfig(width=1024, layers=23, heads=16, embed_dim=0),
        latent_px=64,
        image_px=512,
        batch=32,
    ),
}
TOLERANCE = {"no": 1e-2, "bf16": 2e-1}
"""Theirs lets biases and norms decay as well: a weight of 1 goes a hundredth of the rate further."""
WEIGHT_TYPE = {"no": torch.float32, "bf16": torch.bfloat16}
OPTIMIZER = OptimizerConfig(schedule="constant")  # but for that, the script's defaults
EMA_DECAY = 0.9999
SYNTHETIC, SHARDS = "one batch again and again", "from shards"
STEPS = "training step"
STEP, SAVED = "a step", "a step and a checkpoint"
LOG_STEPS = 20
SAVE_STEPS = 100
H200_FLOPS = 989e12  # dense bf16
MLPERF = (139.4, 145.0)
"""Images/s of each H200 in MLPerf Training 4.1, sustained: same U-Net, latents and batch; fp16, no average."""
FLOOR = 274.0
"""Images/s there if every product ran at the rate of a large GEMM (790 TFLOP/s) and nothing was read twice."""


@dataclass(frozen=True)
class Bench:
    """Where and at what size the steps are: the weights' folder, one batch of pictures, and how it is computed."""

    folder: Path
    sizes: Sizes
    device: torch.device
    precision: str  # no | bf16
    batch: Batch


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step: noise of the posterior and of the diffusion [B, C, h, w], timesteps [B]."""

    posterior: Tensor
    noise: Tensor
    t: Tensor


def make_bench(folder: Path, sizes: Sizes, device: torch.device) -> Bench:
    """Write seeded random weights as a folder of diffusers, which both sides read; draw pictures of noise."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {
        "autoencoder": AutoencoderKL(sizes.autoencoder),
        "text": TextEncoder(sizes.text),
        "denoiser": UNet(sizes.unet),
    }
    with torch.no_grad():
        for parameter in (p for part in parts.values() for p in part.parameters()):
            if not parameter.any():  # a zero-initialised layer would hide whatever comes before it
                parameter.normal_(std=ZERO_STD)
    settings = {"size": sizes.image_px, "null_prompt": "", "diffusion": asdict(DiffusionConfig())}
    folders.write(LoadedModel(parts, settings, "benchmark", folder), folder)
    captions = [f"a picture of {i} red circles to the left of a blue square" for i in range(sizes.batch)]
    image = torch.randn(sizes.batch, 3, sizes.image_px, sizes.image_px).clamp(-1, 1)
    batch = Batch(image, captions, torch.arange(sizes.batch), [str(i) for i in range(sizes.batch)])
    precision = "bf16" if device.type == "cuda" else "no"
    return Bench(folder, sizes, device, precision, batch.to(device))


class Ours:
    """Our step, by the loop's own functions."""

    def __init__(self, bench: Bench, speed: SpeedConfig | None = None, **changed: Any) -> None:
        speed = replace(speed or SpeedConfig(), frozen=bench.precision)
        words: dict[str, Any] = dict(ema=EMA_DECAY, optimizer=OPTIMIZER, speed=speed, precision=bench.precision)
        self.config = TrainConfig(**(words | changed))
        source = str(bench.folder)
        task = DenoisingTaskConfig(autoencoder=source, text=source, unet=bench.sizes.unet, dropout=0.0)
        self.task = DenoisingTask(task, size=bench.sizes.image_px, seed=self.config.seed)
        start_from(self.task, source)
        self.state = prepare(self.task, self.config, Accelerator(mixed_precision=bench.precision))
        self.means = Means()
        self.ema, self.optimizer = self.state.emas["denoiser"], self.state.optimizers["denoiser"]
        self.parameters = self.ema.parameters
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}

    def step(self, batch: Batch) -> Tensor:
        """One turn of the loop, without what it only does now and then, but for the log."""
        state, config = self.state, self.config
        batch = batch.to(state.accelerator.device, non_blocking=True)
        set_learning_rate(state.optimizers.values(), learning_rate(config.optimizer, state.step, config.samples))
        outcome = update(state, batch, config, self.means)
        self.ema.update(state.step, outcome.skipped)
        state.step += 1
        state.samples += len(batch)
        if state.step % LOG_STEPS == 0:
            floats(self.means.pop())
        return outcome.skipped

    def proof(self, batch: Batch) -> list[Tensor]:
        """What one step from the first weights makes: see `moved`. The average is one that was updated once before."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.start[name])
                self.ema.average[name].copy_(self.start[name])
        self.optimizer.optimizer.state.clear()
        self.state.step, self.means = 1, Means()
        self.step(batch)
        state = self.optimizer.optimizer.state
        config, names = self.task.config.unet, list(self.parameters)

        def foreign(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return to_foreign([e for e in unet_layout.diffusers(config, names) if e.native in tensors], tensors)

        now = {name: p.detach() for name, p in self.parameters.items()}
        gradients = {name: state[p]["exp_avg"] for name, p in self.parameters.items()}
        every = (foreign(t) for t in (self.start, now, self.ema.average, gradients))
        return moved(self.means.pop()["loss"], *every)

    def subject(self, batch: Batch) -> Subject:
        """To be timed on one batch again and again."""
        return Subject(lambda: self.step(batch), lambda _: self.proof(batch))


class Theirs:
    """The step of diffusers 0.42's examples/text_to_image/train_text_to_image.py, from the same public classes.

    foreach: its --foreach_ema. cached: latents' moments and text computed before, which the script cannot.
    """

    def __init__(self, bench: Bench, *, foreach: bool = False, channels_last: bool = False, cached: bool = False):
        import_open_clip()  # declares what diffusers' imports need beside a CPU build of torch
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel

        self.bench, self.cached = bench, cached
        self.accelerator = Accelerator(mixed_precision=bench.precision)
        self.scheduler = DDPMScheduler.from_pretrained(bench.folder, subfolder="scheduler")
        self.vae: Any = AutoencoderKL.from_pretrained(bench.folder, subfolder="vae")
        self.text: Any = CLIPTextModel.from_pretrained(bench.folder, subfolder="text_encoder")
        unet: Any = UNet2DConditionModel.from_pretrained(bench.folder, subfolder="unet")
        frozen: Any
        for frozen in (self.vae, self.text):
            frozen.requires_grad_(False)
            frozen.to(bench.device, WEIGHT_TYPE[bench.precision])
        unet.to(bench.device)
        if channels_last:
            unet.to(memory_format=torch.channels_last), self.vae.to(memory_format=torch.channels_last)
        unet.train()
        self.ema = EMAModel(unet.parameters(), decay=EMA_DECAY, foreach=foreach)
        adam = OPTIMIZER
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay, eps=adam.eps
        )
        rate = get_scheduler("constant", optimizer)
        self.unet, self.optimizer, self.rate = self.accelerator.prepare(unet, optimizer, rate)
        self.parameters = dict(self.accelerator.unwrap_model(self.unet).named_parameters())
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        tokenize = TextEncoder(bench.sizes.text).tokenize  # the script does it beforehand, once for the data set
        self.ids = tokenize(bench.batch.captions).to(bench.device)
        self.known = self._encoded()

    @torch.no_grad()
    def _encoded(self) -> tuple[Any, Tensor]:
        image = self.bench.batch.image.to(WEIGHT_TYPE[self.bench.precision])
        return self.vae.encode(image).latent_dist, self.text(self.ids, return_dict=False)[0]

    def step(self, draws: Draws | None = None) -> Tensor:
        """The script's inner loop in its order; `draws` instead of its own random numbers."""
        with self.accelerator.accumulate(self.unet):
            image = self.bench.batch.image.to(WEIGHT_TYPE[self.bench.precision])
            posterior = self.known[0] if self.cached else self.vae.encode(image).latent_dist
            latents = posterior.sample() if draws is None else posterior.mean + posterior.std * draws.posterior
            latents = latents * self.vae.config.scaling_factor
            noise, steps = torch.randn_like(latents), self.scheduler.config.num_train_timesteps
            t = torch.randint(0, steps, (len(latents),), device=latents.device).long()
            if draws is not None:
                noise, t = draws.noise.to(noise), draws.t
            noisy = self.scheduler.add_noise(latents, noise, t)
            context = self.known[1] if self.cached else self.text(self.ids, return_dict=False)[0]
            predicted = self.unet(noisy, t, context, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            self.accelerator.gather(loss.repeat(len(latents))).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), OPTIMIZER.clip)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        loss.detach().item()  # for its progress bar
        return loss.detach()

    def proof(self) -> list[Tensor]:
        """What one step from the first weights makes: see `moved`. The average is one that was updated once before."""
        with torch.no_grad():
            for parameter, start, average in zip(
                self.parameters.values(), self.start.values(), self.ema.shadow_params, strict=True
            ):
                parameter.copy_(start), average.copy_(start)
        self.optimizer.optimizer.state.clear()
        self.ema.optimization_step = 1
        random = SampleRandomness(0, self.bench.batch.positions, self.bench.device)
        shape = (self.bench.sizes.autoencoder.latent_channels, *[self.bench.sizes.latent_px] * 2)
        t = (random.uniform("timestep").double() * self.scheduler.config.num_train_timesteps).long()
        loss = self.step(Draws(random.normal("posterior", shape), random.normal("noise", shape), t))
        gradients = {name: self.optimizer.optimizer.state[p]["exp_avg"] for name, p in self.parameters.items()}
        averages = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        return moved(loss, self.start, {n: p.detach() for n, p in self.parameters.items()}, averages, gradients)

    def subject(self) -> Subject:
        """To be timed on its batch again and again."""
        return Subject(self.step, lambda _: self.proof())


def moved(
    loss: Tensor,
    start: dict[str, Tensor],
    weights: dict[str, Tensor],
    averages: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> list[Tensor]:
    """What is compared: the loss; how far each weight and each average went, root mean square; AdamW's first moments.

    Those are the clipped gradients. Single weights go as far for a gradient of rounding errors as for any other.
    """
    names = sorted(start)

    def way(there: dict[str, Tensor]) -> Tensor:
        return torch.stack([(there[n] - start[n]).double().square().mean().sqrt() for n in names]) / OPTIMIZER.lr

    return [loss, way(weights), way(averages), *(gradients[n] for n in names)]


def cached_batch(bench: Bench, ours: Ours) -> Batch:
    """The batch as `data.cache` gives it, with moments and text as stored, in float16, instead of pictures."""
    task: Any = ours.task
    with torch.no_grad():
        posterior = task.autoencoder.posterior(bench.batch.image)
        context = task.text(bench.batch.captions).context
    moments, context = (
        torch.from_numpy(load_array(dump_array(t.cpu()))).float().to(bench.device)
        for t in (torch.cat([posterior.mean, posterior.logvar], dim=1), context)
    )
    return replace(bench.batch, image=bench.batch.image[:, :, :0, :0], moments=moments, text={"context": context})


def steps_of(bench: Bench, compiled: bool) -> dict[str, Subject]:
    """The script as it is, with its best flags and with a cache that it has not; ours with settings of `speed`."""
    cuda = bench.device.type == "cuda"
    fast = SpeedConfig(channels_last=True)
    kinds = {"ours": SpeedConfig(), "ours, channels_last": fast}
    if compiled:
        mode = "max-autotune-no-cudagraphs" if cuda else "default"
        kinds["ours, channels_last + compile"] = replace(fast, compile=mode)
    subjects = {}
    best = {"foreach": True, "channels_last": True}
    for name, options in (
        ("diffusers", {}),
        ("diffusers, foreach_ema + channels_last", best),
        ("diffusers, the same, cached by hand", best | {"cached": True}),
    ):
        theirs = Theirs(bench, **options)
        subjects[name] = theirs.subject()
    for name, speed in kinds.items():
        ours = Ours(bench, speed)
        subjects[name] = ours.subject(bench.batch)
        subjects[f"{name}, cached"] = ours.subject(cached_batch(bench, ours))
    return subjects


def feeding(folder: Path, ours: Ours, sizes: Sizes, pictures: int) -> dict[str, Subject]:
    """Steps on one batch again and again, and on pictures that one process meanwhile decodes from shards."""
    config = BuildConfig(size=sizes.image_px, image_format="jpg", quality=95)
    build(FolderSource(FolderConfig(str(photographs(folder / "photographs", pictures)))), config, folder / "shards")
    data = DataConfig(str(folder / "shards"), workers=1)
    stream = iter(Loader(open_data(data), data, batch_size=sizes.batch, seed=0))
    same = next(stream)

    def made_of(batch: Batch) -> Tensor:
        ours.step(batch)
        return torch.tensor(batch.image.shape, dtype=torch.float32)

    return {SYNTHETIC: Subject(lambda: made_of(same)), SHARDS: Subject(lambda: made_of(next(stream)))}


def saving(folder: Path, ours: Ours, batch: Batch) -> dict[str, Subject]:
    """A step, and a step with a checkpoint."""

    def step(save: bool) -> Tensor:
        ours.step(batch)
        if save:
            ours.state.save(folder, name="benchmark", keep=1)
        return torch.ones(1)

    return {STEP: Subject(lambda: step(False)), SAVED: Subject(lambda: step(True))}


def speeds(result: Comparison, batch: int, flop: float) -> list[str]:
    """A Markdown table of images/s; on a GPU with the share of the H200's peak, beside the record and the floor.

    flop: of one image through the U-Net, forward and backward.
    """
    cuda = result.measurement.device.startswith("cuda")
    lines = [f"| subject | images/s |{' of 989 TFLOP/s |' * cuda}", f"|---|--:|{'--:|' * cuda}"]
    for row in result.rows:
        if row.median_s is not None:
            rate = batch / row.median_s
            lines.append(f"| {row.subject.name} | {rate:.4g} |{f' {rate * flop / H200_FLOPS:.1%} |' * cuda}")
    if cuda:
        for name, rate in (("MLPerf 4.1, least", MLPERF[0]), ("MLPerf 4.1, most", MLPERF[1]), ("floor", FLOOR)):
            lines.append(
                f"| {name}, Stable Diffusion 2 at 512 px on an H200 | {rate} | {rate * flop / H200_FLOPS:.1%} |"
            )
    return [*lines, "", f"U-Net: {flop / 1e9:.5g} GFLOP an image, forward and backward, {batch} images a step."]


def main(
    size: Annotated[Literal["tiny", "small"], typer.Option(help="tiny: to try it")] = "small",
    full: Annotated[bool, typer.Option("--full", help="Stable Diffusion 2 at 512 px, bf16; needs a GPU")] = False,
    compiled: Annotated[bool, typer.Option(help="a row of ours through torch.compile")] = False,
    blocks: Annotated[int, typer.Option(help="timed blocks of each subject")] = 10,
    min_block_s: Annotated[float, typer.Option(help="shortest block, s")] = 2.0,
    cpu_time: Annotated[
        bool, typer.Option(help="steps by this process's CPU seconds, for a CPU that others use as well; 1 thread")
    ] = False,
    pictures: Annotated[int, typer.Option(help="in the shards that are read")] = 320,
    out: Annotated[Path | None, typer.Option(help="JSON with every raw block")] = None,
) -> None:
    """Measure steps, reading and saving; print a table of each, and write what is asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = Accelerator().device
    if full and device.type != "cuda":
        typer.echo("error: --full needs a GPU: a step of that size would take minutes on a CPU", err=True)
        raise typer.Exit(1)
    if cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        typer.echo("error: --cpu-time is for one thread on a CPU: set OMP_NUM_THREADS=1", err=True)
        raise typer.Exit(1)
    name = "sd2" if full else size
    schedule = Schedule(blocks=blocks, min_block_s=min_block_s)
    results: list[Comparison] = []

    def measured(title: str, baseline: str, subjects: dict[str, Subject], tolerance: float) -> Comparison:
        tools = instruments(device, 8192 if device.type == "cuda" else 1024)
        if cpu_time and title == STEPS:  # not where other processes or a disk are waited for
            tools, title = replace(tools, clock=time.process_time), f"{title}, CPU seconds"
        title = f"{title}, {name}, {bench.precision}"
        found = compare(subjects, baseline=baseline, tolerance=tolerance, title=title, schedule=schedule, tools=tools)
        results.append(found)
        if out is not None:  # after each, so that a run that is stopped leaves what it has
            write(results, out)
        typer.echo(table(found) + "\n")
        return found

    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as work:
        bench = make_bench(Path(work) / "model", SIZES[name], device)
        subjects = steps_of(bench, compiled)
        steps = measured(STEPS, "diffusers", subjects, TOLERANCE[bench.precision])
        flop = count_flop(subjects["ours, cached"].call) / bench.sizes.batch
        typer.echo("\n".join(speeds(steps, bench.sizes.batch, flop)) + "\n")
        subjects.clear()
        gc.collect()

        ours = Ours(bench)
        read = measured("reading", SYNTHETIC, feeding(Path(work), ours, bench.sizes, pictures), 0.0).row(SHARDS)
        if read.speedup is not None:
            typer.echo(f"throughput with pictures from shards: {read.speedup:.3f} of that without\n")
        pair = saving(Path(work) / "run", ours, cached_batch(bench, ours))
        saved = measured("saving", STEP, pair, 0.0).row(SAVED)
        if saved.speedup is not None:
            share = (1 / saved.speedup - 1) / SAVE_STEPS
            typer.echo(f"a checkpoint every {SAVE_STEPS} steps takes {share:.2%} of the steps' time")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

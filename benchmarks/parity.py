"""Full-size networks of Stable Diffusion 1.5, 2.1 and XL: ours against diffusers and transformers, same weights.

    python -m benchmarks.parity --model all --out parity.json

Random weights in float32, through our rename tables and without a copy; one network in memory at a time, so XL needs
12 GB. `--model loading` writes a single file of 2 GB to the temporary folder, and measures what reading it takes.
"""

import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.harness import difference
from benchmarks.instruments import machine
from ldm.checkpoints import compvis
from ldm.checkpoints.layouts import autoencoder, text, unet, unet_config
from ldm.checkpoints.layouts.table import Entry, to_foreign, to_native
from ldm.checkpoints.model import KINDS
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text import VOCABULARY, TextConfig, import_open_clip
from ldm.models.unet import UNetConfig
from ldm.types import Conditioning

LIMIT, PLANTED, PEAK_LIMIT = 1e-5, 1e-3, 1.3
GB, SAMPLE_S = 1e9, 0.002
SPARE = 1.15  # of the weights' bytes, for activations and temporaries
LATENT_PX, IMAGE_PX, TOKENS = (16, 24), (64, 96), 77

SD2 = UNetConfig(context_dim=1024, head_dim=64, linear_projection=True)
SDXL = replace(
    SD2, multipliers=(1, 2, 4), depths=(0, 2, 10), middle_depth=10, context_dim=2048, pooled_dim=1280, pooled_layers=2,
    size_dim=256,
)  # fmt: skip
CLIP_L = TextConfig(embed_dim=0, activation="quick_gelu", pad_id=49_407)
CLIP_H = TextConfig(width=1024, layers=23, heads=16, embed_dim=0)
CLIP_G = TextConfig(width=1280, layers=32, heads=20, embed_dim=1280)


@dataclass(frozen=True)
class Subject:
    """A network of a published model. `skip`: blocks that the text's context leaves out; then without the last norm."""

    model: str
    kind: str  # unet | autoencoder | text
    config: Any
    tensors: int
    parameters: int
    skip: int = 0


SUBJECTS = {
    "SD 1.5 U-Net": Subject("sd15", "unet", UNetConfig(), 686, 859_520_964),
    "SD 1.5 text, CLIP ViT-L": Subject("sd15", "text", CLIP_L, 196, 123_060_480),
    "SD 2.1 U-Net": Subject("sd21", "unet", SD2, 686, 865_910_724),
    "SD 2.1 text, ViT-H of 23 layers": Subject("sd21", "text", CLIP_H, 372, 340_387_840),
    "SDXL U-Net": Subject("sdxl", "unet", SDXL, 1680, 2_567_463_684),
    "SDXL text, CLIP ViT-L": Subject("sdxl", "text", CLIP_L, 196, 123_060_480, skip=1),
    "SDXL text, ViT-bigG": Subject("sdxl", "text", CLIP_G, 517, 694_659_840, skip=1),
    "KL-f8 autoencoder": Subject("kl-f8", "autoencoder", AutoencoderConfig(), 248, 83_653_863),
}
LAYOUTS: dict[str, Callable[[Any, list[str]], list[Entry]]] = {
    "unet": unet.diffusers,
    "autoencoder": autoencoder.diffusers,
    "text": text.transformers,
}
Choice = Literal["sd15", "sd21", "sdxl", "kl-f8", "loading", "all"]


@dataclass(frozen=True)
class Row:
    """errors: by output, max |ours - theirs| / max |theirs|. planted: the same with two tensors of ours exchanged.

    ok: the counts are right, no error is above LIMIT, and the planted one is far above.
    """

    name: str
    tensors: int = 0
    parameters: int = 0
    errors: dict[str, float] | None = None
    planted: float | None = None
    ok: bool | None = None
    seconds: float = 0.0
    skipped: str = ""


@dataclass(frozen=True)
class Loading:
    """Reading a file in a fresh process: growth over what was resident before, in bytes."""

    tensor_bytes: int
    seconds: float
    peak_rss: int  # ru_maxrss: pages of the file that are mapped count too
    peak_anonymous: int
    kept_anonymous: int  # after loading

    @property
    def ok(self) -> bool:
        """Whether the peak, mapped pages included, is below PEAK_LIMIT times the tensors."""
        return self.peak_rss < PEAK_LIMIT * self.tensor_bytes


def reference(subject: Subject) -> nn.Module:
    """The library's network with random weights, none of which is zero; never initialised, which would take long."""
    import_open_clip()  # declares what diffusers' imports need beside a CPU build of torch
    import diffusers
    import transformers

    config = subject.config
    with torch.device("meta"):
        if subject.kind == "unet":
            words = unet_config.to_diffusers(config, LATENT_PX[0])
            peer: Any = diffusers.UNet2DConditionModel.from_config(words)
        elif subject.kind == "autoencoder":
            peer = diffusers.AutoencoderKL.from_config(autoencoder.to_diffusers(config, IMAGE_PX[0], 1.0, 0.0))
        else:
            words = text.to_transformers(config)
            peer = getattr(transformers, words["architectures"][0])(transformers.CLIPTextConfig(**words))
    peer = peer.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            bound = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.25
            parameter.uniform_(-bound, bound, generator=rng)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter += 1
        for name, buffer in peer.named_buffers():
            assert name.endswith("position_ids"), f"nothing fills {name}"
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return peer.eval()


def ours(subject: Subject, peer: nn.Module) -> nn.Module:
    """Our network on the library's own tensors, where the table needs no joining or reshaping."""
    config = subject.config
    if subject.skip:
        config = replace(config, skip=subject.skip, final_norm=False)
    with torch.device("meta"):
        network: Any = KINDS[subject.kind][0](config)
    keys = [k for k in network.state_dict() if k not in ("latent_mean", "latent_std")]
    theirs = {k: v for k, v in peer.state_dict().items() if not k.endswith("position_ids")}
    if subject.kind == "text" and not any(k.startswith(text.WRAPPER) for k in theirs):
        theirs = {text.WRAPPER + k: v for k, v in theirs.items()}  # as published files have it
    native = to_native(LAYOUTS[subject.kind](config, keys), theirs, type(peer).__name__)
    if subject.kind == "autoencoder":  # the library's encoder and decoder do not scale their latents
        shape = (config.latent_channels, 1, 1)
        native |= {"latent_mean": torch.zeros(shape), "latent_std": torch.ones(shape)}
    network.load_state_dict(native, assign=True)
    if subject.kind == "text":
        network.tokenize = lambda ids: ids  # both sides are given ids
    return network.eval()


Outputs = dict[str, tuple[Tensor, Tensor]]  # ours, theirs


def _unet_outputs(subject: Subject, network: Any, peer: Any) -> Outputs:
    config, rng = subject.config, torch.Generator().manual_seed(1)
    x = torch.randn(1, config.in_channels, *LATENT_PX, generator=rng)
    t = torch.tensor([801])
    context = torch.randn(1, TOKENS, config.context_dim, generator=rng)
    cond, added = Conditioning(context=context), None
    if config.size_dim:
        pooled, sizes = torch.randn(1, config.pooled_dim, generator=rng), torch.tensor([[1024, 768, 0, 64, 1024, 1024]])
        cond, added = replace(cond, pooled=pooled, sizes=sizes), {"text_embeds": pooled, "time_ids": sizes}
    return {"prediction": (network(x, t, cond), peer(x, t, context, added_cond_kwargs=added).sample)}


def _autoencoder_outputs(_: Subject, network: Any, peer: Any) -> Outputs:
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, *IMAGE_PX, generator=rng) * 2 - 1
    told = peer.encode(image).latent_dist
    latent = torch.randn(told.mean.shape, generator=rng)
    posterior = network.posterior(image)
    return {
        "mean": (posterior.mean, told.mean),
        "log variance": (posterior.logvar, told.logvar),
        "picture": (network.decode(latent), peer.decode(latent).sample),
    }


def _text_outputs(subject: Subject, network: Any, peer: Any) -> Outputs:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY - 2, (2, TOKENS), generator=rng)
    ids[:, 0], ids[0, 20:], ids[1, -1] = VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 1
    cond, told = network(ids), peer(ids, output_hidden_states=True)
    context = told.hidden_states[-1 - subject.skip] if subject.skip else told.last_hidden_state
    pooled = told.text_embeds if "text_embeds" in told else told.pooler_output
    return {"context": (cond.context, context), "pooled": (cond.pooled, pooled)}


@torch.inference_mode()
def compare(name: str) -> Row:
    """One network of `SUBJECTS` on both sides, or why it was skipped."""
    subject, start = SUBJECTS[name], time.perf_counter()
    need, free = 4 * subject.parameters * SPARE, psutil.virtual_memory().available
    if free < need:
        return Row(name, skipped=f"needs {need / GB:.1f} GB, {free / GB:.1f} GB were free")
    peer = reference(subject)
    network = ours(subject, peer)
    errors = _errors(subject, network, peer)
    _exchange(network)
    planted = max(_errors(subject, network, peer).values())
    tensors = sum(not k.endswith("position_ids") for k in peer.state_dict())
    parameters = sum(p.numel() for p in network.parameters())
    counted = (tensors, parameters) == (subject.tensors, subject.parameters)
    ok = counted and max(errors.values()) <= LIMIT and planted > PLANTED
    return Row(name, tensors, parameters, errors, planted, ok, time.perf_counter() - start)


def _errors(subject: Subject, network: nn.Module, peer: nn.Module) -> dict[str, float]:
    of = {"unet": _unet_outputs, "autoencoder": _autoencoder_outputs, "text": _text_outputs}[subject.kind]
    return {output: difference([a], [b]) for output, (a, b) in of(subject, network, peer).items()}


def _exchange(network: nn.Module) -> None:
    """Exchange two neighbours of the same shape in the middle of the network: what a wrong table would do."""
    pairs = [(a, b) for a, b in pairwise(network.named_parameters()) if a[1].shape == b[1].shape]
    (first, a), (second, b) = pairs[len(pairs) // 2]
    network.load_state_dict({first: b, second: a}, strict=False, assign=True)


def write_single_file(path: Path) -> int:
    """A file of Stable Diffusion 1.5 in fp16 with random weights; returns the bytes of its tensors."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half() * 0.02
    whole = (compvis.DENOISER, "unet", UNetConfig()), (compvis.AUTOENCODER, "autoencoder", AutoencoderConfig())
    tensors: dict[str, Tensor] = {}
    for prefix, kind, config in (*whole, (compvis.TEXT_1, "text", CLIP_L)):
        with torch.device("meta"):
            state = KINDS[kind][0](config).state_dict()
        state = {k: v for k, v in state.items() if k not in ("latent_mean", "latent_std")}
        for name, like in to_foreign(compvis.table(kind, config, (prefix,)), state).items():
            count = like.numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].clone().view(like.shape)
    save_file(tensors, path)
    return sum(t.nbytes for t in tensors.values())


def measure_load(path: str) -> dict[str, float]:
    """Load a model and say what memory that took, in bytes: to be called in a process that did nothing else."""
    from ldm.checkpoints.load import load_model

    import_open_clip()
    stop, samples = threading.Event(), [_resident()]

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            samples.append(_resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    model = load_model(path)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    (rss, anonymous), (_, kept) = samples[0], _resident()
    assert set(model.components) == {"autoencoder", "text", "denoiser"}
    return {
        "seconds": seconds,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss,
        "peak_anonymous": max(a for _, a in samples) - anonymous,
        "kept_anonymous": kept - anonymous,
    }


def _resident() -> tuple[int, int]:
    """(RSS, anonymous part of it) of this process, bytes. Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["RssAnon"].split()[0]) * 1024


def loading() -> Loading:
    """Write a file, read it in a fresh process, delete it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd15-fp16.safetensors"
        size = write_single_file(path)
        gc.collect()
        code = f"import json; from benchmarks import parity; print(json.dumps(parity.measure_load({str(path)!r})))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Loading(size, **json.loads(child.stdout.splitlines()[-1]))


def table(rows: Sequence[Row], load: Loading | None) -> str:
    """What was found, in Markdown."""
    lines = ["| network | tensors | parameters | largest relative error | planted | ok |", "|---|--:|--:|---|--:|---|"]
    for row in rows:
        errors = ", ".join(f"{output} {value:.1e}" for output, value in (row.errors or {}).items())
        verdict = "skipped" if row.skipped else "yes" if row.ok else "**no**"
        planted = "-" if row.planted is None else f"{row.planted:.1g}"
        counts = f"{row.tensors:,} | {row.parameters:,}"
        lines.append(f"| {row.name} | {counts} | {errors or row.skipped} | {planted} | {verdict} |")
    if load is not None:
        ratios = [x / load.tensor_bytes for x in (load.peak_rss, load.peak_anonymous, load.kept_anonymous)]
        lines += [
            "",
            "| growth while loading SD 1.5 in fp16 | peak | of it anonymous | kept anonymous | s | ok |",
            "|---|--:|--:|--:|--:|---|",
            f"| its tensors, {load.tensor_bytes / GB:.3f} GB | {' | '.join(f'{x:.2f}x' for x in ratios)} | "
            f"{load.seconds:.1f} | {'yes' if load.ok else '**no**'} |",
        ]
    return "\n".join(lines)


def main(
    model: Annotated[Choice, typer.Option(help="which family; loading: the memory that reading a file takes")] = "all",
    out: Annotated[Path | None, typer.Option(help="JSON with every number and the versions")] = None,
) -> None:
    """Compare our full-size networks with the libraries' and print the tables."""
    rows: list[Row] = []
    load = loading() if model in ("loading", "all") else None
    for name, subject in SUBJECTS.items():
        if model in (subject.model, "all"):
            rows.append(compare(name))
            gc.collect()
        if out is not None:  # after each, so that a run that is stopped leaves what it has
            _write(rows, load, out)
    typer.echo(table(rows, load))
    if not all(row.ok for row in rows if not row.skipped) or (load is not None and not load.ok):
        raise typer.Exit(1)


def _write(rows: Sequence[Row], load: Loading | None, path: Path) -> None:
    settings = {"latent_px": LATENT_PX, "image_px": IMAGE_PX, "tokens": TOKENS, "dtype": "float32", "limit": LIMIT}
    document: dict[str, Any] = {"machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}
    if load is not None:
        document["loading"] = asdict(load) | {"ok": load.ok}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

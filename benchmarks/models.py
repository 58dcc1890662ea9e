"""Our networks against diffusers' and transformers', on the same weights and inputs, part by part.

    python -m benchmarks.models --size sd15 --part unet --out unet.json

Run it from the repository's root; `--help` lists the options, README.md says how to read the table.
"""

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.harness import Comparison, Schedule, Subject, compare, table, write
from benchmarks.instruments import instruments
from benchmarks.peers import SIZES, Pair, Sizes, build, pair
from ldm.models.text import VOCABULARY
from ldm.nn.cpu import for_cpu
from ldm.types import Conditioning

Inputs = dict[str, Tensor]
Forward = Callable[[nn.Module, Inputs], Tensor]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TRAIN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
GPU_REPS = 20
GPU_GEMM, CPU_GEMM, TINY_GEMM = 8192, 2048, 512


@dataclass(frozen=True)
class Part:
    """A network, how each side is called, and whether gradients are part of the call."""

    kind: str  # unet | autoencoder | text
    title: str
    peer: Forward
    ours: Forward
    train: bool = False


def _unet_peer(model: nn.Module, inputs: Inputs) -> Tensor:
    result: Tensor = model(inputs["latent"], inputs["t"], encoder_hidden_states=inputs["context"], return_dict=False)[0]
    return result


def _unet_ours(model: nn.Module, inputs: Inputs) -> Tensor:
    result: Tensor = model(inputs["latent"], inputs["t"], Conditioning(context=inputs["context"]))
    return result


def _encode_peer(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model.encode(inputs["image"], return_dict=False)[0].mean
    return result


def _encode_ours(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model.encode(inputs["image"])
    return result


def _decode_peer(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model.decode(inputs["one_latent"], return_dict=False)[0]
    return result


def _decode_ours(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model.decode(inputs["one_latent"])
    return result


def _text_peer(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model(inputs["ids"]).last_hidden_state
    return result


def _text_ours(model: Any, inputs: Inputs) -> Tensor:
    result: Tensor = model(inputs["ids"]).context
    return result


PARTS = {
    "unet": Part("unet", "U-Net, forward", _unet_peer, _unet_ours),
    "unet-train": Part("unet", "U-Net, forward and backward", _unet_peer, _unet_ours, train=True),
    "encode": Part("autoencoder", "autoencoder, encode", _encode_peer, _encode_ours),
    "decode": Part("autoencoder", "autoencoder, decode", _decode_peer, _decode_ours),
    "text": Part("text", "text encoder", _text_peer, _text_ours),
}
Size = Literal["tiny", "sd15"]
Choice = Literal["unet", "unet-train", "encode", "decode", "text", "all"]


def make_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Inputs:
    """Seeded inputs, drawn on the CPU: noise for latents, context, image and target; whole prompts of random tokens."""
    rng = torch.Generator().manual_seed(1)
    n, unet, text = sizes.batch, sizes.unet, sizes.text
    side, px = sizes.latent_px, sizes.image_px
    latent_px = px // 2 ** (len(sizes.autoencoder.multipliers) - 1)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=rng).to(device, dtype)
        return drawn.to(memory_format=layout) if len(shape) == 4 else drawn

    ids = torch.randint(1, VOCABULARY - 2, (n, text.context_length), generator=rng)
    ids[:, 0], ids[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {
        "latent": normal(n, unet.in_channels, side, side),
        "target": normal(n, unet.out_channels, side, side),
        "context": normal(n, text.context_length, unet.context_dim),
        "t": torch.randint(0, 1000, (n,), generator=rng).to(device),
        "image": normal(1, sizes.autoencoder.image_channels, px, px).clamp(-1, 1),
        "one_latent": normal(1, sizes.autoencoder.latent_channels, latent_px, latent_px),
        "ids": ids.to(device),
    }


def subject(part: Part, model: nn.Module, builds: Pair, inputs: Inputs, compiled: bool = False) -> Subject:
    """One build as something to time. Compiled: one static graph without breaks."""
    cuda = inputs["latent"].is_cuda
    forward: Callable[[], Tensor] = partial(part.peer if model is builds.peer else part.ours, model, inputs)
    if compiled:
        compiled_forward = torch.compile(
            forward, fullgraph=True, dynamic=False, mode="max-autotune" if cuda else "default"
        )

        def forward() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            result: Tensor = compiled_forward()
            return result

    def infer() -> Tensor:
        with torch.inference_mode():
            return forward()

    parameters = list(model.parameters())

    def step() -> tuple[Tensor, ...]:
        loss = F.mse_loss(forward().float(), inputs["target"].float())
        return (loss, *torch.autograd.grad(loss, parameters))

    if part.train:
        return Subject(step, lambda result: [result[0], *builds.gradients(model, list(result[1:]))])
    return Subject(infer)


def subjects(part: Part, sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Subject]:
    """The stock build, the stock build with its documented best flags, ours, and ours compiled."""
    stock = build(part.kind, sizes, device, dtype)
    name = "transformers" if part.kind == "text" else "diffusers"
    if part.train:
        stock.peer.train(), stock.ours.train()  # diffusers' layers take another path then
    inputs = make_inputs(sizes, device, dtype, torch.contiguous_format)
    made = {name: subject(part, stock.peer, stock, inputs), "ours": subject(part, stock.ours, stock, inputs)}
    if part.kind == "text" and not compiled:  # no convolution, so no layout to choose
        return made
    best, flags = stock, "compile"
    if part.kind != "text":
        peer: Any = copy.deepcopy(stock.peer)
        peer.to(memory_format=torch.channels_last)
        best, flags = pair(part.kind, sizes, peer), "channels_last + compile" if compiled else "channels_last"
        best.ours.train(part.train)
        inputs = make_inputs(sizes, device, dtype, torch.channels_last)
    made[f"{name}, {flags}"] = subject(part, best.peer, best, inputs, compiled)
    made[f"ours, {flags}"] = subject(part, best.ours, best, inputs, compiled)
    if not part.train and device.type == "cpu":
        ready = pair(part.kind, sizes, best.peer)
        made["ours, as generate runs it"] = subject(part, for_cpu(ready.ours), ready, inputs)
    return made


def run_part(name: str, size: str, *, compiled: bool, schedule: Schedule, device: torch.device) -> Comparison:
    """Build, check and time one part: fp32 on a CPU, bf16 on a GPU."""
    import torch._inductor.config as inductor

    part, sizes, cuda = PARTS[name], SIZES[size], device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    inductor.freezing = compiled and not cuda and not part.train
    torch._dynamo.reset()
    gemm = TINY_GEMM if size == "tiny" else GPU_GEMM if cuda else CPU_GEMM
    result = compare(
        subjects(part, sizes, device, dtype, compiled),
        baseline="transformers" if part.kind == "text" else "diffusers",
        tolerance=(TRAIN_TOLERANCE if part.train else TOLERANCE)[dtype],
        title=f"{part.title}, {size}, {str(dtype).removeprefix('torch.')}",
        schedule=replace(schedule, min_reps=GPU_REPS if cuda else 1),
        tools=instruments(device, gemm),
    )
    torch._dynamo.reset()
    gc.collect()
    return result


def main(
    size: Annotated[Size, typer.Option(help="tiny: seconds, to try it; sd15: Stable Diffusion 1.5's")] = "sd15",
    part: Annotated[Choice, typer.Option(help="which network and direction")] = "all",
    compiled: Annotated[bool, typer.Option(help="the peer's best row and ours through torch.compile")] = True,
    blocks: Annotated[int, typer.Option(help="timed blocks of each subject")] = 10,
    min_block_s: Annotated[float, typer.Option(help="shortest block, s")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu | cuda; the default takes the GPU if there is one")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON with every raw block")] = None,
) -> None:
    """Time our networks against the stock ones and print one table a part."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: list[Comparison] = []
    try:
        schedule = Schedule(blocks=blocks, min_block_s=min_block_s)
        for name in PARTS if part == "all" else [part]:
            results.append(run_part(name, size, compiled=compiled, schedule=schedule, device=where))
            typer.echo(table(results[-1]) + "\n")
            if out is not None:  # after each, so that a run that is stopped leaves what it has
                write(results, out)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()

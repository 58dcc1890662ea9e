"""`ldm generate`."""

import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

GRID_IMAGES = 64  # as many as one can look at; the rest are in their files


def _list_samplers(asked: bool) -> None:
    """What --sampler and --spacing know, as a table."""
    if not asked:
        return
    from ldm.diffusion.noise import SPACINGS
    from ldm.diffusion.samplers import SAMPLERS, traits

    for name in SAMPLERS:
        known = traits(name)
        noise = "draws noise" if known.stochastic else f"order {known.order}"
        calls = f"{known.evaluations} evaluation{'s' if known.evaluations > 1 else ''} a step"
        typer.echo(f"{name:<18}  {noise:<12}  {calls}")
    typer.echo(f"spacings: {', '.join(SPACINGS)}")
    raise typer.Exit


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run or model folder, a folder of diffusers, or a file.")
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, each in quotes.")],
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    count: Annotated[int, typer.Option(help="Images per prompt; the k-th uses seed + k.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed and settings draw the same image.")] = 0,
    steps: Annotated[int, typer.Option(help="More is finer and slower.")] = 50,
    sampler: Annotated[str, typer.Option(help="Such as 'DPM++ 2M Karras'; see --list-samplers.")] = "ddim",
    eta: Annotated[float, typer.Option(help="ddim: share of noise drawn anew each step, 0 to 1.")] = 0.0,
    spacing: Annotated[str, typer.Option(help="Where steps lie, such as karras; else the model's.")] = "",
    guidance: Annotated[float, typer.Option(help="How strictly to follow the prompt; 1 turns it off.")] = 5.0,
    rescale: Annotated[float, typer.Option(help="Against overexposure: 0 off, 0.7 usual.")] = 0.0,
    interval: Annotated[str, typer.Option(help="Guide only where t is in LOW-HIGH, such as 200-800.")] = "",
    parallel: Annotated[float, typer.Option(help="Share of guidance along the estimate; 0 saturates least.")] = 1.0,
    momentum: Annotated[float, typer.Option(help="Of earlier steps' guidance; -0.5 goes with --parallel 0.")] = 0.0,
    norm: Annotated[float, typer.Option(help="Longest guidance; 0 is any length, 15 goes with --parallel 0.")] = 0.0,
    size: Annotated[str, typer.Option(help="Pixels, N or WxH; without it, the size trained at.")] = "",
    batch: Annotated[int, typer.Option(help="Images at a time; fewer need less memory.")] = 16,
    prediction: Annotated[str, typer.Option(help="What the model predicts, against its file: eps, v, x0.")] = "",
    ema: Annotated[bool, typer.Option(help="Averaged weights of a CompVis file that has both.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    list_samplers: Annotated[
        bool, typer.Option("--list-samplers", is_eager=True, callback=_list_samplers, help="Samplers and spacings.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the images; nothing in it is overwritten.")] = Path("out"),
) -> None:
    """Draw pictures from prompts with a trained model.

    Example: ldm generate runs/denoiser "a red circle" "a blue square" --count 4 --out pictures

    Writes 00000-SEED.png, ... with the settings inside each file, and for several images a grid.
    """
    import torch
    from tqdm import tqdm

    from ldm.diffusion.prediction import PREDICTIONS
    from ldm.images import grid, to_pil
    from ldm.names import known
    from ldm.pipeline import Pipeline, Request, pairs

    width, height = _size(size)
    request = Request(  # checks what it can before any weights are read
        *pairs(prompts, count, seed),
        negative=negative,
        steps=steps,
        sampler=sampler,
        eta=eta,
        spacing=spacing or None,
        guidance=guidance,
        rescale=rescale,
        interval=_interval(interval),
        parallel=parallel,
        momentum=momentum,
        norm=norm,
        width=width,
        height=height,
        batch=batch,
    )
    if prediction:
        known("prediction", prediction, PREDICTIONS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.load(model, device, prediction=prediction or None, ema=ema)
    stream = pipeline.stream(request)  # checks the rest
    out.mkdir(parents=True, exist_ok=True)
    numbers, index, shown = _numbers(out, ""), 0, []
    per_batch = pipeline.steps(request)
    with tqdm(total=per_batch * request.batches, unit="step", disable=not sys.stderr.isatty()) as bar:
        for step in stream:
            bar.update()
            if (step.index + 1) % per_batch:
                continue
            for picture in map(to_pil, pipeline.decode(step.x)):
                name = f"{{:05d}}-{request.seeds[index]}.png"
                bar.write(str(_save(picture, out, name, numbers, pipeline.settings(request, index))))
                shown += [picture] if index < GRID_IMAGES else []
                index += 1
    if len(shown) > 1:
        columns = count if 1 < count <= 16 else math.ceil(math.sqrt(len(shown)))
        sheet = grid(shown, columns)
        path = _save(sheet, out, "grid-{:05d}.png", _numbers(out, "grid-"), pipeline.settings(request, 0))
        typer.echo(path)


def _size(size: str) -> tuple[int | None, int | None]:
    """ "N" or "WxH" -> width, height; "" -> the model's own."""
    if not size:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size.strip().lower())
    if match is None:
        raise ValueError(f"--size must be N or WxH, such as 512 or 768x512, got {size!r}")
    return int(match[1]), int(match[2] or match[1])


def _interval(interval: str) -> tuple[float, float] | None:
    """ "LOW-HIGH" -> both; "" -> none."""
    if not interval:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", interval.strip())
    if match is None:
        raise ValueError(f"--interval must be LOW-HIGH, such as 200-800, got {interval!r}")
    return float(match[1]), float(match[2])


def _numbers(folder: Path, prefix: str) -> Iterator[int]:
    """Numbers after those of the PNG files that begin with `prefix` and a number."""
    names = (re.match(rf"{prefix}(\d+).*\.png$", file.name) for file in folder.iterdir())
    return itertools.count(max((int(name[1]) for name in names if name), default=-1) + 1)


def _save(picture: "Image.Image", folder: Path, name: str, numbers: Iterator[int], settings: dict[str, Any]) -> Path:
    """Save under the next number that is free, also if another process takes names in the same folder."""
    from ldm.images import save_png

    while True:
        path = folder / name.format(next(numbers))
        try:
            save_png(picture, path, settings, overwrite=False)
            return path
        except FileExistsError:
            continue

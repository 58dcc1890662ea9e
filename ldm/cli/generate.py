"""`ldm generate`."""

import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Given

GRID_IMAGES = 64  # as many as one can look at; the rest are in their files


STEERING = {
    "rescale": "pull the spread of guided estimates back: against overexposure; 0.7 usual",
    "interval": "[200,800]: guide only where t lies in it",
    "parallel": "share of guidance along the estimate: 0 saturates least (adaptive projected guidance)",
    "momentum": "of the guidance of earlier steps; -0.5 goes with parallel=0",
    "norm": "longest guidance; 15 goes with parallel=0, 0 is any",
    "plus_plus": "CFG++: --guidance is then a share in 0..1, such as 0.6",
    "threshold": "dynamic thresholding: share of each estimate that stays as it is, such as 0.995",
    "limit": "what thresholding scales down to",
    "perturb": "layers to push away from the absence of: mid, down.2 (U-Net), 7,8,9 (transformers)",
    "perturb_how": "identity: without their attention (PAG); skip: without them (SLG)",
    "perturb_scale": "how far to push",
    "label": "a class of the --classifier",
    "label_scale": "how far towards the label",
    "clip_scale": "how far towards the prompt, by the --clip",
}


def _list_samplers(asked: bool) -> None:
    """What --sampler and --spacing know, as a table."""
    if not asked:
        return
    from ldm.diffusion.noise import SPACINGS
    from ldm.diffusion.samplers import SAMPLERS, traits

    for name in SAMPLERS:
        known = traits(name)
        noise = "draws noise" if known.stochastic else f"order {known.order}"
        calls = {0: "as many evaluations as it takes", 1: "1 evaluation a step"}.get(
            known.evaluations, f"{known.evaluations} evaluations a step"
        )
        typer.echo(f"{name:<18}  {noise:<12}  {calls}")
    typer.echo(f"spacings: {', '.join(SPACINGS)}")
    raise typer.Exit


def _list_steering(asked: bool) -> None:
    """What --steer knows, with its usual value and meaning."""
    if not asked:
        return
    from ldm.pipeline import Steering

    for field in fields(Steering):
        typer.echo(f"{field.name + '=' + str(field.default):<22}  {STEERING[field.name]}")
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
    variance: Annotated[str, typer.Option(help="ddpm: small, large or learned.")] = "",
    spacing: Annotated[str, typer.Option(help="Where steps lie, such as karras; else the model's.")] = "",
    guidance: Annotated[float, typer.Option(help="How strictly to follow the prompt; 1 turns it off.")] = 5.0,
    steer: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="See --list-steering.")] = None,
    weak: Annotated[str, typer.Option(help="A weaker model, to steer away from in place of the negative.")] = "",
    classifier: Annotated[str, typer.Option(help="A run of the classifier task, for --steer label=...")] = "",
    clip: Annotated[str, typer.Option(help="A run of the contrastive task, for --steer clip_scale=...")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to go by, with --mask, --measure or --shows.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Draw anew where this picture is white.")] = None,
    resample: Annotated[int, typer.Option(help="Times to draw each stretch, so that it fits what is kept.")] = 1,
    measure: Annotated[str, typer.Option(help="What --image is of the result: downscale:4, blur:2.5.")] = "",
    shows: Annotated[str | None, typer.Option(help="The prompt that fits --image: draw from its noise.")] = None,
    size: Annotated[str, typer.Option(help="Pixels, N or WxH; without it, the size trained at.")] = "",
    batch: Annotated[int, typer.Option(help="Images at a time; fewer need less memory.")] = 16,
    prediction: Annotated[str, typer.Option(help="What the model predicts, against its file: eps, v, x0.")] = "",
    ema: Annotated[bool, typer.Option(help="Averaged weights of a CompVis file that has both.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    list_samplers: Annotated[
        bool, typer.Option("--list-samplers", is_eager=True, callback=_list_samplers, help="Samplers and spacings.")
    ] = False,
    list_steering: Annotated[
        bool, typer.Option("--list-steering", is_eager=True, callback=_list_steering, help="What --steer knows.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the images; nothing in it is overwritten.")] = Path("out"),
) -> None:
    """Draw pictures from prompts with a trained model.

    Example: ldm generate runs/denoiser "a red circle" "a blue square" --count 4 --out pictures

    Writes 00000-SEED.png, ... with the settings inside each file, and for several images a grid.
    """
    import torch
    from tqdm import tqdm

    from ldm.config import load_config
    from ldm.diffusion.prediction import PREDICTIONS
    from ldm.images import grid, to_pil
    from ldm.names import known
    from ldm.pipeline import Companions, Pipeline, Request, Steering, pairs

    width, height = _size(size)
    request = Request(  # checks what it can before any weights are read
        *pairs(prompts, count, seed),
        negative=negative,
        steps=steps,
        sampler=sampler,
        eta=eta,
        spacing=spacing or None,
        guidance=guidance,
        variance=variance or None,
        steering=load_config(Steering, [], steer or []),
        given=_given(image, mask, resample, measure, shows, width, height),
        width=width,
        height=height,
        batch=batch,
    )
    if prediction:
        known("prediction", prediction, PREDICTIONS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.load(model, device, prediction=prediction or None, ema=ema)
    pipeline.companions = Companions.load(weak, classifier, clip, device=device, diffusion=pipeline.diffusion)
    stream = pipeline.stream(request)  # checks the rest
    out.mkdir(parents=True, exist_ok=True)
    numbers, index, shown = _numbers(out, ""), 0, []
    per_batch = pipeline.steps(request)
    with tqdm(total=per_batch * request.batches, unit="step", disable=not sys.stderr.isatty()) as bar:
        for step in stream:
            bar.update()
            if (step.index + 1) % per_batch:
                continue
            for picture in map(to_pil, pipeline.pictures(request, step)):
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


def _given(
    image: Path | None,
    mask: Path | None,
    resample: int,
    measure: str,
    shows: str | None,
    width: int | None,
    height: int | None,
) -> "Given | None":
    """The picture to go by; with a --size, but not as a measurement, it is scaled to that."""
    from ldm.images import open_mask, open_picture
    from ldm.pipeline import Given

    if image is None:
        if mask or measure or shows is not None or resample != 1:
            raise ValueError("--mask, --measure, --shows and --resample go with an --image")
        return None
    wanted = None if measure or width is None or height is None else (width, height)
    drawn = None if mask is None else open_mask(mask, wanted)
    return Given(open_picture(image, wanted), mask=drawn, resample=resample, measure=measure, shows=shows)


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

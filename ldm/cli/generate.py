"""`ldm generate`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

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


def _recall(ctx: typer.Context, path: Path | None) -> Path | None:
    """What --from says stands in for every option that is not given."""
    if path is not None:
        from ldm.cli.replay import defaults

        ctx.default_map, unused = defaults(path)
        if unused:
            typer.echo(f"not used of what {path} says: {', '.join(unused)}", err=True)
    return path


def generate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run or model folder, a folder of diffusers, or a file.")
    ] = "",
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw, each in quotes.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PICTURE.png",
            is_eager=True,
            callback=_recall,
            help="Draw that picture again; other options override what it says.",
        ),
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    wildcards: Annotated[
        Path | None, typer.Option(help="A folder: __NAME__ in a prompt is a line of its NAME.txt, {a|b} is a or b.")
    ] = None,
    styles: Annotated[Path | None, typer.Option(help="A styles.csv of AUTOMATIC1111.")] = None,
    style: Annotated[list[str] | None, typer.Option(help="A style of --styles; may be repeated.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Read prompts as they are, without a grammar.")] = False,
    clip_skip: Annotated[
        int, typer.Option(help="The layer of CLIP that is heard, counted from the last, 1; 0 is the model's own.")
    ] = 0,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="An adapter for all prompts; may be repeated.")
    ] = None,
    loras: Annotated[str, typer.Option(help="A folder of adapters: <lora:NAME:WEIGHT> in a prompt is NAME.*.")] = "",
    embeddings: Annotated[
        list[str] | None, typer.Option(help="A textual inversion, or a folder of them; may be repeated.")
    ] = None,
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
    image: Annotated[Path | None, typer.Option(help="A picture to start from, edit, enlarge or draw into.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to leave --image, above 0 to 1; 0.75 unless it is masked.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Draw anew where this picture is white.")] = None,
    mask_blur: Annotated[float, typer.Option(help="Soften the mask by a Gaussian of so many px.")] = 0.0,
    mask_full_resolution: Annotated[
        int | None, typer.Option(metavar="PX", help="Draw only what is that near to the mask, at the full size.")
    ] = None,
    mask_invert: Annotated[bool, typer.Option("--mask-invert", help="Draw where the mask is black.")] = False,
    mask_fill: Annotated[
        str, typer.Option(help="What --strength starts from in the mask: original, fill, noise or nothing.")
    ] = "original",
    outpaint: Annotated[
        str, typer.Option(metavar="L,R,T,B", help="Continue --image by px at left, right, top, bottom.")
    ] = "",
    resample: Annotated[int, typer.Option(help="Times to draw each stretch, so that it fits what is kept.")] = 1,
    measure: Annotated[str, typer.Option(help="What --image is of the result: downscale:4, blur:2.5.")] = "",
    shows: Annotated[str | None, typer.Option(help="The prompt that fits --image: draw from its noise.")] = None,
    image_guidance: Annotated[float, typer.Option(help="Editing models: how strictly to keep to --image.")] = 1.5,
    noise_level: Annotated[int, typer.Option(help="Enlarging models: noise put on --image first.")] = 20,
    depth: Annotated[Path | None, typer.Option(help="Depth models: a picture of it, near is bright.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=PICTURE[:WEIGHT[:START-END]]", help="A ControlNet or T2I-adapter; may be repeated."
        ),
    ] = None,
    variation: Annotated[
        str, typer.Option(metavar="SEED:STRENGTH", help="Move the start noise towards that of other seeds.")
    ] = "",
    upscale: Annotated[float, typer.Option(help="Draw on at so many times the size.")] = 1.0,
    upscale_by: Annotated[
        str, typer.Option(help="Latents by nearest, bilinear or bicubic; pixels by lanczos.")
    ] = "bicubic",
    upscale_strength: Annotated[float, typer.Option(help="How far the second pass leaves the first.")] = 0.7,
    upscale_steps: Annotated[int, typer.Option(help="Steps of the second pass; 0 is as many as --steps.")] = 0,
    refiner: Annotated[str, typer.Option(help="A model that draws the last steps.")] = "",
    refiner_switch: Annotated[float, typer.Option(help="The share of the steps before it takes over.")] = 0.8,
    aesthetic: Annotated[
        str,
        typer.Option(metavar="SCORE,SCORE", help="SDXL's refiner: how good the picture is to be, and the negative."),
    ] = "6,2.5",
    size: Annotated[str, typer.Option(help="Pixels, N or WxH; without it, the size trained at.")] = "",
    batch: Annotated[int, typer.Option(help="Images at a time; fewer need less memory.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32; else as stored, on a CPU fp32.")] = "",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Decode in tiles; on a GPU, hold one part of the model at a time.")
    ] = False,
    prediction: Annotated[str, typer.Option(help="What the model predicts, against its file: eps, v, x0.")] = "",
    ema: Annotated[bool, typer.Option(help="Averaged weights of a CompVis file that has both.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    list_samplers: Annotated[
        bool, typer.Option("--list-samplers", is_eager=True, callback=_list_samplers, help="Samplers and spacings.")
    ] = False,
    list_steering: Annotated[
        bool, typer.Option("--list-steering", is_eager=True, callback=_list_steering, help="What --steer knows.")
    ] = False,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V,...", help="Every image by each value, on labelled sheets; up to three keys."),
    ] = None,
    preview: Annotated[int, typer.Option(metavar="N", help="Show every N-th step in OUT/preview.png.")] = 0,
    page: Annotated[bool, typer.Option("--page", help="Show all that is in OUT in OUT/index.html.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the images; nothing in it is overwritten.")] = Path("out"),
) -> None:
    """Draw pictures from prompts with a trained model.

    Example: ldm generate runs/denoiser "a red circle" "a blue square" --count 4 --out pictures

    Writes 00000-SEED.png, ... with the settings inside each file, and for several images a grid.
    """
    given = dict(locals())
    from tqdm import tqdm

    from ldm.cli.contact import write_page
    from ldm.cli.options import Asked, Drawing, Models, gathered
    from ldm.cli.pictures import Pictures
    from ldm.cli.plan import carry_out, planned
    from ldm.cli.replay import DECIDE, check_place
    from ldm.cli.sheets import axes, is_axis

    words = [word for word in prompts or () if grid and is_axis(word)]  # --grid steps=10,20 guidance=3,7
    along = axes([*(grid or ()), *words])
    models, drawing = gathered(Models, given), gathered(Drawing, given)
    pictures, asked = gathered(Pictures, given), gathered(Asked, given)
    alone = prompts_file is not None and not _said(ctx, "prompts")  # a file of prompts in the place of those recalled
    asked = replace(asked, prompts=() if alone else tuple(p for p in asked.prompts if p not in words))
    if from_ is not None:
        check_place(models, from_)
    again = None if _said(ctx, *DECIDE) else from_
    for path in carry_out(planned(models, drawing, pictures, asked, along, again), out, preview):
        tqdm.write(str(path))
    if page:
        tqdm.write(str(write_page(out)))


def _said(ctx: typer.Context, *names: str) -> bool:
    """Whether one of these options was given, rather than recalled or left out."""
    sources = (ctx.get_parameter_source(name) for name in names)
    return any(source is not None and source.name == "COMMANDLINE" for source in sources)

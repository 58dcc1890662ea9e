"""`ldm convert` and `ldm inspect`."""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(help="A run or model folder, a folder of diffusers, or a single file.")]
DTYPES = ("float32", "float16", "bfloat16")


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="A new folder, or a new .safetensors file for compvis.")],
    to: Annotated[str, typer.Option(help="native, compvis or diffusers.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; without it, as it is.")] = "",
    ema: Annotated[bool, typer.Option(help="Take the averaged weights of a CompVis file that has both.")] = False,
    prediction: Annotated[str, typer.Option(help="What the denoiser predicts, against the file: eps, v, x0.")] = "",
) -> None:
    """Write a model in another format, then run both and compare.

    Example: ldm convert v1-5-pruned.safetensors sd15 --to diffusers --dtype float16
    """
    import torch

    from ldm.checkpoints import convert as conversion
    from ldm.diffusion.prediction import PREDICTIONS
    from ldm.names import known

    chosen = getattr(torch, known("dtype", dtype, DTYPES)) if dtype else None
    predicts = known("prediction", prediction, PREDICTIONS) if prediction else None
    for note in conversion.convert(source, target, to, dtype=chosen, ema=ema, prediction=predicts):
        typer.echo(f"note: {note}")
    typer.echo(f"{target}: written, read back, and its outputs are the source's")


def inspect(source: Source) -> None:
    """Say what a model is: parts, parameters, types, metadata, and what does not fit."""
    from ldm.checkpoints.describe import describe

    typer.echo(describe(source))

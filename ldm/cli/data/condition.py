"""`ldm data condition`: condition pictures of a folder, for training what obeys them."""

from typing import Annotated

import typer

from ldm.cli.data.common import app, progress_of


@app.command(no_args_is_help=True)
def condition(
    pictures: Annotated[str, typer.Argument(help="a folder of pictures, with all below it")],
    kind: Annotated[str, typer.Option(help="edges or segments")],
    out: Annotated[str, typer.Option(help="the folder to write to, under the same names")],
    size: Annotated[int | None, typer.Option(help="first make pictures smaller: px of the shorter side")] = None,
) -> None:
    """Write the edges or the regions of each picture as a PNG. Give the size that will be trained on.

    Example: ldm data condition my-pictures --kind edges --out my-edges --size 512
    """
    from data_pipeline.conditions import write_conditions  # here, for it takes seconds to import

    unusable = write_conditions(pictures, out, kind, size, progress_of("pictures"))
    for name, why in unusable.items():
        typer.echo(f"  {name}: {why}")
    typer.echo(out)
    typer.echo(f"then: ldm data build {pictures} SHARDS conditions={out}")

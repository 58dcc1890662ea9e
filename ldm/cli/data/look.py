"""`ldm data info`, `verify`, `report`, `preview`, `doctor`: what a shard folder holds and whether it is sound."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import storage
from data_pipeline.doctor import ERROR, WARNING, Training, examine
from data_pipeline.durable import write_atomically
from data_pipeline.preview import contact_sheet
from data_pipeline.reader import ShardReader
from data_pipeline.report_page import render
from data_pipeline.shards import CONDITION, MASK, to_json
from data_pipeline.survey import survey
from data_pipeline.verify import verify as find_damage
from ldm.cli.data.common import app, progress_of

Folder = Annotated[str, typer.Argument(help="a shard folder")]


@app.command(no_args_is_help=True)
def info(path: Folder) -> None:
    """Say in a few lines what a shard folder holds.

    Example: ldm data info data/emoji
    """
    dataset = ShardReader(path)
    held = dataset.info
    pixels = f"{held.size} x {held.size} px" if held.size else "original size"
    settings = " ".join(f"{k}={v}" for k, v in held.source["settings"].items())
    rows = "" if held.rows is None else f"; of {held.rows} rows {held.rows - held.samples} were turned away"
    typer.echo(f"samples  {held.samples} in {len(held.shards)} shards, {held.bytes / 1e6:.1f} MB{rows}")
    beside = [name for name in (CONDITION, MASK) if name in dataset.extensions(0)]
    typer.echo(f"images   {', '.join([held.image_format, pixels, *(name.partition('.')[0] for name in beside)])}")
    typer.echo(f"source   {held.source['kind']} {settings}")
    typer.echo(f"first    {dataset[0].key}: {dataset[0].captions[0]}")


@app.command(no_args_is_help=True)
def verify(path: Folder) -> None:
    """Read every byte of a shard folder and name each file, row and member that is not as it was written.

    Example: ldm data verify data/mine
    """
    damage = find_damage(path, progress_of("shards"))
    for line in damage:
        typer.echo(line)
    if damage:
        raise ValueError(f"{path} is damaged in {len(damage)} places; build the folder again to repair it")
    typer.echo("every byte is as it was written")


@app.command(no_args_is_help=True)
def report(
    path: Folder,
    out: Annotated[str | None, typer.Option(help="the page to write; else report.html in the folder")] = None,
) -> None:
    """Write what a folder holds and what was turned away as one HTML page, and as JSON beside it.

    Example: ldm data report data/mine --out mine.html
    """
    page = out or storage.join(path, "report.html")
    if not page.endswith(".html"):
        raise ValueError(f"--out {page}: the page's name ends in .html")
    found = survey(path)
    storage.write(page, render(found, path).encode())
    storage.write(page.removesuffix(".html") + ".json", to_json(found.to_json()))
    typer.echo(f"{page}\n{found.report}")


@app.command(no_args_is_help=True)
def preview(
    path: Folder,
    out: Annotated[Path, typer.Argument(help="the PNG to write")],
    count: Annotated[int, typer.Option(help="pictures of each sort: delivered, turned away by filters")] = 24,
    columns: Annotated[int, typer.Option(help="pictures side by side")] = 6,
) -> None:
    """Draw a contact sheet: some pictures with their captions.

    Example: ldm data preview data/mine sheet.png
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the sheet's name ends in .png")
    buffer = io.BytesIO()
    contact_sheet(path, count, columns).save(buffer, "PNG")
    write_atomically(out, buffer.getvalue())
    typer.echo(str(out))


@app.command(no_args_is_help=True)
def doctor(
    paths: Annotated[list[str], typer.Argument(help="shard folders that are to be trained on")],
    ranks: Annotated[int, typer.Option(help="processes that train together")] = 1,
    workers: Annotated[int, typer.Option(help="loading processes of each rank")] = 0,
    batch: Annotated[int, typer.Option(help="samples of one step over all ranks")] = 1,
    speed: Annotated[float | None, typer.Option(help="samples per second over all ranks, to estimate time")] = None,
    max_tokens: Annotated[int, typer.Option(help="of the text encoder, start and end included")] = 77,
) -> None:
    """Look for what would spoil a training run: too few samples, bad pictures, missing or long captions, duplicates.

    Exit status 1 when anything is an error.

    Example: ldm data doctor data/mine --ranks 2 --workers 4 --batch 64 --speed 120
    """
    training = Training(ranks, workers, batch, speed, max_tokens)
    tokens = _clip_tokens(max_tokens)
    levels = []
    for path in paths:
        typer.echo(path)
        for finding in examine(path, training, tokens):
            typer.echo(f"  {finding.level:<8} {finding.text}")
            levels.append(finding.level)
    errors, warnings = levels.count(ERROR), levels.count(WARNING)
    if errors:
        raise ValueError(f"{errors} errors and {warnings} warnings: do not train on this yet")
    typer.echo(f"ready to train, with {warnings} warnings" if warnings else "ready to train")


def _clip_tokens(max_tokens: int) -> Callable[[str], int]:
    from ldm.models.text import Tokenizer  # here, for it takes seconds to import

    return Tokenizer(max_tokens, 0).length

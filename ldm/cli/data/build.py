"""`ldm data fetch`, `build`, `index`: making shard folders."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import assembly
from data_pipeline.build import BuildConfig
from data_pipeline.build import build as build_shards
from data_pipeline.download import FetchConfig
from data_pipeline.fetch import fetch as fetch_table
from data_pipeline.filters import FilterConfig
from data_pipeline.sources import Source
from data_pipeline.sources.opening import DRAWN, recognise
from ldm.cli.data.common import app, progress_of
from ldm.cli.data.similarity import ClipSimilarity
from ldm.config import load_config

FILTERS = "filters."


def open_source(spec: str, overrides: list[str], size: int | None) -> tuple[Source, int | None, str]:
    """The source that `spec` names, the size its pictures are to be stored at, and what it was taken for.

    A source that draws its pictures draws them at `size`, which is sharper than resizing them later, and
    without a size is stored at its own. Raises ValueError for an unknown name or setting.
    """
    found = recognise(spec)
    if found.kind in DRAWN and size is not None and not any(o.startswith("size=") for o in overrides):
        overrides = [*overrides, f"size={size}"]
    config = load_config(found.schema, [], overrides)
    if found.kind in DRAWN and size is None:
        size = config.size
    return found.open(config), size, str(found)


def read_part(text: str) -> tuple[int, int]:
    """The numbers of "3/16": (3, 16). Raises ValueError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--part {text}: write I/N with I from 1 to N, such as 3/16")
    return int(part), int(parts)


@app.command(no_args_is_help=True)
def fetch(
    table: Annotated[str, typer.Argument(help="a .csv, .tsv, .jsonl or .parquet with a column of URLs")],
    out: Annotated[Path, typer.Argument(help="the folder to download into")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as per_host=2")] = None,
) -> None:
    """Download what a table of URLs names. Started again, it asks only for what is missing or may work by now.

    Settings: url_column, caption_columns, max_bytes, concurrency, per_host, delay_s, tries, honour_robots and more.

    Example: ldm data fetch laion.parquet data/fetched per_host=2
    """
    report = fetch_table(table, out, load_config(FetchConfig, [], settings or []), progress_of("rows"))
    typer.echo(f"{out}\n{report}")


@app.command(no_args_is_help=True)
def build(
    source: Annotated[str, typer.Argument(help="shapes, emoji, a path, or KIND:PATH; s3:// and the like, too")],
    out: Annotated[str, typer.Argument(help="the shard folder to make")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value for the source, or filters.key=value")] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side; without it pictures keep their size")] = None,
    workers: Annotated[int, typer.Option(help="processes; the shards are the same for any number")] = 0,
    image_format: Annotated[str, typer.Option(help="png (lossless), jpg or webp")] = "png",
    quality: Annotated[int, typer.Option(help="1 to 100, for jpg and webp")] = 95,
    samples_per_shard: Annotated[int, typer.Option(help="rows of the source that make one shard")] = 500,
    executor: Annotated[str | None, typer.Option(help="serial, processes or ray (RAY_ADDRESS, or here)")] = None,
    clip: Annotated[str, typer.Option(help="a run of the contrastive task, for filters.min_similarity")] = "",
    part: Annotated[str, typer.Option(help="I/N: only every N-th shard from the I-th on, for job arrays")] = "1/1",
) -> None:
    """Make a shard folder from a source. Started again after a kill, it goes on where it was.

    Sources: a folder of pictures with .txt, .caption or metadata files, a table of paths, img2dataset's output,
    WebDataset tars, a Hugging Face dataset on disk, what `ldm data fetch` made; shapes and emoji draw their own.
    A row that cannot be used is turned away by name: see `ldm data report`. Of a folder, conditions=FOLDER takes paired
    pictures of the same names along, and masks=FOLDER or masks=alpha how much each pixel counts in the loss.

    Example: ldm data build my-pictures data/mine --size 512 --workers 4 filters.min_side_px=400
    """
    given = settings or []
    filters = [text.removeprefix(FILTERS) for text in given if text.startswith(FILTERS)]
    opened, stored_size, taken = open_source(source, [text for text in given if not text.startswith(FILTERS)], size)
    config = BuildConfig(
        size=stored_size,
        workers=workers,
        samples_per_shard=samples_per_shard,
        image_format=image_format,
        quality=quality,
        executor=executor,
        filters=load_config(FilterConfig, [], filters),
    )
    typer.echo(taken, err=True)
    similarity = ClipSimilarity.of(clip) if clip else None
    report = build_shards(opened, config, out, progress_of("samples"), read_part(part), similarity)
    waiting = f"part {part} is there; the last part, or `ldm data index {out}`, completes the folder"
    typer.echo(f"{out}\n{report or waiting}")


@app.command(no_args_is_help=True)
def index(path: Annotated[str, typer.Argument(help="a folder whose shards were all built")]) -> None:
    """Write a folder's index anew from its shards, after reading every byte of them. Names those that are missing.

    Example: ldm data index data/mine
    """
    typer.echo(f"{path}\n{assembly.index(path)}")

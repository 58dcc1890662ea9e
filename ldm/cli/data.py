"""`ldm data`: build shards from a source, and say what a shard folder holds."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from data_pipeline.build import BuildConfig
from data_pipeline.build import build as build_shards
from data_pipeline.shards import ShardDataset
from data_pipeline.sources import Source
from data_pipeline.sources.emoji import EmojiConfig, EmojiSource
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.config import did_you_mean, load_config

app = typer.Typer(help="Captioned pictures in, shards out.", no_args_is_help=True)

DRAWN: dict[str, tuple[type[Any], Callable[[Any], Source]]] = {
    "shapes": (ShapesConfig, ShapesSource),
    "emoji": (EmojiConfig, EmojiSource),
}
_SECONDS_BETWEEN_LINES = 10.0


def open_source(name: str, overrides: list[str], size: int | None) -> tuple[Source, int | None]:
    """The source called `name` (shapes, emoji or a folder), and the size its pictures are to be stored at.

    A source that draws its pictures draws them at `size`, which is sharper than resizing them later, and
    without a size is stored at its own. Raises ValueError for an unknown name or setting.
    """
    if name not in DRAWN:
        if not Path(name).is_dir():
            hint = did_you_mean(name, DRAWN).replace("Known:", "Sources:")
            raise ValueError(f"unknown source {name!r}{hint}, or a folder")
        return FolderSource(replace(load_config(FolderConfig, [], overrides), path=name)), size
    schema, source = DRAWN[name]
    if size is not None and not any(o.startswith("size=") for o in overrides):
        overrides = [*overrides, f"size={size}"]
    config = load_config(schema, [], overrides)
    return source(config), config.size if size is None else size


@app.command(no_args_is_help=True)
def build(
    source: Annotated[str, typer.Argument(help="shapes, emoji, or a folder of pictures with captions")],
    out: Annotated[Path, typer.Argument(help="the shard folder to make")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value for the source, see above")] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side; without it pictures keep their size")] = None,
    workers: Annotated[int, typer.Option(help="processes; the shards are the same for any number")] = 0,
    image_format: Annotated[str, typer.Option(help="png (lossless), jpg or webp")] = "png",
    quality: Annotated[int, typer.Option(help="1 to 100, for jpg and webp")] = 95,
) -> None:
    """Make a shard folder from a source. Started again after a kill, it goes on where it was.

    Settings: shapes takes count, seed, split, max_objects; emoji takes font, cldr, language, split; a folder
    takes min_side_px, max_pixels. Captions of a folder: same-stem .txt or .caption files, or metadata.jsonl / .csv.

    Example: ldm data build emoji data/emoji --size 64 --workers 2 split=train
    """
    opened, stored_size = open_source(source, settings or [], size)
    config = BuildConfig(stored_size, workers, image_format=image_format, quality=quality)
    report = build_shards(opened, config, out, _bar() if sys.stderr.isatty() else _lines())
    typer.echo(f"{out}\n{report}")


@app.command(no_args_is_help=True)
def info(
    path: Annotated[Path, typer.Argument(help="a shard folder")],
    verify: Annotated[bool, typer.Option("--verify", help="read every byte and compare with the hashes")] = False,
) -> None:
    """Say what a shard folder holds. Fails, naming them, when files are missing or damaged.

    Example: ldm data info data/emoji --verify
    """
    dataset = ShardDataset(path)
    held = dataset.info
    pixels = f"{held.size} x {held.size} px" if held.size else "original size"
    settings = " ".join(f"{k}={v}" for k, v in held.source["settings"].items())
    typer.echo(f"samples  {held.samples} in {len(held.shards)} shards, {held.bytes / 1e6:.1f} MB")
    typer.echo(f"images   {held.image_format}, {pixels}")
    typer.echo(f"source   {held.source['kind']} {settings}")
    typer.echo(f"first    {dataset[0].key}: {dataset[0].captions[0]}")
    if verify:
        damaged = dataset.damaged()
        if damaged:
            raise ValueError(f"damaged in {path}: {', '.join(damaged)}; build the folder again")
        typer.echo("verified every byte is as it was written")


def _bar() -> Callable[[int, int], None]:
    bar = tqdm(unit=" samples", file=sys.stderr)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress


def _lines() -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            typer.echo(f"{done} of {total} samples", err=True)
            last = time.monotonic()

    return progress

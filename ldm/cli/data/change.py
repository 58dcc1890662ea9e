"""`ldm data remove`, `dedupe`, `merge`, `split`: new shards from stored ones; no picture is encoded again."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import copying
from data_pipeline.duplicates import DropList, read_drop_list
from data_pipeline.remove import Removals, find, find_twice, take_out
from ldm.cli.data.common import app, progress_of

DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would go")]
_SHOWN = 20


@app.command(no_args_is_help=True)
def remove(
    path: Annotated[str, typer.Argument(help="a shard folder")],
    keys: Annotated[Path | None, typer.Option(help="a text file: one key a line")] = None,
    urls: Annotated[Path | None, typer.Option(help="a text file: one URL a line")] = None,
    hashes: Annotated[
        Path | None, typer.Option(help="a text file: one sha256 a line, original or stored picture")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Take pictures out of a finished folder. Interrupted, it is completed by the same command.

    Their rows stay in the ledger as "removed on request"; shards without any of them stay as they are.

    Example: ldm data remove data/mine --urls requests.txt
    """
    wanted = DropList()
    for kind, file in (("keys", keys), ("urls", urls), ("hashes", hashes)):
        if file is not None:
            wanted |= read_drop_list(file, kind)
    if not wanted:
        raise ValueError("name what is to go: --keys, --urls or --hashes with a text file")
    removals, missing = find(path, wanted)
    _take_out(path, removals, dry_run)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        typer.echo(f"{len(missing)} on the list are not here, or were removed before: {shown}")


@app.command(no_args_is_help=True)
def dedupe(
    path: Annotated[str, typer.Argument(help="a shard folder")],
    against: Annotated[str | None, typer.Option(help="another folder: what is there goes from this one")] = None,
    near: Annotated[
        int | None, typer.Option(help="also pictures whose perceptual hashes differ in so few bits")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Take out pictures that are there twice; the first stays. Their rows stay in the ledger as "duplicate".

    Example: ldm data dedupe data/mine --near 4 --dry-run
    """
    _take_out(path, find_twice(path, against, near), dry_run)


@app.command(no_args_is_help=True)
def merge(
    folders: Annotated[list[str], typer.Argument(help="shard folders of one size and format, then the one to make")],
    rename: Annotated[bool, typer.Option("--rename", help="put the folder's number before each key")] = False,
) -> None:
    """Join shard folders into a new one.

    Example: ldm data merge data/cats data/dogs data/pets
    """
    if len(folders) < 3:
        raise ValueError("merging takes 2 folders or more, and last the one to make")
    report = copying.merge(list(folders[:-1]), folders[-1], rename=rename, progress=progress_of("shards"))
    typer.echo(f"{folders[-1]}\n{report}")


@app.command(no_args_is_help=True)
def split(
    path: Annotated[str, typer.Argument(help="a shard folder")],
    train: Annotated[str, typer.Argument(help="the folder to make of most of it")],
    held_out: Annotated[str, typer.Argument(help="the folder to make of the rest, for validation")],
    share: Annotated[float | None, typer.Option(help="chance of a sample to be held out, 0 to 1")] = None,
    count: Annotated[int | None, typer.Option(help="or how many samples are held out")] = None,
    seed: Annotated[int, typer.Option(help="another number, another choice")] = 0,
) -> None:
    """Divide a shard folder in two by a hash of each key: the same choice on every machine, at any time.

    Example: ldm data split data/mine data/train data/val --share 0.01
    """
    made = copying.split(path, (train, held_out), share=share, count=count, seed=seed, progress=progress_of("shards"))
    for folder, report in zip((train, held_out), made, strict=True):
        typer.echo(f"{folder}\n{report}")


def _take_out(path: str, removals: Removals, dry_run: bool) -> None:
    for key, (_, detail) in list(removals.items())[:_SHOWN]:
        typer.echo(f"  {key}: {detail}")
    if len(removals) > _SHOWN:
        typer.echo(f"  ... and {len(removals) - _SHOWN} more")
    if dry_run:
        typer.echo(f"{len(removals)} samples would go")
        return
    report = take_out(path, removals)
    typer.echo(f"{len(removals)} samples are out\n{path}\n{report}")

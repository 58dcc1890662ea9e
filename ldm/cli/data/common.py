"""What the commands of `ldm data` share: their group, and how they say how far they are."""

import sys
import time
from collections.abc import Callable

import typer
from tqdm import tqdm

app = typer.Typer(help="Captioned pictures in, shards out.", no_args_is_help=True)

_SECONDS_BETWEEN_LINES = 10.0


def progress_of(unit: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows a bar on a terminal, else writes a line now and then."""
    return _bar(unit) if sys.stderr.isatty() else _lines(unit)


def _bar(unit: str) -> Callable[[int, int], None]:
    bar = tqdm(unit=f" {unit}", file=sys.stderr)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress


def _lines(unit: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            typer.echo(f"{done} of {total} {unit}", err=True)
            last = time.monotonic()

    return progress

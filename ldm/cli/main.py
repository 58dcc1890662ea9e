"""The `ldm` command: verbs, and one clear line for what goes wrong."""

import logging
import os
import sys

import typer

from ldm.cli import adapter, data, evaluate, runs
from ldm.cli.average import average
from ldm.cli.convert import convert, inspect
from ldm.cli.finetune import finetune
from ldm.cli.generate import generate
from ldm.cli.train import train


def application() -> typer.Typer:
    """All verbs under one name."""
    app = typer.Typer(
        name="ldm",
        help="Latent text-to-image, every stage: pictures -> shards -> models -> pictures.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.add_typer(data.app, name="data", help="Turn captioned pictures into shards, and look into them.")
    app.command()(train)
    app.command()(finetune)
    app.add_typer(runs.app, name="runs", help="Training runs: how they stand, side by side, as a page.")
    app.command()(average)
    app.command()(generate)
    app.command()(convert)
    app.command()(inspect)
    app.add_typer(adapter.app, name="adapter", help="LoRA and its kin: merge, extract, resize, convert.")
    app.add_typer(evaluate.app, name="evaluate", help="Measure a model.")
    return app


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2, not in a traceback."""
    _open_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        application()()
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        sys.exit(f"ldm: {' '.join(str(error).split())}")
    finally:
        _flush_streams()


def _open_streams() -> None:
    """Have all three standard streams, if only to nowhere: a file opened later would become one of them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _flush_streams() -> None:
    """Give up what nobody can be told: Python would end with status 120, whatever became of the command."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""`ldm train`."""

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ldm.training.run import RunConfig


def train(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [key=value...]", help="YAML files, later ones win; then settings."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config, and the run's memory, time and disk, and stop.")
    ] = False,
    tflops: Annotated[
        float, typer.Option(min=0.0, help="With --dry-run: TFLOP/s to reckon with; else a guess for this device.")
    ] = 0.0,
) -> None:
    """Train an autoencoder, a text encoder, a denoiser or a classifier; run it again to resume.

    Example: ldm train configs/demo/autoencoder.yaml data.path=shards/train out=runs/autoencoder

    On several GPUs or machines: accelerate launch -m ldm train CONFIG... key=value ...

    Start from an existing model, to fine-tune it: init=MODEL

    SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 saves after the step under way; a second one ends it at once. Exit status: 0
    finished; 75 stopped and saved, run it again to go on; 1 an error, in one line; 70 no progress, and who held it up.
    """
    from ldm.config import load_config
    from ldm.training.run import RunConfig, describe

    files = [w for w in words if "=" not in w]
    overrides = [w for w in words if "=" in w]
    if not files:
        raise ValueError("give at least one config file, such as configs/demo/autoencoder.yaml")
    config = load_config(RunConfig, files, overrides)
    if dry_run:
        typer.echo(describe(config, tflops))
    else:
        go(config)


def go(config: "RunConfig") -> bool:
    """Run it and say where the model is -> whether this is the main process. Exits with status 75 where it stopped."""
    from ldm.training.ranks import part
    from ldm.training.run import run
    from ldm.training.stopping import SIGNALS, STOPPED

    state = run(config)
    if state.stopped:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a launcher ends all others as soon as one has gone
    part()
    if state.accelerator.is_main_process:
        with suppress(OSError):  # whoever no longer listens learns it from the exit status
            typer.echo(f"{config.out}: at step {state.step}; the model is its newest checkpoint")
    if state.stopped:
        raise typer.Exit(STOPPED)
    return bool(state.accelerator.is_main_process)

"""`ldm train`."""

from typing import Annotated

import typer


def train(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [key=value...]", help="YAML files, later ones win; then settings."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config, sizes and cost of the run, and stop.")
    ] = False,
) -> None:
    """Train an autoencoder, a text encoder, a denoiser or a classifier; run it again to resume.

    Example: ldm train configs/demo/autoencoder.yaml data.path=shards/train out=runs/autoencoder

    On several GPUs or machines: accelerate launch -m ldm train CONFIG... key=value ...

    Start from an existing model, to fine-tune it: init=MODEL
    """
    from ldm.config import load_config
    from ldm.training.run import RunConfig, describe, run

    files = [w for w in words if "=" not in w]
    overrides = [w for w in words if "=" in w]
    if not files:
        raise ValueError("give at least one config file, such as configs/demo/autoencoder.yaml")
    config = load_config(RunConfig, files, overrides)
    if dry_run:
        typer.echo(describe(config))
    else:
        state = run(config)
        if state.accelerator.is_main_process:
            typer.echo(f"{config.out}: at step {state.step}; the model is its newest checkpoint")

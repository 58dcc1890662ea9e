"""`ldm average`."""

from pathlib import Path
from typing import Annotated

import typer


def average(
    run: Annotated[Path, typer.Argument(help="A run folder whose training kept other averages.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    sigma_rel: Annotated[float | None, typer.Option(help="Width of a power-function average, 0.01 to 0.25.")] = None,
    step: Annotated[int | None, typer.Option(help="With --sigma-rel: as of this step; else of the last.")] = None,
    decay: Annotated[float | None, typer.Option(help="Or one of the run's ema_decays.")] = None,
) -> None:
    """Make a model of another average of a run's weights.

    Any width can be chosen after training if the run kept snapshots (snapshot_steps); see Karras et al. 2024, sec. 3.

    Example: ldm average runs/denoiser wide --sigma-rel 0.1
    """
    from ldm.training.posthoc import reconstruct, save_average, tracked

    if (sigma_rel is None) == (decay is None):
        raise ValueError("give --sigma-rel or --decay: which average of the weights is wanted")
    if sigma_rel is not None:
        averages = reconstruct(run, sigma_rel, step)
    else:
        assert decay is not None
        averages = tracked(run, decay)
    typer.echo(save_average(run, averages, out))

"""`ldm runs`: training runs at a glance, side by side, and as a page."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core


class ListByDefault(typer.core.TyperGroup):
    """`ldm runs FOLDER` is `ldm runs list FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the verb in where there is none."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=ListByDefault)

LONGEST = 48
"""Characters of a setting that are shown."""

Json = Annotated[bool, typer.Option("--json", help="For other programs.")]


@app.command("list")
def list_runs(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs in them; without any, runs.")] = None,
    as_json: Json = False,
) -> None:
    """How runs stand: running, finished, stopped or failed, how far, and how well. The word `list` may be left out.

    Example: ldm runs runs/demo
    """
    from ldm.training.runs import find_runs, read_run, to_json

    found = [read_run(folder) for folder in find_runs(folders or [Path("runs")])]
    if as_json:
        typer.echo(to_json(found))
        return
    head = ["run", "task", "state", "step", "of", "loss", "best validation", "samples/s", "age"]
    rows = [
        [
            run.folder,
            run.task,
            run.state,
            str(run.step),
            str(run.total_steps),
            _number(run.loss),
            f"{run.best_name} {_number(run.best)}" if run.best_name else "",
            _number(run.samples_per_second),
            _age(run.age_seconds),
        ]
        for run in found
    ]
    typer.echo(_table([head, *rows]) if rows else "no runs here")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.")],
    as_json: Json = False,
) -> None:
    """The settings in which runs differ, and their numbers after equally many samples.

    Example: ldm runs compare runs/a runs/b
    """
    from ldm.training import runs

    found = runs.compare(folders)
    if as_json:
        typer.echo(runs.to_json(found))
        return
    rows = [["", *found.folders]]
    rows += [[name, *map(_short, values)] for name, values in found.settings.items()]
    if found.unshared:
        rows.append([f"({len(found.unshared)} settings that not all of them have)", *[""] * len(found.folders)])
    for samples in dict.fromkeys(samples for samples, _ in found.numbers):
        rows += [[""] * len(rows[0]), [f"after {samples} samples", *[""] * len(found.folders)]]
        rows += [[name, *map(_number, values)] for (at, name), values in found.numbers.items() if at == samples]
    typer.echo(_table(rows))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write RUN/report.html anew: curves, previews, settings, on one page that needs nothing else."""
    from ldm.training.report import write_report

    typer.echo(write_report(folder))


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

"""``mixbits experiment``: run a recipe, write summary.json and report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file like those in recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings to change.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Run folder.")] = Path(
        "runs/experiment"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Compare full precision, uniform bits and learned bits as a recipe says; stopped runs go on where they were."""
    from rich.console import Console

    from mixbits import report
    from mixbits.pipeline.experiment import run_experiment
    from mixbits.pipeline.settings import load_experiment
    from mixbits.summary import read_summary

    changes = tuple(overrides or ())
    command = " ".join(["mixbits experiment", recipe.as_posix(), *changes])
    settings = load_experiment(recipe, changes)
    path = run_experiment(settings, output, command=command, show_progress=not quiet)
    Console(highlight=False, markup=False).print(report.terminal_table(read_summary(path)))
    report.render([path], output / "report.html")
    typer.echo(f"wrote {path} and {output / 'report.html'}")

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and show what it would do; needs no data.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Compare full precision, uniform bits and learned bits as a recipe says; stopped runs go on where they were."""
    from rich.console import Console

    from mixbits import report
    from mixbits.pipeline.experiment import run_experiment
    from mixbits.pipeline.settings import load_experiment
    from mixbits.summary import read_summary

    changes = tuple(overrides or ())
    if dry_run:
        _show_plan(recipe, changes)
        return
    command = " ".join(["mixbits experiment", recipe.as_posix(), *changes])
    settings = load_experiment(recipe, changes)
    path = run_experiment(settings, output, command=command, show_progress=not quiet)
    Console(highlight=False, markup=False).print(report.terminal_table(read_summary(path)))
    report.render([path], output / "report.html")
    typer.echo(f"wrote {path} and {output / 'report.html'}")


def _show_plan(recipe: Path, changes: tuple[str, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mixbits.pipeline.plan import plan
    from mixbits.pipeline.settings import load_experiment

    found = plan(load_experiment(recipe, changes, unset="keep"))
    console = Console(highlight=False, markup=False)
    table = Table("row", "how", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("times smaller", justify="right")
    for row in found.rows:
        table.add_row(row.name, row.how, f"{row.bytes:,}", f"{row.ratio:.2f}")
    console.print(table)
    runs = "" if found.num_runs == 1 else f", {found.num_runs} seeds"
    console.print(
        f"{found.num_parameters:,} parameters, {found.full_bytes:,} bytes in full precision, {found.vocabulary:,} words{runs}"
    )
    for path in found.missing:
        console.print(f"missing: {path}", soft_wrap=True)

"""``mixbits report``: result files to a terminal table and one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    summaries: Annotated[
        list[Path], typer.Argument(metavar="SUMMARY...", help="summary.json files, or run folders that hold one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")] = Path(
        "report.html"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Write the page only; print no tables.")] = False,
) -> None:
    """Show results: a table here, and one HTML page that needs no network."""
    from rich.console import Console

    from mixbits import report
    from mixbits.errors import DataError
    from mixbits.summary import read_summary

    found = [read_summary(path) for path in summaries]
    if output.is_dir():
        raise DataError(f"{output}: is a folder; expected a file name for the page, e.g. -o {output / 'report.html'}")
    console = Console(highlight=False, markup=False)
    if not quiet:
        for summary in found:
            console.print(report.terminal_table(summary))
            console.print()
    report.render(summaries, output)
    console.print(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)", soft_wrap=True)

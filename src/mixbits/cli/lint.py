"""``mixbits lint IN``: what is suspicious in n-best lists. Exit code 0: nothing, 1: findings, 2: cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixbits.cli.convert import (
    AlternationsOption,
    BeamSizeOption,
    FormatOption,
    ManifestOption,
    ReferencesOption,
    SymbolsOption,
)

if TYPE_CHECKING:
    from mixbits.asr.lint import Findings


def main(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File or folder of n-best lists.", show_default=False)],
    format: FormatOption = None,
    references: ReferencesOption = None,
    alternations: AlternationsOption = "refuse",
    manifest: ManifestOption = None,
    beam_size: BeamSizeOption = None,
    symbols: SymbolsOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Look for duplicate ids, wrong order, NaN, missing or empty hypotheses, costs in the place of scores, ragged lists, missing references.

    Exit code 0: nothing found; 1: findings; 2: IN cannot be read as a whole.
    """
    import json as json_module

    from mixbits.asr.formats.registry import ReadOptions, detect_format, read_any
    from mixbits.asr.lint import Findings, lint_lists

    findings = Findings()
    found = format or detect_format(source)
    options = ReadOptions(references, alternations, manifest, beam_size, symbols)
    file = read_any(source, format=found, options=options, report=findings.report)
    lint_lists(file, findings, expect_references=references is not None)
    facts = {
        "path": str(source),
        "format": found,
        "utterances": len(file),
        "hypotheses": sum(len(entry.hypotheses) for entry in file),
        "references": sum(entry.reference is not None for entry in file),
    }
    if json:
        record = {**facts, "findings": findings.counts, "places": {k: v for k, v in findings.places.items() if v}}
        typer.echo(json_module.dumps(record, indent=1))
    else:
        _print(findings)
        typer.echo(
            f"{source} ({found}): {facts['utterances']:,} utterances, {facts['hypotheses']:,} hypotheses, "
            f"{facts['references']:,} references; {f'{findings.total:,} findings' if findings.total else 'nothing found'}"
        )
    if findings.total:
        raise typer.Exit(1)


def _print(findings: Findings) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not findings.total:
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("first places", overflow="fold")
    for kind, count in findings.counts.items():
        if count:
            rest = f"\n… and {count - len(findings.places[kind]):,} more" if count > len(findings.places[kind]) else ""
            table.add_row(kind, f"{count:,}", Text("\n".join(findings.places[kind]) + rest))
    console.print(table)

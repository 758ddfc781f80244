"""``mixbits compare FIRST OTHER...``: word errors, tests, oracle curves and examples of recognizers' outputs on the same utterances."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixbits.cli.outputs import check_outputs

if TYPE_CHECKING:
    from mixbits.pipeline.compare_inputs import System


def main(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="FIRST OTHER...",
            help="Outputs: n-best lists of any format, rescored or not, or transcripts (sclite trn, Kaldi text). NAME=FILE names one.",
            show_default=False,
        ),
    ],
    references: Annotated[
        Path | None, typer.Option(help="References: sclite trn, Kaldi text or a NeMo manifest, by utterance id.")
    ] = None,
    alternations: Annotated[
        Literal["refuse", "first"], typer.Option(help="'{ a / b }' in trn files: refuse, or take the first.")
    ] = "refuse",
    by: Annotated[
        list[str] | None,
        typer.Option(help="Table by this field of the lists; may be repeated (default: speaker, conversation)."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Weights that a rescored list was made with: WER against the LM's weight."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Model that a list was rescored with: WER against model bytes."),
    ] = None,
    all_pairs: Annotated[bool, typer.Option("--all-pairs", help="Test every pair, not only against FIRST.")] = False,
    margin: Annotated[
        float | None, typer.Option(help="Points of WER that a loss must stay below to count as none.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of tests, intervals and bounds.")] = 0.05,
    common: Annotated[bool, typer.Option("--common", help="Compare the utterances that all systems have.")] = False,
    examples: Annotated[int, typer.Option(min=0, max=1000, help="Most improved and worsened utterances to show.")] = 10,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the comparison here as a page.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the comparison here (JSON).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare outputs of recognizers on the same utterances: are the differences real, how large may they be, where do they come from?

    Tests are against FIRST: MAPSSWE with Holm's correction, paired bootstrap by speaker or conversation, upper bound of the difference.
    """
    from itertools import combinations

    from mixbits.errors import SpecError

    paths = {text: Path(text.partition("=")[2] or text) for text in systems}
    check_outputs({"--output": output, "--json": json}, paths)
    if len(systems) < 2:
        raise SpecError("give at least two outputs to compare: mixbits compare FIRST OTHER")

    from mixbits.jsonfile import write_json
    from mixbits.pipeline.compare import compare_systems
    from mixbits.pipeline.compare_inputs import match_systems, read_system
    from mixbits.report.compare_page import render_comparison

    read = [read_system(argument, alternations=alternations) for argument in systems]
    read = _with_facts(read, weights or [], model or [])
    matched = match_systems(read, references=references, alternations=alternations, common=common)
    names = [system.name for system in read]
    record = compare_systems(
        matched,
        pairs=list(combinations(names, 2)) if all_pairs else None,
        groups=by,
        alpha=alpha,
        margin=margin,
        num_examples=examples,
        seed=seed,
    )
    print_comparison(record)
    if json is not None:
        typer.echo(f"wrote {write_json(json, record)}")
    if output is not None:
        typer.echo(f"wrote {render_comparison(record, output)}")


def _with_facts(systems: list[System], weights: list[str], models: list[str]) -> list[System]:
    """The systems with weights and model bytes. Raises SpecError for a name that is none of theirs."""
    from dataclasses import replace

    from mixbits.asr.weights import load_weights

    by_name = {system.name: system for system in systems}
    for name, path in _assignments("--weights", weights, by_name):
        by_name[name] = replace(by_name[name], weights=load_weights(path))
    for name, path in _assignments("--model", models, by_name):
        by_name[name] = replace(by_name[name], num_bytes=_model_bytes(path))
    return [by_name.get(system.name, system) for system in systems] if len(by_name) == len(systems) else systems


def _assignments(option: str, given: list[str], known: dict[str, System]) -> list[tuple[str, Path]]:
    from mixbits.errors import SpecError

    found = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in known:
            raise SpecError(f"{option} {text}: expected NAME=PATH, NAME one of {', '.join(known)}")
        found.append((name, Path(path)))
    return found


def _model_bytes(directory: Path) -> int:
    from mixbits.errors import DataError
    from mixbits.pipeline.certified_models import weight_bytes

    size = weight_bytes(directory)
    if not size:
        raise DataError(f"{directory}: holds no weight files (*.safetensors, *.bin); expected a model directory")
    return size


def print_comparison(record: dict[str, Any]) -> None:
    """Sentences and the two tables of a comparison record."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mixbits.report.cells import printable
    from mixbits.report.compare_page import sentences, system_table, test_table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False, markup=False)
    title = f"{record['utterances']:,} utterances, {record['words']:,} words"
    for text, (headers, rows), left in ((title, system_table(record), (0,)), (None, test_table(record), (0, 1, 2))):
        table = Table(
            title=None if text is None else Text(text), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
        )
        for place, header in enumerate(headers):
            table.add_column(header, justify="left" if place in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print(table)
    for sentence in sentences(record):
        console.print(printable(sentence), soft_wrap=True)
    for test in record["tests"]:
        if test["warning"]:
            console.print(printable(f"Note: {test['b']} against {test['a']}: {test['warning']}."), soft_wrap=True)
    for note in record["notes"]:
        console.print(printable(f"Note: {note}"), soft_wrap=True)

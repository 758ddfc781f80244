"""``mixbits rescore-lattice LATTICES --model DIR``: lattices with a language model's scores, best paths, a certificate of the error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mixbits.pipeline.rescore_lattice import LatticeReport


def main(
    lattices: Annotated[
        Path,
        typer.Argument(metavar="LATTICES", help="A Kaldi archive, an SLF file, or a folder of them; also .gz, .xz."),
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model directory, full precision or packed.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the lattices here, in their format (a folder for a folder)."),
    ] = None,
    best_path: Annotated[
        Path | None, typer.Option(help="Write the best hypotheses here: words (id), a line each (trn).")
    ] = None,
    nbest: Annotated[int | None, typer.Option(min=1, help="So many hypotheses an utterance in --nbest-output.")] = None,
    nbest_output: Annotated[
        Path | None, typer.Option(help="Write the best hypotheses as n-best lists (JSONL, .gz).")
    ] = None,
    acoustic_scale: Annotated[
        float | None, typer.Option(help="Weight of acoustic scores (default: the file's, else 1).")
    ] = None,
    lm_scale: Annotated[float | None, typer.Option(help="Weight of LM scores (default: the file's, else 1).")] = None,
    word_insertion_penalty: Annotated[
        float | None,
        typer.Option(help="Added per word (default: the file's, else 0); a positive one favours long hypotheses."),
    ] = None,
    interpolate: Annotated[float, typer.Option(help="New LM score = (1 − W) old + W model.", metavar="W")] = 1.0,
    old_lm_scale: Annotated[
        float | None, typer.Option(help="In the place of 1 − W, e.g. 1 where the old LM was taken out of the lattices.")
    ] = None,
    old_lm: Annotated[
        Path | None,
        typer.Option(
            help="The n-gram model (ARPA) that made the lattices: new LM score = old + W (model − n-gram); needs a --merge-order not below its order.",
            metavar="ARPA",
        ),
    ] = None,
    merge_order: Annotated[
        int, typer.Option(min=0, help="Histories equal in their last N − 1 words share a state; 0: never.", metavar="N")
    ] = 4,
    beam: Annotated[float, typer.Option(min=0, help="Look only at paths so much below the best one.")] = 10.0,
    max_paths: Annotated[
        int, typer.Option(min=0, help="With at most so many paths in the beam, all are scored exactly.")
    ] = 500,
    max_arcs: Annotated[
        int, typer.Option(min=1, help="Largest new lattice; the beam is narrowed to keep to it.")
    ] = 50_000,
    max_tokens: Annotated[int, typer.Option(min=2, help="Model positions at once: less needs less memory.")] = 4096,
    words: Annotated[Path | None, typer.Option(help="Kaldi's words.txt, where the lattices hold word numbers.")] = None,
    lower_case: Annotated[bool, typer.Option("--lower-case", help="Give the model the texts in lower case.")] = False,
    drop_dead_ends: Annotated[
        bool, typer.Option("--drop-dead-ends", help="Leave out states on no path (they are an error otherwise).")
    ] = False,
    runtime: Annotated[
        Literal["auto", "int8", "float32", "pytorch"], typer.Option(help="What computes, as in mixbits rescore.")
    ] = "auto",
    json: Annotated[Path | None, typer.Option("--json", help="Write the certificates and totals here.")] = None,
) -> None:
    """Rescore LATTICES with a language model.

    Few paths: all exactly. Many: states are split by the last N − 1 words, the best history stands for the others, and the best hypotheses are
    scored exactly to certify the error.
    """
    from mixbits.cli.outputs import check_outputs
    from mixbits.errors import SpecError

    if nbest is not None and nbest_output is None:
        raise SpecError("--nbest needs --nbest-output FILE to write to")
    if output is None and best_path is None and nbest_output is None:
        raise SpecError("nothing to write: give -o LATTICES, --best-path FILE or --nbest-output FILE")
    named = {"--best-path": best_path, "--nbest-output": nbest_output, "--json": json}
    if not lattices.is_dir():
        named = {"-o": output, **named}
    check_outputs(named, {"LATTICES": lattices})

    from mixbits.pipeline.rescore_lattice import LatticeOptions, rescore_lattices
    from mixbits.runs import versions, write_json

    options = LatticeOptions(
        acoustic_scale=acoustic_scale,
        lm_scale=lm_scale,
        word_insertion_penalty=word_insertion_penalty,
        interpolate=interpolate,
        old_lm_scale=old_lm_scale,
        old_lm=old_lm,
        merge_order=merge_order,
        beam=beam,
        max_paths=max_paths,
        max_arcs=max_arcs,
        num_hypotheses=nbest or 10,
        max_tokens=max_tokens,
        lower_case=lower_case,
        drop_dead_ends=drop_dead_ends,
        runtime=runtime,
        words=words,
    )
    report = _with_progress(
        lambda advance: rescore_lattices(
            lattices, model, output, options=options, best_path=best_path, nbest=nbest_output, advance=advance
        )
    )
    if json is not None:
        record = {
            "format": "mixbits-lattice-rescoring",
            "format_version": 1,
            "lattices": str(lattices),
            "model": str(model),
        }
        record |= {"model_hash": report.model_hash, "runtime": report.runtime, "totals": report.totals()}
        shown = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
        write_json(
            json,
            record | {"options": shown, "utterances": report.utterances, "notes": report.notes, "versions": versions()},
        )
    _print(report)
    for path in (output, best_path, nbest_output, json):
        if path is not None:
            typer.echo(f"wrote {path}")


def _with_progress(work) -> LatticeReport:  # type: ignore[no-untyped-def]
    """Run ``work(advance)`` with a bar on a terminal. The number of utterances is not known before they are read."""
    if not sys.stderr.isatty():
        return work(None)
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("rescoring lattices: {task.completed} done, {task.fields[last]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, last="")
        return work(lambda utterance: bar.update(task, advance=1, last=utterance))


def _print(report: LatticeReport) -> None:
    totals = report.totals()
    typer.echo(
        f"{totals['utterances']:,} lattices, {totals['exact_utterances']:,} of them exactly; {totals['arcs_touched']:,} of {totals['arcs']:,} "
        f"arcs touched ({totals['share_touched']:.0%}), {totals['new_arcs']:,} arcs written; {totals['model_positions']:,} model positions in "
        f"{totals['seconds']:.1f} s"
    )
    typer.echo(
        f"Certificate: LM scores of the {totals['checked_hypotheses']:,} best hypotheses are off by {totals['mean_gap_nats']:.3g} nats on average, "
        f"at most {totals['max_gap_nats']:.3g}; those of the best ones by at most {totals['best_max_gap_nats']:.3g}. Exact scores change "
        f"the best hypothesis of {totals['best_changed_by_exact_scores']:,} (the changed one is written)."
    )
    for note in report.notes:
        typer.echo(f"Note: {note}")

"""``mixbits convert IN OUT``: n-best lists from one format to another, without loss or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# The names in mixbits.asr.formats.registry, spelled out so that --help imports nothing; a test compares them.
InputName = Literal["jsonl", "kaldi", "espnet1", "espnet2", "nemo", "mlm-scoring"]
OutputName = Literal["jsonl", "kaldi", "espnet1", "espnet2", "nemo", "mlm-scoring", "trn"]

FormatOption = Annotated[InputName | None, typer.Option("--format", help="Format of IN (default: found out).")]
ReferencesOption = Annotated[
    Path | None, typer.Option(help="References: sclite trn, Kaldi text or a NeMo manifest, joined by utterance id.")
]
AlternationsOption = Annotated[
    Literal["refuse", "first"], typer.Option(help="'{ a / b }' in trn references: refuse, or take the first.")
]
ManifestOption = Annotated[
    Path | None, typer.Option(help="NeMo: the manifest (default: X.manifest.json beside X.tsv).")
]
BeamSizeOption = Annotated[
    int | None, typer.Option(min=1, help="NeMo: lines for each utterance (default: lines over manifest entries).")
]
SymbolsOption = Annotated[
    Path | None, typer.Option(help="Kaldi: words.txt, where only 'words' with integers is there.")
]


def main(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File or folder of n-best lists.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File or new folder to write.", show_default=False)],
    format: FormatOption = None,
    output_format: Annotated[
        OutputName | None, typer.Option("--output-format", help="Format of OUT (default: by .jsonl, .tsv, .trn).")
    ] = None,
    references: ReferencesOption = None,
    alternations: AlternationsOption = "refuse",
    manifest: ManifestOption = None,
    beam_size: BeamSizeOption = None,
    symbols: SymbolsOption = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Fields that may be lost, e.g. lm_score,speaker; all: whatever OUT cannot hold."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the first hypotheses of each list.")] = None,
    gzip: Annotated[bool, typer.Option("--gzip", help="Kaldi: gzip the archives.")] = False,
    transcript: Annotated[
        Literal["one-best", "reference"], typer.Option(help="trn: write the first hypotheses or the references.")
    ] = "one-best",
) -> None:
    """Convert n-best lists: mixbits JSONL, Kaldi folders, ESPnet v1 JSON and v2 folders, NeMo TSV, mlm-scoring JSON; to sclite trn.

    Scores become natural logs, higher is better; nothing is rounded. A field that OUT cannot hold is an error unless --drop names it.
    """
    from dataclasses import replace

    from mixbits.asr.formats.registry import ReadOptions, read_any, write_any
    from mixbits.asr.formats.registry import output_format as find_format
    from mixbits.errors import DataError

    chosen = find_format(target, output_format)
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"{target}: IN and OUT are the same; choose another name")
    options = ReadOptions(references, alternations, manifest, beam_size, symbols)
    lists = list(read_any(source, format=format, options=options))
    if top is not None:
        lists = [replace(entry, hypotheses=entry.hypotheses[:top]) for entry in lists]
    names = {name.strip() for part in drop or () for name in part.split(",") if name.strip()}
    write_any(target, lists, format=chosen, drop=names, compress=gzip, transcript=transcript)
    hypotheses = sum(len(entry.hypotheses) for entry in lists)
    what = f"{transcript} transcripts" if chosen == "trn" else f"{hypotheses:,} hypotheses"
    typer.echo(f"wrote {target}: {len(lists):,} utterances, {what} ({chosen})")

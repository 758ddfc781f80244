"""``mixbits ngram TEXT -o model.arpa.gz``: an n-gram model from plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    text: Annotated[
        Path, typer.Argument(metavar="TEXT", help="Text, one sentence a line, also .gz or .xz.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the ARPA file here (.gz, .xz).")],
    order: Annotated[int, typer.Option(help="Words of the longest n-grams.")] = 4,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="Words to know: a list, or a word-level model directory; all others are <unk>. [default: those of TEXT]"
        ),
    ] = None,
    prune: Annotated[
        str,
        typer.Option(
            metavar="N,N,…", help="For each length: leave out n-grams that occur at most so often; e.g. 0,0,1."
        ),
    ] = "0",
    discount_fallback: Annotated[
        bool,
        typer.Option(
            "--discount-fallback", help="Small or artificial text: discounts 0.5, 1, 1.5 where its counts give none."
        ),
    ] = False,
) -> None:
    """Estimate an interpolated modified Kneser-Ney model (what lmplz and SRILM's -kndiscount -interpolate do) and write an ARPA file."""
    from mixbits.errors import SpecError
    from mixbits.pipeline.ngram import estimate_ngram

    try:
        thresholds = [int(number) for number in prune.replace(",", " ").split()]
    except ValueError:
        raise SpecError(f"--prune is {prune!r}; expected whole numbers, one for each length, e.g. 0,0,1") from None
    found = estimate_ngram(
        text, output, order=order, vocabulary=vocabulary, prune=thresholds, discount_fallback=discount_fallback
    )
    typer.echo(
        f"{found['num_words']:,} words in {found['num_sentences']:,} sentences; vocabulary {found['vocabulary_size']:,} words, "
        f"{found['num_unknown']:,} running words unknown ({found['num_unknown'] / max(1, found['num_words']):.2%})"
    )
    for length, entry in enumerate(found["lengths"], 1):
        kept = "" if entry["kept"] == entry["counted"] else f", {entry['kept']:,} kept"
        discounts = ", ".join(f"{discount:.4f}" for discount in entry["discounts"])
        fallback = " (fallback: the counts give none)" if entry["is_fallback"] else ""
        typer.echo(f"{length}-grams: {entry['counted']:,}{kept}; discounts {discounts}{fallback}")
    typer.echo(f"wrote {output}")

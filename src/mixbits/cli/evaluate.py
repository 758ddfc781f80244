"""``mixbits evaluate``: perplexity of a model, alone or against a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory, full precision or packed.")],
    text: Annotated[Path, typer.Option(help="Text, one sentence a line.")],
    reference: Annotated[Path | None, typer.Option(help="Model to compare with, on the same tokens.")] = None,
    context: Annotated[int | None, typer.Option(help="Window length in tokens.")] = None,
    stride: Annotated[int | None, typer.Option(help="New predictions a window (default: half of it).")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Perplexity per token and per word, with standard errors; unknown words count as one <unk> each."""
    from mixbits.errors import DataError
    from mixbits.jsonfile import write_json
    from mixbits.pipeline.evaluate import evaluate_models

    if json is not None and json.is_dir():
        raise DataError(f"{json}: is a folder; expected the name of a JSON file to write")
    found = evaluate_models(model, text, reference=reference, context=context, stride=stride)
    typer.echo(
        f"perplexity {found['ppl']:.2f} +- {found['ppl_stderr']:.2f} per token, {found['word_ppl']:.2f} per word "
        f"({found['num_tokens']:,} tokens, {found['num_words']:,} words with sentence ends, "
        f"{found['num_unknown']:,} unknown, each predicted as one <unk>; window {found['context']}, stride {found['stride']})"
    )
    if reference is not None:
        delta, stderr = found["delta_nats"], found["delta_nats_stderr"]
        typer.echo(
            f"reference  {found['reference']['ppl']:.2f}; difference {delta:+.4f} +- {stderr:.4f} nats per token "
            f"({100 * found['delta_ppl_relative']:+.2f} % perplexity), paired over sentences"
        )
    if json is not None:
        write_json(json, found)

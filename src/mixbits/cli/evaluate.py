"""``mixbits evaluate``: perplexity of a model, alone, against a reference model, or interpolated with an n-gram model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mixbits.pipeline.evaluate import NgramSettings


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory, full precision or packed.")],
    text: Annotated[Path, typer.Option(help="Text, one sentence a line.")],
    reference: Annotated[Path | None, typer.Option(help="Model to compare with, on the same tokens.")] = None,
    context: Annotated[int | None, typer.Option(help="Window length in tokens.")] = None,
    stride: Annotated[int | None, typer.Option(help="New predictions a window (default: half of it).")] = None,
    ngram: Annotated[
        Path | None, typer.Option(help="Interpolate with this n-gram model: ARPA (.gz, .xz) or KenLM binary.")
    ] = None,
    ngram_weight: Annotated[
        str | None, typer.Option(metavar="W|tune:FILE", help="MODEL's weight, or a text to tune it on.  [default: 0.5]")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Perplexity per token and per word, with standard errors; unknown words count as one <unk> each.

    With --ngram also p = W p(model) + (1 - W) p(n-gram), word by word ("+4-gram").
    """
    from mixbits.errors import DataError
    from mixbits.jsonfile import write_json
    from mixbits.pipeline.evaluate import evaluate_models

    if json is not None and json.is_dir():
        raise DataError(f"{json}: is a folder; expected the name of a JSON file to write")
    settings = _ngram_settings(ngram, ngram_weight)
    found = evaluate_models(model, text, reference=reference, context=context, stride=stride, ngram=settings)
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
    if ngram is not None:
        _print_ngram(found)
    if json is not None:
        write_json(json, found)


def _ngram_settings(path: Path | None, weight: str | None) -> NgramSettings | None:
    from mixbits.errors import SpecError
    from mixbits.pipeline.evaluate import NgramSettings

    if path is None:
        if weight is not None:
            raise SpecError("--ngram-weight needs --ngram: the model to interpolate with")
        return None
    if weight is None:
        return NgramSettings(path)
    if weight.startswith("tune:") and weight != "tune:":
        return NgramSettings(path, tune=Path(weight.removeprefix("tune:")))
    try:
        return NgramSettings(path, weight=float(weight))
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"--ngram-weight is {weight!r}; expected a number above 0, at most 1, or tune:FILE") from None


def _print_ngram(found: dict[str, Any]) -> None:
    ngram = found["ngram"]
    alone, both, unknown = ngram["alone"], ngram["interpolated"], ngram["unknown_words"]
    ppl = (
        "no word that it knows" if alone["ppl"] is None else f"{alone['ppl']:.2f} +- {alone['ppl_stderr']:.2f} per word"
    )
    typer.echo(
        f"{ngram['order']}-gram     {ppl} alone ({unknown['num_unknown_to_ngram']:,} words unknown to it, {unknown['num_unknown_to_both']:,} "
        f"of them to both, {alone['num_left_out']:,} left out)"
    )
    how = "given" if ngram["tuned_on_sha256"] is None else "tuned"
    typer.echo(
        f"+{ngram['order']}-gram    {both['ppl']:.2f} +- {both['ppl_stderr']:.2f} per word, weight {ngram['weight']:.4f} for the model ({how}); "
        f"difference {ngram['delta_nats']:+.4f} +- {ngram['delta_nats_stderr']:.4f} nats per word"
    )
    if "reference" in found:
        other = found["reference"]["ngram"]
        delta, stderr = ngram["delta_nats_to_reference"], ngram["delta_nats_to_reference_stderr"]
        typer.echo(
            f"reference  {other['interpolated']['ppl']:.2f} with it, weight {other['weight']:.4f}; difference {delta:+.4f} +- {stderr:.4f} nats "
            "per word"
        )

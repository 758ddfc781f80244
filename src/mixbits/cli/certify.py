"""``mixbits certify``: is a packed model lossless against its full-precision one? A verdict, the figures, a JSON file, a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mixbits.cli.outputs import check_outputs


def main(
    full: Annotated[Path, typer.Argument(metavar="FULL", help="Full-precision model directory.", show_default=False)],
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="Packed model directory.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Test text, one sentence a line.")],
    dev: Annotated[Path | None, typer.Option(help="Tune weights on these n-best lists (never the test lists).")] = None,
    nbest: Annotated[
        list[Path] | None,
        typer.Option("--nbest", metavar="LIST", help="Test n-best lists; may be given several times."),
    ] = None,
    margin_nats: Annotated[
        float | None,
        typer.Option(help="Largest loss that counts as none, nats per token (default: 1 % of perplexity)."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of every test and bound.")] = 0.05,
    context: Annotated[int | None, typer.Option(help="Window length in tokens.")] = None,
    stride: Annotated[int | None, typer.Option(help="New predictions a window (default: half of it).")] = None,
    lower_case: Annotated[bool, typer.Option("--lower-case", help="Give the models the lists in lower case.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Model positions at once: less needs less memory.")] = 4096,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Score each hypothesis apart (slower; for models that need it).")
    ] = False,
    runtime: Annotated[
        Literal["auto", "int8", "float32", "pytorch"],
        typer.Option(
            help="pytorch, float32: the weights alone are certified; auto, int8: 8-bit activations too (as rescore)."
        ),
    ] = "pytorch",
    cache: Annotated[Path | None, typer.Option(help="Folder to keep the models' scores in.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the certificate here (JSON).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the certificate here as a page.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of tuning and bootstrap.")] = 0,
) -> None:
    """Certify that PACKED is as good as FULL: lossless, unresolved or lossy, with the figures behind it.

    Exit code 0: lossless; 1: not (unresolved or lossy); 2: the comparison could not be made.
    """
    check_outputs({"--output": output, "--html": html})

    from mixbits.jsonfile import write_json
    from mixbits.pipeline.certify import certify
    from mixbits.pipeline.evidence import DEFAULT_MARGIN_NATS
    from mixbits.pipeline.rescore import ScoreSettings
    from mixbits.report.certificate import render_certificate

    settings = ScoreSettings(
        lower_case=lower_case,
        max_tokens=max_tokens,
        scoring="one-by-one" if one_by_one else "trie",
        cache=cache,
        show_progress=sys.stderr.isatty(),
        runtime=runtime,
    )
    certificate = certify(
        full, packed, text=text, dev=dev, lists=nbest or [], alpha=alpha, context=context, stride=stride,
        margin_nats=DEFAULT_MARGIN_NATS if margin_nats is None else margin_nats, settings=settings, seed=seed,
    )  # fmt: skip
    _print(certificate)
    if output is not None:
        typer.echo(f"wrote {write_json(output, certificate)}")
    if html is not None:
        typer.echo(f"wrote {render_certificate(certificate, html)}")
    if certificate["verdict"] != "lossless":
        raise typer.Exit(1)


def _print(certificate: dict[str, Any]) -> None:
    models, part = certificate["models"], certificate["perplexity"]
    kind = "" if models["packed"]["packed"] else " (not packed)"
    if models["packed"].get("disk_bytes", models["packed"]["file_bytes"]) != models["packed"]["file_bytes"]:
        kind = f" (archived: {models['packed']['disk_bytes']:,} on the disk)"
    typer.echo(certificate["sentence"])
    for reason in certificate["reasons"]:
        typer.echo(f"  {reason}")
    typer.echo(
        f"size        {models['packed']['file_bytes']:,} bytes{kind}, {models['compression_ratio']:.2f} times smaller than float32, "
        f"{models['stored_ratio']:.2f} times smaller than the stored file"
    )
    stderr = "unknown" if part["delta_nats_stderr"] is None else f"{part['delta_nats_stderr']:.4f}"
    typer.echo(
        f"perplexity  {part['full']['ppl']:.2f} full, {part['packed']['ppl']:.2f} packed; difference {part['delta_nats']:+.4f} +- {stderr} "
        f"nats per token ({part['num_tokens']:,} tokens, {part['num_sentences']:,} sentences)"
    )
    for name, entry in certificate["lists"].items():
        systems, changed = entry["systems"], entry["changed"]
        rates = ", ".join(
            f"{words} {systems[key]['wer']:.2f} ({systems[key]['sub']}/{systems[key]['del']}/{systems[key]['ins']})"
            for key, words in (("first-pass", "first pass"), ("full", "full"), ("packed", "packed"))
        )
        typer.echo(f"WER %       {name}: {rates} (sub/del/ins)")
        typer.echo(
            f"            {changed['changed']:,} of {changed['utterances']:,} one-bests changed: {changed['better']:,} better, "
            f"{changed['worse']:,} worse, {changed['same_errors']:,} with as many errors"
        )
    for warning in certificate["warnings"]:
        typer.echo(f"warning: {warning}")

"""``mixbits compress``: measure, allocate, quantize, pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixbits.spec import DEFAULT_SPECS


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Full-precision model directory.")],
    text: Annotated[Path, typer.Option(help="Training text, one sentence a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Packed model directory to write.")],
    ratio: Annotated[float | None, typer.Option(help="Times smaller than 4 bytes a parameter.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Bytes of the packed weight file.")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits a weight, everything counted.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Validation text; without it some sentences are held out.")] = None,
    method: Annotated[str, typer.Option(help="straight-through, admm or proximal.")] = "straight-through",
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    batch_size: Annotated[int, typer.Option(help="Blocks a step.")] = 16,
    by: Annotated[
        str, typer.Option("--measure", help="What bits are learned by: fisher, hessian, kl or loss.")
    ] = "fisher",
    probes: Annotated[int, typer.Option(help="Probes of the Hessian trace.")] = 50,
    specs: Annotated[str, typer.Option(help="Specs to choose among.")] = ",".join(DEFAULT_SPECS),
    no_guard: Annotated[
        bool,
        typer.Option("--no-guard", help="Do not train uniform bits of equal bytes to compare with (half the time)."),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Round to the nearest codes only.")] = False,
    archive: Annotated[
        bool, typer.Option("--archive", help="Keep the weight file compressed (gzip) where that saves 3 %.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model directory.")] = False,
) -> None:
    """Compress MODEL to a budget: give one of --ratio, --bytes and --bits-per-weight."""
    from mixbits.cli.written import written
    from mixbits.pipeline.compress import compress
    from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings, validate

    train = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "teacher_weight": 1.0,
        "dropout": "off",
        "seed": seed,
    }
    measure = {
        "measure": by,
        "num_probes": probes,
        "seed": seed,
        "specs": [s.strip() for s in specs.split(",") if s.strip()],
    }
    done = compress(
        model, text=text, output=output, ratio=ratio, max_bytes=max_bytes, bits_per_weight=bits_per_weight,
        valid=valid, train=not no_train, guard=not no_guard, archive=archive, overwrite=overwrite,
        quantize=validate(QuantizeSettings, {"method": method, "train": train}, where="mixbits compress"),
        measure=validate(MeasureSettings, measure, where="mixbits compress"),
    )  # fmt: skip
    typer.echo(written(done.directory, done, archive=archive))
    if done.guard is not None:
        typer.echo(done.guard)
    for note in done.notes:
        typer.echo(f"note: {note}")

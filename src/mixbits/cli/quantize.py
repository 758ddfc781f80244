"""``mixbits quantize``: train a model quantized with given bits, and pack it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Full-precision model directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Packed model directory to write.")],
    allocation: Annotated[Path | None, typer.Option(help="allocation.json from mixbits allocate.")] = None,
    spec: Annotated[str | None, typer.Option(help="The same spec for every unit instead, e.g. 2 or 1.58.")] = None,
    text: Annotated[Path | None, typer.Option(help="Training text; without it weights are only rounded.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Validation text.")] = None,
    method: Annotated[str, typer.Option(help="straight-through, admm or proximal.")] = "straight-through",
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 3,
    refine_epochs: Annotated[float, typer.Option(help="Passes that refine scales, biases and norms.")] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    batch_size: Annotated[int, typer.Option(help="Blocks a step.")] = 16,
    teacher_weight: Annotated[float, typer.Option(help="Share of the loss that distils MODEL itself.")] = 1.0,
    archive: Annotated[
        bool, typer.Option("--archive", help="Keep the weight file compressed (gzip) where that saves 3 %.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model directory.")] = False,
) -> None:
    """Train MODEL quantized under an allocation, refine, and write a packed model."""
    from mixbits.cli.written import written
    from mixbits.pipeline.quantize import quantize_model
    from mixbits.pipeline.settings import QuantizeSettings, validate

    settings = {
        "method": method, "refine_epochs": refine_epochs,
        "train": {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
                  "teacher_weight": teacher_weight, "dropout": "off", "seed": seed},
    }  # fmt: skip
    saved = quantize_model(
        model, output, allocation=allocation, spec=spec, text=text, valid=valid, archive=archive, overwrite=overwrite,
        settings=validate(QuantizeSettings, settings, where="mixbits quantize"),
    )  # fmt: skip
    typer.echo(written(output, saved, archive=archive))

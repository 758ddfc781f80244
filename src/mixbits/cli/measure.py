"""``mixbits measure``: how sensitive each unit is to quantization, as one JSON file that any budget can be solved from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixbits.spec import DEFAULT_SPECS

if TYPE_CHECKING:
    from mixbits.quant.sensitivity import Sensitivities


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Full-precision model directory.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Text to measure on, one sentence a line.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = Path(
        "sensitivities.json"
    ),
    measure: Annotated[
        str, typer.Option(help="fisher, hessian, kl (full against one unit quantized) or loss (measured).")
    ] = "fisher",
    probes: Annotated[int, typer.Option(help="Random probes of the Hessian trace.")] = 50,
    blocks: Annotated[int, typer.Option("--blocks", "--batch", help="Blocks of text to measure on.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of probes, drawn targets and blocks.")] = 0,
    specs: Annotated[str, typer.Option(help="Specs to measure, separated by commas.")] = ",".join(DEFAULT_SPECS),
    around: Annotated[
        Path | None,
        typer.Option(metavar="ALLOCATION", help="Hold the other units at this allocation file.", show_default=False),
    ] = None,
) -> None:
    """Measure how sensitive each unit of MODEL is to quantization, in nats per token."""
    import sys

    from mixbits.errors import SpecError
    from mixbits.spec import BitAllocation, parse_specs

    wanted = parse_specs(s.strip() for s in specs.split(",") if s.strip())
    for name, value in (("--probes", probes), ("--blocks", blocks), ("--specs", len(wanted))):
        if value < 1:
            raise SpecError(f"{name} is {value}; expected at least 1")

    from mixbits.jsonfile import read_json
    from mixbits.lm.checkpoint import load_model
    from mixbits.pipeline.checks import check_file, check_full_precision
    from mixbits.pipeline.measure import MEASURE_NAMES, measure_sensitivities
    from mixbits.quant.sensitivity import write_sensitivities

    if measure not in MEASURE_NAMES:
        raise SpecError(f"--measure is {measure!r}; expected one of {', '.join(MEASURE_NAMES)}")
    allocation = None if around is None else BitAllocation.from_json(read_json(around), where=str(around))
    check_file(output)
    network, tokenizer = load_model(model)
    check_full_precision(network, model)
    found = measure_sensitivities(
        network,
        tokenizer,
        text,
        measure=measure,
        specs=[str(s) for s in wanted],
        num_probes=probes,
        num_blocks=blocks,
        seed=seed,
        around=allocation,
        show_progress=sys.stderr.isatty(),
    )
    write_sensitivities(output, found)
    typer.echo(f"wrote {output}: {summary(found)}")
    for warning in found.provenance["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


def summary(found: Sensitivities) -> str:
    """What was measured, what it cost and how sure it is, in one line."""
    error, unit, spec = found.largest_relative_stderr
    sure = f"{error:.2g} ({unit} at {spec})" if math.isfinite(error) else "unknown"
    negative = len(found.negative_units)
    note = f"; {negative} unit(s) with negative values, which count as 0 when bits are allocated" if negative else ""
    return (
        f"{found.measure}, {len(found.units)} units, {len(found.specs)} specs, {found.provenance['num_tokens']} tokens; "
        f"cost {found.cost_forward_backwards:.3g} forward-backward passes, largest relative standard error {sure}{note}"
    )

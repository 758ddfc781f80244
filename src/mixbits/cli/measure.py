"""``mixbits measure``: how sensitive each unit is to quantization, as one JSON file that any budget can be solved from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Full-precision model directory.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Text to measure on, one sentence a line.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = Path(
        "sensitivities.json"
    ),
    probes: Annotated[int, typer.Option(help="Random probes of the Hessian trace.")] = 50,
    batch: Annotated[int, typer.Option(help="Blocks of text to measure on.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of probes and blocks.")] = 0,
    specs: Annotated[str, typer.Option(help="Specs to measure, separated by commas.")] = "1,1.58,2,3,4,8",
) -> None:
    """Measure how sensitive each unit of MODEL is to quantization (Hessian trace times perturbation)."""
    import sys

    from mixbits.errors import SpecError
    from mixbits.spec import parse_specs

    wanted = parse_specs(s.strip() for s in specs.split(",") if s.strip())
    for name, value in (("--probes", probes), ("--batch", batch), ("--specs", len(wanted))):
        if value < 1:
            raise SpecError(f"{name} is {value}; expected at least 1")

    from mixbits.lm.checkpoint import load_model
    from mixbits.pipeline.compress import measure_sensitivities
    from mixbits.quant.sensitivity import write_sensitivities

    network, tokenizer = load_model(model)
    found = measure_sensitivities(
        network,
        tokenizer,
        text,
        specs=[str(s) for s in wanted],
        num_probes=probes,
        num_blocks=batch,
        seed=seed,
        show_progress=sys.stderr.isatty(),
    )
    write_sensitivities(output, found)
    negative = found.provenance["negative_traces"]
    note = f"; {len(negative)} negative trace(s), which count as 0 when bits are allocated" if negative else ""
    typer.echo(
        f"wrote {output}: {len(found.units)} units, {len(wanted)} specs, {found.provenance['num_tokens']} tokens{note}"
    )

"""``mixbits allocate``: bits per unit under a byte budget, from a sensitivity file alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mixbits.quant.sensitivity import Sensitivities
    from mixbits.spec import BitAllocation, QuantSpec


def main(
    sensitivities: Annotated[
        Path, typer.Argument(metavar="SENSITIVITIES", help="File of mixbits measure.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = Path(
        "allocation.json"
    ),
    ratio: Annotated[float | None, typer.Option(help="Times smaller than 4 bytes a parameter.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Bytes of the packed weight file.")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits a weight, everything counted.")] = None,
    specs: Annotated[str | None, typer.Option(help="Choose among these only; default: all that were measured.")] = None,
    fix: Annotated[
        list[str] | None, typer.Option(metavar="UNIT=SPEC", help="A unit that must have a spec; repeatable.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model directory: check that the file was measured on it.")] = None,
) -> None:
    """Choose bits per unit of least predicted loss: give one of --ratio, --bytes and --bits-per-weight."""
    from mixbits.errors import SpecError
    from mixbits.quant.allocate import allocate, budget_bytes
    from mixbits.quant.sensitivity import read_sensitivities
    from mixbits.runs import write_json
    from mixbits.spec import parse_specs

    measured = read_sensitivities(sensitivities)
    inventory = measured.inventory
    if model is not None:
        _check_model(model, measured)
    budget = budget_bytes(inventory, ratio=ratio, bytes=max_bytes, bits_per_weight=bits_per_weight)
    wanted = None if specs is None else parse_specs(s.strip() for s in specs.split(",") if s.strip())
    if wanted is not None and not wanted:
        raise SpecError(f"--specs is {specs!r}; expected e.g. 1,1.58,2,4")
    found = allocate(inventory, measured, max_bytes=budget, specs=wanted, fixed=_fixed(fix or []))
    write_json(output, found.to_json())
    _print_table(measured, found)
    typer.echo(f"wrote {output}")


def _fixed(texts: list[str]) -> dict[str, QuantSpec]:
    from mixbits.errors import SpecError
    from mixbits.spec import QuantSpec

    result = {}
    for text in texts:
        name, equals, spec = text.rpartition("=")
        if not equals or not name:
            raise SpecError(f"--fix {text!r} is not UNIT=SPEC, e.g. lm_head=4")
        result[name] = QuantSpec.parse(spec)
    return result


def _check_model(path: Path, measured: Sensitivities) -> None:
    from mixbits.errors import SpecError
    from mixbits.lm.checkpoint import load_model
    from mixbits.quant.fingerprint import model_hash

    network, _ = load_model(path)
    if model_hash(network) != measured.provenance.get("model_hash"):
        raise SpecError(f"{path} is not the model the sensitivities were measured on (its weights differ); measure it")


def _print_table(measured: Sensitivities, found: BitAllocation) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("unit", overflow="fold")
    table.add_column("spec", no_wrap=True)
    for name in ("weights", "bytes", "predicted loss (nats/token)", "standard error"):
        table.add_column(name, justify="right")
    for unit in measured.inventory.units:
        spec, sensitivity = found.specs[unit.name], measured.units[unit.name]
        loss = sensitivity.loss_increase.get(spec)
        table.add_row(
            Text(" = ".join((unit.name, *unit.tied))),
            str(spec),
            f"{unit.num_weights:,}",
            f"{spec.unit_bytes(unit.rows, unit.cols):,}",
            "not measured" if loss is None else f"{loss:.3g}",
            "" if loss is None else f"{sensitivity.stderr[spec]:.1g}",
        )
    console.print(table)
    facts = found.provenance
    lines = [
        f"{facts['predicted_bytes']:,} bytes of {facts['budget_bytes']:,}: {facts['compression_ratio']:.2f} times smaller than "
        f"float32, {facts['bits_per_weight']:.3f} bits per weight",
        f"predicted loss increase before training: {facts['predicted_loss_increase_nats']:.4g} nats per token"
        + (f", at most {facts['gap_nats']:.1g} above the optimum" if facts["gap_nats"] else ", the optimum"),
    ]
    clamped = facts["negative_sensitivities_clamped_to_zero"]
    if clamped:
        lines.append(f"{len(clamped)} unit(s) with a negative sensitivity counted as 0: {', '.join(clamped[:5])}")
    for line in lines:
        console.print(line, highlight=False, markup=False)

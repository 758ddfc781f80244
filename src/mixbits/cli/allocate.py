"""``mixbits allocate``: bits per unit under a byte budget, or the front of all budgets, from a sensitivity file alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mixbits.quant.front import Front
    from mixbits.quant.sensitivity import Sensitivities
    from mixbits.spec import BitAllocation, ModelInventory, QuantSpec


def main(
    sensitivities: Annotated[
        Path, typer.Argument(metavar="SENSITIVITIES", help="File of mixbits measure or search.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = Path(
        "allocation.json"
    ),
    ratio: Annotated[float | None, typer.Option(help="Times smaller than 4 bytes a parameter.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Bytes of the packed weight file.")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits a weight, everything counted.")] = None,
    specs: Annotated[str | None, typer.Option(help="Choose among these only; default: all that were measured.")] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(metavar="UNIT=SPEC", help="A unit, or a pattern of units, that must have a spec; repeatable."),
    ] = None,
    granularity: Annotated[
        str, typer.Option(metavar="matrix|sublayer|layer", help="Units that share a spec: none, blocks, whole layers.")
    ] = "matrix",
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN[,PATTERN...]", help="Units that share a spec, by name or pattern; repeatable."),
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the best allocations of all sizes to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them: bytes against loss (.png, .svg, .pdf).")
    ] = None,
    points: Annotated[int, typer.Option(help="Sizes on the front, about.")] = 40,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured losses to draw: a summary.json, or {bytes, nats, name}."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model directory: check that the file was measured on it.")] = None,
) -> None:
    """Choose bits per unit of least predicted loss: one of --ratio, --bytes and --bits-per-weight, or --front for all sizes."""
    from mixbits.errors import SpecError
    from mixbits.quant.allocate import allocate, budget_bytes
    from mixbits.quant.groups import group_units, matching_specs
    from mixbits.quant.sensitivity import read_sensitivities
    from mixbits.runs import write_json
    from mixbits.spec import parse_specs

    wants_front = front is not None or plot is not None
    if measured is not None and plot is None:
        raise SpecError("--measured is drawn by --plot FILE, which was not given; add it")
    drawn = None if plot is None else _plot_inputs(plot, measured)
    found = read_sensitivities(sensitivities)
    inventory = found.inventory
    if model is not None:
        _check_model(model, found)
    wanted = None if specs is None else parse_specs(s.strip() for s in specs.split(",") if s.strip())
    if wanted is not None and not wanted:
        raise SpecError(f"--specs is {specs!r}; expected e.g. 1,1.58,2,4")
    lists = [[p.strip() for p in text.split(",") if p.strip()] for text in group or []]
    rules: dict[str, Any] = {
        "specs": wanted,
        "fixed": matching_specs(inventory, _pairs(fix or [])),
        "groups": group_units(inventory, granularity, lists),  # type: ignore[arg-type]
    }
    if not (wants_front and ratio is None and max_bytes is None and bits_per_weight is None):
        budget = budget_bytes(inventory, ratio=ratio, bytes=max_bytes, bits_per_weight=bits_per_weight)
        allocation = allocate(inventory, found, max_bytes=budget, **rules)
        write_json(output, allocation.to_json())
        _print_table(found, allocation)
        typer.echo(f"wrote {output}")
    if wants_front:
        _write_front(found, rules, points, front, plot, drawn)


def _plot_inputs(plot: Path, measured: Path | None) -> tuple[Any, ...]:
    from mixbits.report.front_plot import check_plot_path, measured_points
    from mixbits.runs import read_json

    check_plot_path(plot)
    return () if measured is None else measured_points(read_json(measured), where=str(measured))


def _write_front(
    found: Sensitivities, rules: dict[str, Any], points: int, path: Path | None, plot: Path | None, drawn: Any
) -> None:
    from mixbits.quant.front import front, write_front
    from mixbits.report.front_plot import draw_front

    result = front(found.inventory, found, num_points=points, **rules)
    _print_front(found.inventory, result)
    if path is not None:
        typer.echo(f"wrote {write_front(path, result)}")
    if plot is not None:
        typer.echo(f"wrote {draw_front(result.to_json(), plot, measured=drawn)}")


def _print_front(inventory: ModelInventory, result: Front) -> None:
    from mixbits.spec import compression_ratio

    proved = sum(p.gap_nats == 0 for p in result.points)
    first, last = result.points[0], result.points[-1]
    typer.echo(
        f"{len(result.points)} points from {first.bytes:,} bytes ({first.ratio:.2f}x) to {last.bytes:,} ({last.ratio:.2f}x), "
        f"{proved} proved optimal"
    )
    for uniform in result.uniform:
        if uniform.bytes < first.bytes:
            continue
        learned = result.best(uniform.bytes).predicted_loss_increase_nats
        typer.echo(
            f"at the {uniform.bytes:,} bytes of uniform {uniform.spec} ({compression_ratio(inventory, uniform.bytes):.2f}x): "
            f"predicted loss {learned:.4g} learned, {uniform.predicted_loss_increase_nats:.4g} uniform"
        )


def _pairs(texts: list[str]) -> list[tuple[str, QuantSpec]]:
    from mixbits.errors import SpecError
    from mixbits.spec import QuantSpec

    result = []
    for text in texts:
        name, equals, spec = text.rpartition("=")
        if not equals or not name:
            raise SpecError(f"--fix {text!r} is not UNIT=SPEC, e.g. lm_head=4")
        result.append((name, QuantSpec.parse(spec)))
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

    from mixbits.quant.allocate import allocation_notes

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
        loss, error = sensitivity.loss_increase.get(spec), sensitivity.stderr.get(spec, math.inf)
        table.add_row(
            Text(" = ".join((unit.name, *unit.tied))),
            str(spec),
            f"{unit.num_weights:,}",
            f"{spec.unit_bytes(unit.rows, unit.cols):,}",
            "not measured" if loss is None else f"{loss:.3g}",
            "" if loss is None else f"{error:.1g}" if math.isfinite(error) else "unknown",
        )
    console.print(table)
    facts = found.provenance
    lines = [
        f"{facts['predicted_bytes']:,} bytes of {facts['budget_bytes']:,}: {facts['compression_ratio']:.2f} times smaller than "
        f"float32, {facts['bits_per_weight']:.3f} bits per weight",
        f"predicted loss increase before training: {facts['predicted_loss_increase_nats']:.4g} nats per token"
        + (f", at most {facts['gap_nats']:.1g} above the optimum" if facts["gap_nats"] else ", the optimum"),
    ]
    lines += allocation_notes(found)
    for line in lines:
        console.print(line, highlight=False, markup=False)

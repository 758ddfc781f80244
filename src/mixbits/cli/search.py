"""``mixbits search``: learn which spec each unit should have by training all candidates at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mixbits.pipeline.search import SearchResult


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Full-precision model directory.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Training text, one sentence a line.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Sensitivity file to write.")] = Path(
        "sensitivities.json"
    ),
    preferences: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write probabilities and the log of every step.")
    ] = None,
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the 1-best allocation, for mixbits quantize.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Times smaller than 4 bytes a parameter.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Bytes of the packed weight file.")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits a weight, everything counted.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Validation text; without it some sentences are held out.")] = None,
    specs: Annotated[str, typer.Option(help="Candidate specs, separated by commas.")] = "1,1.58,2,4",
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Blocks a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the weights.")] = 3e-4,
    arch_learning_rate: Annotated[float, typer.Option(help="Learning rate of the architecture weights.")] = 0.05,
    arch_every: Annotated[int, typer.Option(help="Training steps to each architecture step.")] = 4,
    relaxation: Annotated[str, typer.Option(help="softmax or gumbel.")] = "gumbel",
    mode: Annotated[str, typer.Option(help="Mix weights or outputs.")] = "weights",
    granularity: Annotated[str, typer.Option(help="What shares a spec: matrix, sublayer or layer.")] = "matrix",
    basis: Annotated[str, typer.Option(help="Sensitivities from: marginal (any budget) or probability.")] = "marginal",
    beta: Annotated[
        float | None, typer.Option(help="The papers' size penalty instead of the budget's multiplier.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Search the spec of each unit of MODEL: give one of --ratio, --bytes and --bits-per-weight.

    Checkpoints lie in OUTPUT.work until it is done; an interrupted call is resumed by the same call.
    """
    from mixbits.lm.checkpoint import load_model, model_hash
    from mixbits.pipeline.checks import check_file, check_full_precision, check_text
    from mixbits.pipeline.prepare import split_text, training_context
    from mixbits.pipeline.rows import fingerprint
    from mixbits.pipeline.search import search_precisions
    from mixbits.pipeline.search_settings import SearchSettings
    from mixbits.pipeline.settings import validate
    from mixbits.pipeline.workplace import workplace
    from mixbits.quant.allocate import budget_bytes
    from mixbits.quant.sensitivity import write_sensitivities
    from mixbits.quant.units import find_units
    from mixbits.runs import write_json

    data: dict[str, Any] = {
        "candidates": [s.strip() for s in specs.split(",") if s.strip()], "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "arch_learning_rate": arch_learning_rate, "arch_every": arch_every,
        "relaxation": relaxation, "mode": mode, "granularity": granularity, "beta": beta, "basis": basis, "seed": seed,
    }  # fmt: skip
    settings = validate(SearchSettings, data, where="mixbits search")
    for path in filter(None, (output, preferences, allocation)):
        check_file(path)
    network, tokenizer = load_model(model)
    check_full_precision(network, model)
    budget = budget_bytes(find_units(network), ratio=ratio, bytes=max_bytes, bits_per_weight=bits_per_weight)
    stream, held_out = split_text(tokenizer, text, valid)
    context = training_context(network)
    check_text(stream, context, text)
    check_text(held_out, context, valid or f"{text} (held-out part)")
    key = fingerprint("search", model_hash(model), settings.model_dump(), budget, stream.sha256, held_out.sha256)
    with workplace(output, key) as work:
        teacher = load_model(model)[0] if settings.teacher_weight else None
        found = search_precisions(
            network, stream, held_out, settings, work, max_bytes=budget, context=context, teacher=teacher
        )
        write_sensitivities(output, found.sensitivities)
        if preferences is not None:
            write_json(preferences, found.preferences.to_json())
        if allocation is not None:
            write_json(allocation, found.one_best.to_json())
    _print(found)
    typer.echo("wrote " + ", ".join(str(path) for path in (output, preferences, allocation) if path is not None))


def _print(found: SearchResult) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    wanted = found.preferences
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("unit", overflow="fold")
    for spec in wanted.candidates:
        table.add_column(f"p({spec})", justify="right")
    for name in ("1-best", "integer program"):
        table.add_column(name, no_wrap=True)
    for group, row in zip(wanted.groups, wanted.probabilities, strict=True):
        chosen = [str(allocation.specs[group[0]]) for allocation in (found.one_best, found.integer_program)]
        table.add_row(Text(" + ".join(group)), *(f"{p:.3f}" for p in row), *chosen)
    console.print(table)
    for name, allocation in (("1-best", found.one_best), ("integer program", found.integer_program)):
        facts = allocation.provenance
        line = (
            f"{name}: {facts['predicted_bytes']:,} bytes of {facts['budget_bytes']:,}, {facts['compression_ratio']:.2f} times "
            f"smaller, {facts['bits_per_weight']:.3f} bits a weight"
        )
        if facts.get("repaired"):
            line += f" (repaired: each group's favourite would take {facts['one_best_bytes']:,} bytes)"
        console.print(line, highlight=False, markup=False)
    for event in wanted.provenance["events"]:
        console.print(f"note: step {event['step']}: {event['message']}", highlight=False, markup=False)

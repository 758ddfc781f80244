"""``mixbits inspect DIR``: the tensors, bits and bytes of a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mixbits.packing.inspect import PackedInfo


def main(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a packed model, or a weight file in it.", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Show the tensors, bits, bytes, entropy and scales of a packed model, after checking its files."""
    from mixbits.packing.inspect import inspect_packed

    info = inspect_packed(directory.parent if directory.is_file() else directory)
    if json:
        import json as json_module

        typer.echo(json_module.dumps(info.to_json(), indent=1))
    else:
        _print_table(info)


def _common_prefix(names: list[str]) -> str:
    """The dotted path that all names begin with, last dot included."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)


def _print_table(info: PackedInfo) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    all_scales = console.width >= 105  # a narrow terminal keeps the names readable instead
    prefix = _common_prefix([unit.name for unit in info.units])
    title = Text(info.directory + (f" (names under {prefix.rstrip('.')})" if prefix else ""))
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("unit", overflow="fold", min_width=16)
    numbers = ["shape", "bits", "bytes", "share", "entropy"]
    numbers += ["scale min", "mean", "max"] if all_scales else []
    table.add_column("spec", no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for unit in info.units:
        scales = (unit.scale_min, unit.scale_mean, unit.scale_max) if all_scales else ()
        table.add_row(
            Text(" = ".join((unit.name[len(prefix) :], *unit.tied))),
            unit.spec,
            f"{unit.rows} x {unit.cols}",
            f"{unit.bits_per_weight:.3f}",
            f"{unit.num_bytes:,}",
            f"{unit.share:.1%}",
            "" if unit.code_entropy is None else f"{unit.code_entropy:.3f}/{unit.bits_per_code:g}",
            *("" if value is None else f"{value:.3g}" for value in scales),
        )
    table.add_section()
    other_bytes = sum(tensor.num_bytes for tensor in info.others)
    for name, count in ((f"{len(info.others)} other tensors", other_bytes), ("file header", info.header_bytes)):
        spec = "float16" if name != "file header" else ""
        table.add_row(name, spec, "", "", f"{count:,}", f"{count / info.file_bytes:.1%}")
    console.print(table)
    archived = f" (archived: {info.disk_bytes:,} on the disk)" if info.disk_bytes != info.file_bytes else ""
    files = f" in {len(info.files)} files" if len(info.files) > 1 else ""
    console.print(
        f"{info.file_bytes:,} bytes{files}{archived}, {info.num_parameters:,} parameters (ties once): "
        f"{info.compression_ratio:.2f} times smaller than float32, {info.bits_per_weight:.3f} bits per weight"
        + ("" if info.has_checksums else "; format version 1, which has no checksums"),
        highlight=False,
    )

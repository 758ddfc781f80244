"""``mixbits verify``: are a packed model's files whole, and do they fit each other and the model they name?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixbits.errors import MixbitsError


def main(
    directory: Annotated[Path, typer.Argument(help="Directory of a packed model.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line.")] = False,
) -> None:
    """Check every file of a packed model: structure, names, shapes, values, checksums. Exit code 2 names what is wrong."""
    import json as json_module

    try:
        found = verified(directory)
    except MixbitsError as error:
        if json:
            typer.echo(json_module.dumps({"directory": str(directory), "ok": False, "error": str(error)}, indent=1))
        raise
    if json:
        typer.echo(json_module.dumps(found, indent=1))
        return
    checksums = "checksums match" if found["checksums"] else "no checksums to compare"
    archived = ", archived" if found["archived"] else ""
    typer.echo(
        f"{directory}: good. {found['model_class']}, {found['units']} units in {found['tensors']} tensors, {found['files']} weight "
        f"file(s) of {found['disk_bytes']:,} bytes{archived}; format version {found['format_version']}, {checksums}"
    )


def verified(directory: Path) -> dict[str, Any]:
    """Facts of a model whose files are good, as plain data. Raises FormatError or DataError."""
    from mixbits.hf import check_model
    from mixbits.packing.archive import ARCHIVE_SUFFIX
    from mixbits.packing.verify import read_quantization_config, verify_packed

    weights, packed = verify_packed(directory)
    return {
        "directory": str(directory),
        "ok": True,
        "model_class": check_model(directory, weights, packed),
        "format_version": read_quantization_config(directory)[0]["format_version"],
        "checksums": packed.checksums is not None,
        "units": len(packed.units),
        "tensors": len(weights.tensors),
        "files": len(weights.files),
        "archived": any(file.path.suffix == ARCHIVE_SUFFIX for file in weights.files),
        "file_bytes": weights.file_bytes,
        "disk_bytes": sum(file.path.stat().st_size for file in weights.files),
    }

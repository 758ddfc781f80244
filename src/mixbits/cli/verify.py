"""``mixbits verify``: are a packed model's files whole, and do they fit each other and the model they name? And a run's, its manifest?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixbits.errors import MixbitsError


def main(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a packed model, or of a run with a manifest.", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line.")] = False,
) -> None:
    """Check every file of a packed model: structure, names, shapes, values, checksums; or the files of a run against its manifest.

    Exit code 2 names what is wrong.
    """
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
    if "manifests" in found:
        typer.echo(
            f"{directory}: good. {found['files']:,} file(s) of the run are as {found['manifests']} manifest(s) say"
        )
        return
    checksums = "checksums match" if found["checksums"] else "no checksums to compare"
    archived = ", archived" if found["archived"] else ""
    typer.echo(
        f"{directory}: good. {found['model_class']}, {found['units']} units in {found['tensors']} tensors, {found['files']} weight "
        f"file(s) of {found['disk_bytes']:,} bytes{archived}; format version {found['format_version']}, {checksums}"
    )


def verified(directory: Path) -> dict[str, Any]:
    """Facts of a model or run whose files are good, as plain data. Raises FormatError or DataError."""
    from mixbits.pipeline.manifest import MANIFEST_FILE

    runs = [path.parent for pattern in (MANIFEST_FILE, f"seed-*/{MANIFEST_FILE}") for path in directory.glob(pattern)]
    return _verified_runs(directory, sorted(runs)) if runs else _verified_model(directory)


def _verified_runs(directory: Path, runs: list[Path]) -> dict[str, Any]:
    from mixbits.errors import DataError
    from mixbits.jsonfile import read_json
    from mixbits.pipeline.manifest import MANIFEST_FILE, verify_manifest

    files = 0
    for run in runs:
        found = verify_manifest(run)
        if found:
            shown = "; ".join(map(str, found[:5])) + ("; …" if len(found) > 5 else "")
            raise DataError(
                f"{run}: {len(found)} file(s) are not as {MANIFEST_FILE} says: {shown}; run the same command again, or restore them"
            )
        files += len(read_json(run / MANIFEST_FILE)["files"])
    return {"directory": str(directory), "ok": True, "manifests": len(runs), "files": files}


def _verified_model(directory: Path) -> dict[str, Any]:
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

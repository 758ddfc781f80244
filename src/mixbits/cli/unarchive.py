"""``mixbits unarchive``: the exact opposite of ``mixbits archive``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    directory: Annotated[Path, typer.Argument(help="Directory of an archived model.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="A new directory instead of changing DIRECTORY."),
    ] = None,
) -> None:
    """Unpack an archived model to the very files it was made from, checked against their checksums."""
    from mixbits.packing.archive import unarchive_packed
    from mixbits.packing.verify import verify_packed

    weights, _ = verify_packed(directory)
    target = unarchive_packed(directory, output)
    typer.echo(f"{target}: {weights.file_bytes:,} bytes of weights")

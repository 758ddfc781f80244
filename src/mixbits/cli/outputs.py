"""Find out before the work that a result cannot be written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mixbits.errors import DataError


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Check the files that options name: option → path, None where it is not given; ``inputs`` are read and must stay.

    Raises:
        DataError: a folder, no permission, a file where a folder is needed, or two names for one file.
    """
    taken = {path.resolve(): name for name, path in (inputs or {}).items() if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise DataError(f"{option} {path}: is a folder; expected a file name")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise DataError(f"{option} {path}: {nearest} is a file; expected a folder to write to")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise DataError(f"{option} {path}: no permission to write in {nearest}; choose another place")
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise DataError(f"{option} {path}: is the same file as {other}; choose another name")

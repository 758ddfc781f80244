"""JSON files: written so that a killed run never leaves half a file, read strictly, with errors that name the file.

Why this way: a file is written under a temporary name beside its target, synced and renamed. JSON has no NaN, so numbers
that are not finite are written as null, and null means "unknown" everywhere in mixbits.

Limits: whole files in memory; text that is not valid Unicode (lone surrogates) is written backslash-escaped.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, FormatError


def plain(value: Any) -> Any:
    """Plain data that JSON can hold: not-finite numbers become None, numpy and torch scalars become Python's."""
    if isinstance(value, (str, bool, type(None))):
        return value
    if isinstance(value, (int, float)):
        return value if isinstance(value, int) or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    raise TypeError(f"cannot write {type(value).__name__} as JSON; expected numbers, text, lists and mappings")


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that ``path`` holds either the old content or all of the new one. Makes parent folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, data: Any) -> Path:
    """Write plain data as JSON, atomically; NaN and infinities become null, keys keep their order.

    Numpy and torch scalars and arrays are written as numbers and lists. Returns ``path``. Raises TypeError for anything else.
    """
    return write_text(path, json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON; write null for an unknown number")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises DataError (missing, unreadable) or FormatError (not UTF-8, not JSON, NaN) naming ``path``."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path, or run the step that writes it first") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; expected a JSON file in it, e.g. {path / 'summary.json'}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not raw.strip():
        raise FormatError(f"{path}: is empty; expected JSON. Run the step that writes it again")
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}; expected a JSON text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "if it is cut short, run the step that writes it again"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{path}: not readable as JSON: {reason}") from None

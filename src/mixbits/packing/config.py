"""config.json of a packed model's directory, read and seen to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixbits.errors import FormatError
from mixbits.jsonfile import read_json


def read_config(directory: str | Path) -> dict[str, Any]:
    """The whole of config.json, whose ``quantization_config`` is an object. Raises DataError (missing) or FormatError."""
    path = Path(directory) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise FormatError(f"{path}: no quantization_config; expected a model packed by mixbits")
    return config

"""What a command says about the packed model it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Written(Protocol):
    """A packed model's size; ``disk_bytes`` is less than ``file_bytes`` where it is archived."""

    @property
    def file_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def compression_ratio(self) -> float: ...
    @property
    def bits_per_weight(self) -> float: ...


def written(directory: Path, model: Written, *, archive: bool) -> str:
    """One line. ``archive``: whether an archive was asked for."""
    line = (
        f"wrote {directory}: {model.file_bytes:,} bytes, {model.compression_ratio:.2f}x smaller, "
        f"{model.bits_per_weight:.3f} bits a weight"
    )
    if model.disk_bytes != model.file_bytes:
        saved = 1 - model.disk_bytes / model.file_bytes
        return f"{line}; archived, {model.disk_bytes:,} bytes on the disk ({saved:.1%} saved)"
    return f"{line}; not archived, that would not save 3 %" if archive else line

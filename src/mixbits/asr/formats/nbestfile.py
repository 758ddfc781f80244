"""The lists of one file (or folder) with a hash of what was read: what every n-best reader returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixbits.asr.nbest import NBest


@dataclass(frozen=True)
class NBestFile(Sequence[NBest]):
    """The lists of a file. ``data_hash`` is the SHA-256 of the uncompressed bytes, ``skipped`` the first messages
    about skipped lines (at most 20) and ``num_skipped`` how many lines were skipped in all."""

    path: str
    lists: tuple[NBest, ...]
    data_hash: str
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.lists[index]

    def __len__(self) -> int:
        return len(self.lists)

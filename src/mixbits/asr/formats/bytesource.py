"""Bytes of a file, plain, gzip or xz, read forward once, with offsets for error messages and a bound on every read.

For formats that mix text and binary records in one stream. Only a block and the record asked for are in memory; a line
longer than its limit is refused without being read whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from mixbits.asr.formats.lines import open_unpacked
from mixbits.errors import FormatError

MAX_LINE_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18


class ByteSource:
    """A window on a stream. ``buffer[position:]`` is read but not consumed; :meth:`need` makes it long enough."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.buffer = b""
        self.position = 0
        self.num_lines = 0
        self._stream = stream
        self._before = 0
        self._ended = False

    @property
    def offset(self) -> int:
        """Uncompressed bytes consumed so far."""
        return self._before + self.position

    @property
    def num_read(self) -> int:
        """Uncompressed bytes read so far, consumed or not."""
        return self._before + len(self.buffer)

    def need(self, num_bytes: int) -> bool:
        """Read on until ``num_bytes`` are in the window; False if the file ends before."""
        while len(self.buffer) - self.position < num_bytes and not self._ended:
            missing = num_bytes - (len(self.buffer) - self.position)
            self._before += self.position
            self.buffer = self.buffer[self.position :] + self._read(min(max(missing, _BLOCK_BYTES), 1 << 24))
            self.position = 0
        return len(self.buffer) - self.position >= num_bytes

    def peek(self, num_bytes: int) -> bytes:
        """The next bytes, fewer at the end of the file; nothing is consumed."""
        self.need(num_bytes)
        return self.buffer[self.position : self.position + num_bytes]

    def take(self, num_bytes: int, what: str) -> bytes:
        """The next ``num_bytes`` bytes. Raises FormatError if the file ends before."""
        if not self.need(num_bytes):
            raise self.truncated(what)
        start = self.position
        self.position += num_bytes
        return self.buffer[start : self.position]

    def line(self, max_bytes: int = MAX_LINE_BYTES) -> bytes | None:
        """The next line without its end (``\\n`` or ``\\r\\n``); None at the end of the file.

        Raises:
            FormatError: the line is longer than ``max_bytes``.
        """
        searched = self.position
        while (end := self.buffer.find(b"\n", searched)) < 0 and not self._ended:
            if len(self.buffer) - self.position > max_bytes:
                break
            searched = len(self.buffer) - self.position
            self.need(searched + 1)
            searched += self.position
        is_last = end < 0
        end = len(self.buffer) if is_last else end
        if end - self.position > max_bytes:
            raise FormatError(
                f"{self.name}:{self.num_lines + 1}: the line is longer than {max_bytes} bytes; is this a lattice file?"
            )
        if is_last and end == self.position:
            return None
        found = self.buffer[self.position : end]
        self.position = end if is_last else end + 1
        self.num_lines += 1
        return found[:-1] if found.endswith(b"\r") else found

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return not self.need(1)

    def truncated(self, what: str) -> FormatError:
        """The error for a file that ends inside ``what``."""
        return FormatError(f"{self.name}: byte {self.num_read}: the file ends inside {what}; copy or write it again")

    def _read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        self._ended = not data
        return data


@contextmanager
def open_source(path: str | os.PathLike[str], *, expected: str = "lattices") -> Iterator[ByteSource]:
    """Open a file, told apart by its first bytes.

    Raises:
        DataError: it does not exist or cannot be read. FormatError, also while reading: damaged compression.
    """
    name = os.fspath(path)
    opened: list[ByteSource] = []

    def place() -> tuple[str, str]:
        return name, f"{opened[0].num_read if opened else 0} unpacked bytes"

    with open_unpacked(name, expected=expected, place=place) as stream:
        opened.append(ByteSource(stream, name))
        yield opened[0]

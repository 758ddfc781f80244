"""Lines of text files, in and out: compression, encodings, line ends and endless lines, the same for all formats.

Plain, gzip and xz are told apart by their first bytes, not by the name; writing goes by the name (``.gz``, ``.xz``). A line
longer than ``max_line_bytes`` is refused without being read whole, so memory is bounded by the sound lines. Lines end in
``\\n`` or ``\\r\\n``; no other character ends a line. Text is UTF-8; a byte order mark at the start is skipped.

Kaldi's text archives and data files (``key value``) have the key up to the first space or tab; the value is the rest of the line.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mixbits.asr.atomic import atomic_binary_file
from mixbits.asr.formats.problems import DuplicateError, NotFiniteError, Report, stop
from mixbits.errors import DataError, FormatError

MAX_LINE_BYTES = 64 * 2**20
WHITE = " \t\n\v\f\r"
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_SEPARATOR = re.compile("[ \t]")
_MAX_NUMBER = 1000  # characters
_NUMBER = re.compile(
    r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf|infinity)", re.IGNORECASE
)


@contextmanager
def open_unpacked(name: str, *, expected: str, place: Callable[[], tuple[str, str]]) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file. ``place`` gives (where, what was read so far) for messages.

    Raises:
        DataError: no such file, or it cannot be read. FormatError: truncated or damaged compression.
    """
    try:
        with open(name, "rb") as raw:
            head = raw.peek(6)[:6]
            if head.startswith(_GZIP):
                yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
            elif head.startswith(_XZ):
                yield lzma.LZMAFile(raw)  # noqa: SIM115 (owns nothing: `raw` is closed above)
            else:
                yield raw
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; expected {expected}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        where, after = place()
        raise FormatError(
            f"{where}: the compressed file is truncated or damaged after {after} ({error}); copy or write it again"
        ) from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def raw_lines(name: str, digest: Any, max_line_bytes: int, *, expected: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of a line that is too long only its first ``max_line_bytes + 1`` bytes."""
    number = 0
    with open_unpacked(name, expected=expected, place=lambda: (f"{name}:{number + 1}", f"line {number}")) as stream:
        while line := stream.readline(max_line_bytes + 1):
            number += 1
            digest.update(line)
            yield number, line
            while (
                len(line) > max_line_bytes and line and not line.endswith(b"\n")
            ):  # the rest, where the caller goes on
                line = stream.readline(max_line_bytes + 1)
                digest.update(line)


def decode_line(line: bytes, *, where: str, first: bool, max_line_bytes: int = MAX_LINE_BYTES) -> str:
    """The line as text, its end included.

    Raises:
        FormatError: longer than ``max_line_bytes``. DataError: not UTF-8.
    """
    if len(line) > max_line_bytes:
        raise FormatError(f"{where}: the line is longer than {max_line_bytes} bytes; expected one entry a line")
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); convert the file to UTF-8"
        ) from error


def text_lines(
    name: str, digest: Any, *, expected: str, report: Report = stop, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[str, str]]:
    """(``file:line``, text without its line end) of every line that is not empty."""
    for number, line in raw_lines(name, digest, max_line_bytes, expected=expected):
        where = f"{name}:{number}"
        try:
            text = decode_line(line, where=where, first=number == 1, max_line_bytes=max_line_bytes)
        except (FormatError, DataError) as error:
            report(error)
            continue
        text = text[:-1] if text.endswith("\n") else text
        text = text[:-1] if text.endswith("\r") else text
        if text:
            yield where, text


def read_archive(name: str, digest: Any, *, expected: str, report: Report = stop) -> dict[str, tuple[str, str]]:
    """A text archive ``key value``: key → (``file:line``, value as it stands), in the file's order.

    Raises:
        FormatError: a binary archive, a line without a key. DuplicateError: a key that was there before.
    """
    entries: dict[str, tuple[str, str]] = {}
    for where, line in text_lines(name, digest, expected=expected, report=report):
        parts = _SEPARATOR.split(line, maxsplit=1)
        key, value = parts[0], parts[1] if len(parts) > 1 else ""
        if value.startswith("\0B"):
            raise FormatError(f"{where}: a binary Kaldi archive; expected text: write it with 'ark,t:' (or copy it so)")
        if not key:
            report(FormatError(f"{where}: the line starts with white space; expected {expected}"))
        elif key in entries:
            report(DuplicateError(f"{where}: {key!r} was in {entries[key][0]} already; keys must be unique"))
        else:
            entries[key] = (where, value)
    return entries


def number(text: str, *, where: str, what: str) -> float:
    """A finite number written as text.

    Raises:
        FormatError: not a number. NotFiniteError: NaN or infinite.
    """
    if len(text) > _MAX_NUMBER or not _NUMBER.fullmatch(text.strip(WHITE)):
        raise FormatError(f"{where}: expected {what}, a number, got {text[:40]!r}")
    value = float(text)
    if not math.isfinite(value):
        raise NotFiniteError(f"{where}: {what} is {text.strip(WHITE)[:40]}; expected a finite number")
    return value


def new_digest() -> Any:
    """What ``data_hash`` is made with."""
    return hashlib.sha256()


@contextmanager
def packed_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to, compressed if its name ends in ``.gz`` or ``.xz``; it appears only when complete."""
    with atomic_binary_file(path) as raw, packed(raw, Path(path).suffix) as file:
        yield file


@contextmanager
def packed(raw: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    """What is written comes out in ``raw``, compressed as the suffix says; the same bytes every time."""
    if suffix == ".gz":
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
            yield cast("IO[bytes]", file)
    elif suffix == ".xz":
        with lzma.LZMAFile(raw, "wb") as file_xz:
            yield file_xz
    else:
        yield raw


def check_key(utterance: str, *, format_name: str) -> None:
    """Raise DataError if a file of ``key value`` lines cannot hold this utterance id."""
    if any(character.isspace() for character in utterance) or utterance.startswith("\ufeff"):
        raise DataError(
            f"utterance id {utterance[:60]!r} holds white space, which {format_name} cannot; rename the utterance"
        )


def check_line(text: str, *, what: str, format_name: str, forbidden: str = "\n\r\0") -> None:
    """Raise DataError if ``text`` holds a character that would end a line or a field."""
    found = next((character for character in forbidden if character in text), None)
    if found is None and text.startswith("\ufeff"):
        found = "\ufeff"
    if found is not None:
        raise DataError(f"{what} holds the character {found!r}, which {format_name} cannot: {text[:60]!r}")


def encode_line(text: str, *, what: str) -> bytes:
    """UTF-8 bytes of a line, its end added. Raises DataError for a lone surrogate."""
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds a lone surrogate, which is not text: {text[:60]!r}") from error

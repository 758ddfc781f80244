"""The members of one huge JSON object, one after the other, without reading the object whole.

ESPnet's and mlm-scoring's lists are one object over all utterances, which may be larger than the memory. Here only the text
of one member is held at a time, and a member longer than ``max_item_bytes`` is refused. Positions are byte offsets into the
uncompressed file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from mixbits.asr.formats.lines import MAX_LINE_BYTES, open_unpacked
from mixbits.asr.formats.strictjson import DECODER, dump_json, json_error, refuse_surrogates
from mixbits.asr.nbest import NBest
from mixbits.errors import DataError, FormatError

_CHUNK = 1 << 18
_WHITE = " \t\n\r"


def members(
    name: str, digest: Any, *, inside: str | None = None, expected: str, max_item_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[str, str, Any]]:
    """(``file: byte N``, key, value) of each member of the file's object, or of its only member ``inside``.

    Keys may occur twice: the caller sees both.

    Raises:
        FormatError: not JSON, cut short, something after the object, a member that is too long. DataError: cannot be read,
            or not UTF-8.
    """
    text: _Text | None = None

    def place() -> tuple[str, str]:
        done = 0 if text is None else text.num_bytes
        return f"{name}: byte {done}", f"byte {done}"

    with open_unpacked(name, expected=expected, place=place) as stream:
        text = _Text(name, stream, digest, max_item_bytes)
        if not text.peek():
            raise DataError(f"{name}: the file is empty; expected {expected}")
        text.take("{", expected)
        if inside is not None:
            key = text.value('"', f'the key "{inside}"')
            if key != inside:
                raise FormatError(f'{text.where}: expected the key "{inside}", got {key[:40]!r}')
            text.take(":", "a colon")
            text.take("{", "an object of utterances")
        first = True
        while text.peek() != "}":
            if not first:
                text.take(",", "a comma or the end of the object")
            first = False
            key = text.value('"', "a key")
            text.take(":", "a colon")
            text.peek()
            where = text.where
            yield where, key, text.value("{", "an object")
        text.take("}", "the end of the object")
        if inside is not None:
            text.take("}", "the end of the outer object")
        if text.peek():
            raise FormatError(f"{text.where}: expected the end of the file, got {text.peek()!r}")


class _Text:
    """A window on the text of a stream that moves only forward."""

    def __init__(self, name: str, stream: IO[bytes], digest: Any, limit: int) -> None:
        self.name, self.stream, self.digest, self.limit = name, stream, digest, limit
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.window, self.at = "", 0
        self.start = 0  # byte offset of the window's first character, a byte order mark aside
        self.num_bytes = 0  # bytes read from the stream
        self.ended = False

    @property
    def where(self) -> str:
        return f"{self.name}: byte {self.start + len(self.window[: self.at].encode('utf-8'))}"

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self.at < len(self.window):
                if self.window[self.at] not in _WHITE:
                    return self.window[self.at]
                self.at += 1
            if not self.grow():
                return ""

    def take(self, character: str, expected: str) -> None:
        """Step over ``character`` or raise FormatError."""
        found = self.peek()
        if found != character:
            got = repr(found) if found else "the end of the file (cut short?)"
            raise FormatError(f"{self.where}: expected {expected} ({character!r}), got {got}")
        self.at += 1

    def value(self, opening: str, expected: str) -> Any:
        """The JSON value that starts here, with ``opening``."""
        if self.peek() != opening:
            self.take(opening, expected)
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
                break
            except json.JSONDecodeError as error:
                if len(self.window) - self.at > self.limit:
                    raise FormatError(
                        f"{self.where}: {expected} is longer than {self.limit} bytes or broken ({error.msg})"
                    ) from error
                if not self.grow():
                    near = self.window[self.at : self.at + 40]
                    raise FormatError(f"{self.where}: not JSON or cut short: {error.msg}; got {near!r}") from error
            except (ValueError, RecursionError) as error:
                raise json_error(error, where=self.where, text=self.window[self.at : self.at + 40]) from error
        refuse_surrogates(value, self.window[self.at : end], where=self.where)
        self.at = end
        return value

    def grow(self) -> bool:
        """Read on, at least as much as is held, and forget what is behind; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.stream.read(max(_CHUNK, len(self.window) - self.at))
        self.digest.update(chunk)
        self.num_bytes += len(chunk)
        self.start += len(self.window[: self.at].encode("utf-8"))
        try:
            self.window = self.window[self.at :] + self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = self.num_bytes - len(error.object) + error.start
            raise DataError(
                f"{self.name}: byte {at}: not UTF-8 (0x{error.object[error.start]:02x}); convert the file to UTF-8"
            ) from error
        self.at = 0
        self.ended = not chunk
        return not self.ended


def write_members(file: IO[bytes], lists: Sequence[NBest], record: Callable[[NBest], Any]) -> None:
    """Write the lists as members of a JSON object, ``utterance: record``, a line each. Raises DataError: a field that JSON cannot hold."""
    for position, entry in enumerate(lists):
        key = dump_json(entry.utterance, what="an utterance id")
        value = dump_json(record(entry), what=f"utterance {entry.utterance!r}")
        file.write((b",\n" if position else b"\n") + key + b": " + value)

"""ARPA files of back-off n-gram models, in and out: plain, gzip or xz.

``\\data\\`` with a line ``ngram N=count`` for each length, sections ``\\N-grams:`` of lines ``log10(p) w1 … wN [log10(back-off)]``, then ``\\end\\``
(SRILM's ngram-format page). Base 10 outside, natural logs inside. Fields stand between spaces or tabs; anything may precede ``\\data\\``;
a missing back-off weight is 0. ``<UNK>`` (CMU) is read as ``<unk>``.

Lines are parsed in batches of whole blocks; only when a batch is bad is it looked at line by line, for an error that names the line. Memory follows
what has been read, never a count that the file claims, and a line longer than ``max_line_bytes`` is refused without being read whole.
As in KenLM, every n-gram's first n - 1 words must be an n-gram too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mixbits.asr.formats.lines import open_unpacked, packed_file
from mixbits.asr.ngram import BEGIN, END, LN10, UNKNOWN, BackoffModel, FloatArray, IntArray, NgramTable
from mixbits.errors import DataError, FormatError

MAX_LINE_BYTES = 1 << 20
MAX_ORDER = 32
_BLOCK_BYTES = 1 << 22
_ROUNDING_LOG10 = 1e-5
_EXPECTED = "an ARPA n-gram file"
_COUNT = re.compile(rb"ngram\s+([0-9]{1,4})\s*=\s*([0-9]{1,18})")


def read_arpa(path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES) -> BackoffModel:
    """Read an ARPA file.

    Raises:
        FormatError: naming file and line: cut short, sections or counts that do not fit ``\\data\\``, NaN or infinite numbers, a probability
            above 1, an n-gram twice or without its history, no ``<s>`` or ``</s>``. DataError: no such file.
    """
    name = os.fspath(path)
    opened: list[_Lines] = []

    def place() -> tuple[str, str]:
        number = opened[0].number if opened else 0
        return f"{name}:{number + 1}", f"line {number}"

    with open_unpacked(name, expected=_EXPECTED, place=place) as stream:
        opened.append(_Lines(stream, name, max_line_bytes))
        return _Reader(opened[0]).read()


def write_arpa(path: str | os.PathLike[str], model: BackoffModel, *, digits: int = 7) -> None:
    """Write a model, compressed if the name ends in ``.gz`` or ``.xz``; the file appears only when complete.

    ``digits``: significant digits of the base-10 logarithms (17 keep every bit). Words in the model's order, n-grams by their history's.

    Raises:
        DataError: a word that is empty or holds white space.
    """
    names = [word.encode("utf-8") for word in model.words]
    for word, name in zip(model.words, names, strict=True):
        if len(name.split()) != 1 or name.split()[0] != name:
            raise DataError(f"an ARPA file cannot hold the word {word!r}: it is empty or holds white space")
    with packed_file(path) as file:
        file.write(b"\\data\\\n")
        file.writelines(b"ngram %d=%d\n" % (order, len(table)) for order, table in enumerate(model.tables, 1))
        before = np.zeros((1, 0), dtype=np.int32)
        for order, table in enumerate(model.tables, 1):
            context, last = np.divmod(table.keys, len(names))
            before = np.concatenate([before[context], last[:, None].astype(np.int32)], axis=1)
            file.write(b"\n\\%d-grams:\n" % order)
            _write_section(file, table, before, names, digits)
        file.write(b"\n\\end\\\n")


def _write_section(
    file: IO[bytes], table: NgramTable, rows: npt.NDArray[np.int32], names: Sequence[bytes], digits: int
) -> None:
    number = f"%.{digits}g".encode()
    plain, with_backoff = number + b"\t%b\n", number + b"\t%b\t" + number + b"\n"
    for start in range(0, len(table), 1 << 16):
        part = slice(start, start + (1 << 16))
        log_p = np.minimum(table.log_p[part] / LN10, 0.0).tolist()
        words = [b" ".join([names[word] for word in row]) for row in rows[part].tolist()]
        if table.log_backoff is None:
            file.writelines(map(plain.__mod__, zip(log_p, words, strict=True)))
        else:
            log_backoff = (table.log_backoff[part] / LN10 + 0.0).tolist()
            file.writelines(map(with_backoff.__mod__, zip(log_p, words, log_backoff, strict=True)))


class _Lines:
    """Lines of a stream without their ends, a block in memory at a time; ``number``: how many have been given out."""

    def __init__(self, stream: IO[bytes], name: str, max_line_bytes: int) -> None:
        self.name, self.number = name, 0
        self._stream, self._max_line_bytes = stream, max_line_bytes
        self._block: list[bytes] = []
        self._given = 0
        self._rest = b""

    def batch(self, most: int) -> list[bytes]:
        """At least one line and at most ``most``; none at the end of the file."""
        if self._given == len(self._block):
            self._fill()
        lines = self._block[self._given : self._given + most]
        self._given += len(lines)
        self.number += len(lines)
        return lines

    def next(self) -> bytes | None:
        """The next line that is not blank, stripped; None at the end of the file."""
        while lines := self.batch(1):
            if line := lines[0].strip():
                return line
        return None

    def error(self, message: str, number: int | None = None) -> FormatError:
        """Names the line given out last, or ``number``."""
        return FormatError(f"{self.name}:{self.number if number is None else number}: {message}")

    def _fill(self) -> None:
        self._block, self._given = [], 0
        while not self._block:
            data = self._stream.read(_BLOCK_BYTES)
            if not data:
                self._block, self._rest = [self._rest] if self._rest else [], b""
                return
            lines = (self._rest + data).split(b"\n")
            self._rest = lines.pop()
            self._block = lines
            if len(self._rest) > self._max_line_bytes:
                number = self.number + len(lines) + 1
                raise self.error(
                    f"the line is longer than {self._max_line_bytes} bytes; expected {_EXPECTED}, one n-gram a line",
                    number,
                )


class _Reader:
    """Reads one file from front to end."""

    def __init__(self, lines: _Lines) -> None:
        self.lines = lines
        self.ids: dict[bytes, int] = {}
        self.tables: list[NgramTable] = []

    def read(self) -> BackoffModel:
        counts = self._counts()
        for order, count in enumerate(counts, 1):
            self._section(order, count, last=order == len(counts))
            self._expect(b"\\end\\" if order == len(counts) else b"\\%d-grams:" % (order + 1), order, count)
        if (rest := self.lines.next()) is not None:
            raise self.lines.error(f"text after \\end\\: {_shown(rest)}; expected one model a file")
        words = {word.decode(): number for word, number in self.ids.items()}
        if "<UNK>" in words and UNKNOWN not in words:
            words = {UNKNOWN if word == "<UNK>" else word: number for word, number in words.items()}
        for word in (BEGIN, END):
            if word not in words:
                raise FormatError(
                    f"{self.lines.name}: no {word} among the 1-grams; expected a model of whole sentences"
                )
        return BackoffModel(tuple(words), tuple(self.tables))

    def _counts(self) -> list[int]:
        """The counts after ``\\data\\``; reads on to the first section's head."""
        while (line := self.lines.next()) != b"\\data\\":
            if line is None:
                raise self.lines.error(
                    "no line \\data\\; expected an ARPA n-gram file (empty, cut short or another format?)"
                )
            if self.lines.number == 1 and line.startswith(b"mmap lm "):
                raise self.lines.error(
                    "a KenLM binary file; give the ARPA file that it was made from, or install kenlm"
                )
        counts: list[int] = []
        while (line := self.lines.next()) is not None:
            if line == b"\\1-grams:":
                if not counts:
                    break
                return counts
            found = _COUNT.fullmatch(line)
            if found is None or int(found[1]) != len(counts) + 1:
                raise self.lines.error(f"expected 'ngram {len(counts) + 1}=COUNT' or \\1-grams:, got {_shown(line)}")
            counts.append(int(found[2]))
            if len(counts) > MAX_ORDER:
                raise self.lines.error(f"n-grams longer than {MAX_ORDER} words; is this {_EXPECTED}?")
        raise self.lines.error("the file ends, or has no counts, before \\1-grams:; copy or write it again")

    def _expect(self, head: bytes, order: int, count: int) -> None:
        line = self.lines.next()
        if line is None:
            raise self.lines.error(f"the file ends before {head.decode()}; it is cut short: copy or write it again")
        if line != head:
            raise self.lines.error(
                f"expected {head.decode()} after {count} {order}-grams (as \\data\\ says), got {_shown(line)}"
            )

    def _section(self, order: int, count: int, *, last: bool) -> None:
        parts: tuple[list[Any], ...] = ([], [], [], [])
        done = 0
        while done < count:
            batch = self.lines.batch(count - done)
            if not batch:
                raise self.lines.error(
                    f"the file ends after {done} of {count} {order}-grams; it is cut short: copy or write it again"
                )
            first = self.lines.number - len(batch) + 1
            kept = [(first + place, fields) for place, line in enumerate(batch) if (fields := line.split())]
            if not kept:
                continue
            try:
                found = self._parse([fields for _, fields in kept], order, last=last)
            except (ValueError, KeyError):
                self._explain(kept, order, done, count, last=last)
                raise
            for part, values in zip(parts, (*found, np.array([number for number, _ in kept])), strict=True):
                part.append(values)
            done += len(kept)
        self._add_table(order, parts, last=last)

    def _parse(self, rows: list[list[bytes]], order: int, *, last: bool) -> tuple[IntArray, FloatArray, FloatArray]:
        """Keys, ln p and ln back-off of a batch of lines. Raises ValueError, or KeyError for a word that is not a 1-gram."""
        lengths = set(map(len, rows))
        if not lengths <= {order + 1, order + 2}:
            raise ValueError(f"expected a number, {order} words and perhaps a back-off weight")
        if len(lengths) == 2:
            rows = [row if len(row) == order + 2 else [*row, b"0"] for row in rows]
        columns = list(zip(*rows, strict=True))
        log_p = _numbers(columns[0])
        if log_p.max() > _ROUNDING_LOG10:
            raise ValueError(f"log10(p) is {log_p.max():g}, a probability above 1")
        log_backoff = _numbers(columns[order + 1]) if len(columns) == order + 2 else np.zeros(len(rows))
        if last and log_backoff.any():
            raise ValueError("a back-off weight on an n-gram of the longest kind; expected none")
        if order == 1:
            keys = self._new_words(columns[1])
        else:
            words = np.array(
                [list(map(self.ids.__getitem__, column)) for column in columns[1 : order + 1]], dtype=np.int64
            )
            keys = words[0]
            for number in range(1, order):
                if number > 1:
                    keys = self.tables[number - 1].find(keys)
                    if keys.min() < 0:
                        raise ValueError(
                            f"its first {number} words are not among the {number}-grams; expected every history there"
                        )
                keys = keys * len(self.ids) + words[number]
        return keys, np.minimum(log_p, 0.0) * LN10, log_backoff * LN10

    def _new_words(self, names: Sequence[bytes]) -> IntArray:
        """Ids of words not seen before. Raises ValueError for others, and for what is not UTF-8."""
        found = set(names)
        if len(found) < len(names) or not found.isdisjoint(self.ids):
            raise ValueError("this word was there already; expected each once")
        b"\n".join(names).decode()
        start = len(self.ids)
        self.ids.update(zip(names, range(start, start + len(names)), strict=True))
        return np.arange(start, start + len(names))

    def _explain(self, kept: list[tuple[int, list[bytes]]], order: int, done: int, count: int, *, last: bool) -> None:
        """Raise the error of the first bad line."""
        for place, (number, fields) in enumerate(kept):
            line = _shown(b" ".join(fields))
            if fields[0].startswith(b"\\"):
                raise self.lines.error(
                    f"{line} after {done + place} {order}-grams; \\data\\ promises {count}: cut short, or wrong counts",
                    number,
                ) from None
            try:
                self._parse([fields], order, last=last)
            except KeyError as error:
                raise self.lines.error(
                    f"{line}: the word {_shown(error.args[0])} is not among the 1-grams", number
                ) from None
            except ValueError as error:
                reason = "not UTF-8; convert the file" if isinstance(error, UnicodeDecodeError) else error
                raise self.lines.error(f"{line} is no {order}-gram: {reason}", number) from None

    def _add_table(self, order: int, parts: tuple[list[Any], ...], *, last: bool) -> None:
        arrays: list[npt.NDArray[Any]] = [np.concatenate(part) if part else np.zeros(0) for part in parts]
        keys, log_p, log_backoff, numbers = arrays
        place = np.argsort(keys, kind="stable")
        keys = keys.astype(np.int64)[place]
        twice = np.flatnonzero(np.diff(keys) == 0)
        if len(twice):
            number = int(numbers[place[twice[0] + 1]])
            raise self.lines.error(
                f"this {order}-gram was in line {int(numbers[place[twice[0]]])} already; expected each once", number
            )
        self.tables.append(NgramTable(keys, log_p[place], None if last else log_backoff[place]))


def _numbers(column: Sequence[bytes]) -> FloatArray:
    """Numbers as text. Raises ValueError unless all are finite."""
    values = np.array(list(map(float, column)))
    if not np.all(np.isfinite(values)):
        raise ValueError("a number is not finite; write log10(0) as -99")
    if b"_" in b"".join(column):
        raise ValueError("'_' in a number")
    return values


def _shown(text: bytes) -> str:
    return repr(text[:60].decode("utf-8", "backslashreplace"))

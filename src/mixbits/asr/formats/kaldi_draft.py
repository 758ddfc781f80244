"""What Kaldi's text and binary lattices have in common: kinds, word symbols, and arrays that grow while a lattice is read."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mixbits.asr.formats.bytesource import open_source
from mixbits.asr.lattice import MAX_SCORE, FloatArray, IntArray, Lattice, TransitionIds, make_lattice, offsets_of
from mixbits.errors import DataError, FormatError

DeadEnds = Literal["error", "drop"]
EPSILON = "<eps>"
MAX_LATTICE_BYTES = 128 << 20
"""Unpacked bytes of one lattice; more is refused, so that a small damaged or hostile file cannot fill the memory."""
MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class KaldiKind:
    """``compact``: CompactLattice (an arc is a word with its transition ids), else Lattice (an arc has at most one of each)."""

    compact: bool = True
    binary: bool = True
    precision: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True)
class WordSymbols:
    """Kaldi's ``words.txt``: words by id and ids by word; id 0 is epsilon, "" here."""

    words: Mapping[int, str]
    ids: Mapping[str, int]
    name: str = "the symbol table"


def read_word_symbols(path: str | os.PathLike[str]) -> WordSymbols:
    """Read ``word id`` lines. Raises FormatError: a bad line, or a word or id that occurs twice."""
    words: dict[int, str] = {}
    ids: dict[str, int] = {}
    with open_source(path) as source:
        while (line := source.line()) is not None:
            where, parts = f"{source.name}:{source.num_lines}", line.split()
            if not parts:
                continue
            if len(parts) != 2 or not parts[1].isdigit() or int(parts[1]) > MAX_ID:
                raise FormatError(f"{where}: got {line[:60]!r}; expected a word and its number")
            word, number = text_of(parts[0], where), int(parts[1])
            word = "" if number == 0 else word
            if number in words or word in ids:
                raise FormatError(f"{where}: word {word[:40]!r} or number {number} occurs twice")
            words[number], ids[word] = word, number
    if not words:
        raise DataError(f"{path}: the file is empty; expected a word and its number a line, as Kaldi's words.txt")
    return WordSymbols({0: "", **words}, {"": 0, **ids}, os.fspath(path))


@dataclass
class Draft:
    """A lattice while it is read: numbers as they stand in the file, costs included."""

    utterance: str
    where: str
    start: int = 0
    src: array[int] = field(default_factory=lambda: array("q"))
    dst: array[int] = field(default_factory=lambda: array("q"))
    label: array[int] = field(default_factory=lambda: array("q"))
    graph: array[float] = field(default_factory=lambda: array("d"))
    acoustic: array[float] = field(default_factory=lambda: array("d"))
    num_ids: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("i"))
    finals: array[int] = field(default_factory=lambda: array("q"))
    final_graph: array[float] = field(default_factory=lambda: array("d"))
    final_acoustic: array[float] = field(default_factory=lambda: array("d"))
    num_final_ids: array[int] = field(default_factory=lambda: array("q"))
    final_ids: array[int] = field(default_factory=lambda: array("i"))

    def finish(self, words: tuple[IntArray, tuple[str, ...]], num_states: int, *, dead_ends: DeadEnds) -> Lattice:
        """The lattice, costs turned into scores. Raises FormatError: not sound."""
        transition_ids = None
        if self.ids or self.final_ids:
            counts = np.concatenate([_ints(self.num_ids), _ints(self.num_final_ids)])
            ids = np.concatenate([np.frombuffer(part, dtype=np.int32) for part in (self.ids, self.final_ids) if part])
            transition_ids = TransitionIds(offsets_of(counts), ids)
        try:
            return make_lattice(
                utterance=self.utterance,
                src=_ints(self.src),
                dst=_ints(self.dst),
                word=words[0],
                labels=words[1],
                lm_score=_scores(self.graph),
                acoustic_score=_scores(self.acoustic),
                num_states=num_states,
                start=self.start,
                finals=_ints(self.finals),
                final_lm_score=_scores(self.final_graph),
                final_acoustic_score=_scores(self.final_acoustic),
                transition_ids=transition_ids,
                dead_ends=dead_ends,
            )
        except DataError as error:
            raise FormatError(f"{self.where}: utterance {self.utterance[:80]!r}: {error}") from error


def words_by_id(ids: IntArray, symbols: WordSymbols | None, where: str) -> tuple[IntArray, tuple[str, ...]]:
    """(index of each arc's label, labels) of word ids; without symbols the labels are the ids as text."""
    distinct, index = np.unique(np.append(ids, 0), return_inverse=True)
    labels = []
    for number in distinct.tolist():
        word = str(number) if symbols is None else symbols.words.get(number)
        if number == 0:
            word = ""
        elif word is None:
            assert symbols is not None
            raise FormatError(
                f"{where}: word number {number} is not in {symbols.name}; give the words.txt of this system"
            )
        labels.append(word)
    return index[:-1].astype(np.int64), tuple(labels)


def text_of(data: bytes, where: str) -> str:
    """Bytes as text. Raises FormatError if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8, or it is damaged"
        ) from error


def check_cost(graph: float, acoustic: float, where: str) -> None:
    """Raise FormatError unless both costs are finite and plausible."""
    if not (-MAX_SCORE <= graph <= MAX_SCORE and -MAX_SCORE <= acoustic <= MAX_SCORE):
        raise FormatError(f"{where}: the costs are {graph} and {acoustic}; expected finite numbers")


def costs_of(scores: FloatArray) -> FloatArray:
    """Costs of scores (no negative zeros)."""
    return 0.0 - scores


def _scores(costs: array[float]) -> FloatArray:
    return 0.0 - np.array(costs, dtype=np.float64)


def _ints(numbers: array[int]) -> IntArray:
    return np.array(numbers, dtype=np.int64)

"""Kaldi lattices as text: a key line, FST lines, a blank line.

CompactLattice: arc ``src dst word graph,acoustic,id_id_…``, final ``state graph,acoustic,id_…``. Lattice: arc
``src dst transition word graph,acoustic``, final ``state graph,acoustic``. A missing weight costs nothing; the first line's state is
the start. Three columns can only be compact; four are compact with a weight or a lattice without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import numpy as np

from mixbits.asr.formats.bytesource import ByteSource
from mixbits.asr.formats.kaldi_draft import (
    EPSILON,
    MAX_ID,
    MAX_LATTICE_BYTES,
    DeadEnds,
    Draft,
    KaldiKind,
    WordSymbols,
    check_cost,
    costs_of,
    text_of,
    words_by_id,
)
from mixbits.asr.lattice import FloatArray, IntArray, Lattice
from mixbits.errors import DataError, FormatError


def read_text_lattice(
    source: ByteSource, utterance: str, *, symbols: WordSymbols | None, dead_ends: DeadEnds
) -> tuple[Lattice, KaldiKind]:
    """Read the lines after the key line, the blank one at the end included.

    Labels are words as they stand, or, if all of a lattice's are numbers, word ids: looked up in ``symbols`` if given.

    Raises:
        FormatError: naming file and line.
    """
    parser = _TextParser(Draft(utterance, f"{source.name}:{source.num_lines}"))
    begin = source.offset
    while (line := source.line()) is not None and (columns := line.split()):
        if source.offset - begin > MAX_LATTICE_BYTES:
            raise FormatError(f"{source.name}:{source.num_lines}: the lattice has more than {MAX_LATTICE_BYTES} bytes")
        parser.add(columns, f"{source.name}:{source.num_lines}")
    return parser.finish(symbols, dead_ends), KaldiKind(compact=parser.compact is not False, binary=False)


class _TextParser:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.compact: bool | None = None
        self.labels: dict[bytes, int] = {}
        self.num_lines = 0
        self.highest = -1

    def add(self, columns: list[bytes], where: str) -> None:
        if len(columns) > 5:
            raise FormatError(f"{where}: {len(columns)} columns; expected at most 5 (src dst transition word weight)")
        state = _number(columns[0], "a state", where)
        if not self.num_lines:
            self.draft.start = state
        self.num_lines += 1
        self.highest = max(self.highest, state)
        if len(columns) <= 2:
            self._final(state, columns[1] if len(columns) == 2 else None, where)
        else:
            self._arc(state, columns, where)

    def _arc(self, state: int, columns: list[bytes], where: str) -> None:
        draft, dst = self.draft, _number(columns[1], "a state", where)
        self.highest = max(self.highest, dst)
        is_compact = len(columns) == 3 or (len(columns) == 4 and columns[3].count(b",") == 2)
        self._decide(is_compact, where)
        weight = columns[3:4] if is_compact else columns[4:5]
        graph, acoustic, ids = _weight(weight[0], is_compact, where) if weight else (0.0, 0.0, b"")
        check_cost(graph, acoustic, where)
        if is_compact:
            draft.num_ids.append(_append_ids(draft.ids, ids, where) if ids else 0)
        else:
            transition = _number(columns[2], "a transition id", where)
            draft.num_ids.append(1 if transition else 0)
            if transition:
                draft.ids.append(transition)
        label = columns[2 if is_compact else 3]
        draft.label.append(self.labels.setdefault(label, len(self.labels)))
        draft.src.append(state)
        draft.dst.append(dst)
        draft.graph.append(graph)
        draft.acoustic.append(acoustic)

    def _final(self, state: int, weight: bytes | None, where: str) -> None:
        draft, graph, acoustic, ids = self.draft, 0.0, 0.0, b""
        if weight is not None:
            is_compact = weight.count(b",") == 2
            self._decide(is_compact, where)
            graph, acoustic, ids = _weight(weight, is_compact, where)
            if graph == acoustic == math.inf:
                return  # not final
        check_cost(graph, acoustic, where)
        draft.finals.append(state)
        draft.final_graph.append(graph)
        draft.final_acoustic.append(acoustic)
        draft.num_final_ids.append(_append_ids(draft.final_ids, ids, where) if ids else 0)

    def _decide(self, is_compact: bool, where: str) -> None:
        if self.compact is None:
            self.compact = is_compact
        elif self.compact != is_compact:
            kinds = {True: "a CompactLattice", False: "a Lattice"}
            raise FormatError(
                f"{where}: the line is of {kinds[is_compact]}, those before of {kinds[self.compact]}; expected one kind"
            )

    def finish(self, symbols: WordSymbols | None, dead_ends: DeadEnds) -> Lattice:
        draft, where = self.draft, self.draft.where
        if not self.num_lines:
            raise FormatError(f"{where}: utterance {draft.utterance[:80]!r}: no lines; expected arcs and a final state")
        if self.highest > 2 * self.num_lines:
            raise FormatError(
                f"{where}: state {self.highest} in a lattice of {self.num_lines} lines; expected states from 0 on"
            )
        if self.labels and all(label.isdigit() for label in self.labels):
            numbers = [_number(label, "a word", where) for label in self.labels]
            ids = np.array(numbers, dtype=np.int64)[np.array(draft.label, dtype=np.int64)]
            words = words_by_id(ids, symbols, where)
        else:
            words = _words_by_name(draft, self.labels)
        return draft.finish(words, self.highest + 1, dead_ends=dead_ends)


def _words_by_name(draft: Draft, found: dict[bytes, int]) -> tuple[IntArray, tuple[str, ...]]:
    names = ["" if name == EPSILON.encode() else text_of(name, draft.where) for name in found]
    labels = ("", *(name for name in names if name))
    index = {label: number for number, label in enumerate(labels)}
    where = np.array([index[name] for name in names], dtype=np.int64)
    return where[np.array(draft.label, dtype=np.int64)], labels


def _number(data: bytes, what: str, where: str) -> int:
    if not data.isdigit() or len(data) > 10 or (number := int(data)) > MAX_ID:
        raise FormatError(f"{where}: got {data[:40]!r}; expected {what}, a number from 0 to {MAX_ID}")
    return number


def _weight(data: bytes, is_compact: bool, where: str) -> tuple[float, float, bytes]:
    parts = data.split(b",")
    try:
        if len(parts) != (3 if is_compact else 2) or b"_" in parts[0] or b"_" in parts[1]:
            raise ValueError
        return float(parts[0]), float(parts[1]), parts[2] if is_compact else b""
    except ValueError:
        expected = "graph,acoustic,id_id_…" if is_compact else "graph,acoustic"
        raise FormatError(f"{where}: got the weight {data[:60]!r}; expected {expected} (numbers)") from None


def _append_ids(to: object, data: bytes, where: str) -> int:
    try:
        numbers = [int(part) for part in data.split(b"_")]
        if min(numbers) < 1 or not data.replace(b"_", b"").isdigit():
            raise ValueError
        to.extend(numbers)  # type: ignore[attr-defined]
    except (ValueError, OverflowError):
        raise FormatError(
            f"{where}: got the transition ids {data[:60]!r}; expected numbers from 1 on, _ between them"
        ) from None
    return len(numbers)


def text_lattice(lattice: Lattice, kind: KaldiKind, symbols: WordSymbols | None) -> Iterator[bytes]:
    """The lines of a lattice, key and blank line included.

    Raises:
        DataError: a key or word that such a file cannot hold.
    """
    if not lattice.utterance.split() == [lattice.utterance]:
        raise DataError(f"utterance id {lattice.utterance[:80]!r} has white space or is empty; Kaldi's keys have none")
    words = label_names(lattice, symbols)
    yield f"{lattice.utterance} \n".encode()
    arcs, bounds = lattice.out_arcs
    dst, word = lattice.dst.tolist(), lattice.word.tolist()
    weight = _weight_texts(lattice, kind)
    final_row = {state: row for row, state in enumerate(lattice.finals.tolist())}
    ids = lattice.transition_ids
    others = (state for state in lattice.topological_order.tolist() if state != lattice.start)
    for state in chain([lattice.start], others):
        for arc in arcs[bounds[state] : bounds[state + 1]].tolist():
            middle = ""
            if not kind.compact:
                middle = f"{int(ids.row(arc)[0]) if ids is not None and len(ids.row(arc)) else 0}\t"
            yield f"{state}\t{dst[arc]}\t{middle}{words[word[arc]]}\t{weight[arc]}\n".encode()
        if (row := final_row.get(state)) is not None:
            text = weight[lattice.num_arcs + row]
            yield (f"{state}\n" if text.strip("0,") == "" else f"{state}\t{text}\n").encode()
    yield b"\n"


def label_names(lattice: Lattice, symbols: WordSymbols | None) -> list[str]:
    """What is written for each label: word ids if ``symbols`` are given or all labels are numbers, else the words.

    Raises:
        DataError: a word that is not in ``symbols``, or cannot be told from another.
    """
    labels = lattice.labels
    if symbols is not None:
        missing = [label for label in labels if label not in symbols.ids]
        if missing:
            raise DataError(f"utterance {lattice.utterance!r}: word {missing[0]!r} is not in {symbols.name}")
        return [str(symbols.ids[label]) for label in labels]
    if all(_is_id(label) for label in labels[1:]):
        return ["0", *labels[1:]]
    bad = next((label for label in labels[1:] if label.split() != [label] or label == EPSILON), None)
    if bad is not None or all(label.isdigit() for label in labels[1:]):
        raise DataError(
            f"utterance {lattice.utterance!r}: word {bad or labels[1]!r} cannot stand in a Kaldi text lattice; give a words.txt"
        )
    return [EPSILON, *labels[1:]]


def _is_id(label: str) -> bool:
    return label.isascii() and label.isdigit() and label == str(int(label)) and 0 < int(label) <= MAX_ID


def _weight_texts(lattice: Lattice, kind: KaldiKind) -> list[str]:
    graph = np.concatenate([lattice.lm_score, lattice.final_lm_score])
    acoustic = np.concatenate([lattice.acoustic_score, lattice.final_acoustic_score])
    pairs = zip(_texts(costs_of(graph)), _texts(costs_of(acoustic)), strict=True)
    if not kind.compact:
        return [f"{g},{a}" for g, a in pairs]
    ids = lattice.transition_ids
    if ids is None:
        return [f"{g},{a}," for g, a in pairs]
    return [f"{g},{a},{'_'.join(map(str, ids.row(row).tolist()))}" for row, (g, a) in enumerate(pairs)]


def _texts(costs: FloatArray) -> list[str]:
    """The shortest text of each number that reads back as the same."""
    return [repr(cost).removesuffix(".0") for cost in costs.tolist()]

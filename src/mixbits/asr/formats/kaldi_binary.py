"""Kaldi lattices as binary FSTs (OpenFst's vector type), little-endian; nothing in a header is believed before it is read.

Header: i32 magic, i32 length + ``vector``, i32 length + arc type, i32 version 2, i32 flags, u64 properties, i64 start, i64 states,
i64 arcs (may be 0). A state: its final weight, i64 arcs, the arcs. An arc: i32 ilabel, i32 olabel, weight, i32 next state. A weight:
graph and acoustic cost, for compact types also i32 n and n transition ids. Infinite costs: not final.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import numpy as np

from mixbits.asr.formats.bytesource import ByteSource
from mixbits.asr.formats.kaldi_draft import (
    MAX_LATTICE_BYTES,
    DeadEnds,
    Draft,
    KaldiKind,
    WordSymbols,
    check_cost,
    costs_of,
    words_by_id,
)
from mixbits.asr.formats.kaldi_text import label_names
from mixbits.asr.lattice import Lattice
from mixbits.errors import DataError, FormatError

MAGIC = struct.pack("<I", 0x7EB2FDD6)
_TYPES: dict[bytes, KaldiKind] = {
    b"lattice4": KaldiKind(compact=False),
    b"lattice8": KaldiKind(compact=False, precision="float64"),
    b"compactlattice44": KaldiKind(),
    b"compactlattice84": KaldiKind(precision="float64"),
}
_MAX_IDS = 1 << 22
"""Transition ids of one arc: 11 hours of frames."""
_PROPERTIES = 3  # expanded, mutable: what is always true; readers find the rest out


def read_binary_lattice(
    source: ByteSource, utterance: str, *, symbols: WordSymbols | None, dead_ends: DeadEnds
) -> tuple[Lattice, KaldiKind]:
    """Read the bytes after ``key␠``.

    Raises:
        FormatError: naming file and byte.
    """
    begin = source.offset
    draft = Draft(utterance, f"{source.name}: byte {begin}")
    kind, num_states = _header(source, draft)
    real = "f" if kind.precision == "float32" else "d"
    for state in range(num_states):
        if source.offset - begin > MAX_LATTICE_BYTES:
            raise _bad(source, f"the lattice has more than {MAX_LATTICE_BYTES} bytes")
        num_arcs = _state(source, draft, state, kind, real)
        read_arcs = _compact_arcs if kind.compact else _plain_arcs
        read_arcs(source, draft, state, num_arcs, real, begin)
    words = words_by_id(np.array(draft.label, dtype=np.int64), symbols, draft.where)
    return draft.finish(words, num_states, dead_ends=dead_ends), kind


def _header(source: ByteSource, draft: Draft) -> tuple[KaldiKind, int]:
    if source.take(4, "the header") != MAGIC:
        source.position -= 4
        raise _bad(source, "no FST magic number (d6 fd b2 7e); expected a binary lattice")
    names = []
    for expected in ("vector", "an arc type"):
        (length,) = struct.unpack("<i", source.take(4, "the header"))
        if not 0 < length <= 64:
            raise _bad(source, f"a name of {length} bytes in the header; expected {expected}")
        names.append(source.take(length, "the header"))
    if names[0] != b"vector":
        raise _bad(source, f"the FST type is {names[0]!r}; expected a vector FST")
    if names[1] not in _TYPES:
        known = ", ".join(name.decode() for name in _TYPES)
        raise _bad(source, f"the arc type is {names[1]!r}; expected one of {known}")
    version, flags, _, start, num_states, _ = struct.unpack("<iiQqqq", source.take(40, "the header"))
    if version != 2:
        raise _bad(source, f"FST version {version}; expected 2")
    if flags & 7:
        raise _bad(source, f"the flags are {flags}: symbol tables or alignment inside; expected 0")
    if num_states < 0:
        raise _bad(source, f"{num_states} states; expected a number not below 0")
    draft.start = start
    return _TYPES[names[1]], num_states


def _state(source: ByteSource, draft: Draft, state: int, kind: KaldiKind, real: str) -> int:
    """Read a state's final weight; returns its number of arcs."""
    reader = struct.Struct(f"<{real}{real}")
    graph, acoustic = reader.unpack(source.take(reader.size, f"state {state}"))
    num_ids = 0
    if kind.compact:
        (num_ids,) = struct.unpack("<i", source.take(4, f"state {state}"))
        _check_num_ids(source, num_ids)
        draft.final_ids.frombytes(source.take(4 * num_ids, f"the transition ids of state {state}"))
    if graph == acoustic == math.inf:
        if num_ids:
            raise _bad(source, f"state {state} is not final and has {num_ids} final transition ids")
    else:
        check_cost(graph, acoustic, _where(source))
        draft.finals.append(state)
        draft.final_graph.append(graph)
        draft.final_acoustic.append(acoustic)
        draft.num_final_ids.append(num_ids)
    (num_arcs,) = struct.unpack("<q", source.take(8, f"state {state}"))
    if num_arcs < 0:
        raise _bad(source, f"state {state} has {num_arcs} arcs; expected a number not below 0")
    return num_arcs


def _compact_arcs(source: ByteSource, draft: Draft, state: int, num_arcs: int, real: str, begin: int) -> None:
    front = struct.Struct(f"<ii{real}{real}i")
    size, unpack, next_state = front.size, front.unpack_from, struct.Struct("<i").unpack_from
    for _ in range(num_arcs):
        if not source.need(size):
            raise source.truncated(f"the arcs of state {state}")
        ilabel, olabel, graph, acoustic, num_ids = unpack(source.buffer, source.position)
        if ilabel != olabel or ilabel < 0:
            raise _bad(
                source, f"an arc of state {state} has the words {ilabel} and {olabel}; expected one number twice"
            )
        check_cost(graph, acoustic, _where(source))
        _check_num_ids(source, num_ids)
        source.position += size
        end = 4 * num_ids
        if not source.need(end + 4):
            raise source.truncated(f"the arcs of state {state}")
        if source.offset - begin > MAX_LATTICE_BYTES:
            raise _bad(source, f"the lattice has more than {MAX_LATTICE_BYTES} bytes")
        draft.ids.frombytes(source.buffer[source.position : source.position + end])
        draft.dst.append(next_state(source.buffer, source.position + end)[0])
        source.position += end + 4
        draft.src.append(state)
        draft.label.append(ilabel)
        draft.graph.append(graph)
        draft.acoustic.append(acoustic)
        draft.num_ids.append(num_ids)


def _plain_arcs(source: ByteSource, draft: Draft, state: int, num_arcs: int, real: str, begin: int) -> None:
    whole = struct.Struct(f"<ii{real}{real}i")
    size, unpack = whole.size, whole.unpack_from
    for _ in range(num_arcs):
        if not source.need(size):
            raise source.truncated(f"the arcs of state {state}")
        ilabel, olabel, graph, acoustic, target = unpack(source.buffer, source.position)
        if ilabel < 0 or olabel < 0:
            raise _bad(source, f"an arc of state {state} has the labels {ilabel} and {olabel}; expected none below 0")
        check_cost(graph, acoustic, _where(source))
        source.position += size
        if source.offset - begin > MAX_LATTICE_BYTES:
            raise _bad(source, f"the lattice has more than {MAX_LATTICE_BYTES} bytes")
        draft.src.append(state)
        draft.dst.append(target)
        draft.label.append(olabel)
        draft.graph.append(graph)
        draft.acoustic.append(acoustic)
        draft.num_ids.append(1 if ilabel else 0)
        if ilabel:
            draft.ids.append(ilabel)


def binary_lattice(lattice: Lattice, kind: KaldiKind, symbols: WordSymbols | None) -> Iterator[bytes]:
    """The bytes of a lattice, key included; float32 costs are rounded to 24 bits.

    Raises:
        DataError: words that are no numbers and no ``symbols``, a key with white space, a cost that float32 cannot hold.
    """
    if not lattice.utterance.split() == [lattice.utterance]:
        raise DataError(f"utterance id {lattice.utterance[:80]!r} has white space or is empty; Kaldi's keys have none")
    names = label_names(lattice, symbols)
    if names[0] != "0":
        raise DataError(
            f"utterance {lattice.utterance!r}: binary lattices hold word numbers; give a words.txt for the words"
        )
    yield lattice.utterance.encode() + b" "
    number = np.array([int(name) for name in names], dtype=np.int64)[lattice.word].tolist()
    name = next(
        name for name, known in _TYPES.items() if (known.compact, known.precision) == (kind.compact, kind.precision)
    )
    yield MAGIC + struct.pack("<i", 6) + b"vector" + struct.pack("<i", len(name)) + name
    yield struct.pack("<iiQqqq", 2, 0, _PROPERTIES, lattice.start, lattice.num_states, lattice.num_arcs)
    real = "f" if kind.precision == "float32" else "d"
    pair, front, tail = struct.Struct(f"<{real}{real}"), struct.Struct("<ii"), struct.Struct("<i")
    graph, acoustic = costs_of(lattice.lm_score).tolist(), costs_of(lattice.acoustic_score).tolist()
    final = {
        state: (row, pair.pack(g, a))
        for row, (state, g, a) in enumerate(
            zip(
                lattice.finals.tolist(),
                costs_of(lattice.final_lm_score).tolist(),
                costs_of(lattice.final_acoustic_score).tolist(),
                strict=True,
            )
        )
    }
    ids, dst = lattice.transition_ids, lattice.dst.tolist()
    arcs, bounds = lattice.out_arcs
    no_ids = tail.pack(0)

    def id_bytes(row: int) -> bytes:
        if ids is None:
            return no_ids
        found = ids.row(row)
        return tail.pack(len(found)) + found.astype("<i4").tobytes()

    for state in range(lattice.num_states):
        row, weight = final.get(state, (-1, pair.pack(math.inf, math.inf)))
        if kind.compact:
            weight += id_bytes(lattice.num_arcs + row) if row >= 0 else no_ids
        mine = arcs[bounds[state] : bounds[state + 1]].tolist()
        yield weight + struct.pack("<q", len(mine))
        for arc in mine:
            cost, word = pair.pack(graph[arc], acoustic[arc]), number[arc]
            if kind.compact:
                yield front.pack(word, word) + cost + id_bytes(arc) + tail.pack(dst[arc])
            else:
                first = int(ids.row(arc)[0]) if ids is not None and len(ids.row(arc)) else 0
                yield front.pack(first, word) + cost + tail.pack(dst[arc])


def _check_num_ids(source: ByteSource, num_ids: int) -> None:
    if not 0 <= num_ids <= _MAX_IDS:
        raise _bad(source, f"{num_ids} transition ids in one weight; expected 0 to {_MAX_IDS}")


def _where(source: ByteSource) -> str:
    return f"{source.name}: byte {source.offset}"


def _bad(source: ByteSource, message: str) -> FormatError:
    return FormatError(f"{_where(source)}: {message}")

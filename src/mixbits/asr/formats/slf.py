"""HTK SLF lattices in: one utterance a file, words on links or on nodes.

``#`` starts a comment; lines are ``name=value`` fields in any order, values may be quoted, unknown fields are ignored. Header: ``UTTERANCE``/``U``,
``base`` (of the logs; default e, 0 = no logs), ``lmscale``, ``wdpenalty``, ``acscale``, ``start``, ``end``; sizes ``N=`` nodes and ``L=`` links;
nodes ``I=``, ``t=`` seconds, ``W=``, ``v=``; links ``J=``, ``S=``, ``E=``, ``W=``, ``v=``, ``a=`` acoustic, ``l=`` LM (``n=`` where no link has ``l=``). Values are
log-likelihoods, higher is better. Further fields that all links have as numbers are kept by name (``i=-1,-2`` as ``i.1`` and ``i.2``).

A word on a node stands on every link that leads to it. ``!NULL`` is no word. :mod:`mixbits.asr.formats.slf_write` writes.
Not read: sub-lattices. Dropped: fields that are no numbers (``d=``), pronunciations of nodes where words are on links.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixbits.asr.formats.bytesource import ByteSource, open_source
from mixbits.asr.formats.kaldi_draft import MAX_LATTICE_BYTES, DeadEnds, text_of
from mixbits.asr.lattice import FloatArray, IntArray, Lattice, PathWeights, make_lattice
from mixbits.errors import DataError, FormatError

NULL = "!NULL"
_LONG_NAMES = {
    b"V": b"VERSION", b"U": b"UTTERANCE", b"S": b"SUBLAT", b"NODES": b"N", b"LINKS": b"L",
}  # fmt: skip
_NODE_NAMES = {b"time": b"t", b"WORD": b"W", b"var": b"v"}
_LINK_NAMES = {
    b"START": b"S", b"END": b"E", b"WORD": b"W", b"var": b"v", b"div": b"d", b"acoustic": b"a", b"ngram": b"n", b"language": b"l",
}  # fmt: skip
_LOGS = ("a", "l", "n", "r")
_FIELD = re.compile(rb"""([^\s=]+)=("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S*)(?=\s|$)""")
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_MAX_NUMBER = 2**31 - 1

Fields = dict[bytes, bytes]
_ABSENT = b""  # an empty field counts as missing
_MAX_FIELDS = 100


def read_slf(path: str | os.PathLike[str], *, utterance: str | None = None, dead_ends: DeadEnds = "error") -> Lattice:
    """Read a file, plain, gzip or xz.

    Args:
        utterance: the id; by default the file's own (``UTTERANCE=``), else its name without endings.
        dead_ends: ``drop`` leaves out nodes on no path, which are an error otherwise.

    Raises:
        FormatError: not SLF, damaged, a lattice that is not sound; file and line are named. DataError: no such file.
    """
    with open_source(path) as source:
        return read_slf_stream(source, utterance, stem=_stem(path), dead_ends=dead_ends)


def read_slf_stream(
    source: ByteSource, utterance: str | None = None, *, stem: str = "lattice", dead_ends: DeadEnds = "error"
) -> Lattice:
    """Read an open file to its end; ``stem`` is the id where neither caller nor file gives one. See :func:`read_slf`."""
    table = _SlfTable(source)
    return table.lattice(utterance or table.utterance or stem, dead_ends)


class _SlfTable:
    """Header, nodes and links as they stand in the file."""

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self.header: Fields = {}
        self.sizes: Fields = {}
        self.nodes: dict[int, Fields] = {}
        self.link_lines: list[int] = []
        raw_links: list[bytes] = []
        while (line := source.line()) is not None:
            if source.offset > MAX_LATTICE_BYTES:
                raise FormatError(
                    f"{source.name}:{source.num_lines}: the lattice has more than {MAX_LATTICE_BYTES} bytes"
                )
            line = line.strip()
            if line.startswith(b"J=") or (b"J=" in line and b"J" in _fields(line, f"{source.name}:{source.num_lines}")):
                raw_links.append(line)
                self.link_lines.append(source.num_lines)
            elif line and not line.startswith(b"#"):
                self._add(line, source.num_lines)
        self.num_lines = source.num_lines
        self.links = self._link_columns(raw_links)
        for name, got in ((b"N", len(self.nodes)), (b"L", len(self.link_lines))):
            if name not in self.sizes:
                raise FormatError(f"{self.name}: no line with N= and L=; expected an HTK lattice (SLF)")
            wanted = _integer(self.sizes[name], name, self.name)
            if got != wanted:
                kind = "nodes" if name == b"N" else "links"
                raise FormatError(
                    f"{self.name}:{self.num_lines}: {got} {kind}, but {name.decode()}={wanted} was promised; is the file cut?"
                )

    @property
    def utterance(self) -> str:
        return text_of(self.header.get(b"UTTERANCE", b""), self.name).strip()

    def _add(self, line: bytes, number: int) -> None:
        where = f"{self.name}:{number}"
        fields = _fields(line, where)
        if b"I" in fields:
            node = _integer(fields.pop(b"I"), b"I", where)
            if node in self.nodes:
                raise FormatError(f"{where}: node {node} occurs twice")
            if b"L" in fields:
                raise FormatError(
                    f"{where}: node {node} is a sub-lattice; expand sub-lattices before (HTK's HLRescore)"
                )
            self.nodes[node] = {_NODE_NAMES.get(name, name): value for name, value in fields.items()}
        else:
            fields = {_LONG_NAMES.get(name, name): value for name, value in fields.items()}
            if b"SUBLAT" in fields:
                raise FormatError(f"{where}: sub-lattices are not read; expand them before (HTK's HLRescore)")
            for name, value in fields.items():
                (self.sizes if name in (b"N", b"L") else self.header)[name] = value

    def _link_columns(self, lines: list[bytes]) -> dict[bytes, list[bytes]]:
        """Fields of all links by name; what a link does not have is :data:`_ABSENT`. Lines that are all alike are read by columns."""
        columns = None if not lines else _alike(lines)
        if columns is None:
            rows = [_fields(line, f"{self.name}:{number}") for line, number in zip(lines, self.link_lines, strict=True)]
            names = dict.fromkeys(name for row in rows for name in row)
            if len(names) > _MAX_FIELDS:
                raise FormatError(
                    f"{self.name}: the links have {len(names)} different fields; expected at most {_MAX_FIELDS}"
                )
            columns = {name: [row.get(name, _ABSENT) for row in rows] for name in names}
        renamed: dict[bytes, list[bytes]] = {}
        for name, values in columns.items():
            other = renamed.setdefault(_LINK_NAMES.get(name, name), values)
            if other is not values:  # long and short names in one file
                other[:] = [a or b for a, b in zip(other, values, strict=True)]
        return renamed

    def lattice(self, utterance: str, dead_ends: DeadEnds) -> Lattice:
        """The lattice of these fields. Raises FormatError: not sound."""
        numbers = self._link_numbers()
        logs = self._logs()
        src, dst = (self._states(numbers, name) for name in (b"S", b"E"))
        word, labels = self._words(dst)
        num_states, start, finals = len(self.nodes), self._end(dst, b"start"), self._end(src, b"end")
        start_label = (
            text_of(self.nodes[start].get(b"W", NULL.encode()), self.name) if not self._has_link_words else NULL
        )
        others = self._others(dst)
        lm = logs.get("l", logs.get("n", np.zeros(len(src))))
        others |= {name: values for name, values in logs.items() if name not in ("a", "l") and values is not lm}
        times = self._times()
        try:
            lattice = make_lattice(
                utterance=utterance,
                src=src,
                dst=dst,
                word=word,
                labels=labels,
                lm_score=lm,
                acoustic_score=logs.get("a", np.zeros(len(src))),
                num_states=num_states,
                start=start,
                finals=[finals],
                state_times=times,
                other=others,
                weights=self._weights(),
                dead_ends=dead_ends,
            )
        except DataError as error:
            raise FormatError(f"{self.name}: utterance {utterance[:80]!r}: {error}") from error
        if start_label in lattice.non_words:
            return lattice
        return _with_start_word(lattice, start_label)

    @property
    def _has_link_words(self) -> bool:
        return b"W" in self.links

    def _link_numbers(self) -> dict[bytes, IntArray]:
        found: dict[bytes, IntArray] = {}
        for name in (b"J", b"S", b"E"):
            values = self.links.get(name, [_ABSENT] * len(self.link_lines))
            if not b"".join(values).isdigit() or b"" in values or max(map(len, values)) > 9:
                for value, line in zip(values, self.link_lines, strict=True):
                    if not value:
                        raise FormatError(f"{self.name}:{line}: the link has no {name.decode()}=")
                    _integer(value, name, f"{self.name}:{line}")
            found[name] = np.array(list(map(int, values)), dtype=np.int64)
        distinct, first = np.unique(found[b"J"], return_index=True)
        if len(distinct) < len(self.link_lines):
            twice = sorted(set(range(len(self.link_lines))) - set(first.tolist()))[0]
            raise FormatError(f"{self.name}:{self.link_lines[twice]}: link {found[b'J'][twice]} occurs twice")
        return found

    def _reals(self, name: bytes, absent: bytes) -> FloatArray:
        """A field of all links as finite numbers, ``absent`` where a link does not have it."""
        values = [value or absent for value in self.links[name]]
        try:
            found = np.array(list(map(float, values)), dtype=np.float64)
        except ValueError:
            found = np.full(len(values), np.nan)
        if not np.all(np.isfinite(found)) or b"_" in b"".join(values):
            for value, line in zip(values, self.link_lines, strict=True):
                _real(value, name, f"{self.name}:{line}")
        return found

    def _states(self, numbers: Mapping[bytes, IntArray], name: bytes) -> IntArray:
        """Places of nodes in ascending order of their numbers."""
        nodes = np.array(sorted(self.nodes), dtype=np.int64)
        if not len(nodes):
            raise FormatError(f"{self.name}: no nodes; expected lines with I=")
        places = np.searchsorted(nodes, numbers[name])
        wrong = np.flatnonzero(nodes[np.minimum(places, len(nodes) - 1)] != numbers[name])
        if len(wrong):
            raise FormatError(
                f"{self.name}:{self.link_lines[wrong[0]]}: {name.decode()}={numbers[name][wrong[0]]} is no node of this lattice"
            )
        return places

    def _node_fields(self) -> list[Fields]:
        return [self.nodes[node] for node in sorted(self.nodes)]

    def _end(self, arcs_at: IntArray, name: bytes) -> int:
        """The start or end node's place: what the header says, else the only one without links to or from it."""
        nodes = sorted(self.nodes)
        if name in self.header:
            node = _integer(self.header[name], name, self.name)
            if node not in self.nodes:
                raise FormatError(f"{self.name}: {name.decode()}={node} is no node of this lattice")
            return nodes.index(node)
        free = np.flatnonzero(np.bincount(arcs_at, minlength=len(nodes)) == 0)
        if len(free) != 1:
            links = "leads to" if name == b"start" else "leaves"
            which = ", ".join(str(nodes[place]) for place in free[:3])
            raise FormatError(
                f"{self.name}: no link {links} {len(free)} of the nodes ({which or 'it has a cycle'}); expected one {name.decode()} node, "
                f"or {name.decode()}= in the header"
            )
        return int(free[0])

    def _words(self, dst: IntArray) -> tuple[IntArray, list[str]]:
        """(label index of each link, labels): the link's own word, else that of the node it leads to."""
        index: dict[bytes, int] = {NULL.encode(): 0}
        at_node = [fields.get(b"W", NULL.encode()) for fields in self._node_fields()]
        if self._has_link_words:
            own = self.links[b"W"]
            raw = [label or at_node[to] for label, to in zip(own, dst.tolist(), strict=True)]
        else:
            raw = [at_node[to] for to in dst.tolist()]
        word = np.array([index.setdefault(label, len(index)) for label in raw], dtype=np.int64)
        labels = [text_of(label, self.name) for label in index]
        labels[0] = ""
        if "" in labels[1:]:
            raise FormatError(f"{self.name}: an empty word (W=); expected a word or {NULL}")
        return word, labels

    def _logs(self) -> dict[str, FloatArray]:
        """Log scores of the links by name, as natural logs; only names that occur."""
        try:
            base = float(self.header.get(b"base", b"2.718281828459045"))
        except ValueError:
            base = math.nan
        if not (base == 0 or (0 < base < math.inf and base != 1)):
            raise FormatError(f"{self.name}: base={self.header[b'base'][:40]!r}; expected the base of the logs, or 0")
        is_natural = abs(base - math.e) < 1e-3
        found = {}
        for name in _LOGS:
            key = name.encode()
            if key in self.links:
                values = self._reals(key, b"0" if base else b"1")
                found[name] = values if is_natural else self._natural(values, base, key)
        return found

    def _natural(self, values: FloatArray, base: float, name: bytes) -> FloatArray:
        if base:
            return values * math.log(base)
        if np.any(values <= 0):
            line = self.link_lines[int(np.flatnonzero(values <= 0)[0])]
            raise FormatError(
                f"{self.name}:{line}: {name.decode()}= is not above 0, but base=0 says it is a probability"
            )
        return np.log(values)

    def _others(self, dst: IntArray) -> dict[str, FloatArray]:
        """Further fields that are numbers on every link; pronunciations of nodes where words are there."""
        names = set(self.links) - {b"J", b"S", b"E", b"W", *(name.encode() for name in _LOGS)}
        found: dict[str, FloatArray] = {}
        for name in sorted(names):
            values = self.links[name]
            if not name.isalnum() or not all(values):
                continue
            num_parts = values[0].count(b",") + 1
            try:
                flat = list(map(float, b",".join(values).split(b",")))
            except ValueError:
                continue
            is_even = num_parts == 1 or all(value.count(b",") == num_parts - 1 for value in values)
            if is_even and len(flat) == num_parts * len(values) and np.all(np.isfinite(flat)):
                text = name.decode()
                columns = np.array(flat).reshape(-1, num_parts).T
                found |= {text if num_parts == 1 else f"{text}.{i}": column for i, column in enumerate(columns, 1)}
        if not self._has_link_words and b"v" not in names:
            variants = [fields.get(b"v", b"1") for fields in self._node_fields()]
            if all(value.isdigit() and len(value) < 10 for value in variants) and set(variants) != {b"1"}:
                found["v"] = np.array([int(value) for value in variants], dtype=np.float64)[dst]
        return found

    def _times(self) -> FloatArray | None:
        nodes = self._node_fields()
        if not any(b"t" in fields for fields in nodes):
            return None
        return np.array([_real(f[b"t"], b"t", self.name) if b"t" in f else math.nan for f in nodes])

    def _weights(self) -> PathWeights | None:
        names = {b"acscale": "acoustic_scale", b"lmscale": "lm_scale", b"wdpenalty": "word_insertion_penalty"}
        given = {names[key]: _real(self.header[key], key, self.name) for key in names if key in self.header}
        try:
            return PathWeights(**given) if given else None
        except DataError as error:
            raise FormatError(f"{self.name}: {error}") from error


def _with_start_word(lattice: Lattice, label: str) -> Lattice:
    """A new start with one arc, which carries the word of the old start node."""
    labels = lattice.labels if label in lattice.labels else (*lattice.labels, label)
    times = lattice.state_times
    return make_lattice(
        utterance=lattice.utterance,
        src=np.append(lattice.src, lattice.num_states),
        dst=np.append(lattice.dst, lattice.start),
        word=np.append(lattice.word, labels.index(label)),
        labels=labels,
        lm_score=np.append(lattice.lm_score, 0.0),
        acoustic_score=np.append(lattice.acoustic_score, 0.0),
        num_states=lattice.num_states + 1,
        start=lattice.num_states,
        finals=lattice.finals,
        state_times=None if times is None else np.append(times, times[lattice.start]),
        other={name: np.append(values, 0.0) for name, values in lattice.other.items()},
        weights=lattice.weights,
    )


def _alike(lines: list[bytes]) -> dict[bytes, list[bytes]] | None:
    """Columns of lines with the same fields in the same order and no quotes; None if they are not all so."""
    whole = b" ".join(lines)
    if any(mark in whole for mark in (b'"', b"'", b"\\")):
        return None
    names = [part.partition(b"=")[0] + b"=" for part in lines[0].split()]
    tokens, num_names = whole.split(), len(names)
    if len(set(names)) < num_names or len(tokens) != num_names * len(lines):
        return None
    columns = {}
    for place, name in enumerate(names):
        column = tokens[place::num_names]
        if not all(token.startswith(name) for token in column):
            return None
        columns[name[:-1]] = [token[len(name) :] for token in column]
    return columns


def _fields(line: bytes, where: str) -> Fields:
    if b'"' in line or b"'" in line or b"\\" in line:
        pairs = [(name, _plain(value)) for name, value in _FIELD.findall(line)]
        if b"".join(_FIELD.sub(b"", line).split()):
            raise FormatError(f"{where}: got {line[:60]!r}; expected name=value fields")
    else:
        try:
            pairs = [(name, value) for name, value in (part.split(b"=", 1) for part in line.split())]
        except ValueError:
            raise FormatError(f"{where}: got {line[:60]!r}; expected name=value fields") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise FormatError(f"{where}: a field occurs twice in {line[:60]!r}")
    return fields


def _plain(value: bytes) -> bytes:
    if len(value) > 1 and value[:1] in b"\"'" and value[-1:] == value[:1]:
        value = value[1:-1]
    if b"\\" not in value:
        return value
    return _ESCAPE.sub(lambda m: bytes([int(m[1], 8) & 255]) if len(m[1]) == 3 else m[1], value)


def _integer(data: bytes, name: bytes, where: str) -> int:
    if not data.isdigit() or len(data) > 10 or (number := int(data)) > _MAX_NUMBER:
        raise FormatError(f"{where}: {name.decode()}={data[:40]!r}; expected a number from 0 to {_MAX_NUMBER}")
    return number


def _real(data: bytes, name: bytes, where: str) -> float:
    try:
        value = math.nan if b"_" in data else float(data)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FormatError(f"{where}: {name.decode()}={data[:40]!r}; expected a finite number")
    return value


def _stem(path: str | os.PathLike[str]) -> str:
    name = Path(path).name
    for ending in (".gz", ".xz", ".slf", ".lat", ".htk"):
        name = name.removesuffix(ending)
    return name or "lattice"

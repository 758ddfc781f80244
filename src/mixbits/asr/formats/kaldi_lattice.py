"""Kaldi lattice archives, in and out: Lattice and CompactLattice, text and binary, plain, gzip or xz, one utterance at a time.

An archive is ``key␠`` and a lattice, over and over. White space (a line end) after the key means text, the byte 0xD6 a binary FST;
see :mod:`mixbits.asr.formats.kaldi_text` and :mod:`mixbits.asr.formats.kaldi_binary`. Kaldi's files hold costs, −ln p; the
graph cost becomes the LM score. Words are numbers in binary files and mostly in text: ``words.txt`` (:func:`read_word_symbols`)
names them; without it the labels are the numbers as text.

What a lattice has and the format has no place for (times, named scores, recommended scales) is not written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np

from mixbits.asr.formats.bytesource import ByteSource, open_source
from mixbits.asr.formats.kaldi_binary import MAGIC, binary_lattice, read_binary_lattice
from mixbits.asr.formats.kaldi_draft import DeadEnds, KaldiKind, WordSymbols, read_word_symbols, text_of
from mixbits.asr.formats.kaldi_text import read_text_lattice, text_lattice
from mixbits.asr.formats.lines import packed_file
from mixbits.asr.lattice import Lattice, TransitionIds, make_lattice, offsets_of
from mixbits.errors import FormatError

__all__ = [
    "KaldiKind",
    "WordSymbols",
    "read_kaldi_lattices",
    "read_kaldi_stream",
    "read_word_symbols",
    "write_kaldi_lattices",
]

MAX_KEY_BYTES = 4096
_BINARY_AFTER_KEY = re.compile(rb" \xd6(?![\x80-\xbf])")  # what follows else is a letter in UTF-8


def read_kaldi_lattices(
    path: str | os.PathLike[str], *, symbols: WordSymbols | None = None, dead_ends: DeadEnds = "error"
) -> Iterator[Lattice]:
    """Read an archive, one lattice in memory at a time.

    Args:
        symbols: names of the word ids; without them the labels are the ids as text (or the words of a text archive).
        dead_ends: ``drop`` leaves out states on no path, which are an error otherwise.

    Raises:
        FormatError: not such an archive, damaged, a lattice that is not sound, a key that occurs twice; file and line or byte are named.
        DataError: no such file.
    """
    with open_source(path) as source:
        for lattice, _ in read_kaldi_stream(source, symbols=symbols, dead_ends=dead_ends):
            yield lattice


def read_kaldi_stream(
    source: ByteSource, *, symbols: WordSymbols | None = None, dead_ends: DeadEnds = "error"
) -> Iterator[tuple[Lattice, KaldiKind]]:
    """The lattices of an open archive and how each is stored; see :func:`read_kaldi_lattices`."""
    seen: set[str] = set()
    while (key := _key(source)) is not None:
        if key in seen:
            raise FormatError(f"{_where(source)}: utterance {key[:80]!r} occurs twice; utterance ids must be unique")
        seen.add(key)
        if source.peek(1) == MAGIC[:1]:
            yield read_binary_lattice(source, key, symbols=symbols, dead_ends=dead_ends)
        else:
            source.line()  # the end of the key line
            yield read_text_lattice(source, key, symbols=symbols, dead_ends=dead_ends)
    if not seen:
        raise FormatError(f"{source.name}: no lattice in it; expected a Kaldi archive")


def write_kaldi_lattices(
    path: str | os.PathLike[str],
    lattices: Iterable[Lattice],
    *,
    kind: KaldiKind | None = None,
    symbols: WordSymbols | None = None,
) -> int:
    """Write an archive (compressed if the name ends in ``.gz`` or ``.xz``), which appears when complete. Returns the number of lattices.

    Raises:
        DataError: a word or utterance id that the format cannot hold, or words without numbers in a binary archive.
    """
    kind, number = kind or KaldiKind(), 0
    with packed_file(path) as file:
        for lattice in lattices:
            ready = lattice if kind.compact else one_id_an_arc(lattice)
            write = binary_lattice if kind.binary else text_lattice
            file.writelines(cast("Iterator[bytes]", write(ready, kind, symbols)))
            number += 1
    return number


def one_id_an_arc(lattice: Lattice) -> Lattice:
    """The same paths with at most one transition id an arc and none at final states, as Kaldi's Lattice type wants it.

    An arc with k > 1 ids becomes a chain of k arcs; words and scores are on the first. Ids of a final state follow it in a chain.
    """
    ids = lattice.transition_ids
    if ids is None:
        return lattice
    counts = np.diff(ids.offsets)
    arc_counts, final_counts = counts[: lattice.num_arcs], counts[lattice.num_arcs :]
    if np.all(arc_counts <= 1) and not np.any(final_counts):
        return lattice
    pieces = np.maximum(np.concatenate([arc_counts, final_counts]), 1)
    pieces[lattice.num_arcs :] = final_counts
    origin = np.repeat(np.arange(len(pieces)), pieces)
    place = np.arange(len(origin)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    is_first, is_last = place == 0, place == pieces[origin] - 1
    begin = np.concatenate([lattice.src, lattice.finals])[origin]
    has_chain = final_counts > 0
    ends = lattice.num_states + np.cumsum(has_chain) - 1
    end = np.concatenate([lattice.dst, ends])[origin]
    inner = lattice.num_states + int(has_chain.sum()) + np.cumsum(~is_last) - 1
    src, dst = np.where(is_first, begin, 0), np.where(is_last, end, 0)
    dst[~is_last] = inner[~is_last]
    src[~is_first] = inner[np.flatnonzero(~is_first) - 1]

    def on_first(arc: np.ndarray, final: np.ndarray) -> np.ndarray:
        return np.where(is_first, np.concatenate([arc, final])[origin], np.zeros(1, dtype=arc.dtype))

    rows = np.append(counts[origin] > 0, np.zeros(len(lattice.finals), dtype=bool))
    return make_lattice(
        utterance=lattice.utterance,
        src=src,
        dst=dst,
        word=on_first(lattice.word, np.zeros(len(lattice.finals), dtype=np.int64)),
        labels=lattice.labels,
        lm_score=on_first(lattice.lm_score, lattice.final_lm_score),
        acoustic_score=on_first(lattice.acoustic_score, lattice.final_acoustic_score),
        num_states=lattice.num_states + int(has_chain.sum()) + int((~is_last).sum()),
        start=lattice.start,
        finals=np.where(has_chain, ends, lattice.finals),
        final_lm_score=np.where(has_chain, 0.0, lattice.final_lm_score),
        final_acoustic_score=np.where(has_chain, 0.0, lattice.final_acoustic_score),
        transition_ids=TransitionIds(offsets_of(rows), ids.ids),
        weights=lattice.weights,
        non_words=lattice.non_words,
    )


def _key(source: ByteSource) -> str | None:
    """The next key, its space consumed; None at the end. The line end of a text archive's key line is left."""
    while (head := source.peek(1)) in (b"\n", b"\r"):
        source.line()
    if not head:
        return None
    window = source.peek(MAX_KEY_BYTES)
    found = _BINARY_AFTER_KEY.search(window)
    end, newline = (found.start() if found else -1), window.find(b"\n")
    if end >= 0 and (newline < 0 or end < newline):
        key, used = window[:end], end + 1
    else:
        if newline < 0 and len(window) == MAX_KEY_BYTES:
            raise FormatError(
                f"{_where(source)}: no utterance id in {MAX_KEY_BYTES} bytes ({window[:20]!r}…); expected a Kaldi lattice archive"
            )
        used = newline if newline >= 0 else len(window)
        key = window[:used].strip()
    if not key:
        raise FormatError(f"{_where(source)}: an empty utterance id; expected a Kaldi lattice archive")
    text = text_of(key, _where(source))
    if not text.isprintable():
        raise FormatError(f"{_where(source)}: utterance id {text[:40]!r} is not printable; is the file damaged?")
    source.position += used
    return text


def _where(source: ByteSource) -> str:
    return f"{source.name}: byte {source.offset} (line {source.num_lines + 1})"

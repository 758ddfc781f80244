"""Random small lattices, every path of a lattice by recursion, and comparison: what the lattice tests share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mixbits.asr.lattice import Lattice, PathWeights, TransitionIds, make_lattice, offsets_of

SCORES = st.floats(-50, 50, width=32)
WORDS = ("a", "bé", "c", "d")


@st.composite
def lattices(draw: Any, *, words: tuple[str, ...] = WORDS, with_ids: bool = False, max_ids: int = 3) -> Lattice:
    """Up to 7 states numbered at random, several finals, parallel arcs, arcs without words."""
    num_states = draw(st.integers(1, 7))
    number = draw(st.permutations(range(num_states)))
    pairs = [(0, state) for state in range(1, num_states)]
    pairs += [(a, b) for a in range(num_states) for b in range(a + 1, num_states)]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=12)) if pairs else []
    chosen += [(draw(st.integers(0, state - 1)), state) for state in range(1, num_states)]
    finals = sorted(draw(st.sets(st.integers(0, num_states - 1), max_size=3)) | {num_states - 1})
    finals += [s for s in range(num_states) if s not in finals and all(src != s for src, _ in chosen)]
    count, ends = len(chosen), len(finals)

    def floats(size: int) -> list[float]:
        return draw(st.lists(SCORES, min_size=size, max_size=size))

    ids = None
    if with_ids:
        counts = draw(st.lists(st.integers(0, max_ids), min_size=count + ends, max_size=count + ends))
        if max_ids == 1:
            counts[count:] = [0] * ends
        if sum(counts):
            values = draw(st.lists(st.integers(1, 2**31 - 1), min_size=sum(counts), max_size=sum(counts)))
            ids = TransitionIds(offsets_of(counts), np.array(values, dtype=np.int32))
    return make_lattice(
        utterance=draw(st.sampled_from(["u1", "spk_é-2"])),
        src=[number[a] for a, _ in chosen],
        dst=[number[b] for _, b in chosen],
        word=draw(st.lists(st.integers(0, len(words)), min_size=count, max_size=count)),
        labels=["", *words],
        lm_score=floats(count),
        acoustic_score=floats(count),
        num_states=num_states,
        start=number[0],
        finals=[number[state] for state in finals],
        final_lm_score=floats(ends),
        final_acoustic_score=floats(ends),
        transition_ids=ids,
    )


def all_paths(lattice: Lattice) -> Iterator[tuple[list[int], int]]:
    """(arcs, row of the final state) of every path."""
    row = {state: place for place, state in enumerate(lattice.finals.tolist())}

    def walk(state: int, arcs: list[int]) -> Iterator[tuple[list[int], int]]:
        if state in row:
            yield arcs, row[state]
        for arc in np.flatnonzero(lattice.src == state).tolist():
            yield from walk(int(lattice.dst[arc]), [*arcs, arc])

    return walk(lattice.start, [])


def total(lattice: Lattice, arcs: list[int], row: int, weights: PathWeights) -> float:
    """Total score of a path, added up one by one."""
    words = sum(lattice.labels[lattice.word[arc]] not in lattice.non_words for arc in arcs)
    lm = math.fsum([*lattice.lm_score[arcs], lattice.final_lm_score[row]])
    acoustic = math.fsum([*lattice.acoustic_score[arcs], lattice.final_acoustic_score[row]])
    return weights.acoustic_scale * acoustic + weights.lm_scale * lm + weights.word_insertion_penalty * words


def words(lattice: Lattice, arcs: list[int]) -> tuple[str, ...]:
    """The words on a path."""
    labels = (lattice.labels[lattice.word[arc]] for arc in arcs)
    return tuple(label for label in labels if label not in lattice.non_words)


def path_table(lattice: Lattice, *, digits: int = 9, with_ids: bool = True) -> list[tuple]:
    """Sorted (words, LM score, acoustic score, transition ids) of every path: equal for lattices that say the same."""
    table = []
    for arcs, row in all_paths(lattice):
        ids: tuple[int, ...] = ()
        if with_ids and lattice.transition_ids is not None:
            rows = [*arcs, lattice.num_arcs + row]
            ids = tuple(int(i) for r in rows for i in lattice.transition_ids.row(r))
        lm = round(math.fsum([*lattice.lm_score[arcs], lattice.final_lm_score[row]]), digits)
        acoustic = round(math.fsum([*lattice.acoustic_score[arcs], lattice.final_acoustic_score[row]]), digits)
        table.append((words(lattice, arcs), lm + 0.0, acoustic + 0.0, ids))
    return sorted(table)


def same_arcs(a: Lattice, b: Lattice) -> bool:
    """Same states, arcs (in any order) with the same labels and scores to the last bit, finals and transition ids."""

    def arcs(x: Lattice) -> list[tuple]:
        ids = x.transition_ids
        columns = zip(
            x.src.tolist(), x.dst.tolist(), x.word.tolist(), x.lm_score.tolist(), x.acoustic_score.tolist(), strict=True
        )
        return sorted(
            (s, d, x.labels[w], lm, ac, tuple(ids.row(i).tolist()) if ids else ())
            for i, (s, d, w, lm, ac) in enumerate(columns)
        )

    def ends(x: Lattice) -> list[tuple]:
        ids = x.transition_ids
        scores = zip(x.finals.tolist(), x.final_lm_score.tolist(), x.final_acoustic_score.tolist(), strict=True)
        return [(*score, tuple(ids.row(x.num_arcs + i).tolist()) if ids else ()) for i, score in enumerate(scores)]

    return (a.utterance, a.num_states, a.start) == (b.utterance, b.num_states, b.start) and (arcs(a), ends(a)) == (
        arcs(b),
        ends(b),
    )

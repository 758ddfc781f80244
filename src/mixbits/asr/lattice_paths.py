"""Best paths, posteriors, pruning and counting of lattices.

All passes are one loop over the arcs in topological order (NumPy steps a level are slower: lattices are deep and narrow). The k-best list of *distinct
word sequences* is exact: a best-first search over word prefixes, each with the set of states it can end in (the lattice
determinized on demand, Mohri & Riley 2002), guided by the best completion from every state. As that guide is exact, no
prefix is looked into that is not one of a listed hypothesis (or ties with one).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any

import numpy as np

from mixbits.asr.lattice import BoolArray, FloatArray, IntArray, Lattice, PathWeights, words_of
from mixbits.errors import DataError, SpecError

_Chain = tuple[int, Any] | None
"""Arcs of a path, last first: (arc, the chain before it)."""


@dataclass(frozen=True, eq=False)
class LatticePath:
    """One path: ``arcs`` from the start on, the words on them, and its scores, final state included."""

    arcs: IntArray
    words: tuple[str, ...]
    total_score: float
    lm_score: float
    acoustic_score: float

    @property
    def text(self) -> str:
        """The words, with spaces between them."""
        return " ".join(self.words)


def arc_scores(lattice: Lattice, weights: PathWeights) -> FloatArray:
    """Weighted score of each arc, (num_arcs,)."""
    scaled = weights.acoustic_scale * lattice.acoustic_score + weights.lm_scale * lattice.lm_score
    return scaled + weights.word_insertion_penalty * lattice.is_word


def final_scores(lattice: Lattice, weights: PathWeights) -> FloatArray:
    """Weighted score of each final state, (num_finals,)."""
    return weights.acoustic_scale * lattice.final_acoustic_score + weights.lm_scale * lattice.final_lm_score


class LatticeSearch:
    """A lattice under weights: forward and backward scores, made when first needed."""

    def __init__(self, lattice: Lattice, weights: PathWeights | None = None) -> None:
        self.lattice = lattice
        self.weights = weights or lattice.weights or PathWeights()
        self.arc_score = arc_scores(lattice, self.weights)
        self.final_score = final_scores(lattice, self.weights)

    @cached_property
    def _arcs(self) -> list[tuple[int, int, int, float]]:
        """(arc, source, target, score) of all arcs, each after those that lead to where it begins."""
        lattice, order = self.lattice, self.lattice.sorted_arcs
        columns = (order, lattice.src[order], lattice.dst[order], self.arc_score[order])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @cached_property
    def forward(self) -> tuple[FloatArray, IntArray]:
        """(num_states,) best score from the start, and the arc by which it came (−1 at the start)."""
        scores, came_by = [-math.inf] * self.lattice.num_states, [-1] * self.lattice.num_states
        scores[self.lattice.start] = 0.0
        for arc, source, target, score in self._arcs:
            if (value := scores[source] + score) > scores[target]:
                scores[target], came_by[target] = value, arc
        return np.array(scores), np.array(came_by, dtype=np.int64)

    @cached_property
    def backward(self) -> FloatArray:
        """(num_states,) best score from a state to an end, final scores included."""
        scores = self._ends()
        for _, source, target, score in reversed(self._arcs):
            if (value := scores[target] + score) > scores[source]:
                scores[source] = value
        return np.array(scores)

    @property
    def best_score(self) -> float:
        """Total score of the best path."""
        return float(self.backward[self.lattice.start])

    def _ends(self) -> list[float]:
        scores = np.full(self.lattice.num_states, -np.inf)
        scores[self.lattice.finals] = self.final_score
        return scores.tolist()

    def best_through(self) -> tuple[FloatArray, FloatArray]:
        """(num_arcs,) and (num_finals,): total score of the best path over each arc and into each final state."""
        forward = self.forward[0]
        arcs = forward[self.lattice.src] + self.arc_score + self.backward[self.lattice.dst]
        return arcs, forward[self.lattice.finals] + self.final_score

    def log_posteriors(self) -> tuple[FloatArray, FloatArray, float]:
        """(num_arcs,) and (num_finals,) log of the share of all paths' exp(total score), and the log of their sum."""
        lattice, forward, backward = self.lattice, [-math.inf] * self.lattice.num_states, self._ends()
        forward[lattice.start] = 0.0
        for _, source, target, score in self._arcs:
            forward[target] = _log_add(forward[target], forward[source] + score)
        for _, source, target, score in reversed(self._arcs):
            backward[source] = _log_add(backward[source], backward[target] + score)
        total = backward[lattice.start]
        before, after = np.array(forward), np.array(backward)
        arcs = before[lattice.src] + self.arc_score + after[lattice.dst] - total
        return arcs, before[lattice.finals] + self.final_score - total, total

    def path(self, arcs: IntArray) -> LatticePath:
        """Words and scores of a whole path. Raises DataError if it does not end in a final state."""
        lattice = self.lattice
        end = int(lattice.dst[arcs[-1]]) if len(arcs) else lattice.start
        row = int(np.searchsorted(lattice.finals, end))
        if row == len(lattice.finals) or lattice.finals[row] != end:
            raise DataError(f"the path ends in state {end}, which is not final")
        return LatticePath(
            arcs,
            words_of(lattice, arcs),
            float(self.arc_score[arcs].sum() + self.final_score[row]),
            float(lattice.lm_score[arcs].sum() + lattice.final_lm_score[row]),
            float(lattice.acoustic_score[arcs].sum() + lattice.final_acoustic_score[row]),
        )

    def best_path(self) -> LatticePath:
        """The path with the highest total score."""
        scores, came_by = self.forward
        state = int(self.lattice.finals[np.argmax(scores[self.lattice.finals] + self.final_score)])
        arcs = []
        while (arc := int(came_by[state])) >= 0:
            arcs.append(arc)
            state = int(self.lattice.src[arc])
        return self.path(np.array(arcs[::-1], dtype=np.int64))

    def nbest(self, num_paths: int) -> list[LatticePath]:
        """The best path of each of the ``num_paths`` best distinct word sequences, fewer if there are no more, best first.

        Looks only at arcs near the best path, at more of them until there are enough word sequences.
        """
        through = np.sort(np.concatenate(self.best_through()))[::-1]
        num_arcs = num_paths + int(self.lattice.levels.max(initial=0))
        while True:
            is_all = num_arcs >= len(through)
            floor = -math.inf if is_all else float(through[num_arcs - 1])
            slack = 0.0 if is_all else 1e-9 * max(1.0, abs(floor))
            found = list(islice(_distinct_paths(self, floor - slack), num_paths))
            if len(found) == num_paths or is_all:
                return found
            num_arcs *= 2


def best_path(lattice: Lattice, weights: PathWeights | None = None) -> LatticePath:
    """The best path under ``weights`` (default: those of the lattice's file, else 1, 1, 0)."""
    return LatticeSearch(lattice, weights).best_path()


def nbest_paths(lattice: Lattice, num_paths: int, weights: PathWeights | None = None) -> list[LatticePath]:
    """The best ``num_paths`` distinct word sequences (fewer if there are no more), each by its best path, best first."""
    if num_paths < 1:
        raise SpecError(f"num_paths must be at least 1, got {num_paths}")
    return LatticeSearch(lattice, weights).nbest(num_paths)


def count_paths(lattice: Lattice, limit: int = 10**18) -> int:
    """Number of paths (not of distinct word sequences); ``limit`` if there are more."""
    counts = [0] * lattice.num_states
    for state in lattice.finals.tolist():
        counts[state] = 1
    arcs, offsets = lattice.out_arcs
    targets, bounds = lattice.dst[arcs].tolist(), offsets.tolist()
    for state in lattice.topological_order[::-1].tolist():
        for target in targets[bounds[state] : bounds[state + 1]]:
            counts[state] += counts[target]
        counts[state] = min(counts[state], limit)
    return counts[lattice.start]


def prune(lattice: Lattice, beam: float, weights: PathWeights | None = None) -> Lattice:
    """Keep the arcs and final states of paths whose total score is at most ``beam`` below the best one's."""
    if not beam >= 0:
        raise SpecError(f"beam must be a number not below 0, got {beam}")
    search = LatticeSearch(lattice, weights)
    keep, keep_final = within_beam(search, beam)
    return lattice.select_arcs(keep, keep_final=keep_final)


def within_beam(search: LatticeSearch, beam: float) -> tuple[BoolArray, BoolArray]:
    """(num_arcs,) and (num_finals,): whether a path over them is in the beam. The best path always is."""
    arcs, finals = search.best_through()
    floor = search.best_score - beam - 1e-9 * max(1.0, abs(search.best_score))
    return arcs >= floor, finals >= floor


def _distinct_paths(search: LatticeSearch, floor: float) -> Iterator[LatticePath]:
    """The best path of each word sequence with one of a total score of at least ``floor``, best first."""
    lattice = search.lattice
    order, offsets = lattice.out_arcs
    out, bounds = order.tolist(), offsets.tolist()
    dst, word = lattice.dst.tolist(), np.where(lattice.is_word, lattice.word, -1).tolist()
    score, level, after = search.arc_score.tolist(), lattice.levels.tolist(), search.backward.tolist()
    final = dict(zip(lattice.finals.tolist(), search.final_score.tolist(), strict=True))
    number = count(0, -1)  # among equals the latest first, which is the longest prefix
    heap: list[tuple[float, int, Any]] = []

    def push(ends: dict[int, tuple[float, _Chain]]) -> None:
        best = max(value + after[state] for state, (value, _) in ends.items())
        heapq.heappush(heap, (-best, next(number), ends))

    push({lattice.start: (0.0, None)})
    while heap:
        _, _, ends = heapq.heappop(heap)
        if isinstance(ends, tuple):
            yield search.path(_arcs_of(ends[0]))
            continue
        waiting = [(level[state], state) for state in ends]
        heapq.heapify(waiting)
        following: dict[int, dict[int, tuple[float, _Chain]]] = {}
        whole: tuple[float, _Chain] | None = None
        while waiting:  # arcs without a word stay in the same prefix; lower levels first, so each state is complete
            _, state = heapq.heappop(waiting)
            value, chain = ends[state]
            if state in final and value + final[state] >= floor and (whole is None or value + final[state] > whole[0]):
                whole = (value + final[state], chain)
            for arc in out[bounds[state] : bounds[state + 1]]:
                if value + score[arc] + after[dst[arc]] < floor:
                    continue
                is_new = word[arc] < 0 and dst[arc] not in ends
                group = ends if word[arc] < 0 else following.setdefault(word[arc], {})
                if (old := group.get(dst[arc])) is None or value + score[arc] > old[0]:
                    group[dst[arc]] = (value + score[arc], (arc, chain))
                if is_new:
                    heapq.heappush(waiting, (level[dst[arc]], dst[arc]))
        if whole is not None:
            heapq.heappush(heap, (-whole[0], next(number), (whole[1],)))
        for _, group in sorted(following.items()):  # in an order that does not depend on the arcs left out
            push(group)


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def _arcs_of(chain: _Chain) -> IntArray:
    arcs = []
    while chain is not None:
        arcs.append(chain[0])
        chain = chain[1]
    return np.array(arcs[::-1], dtype=np.int64)

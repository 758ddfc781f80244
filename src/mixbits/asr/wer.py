"""Word errors by plain edit distance (kaldialign), as Kaldi's compute-wer counts them.

Counts are summed first and rates derived last: a WER is never an average of WERs. How the distance splits into
substitutions, deletions and insertions is a choice among equally good alignments (kaldialign's here); the total is
not. Words are compared as they stand: case, punctuation and spelling are the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import kaldialign
import numpy as np
import numpy.typing as npt

from mixbits.asr.nbest import NBest, list_offsets, reference_texts
from mixbits.errors import DataError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ErrorCounts:
    """Word errors against ``num_words`` reference words; counts of disjoint data may be added."""

    num_sub: int = 0
    num_del: int = 0
    num_ins: int = 0
    num_words: int = 0

    @property
    def num_errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.num_sub + self.num_del + self.num_ins

    @property
    def wer(self) -> float:
        """Word error rate in percent (above 100 is possible).

        Raises:
            DataError: there are no reference words to divide by.
        """
        if self.num_words == 0:
            raise DataError("the references hold no words at all, so there is no word error rate")
        return 100.0 * self.num_errors / self.num_words

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.num_sub + other.num_sub,
            self.num_del + other.num_del,
            self.num_ins + other.num_ins,
            self.num_words + other.num_words,
        )

    def __str__(self) -> str:
        rate = f"{self.wer:.2f} %" if self.num_words else "no words"
        return f"{rate} ({self.num_sub} sub, {self.num_del} del, {self.num_ins} ins, {self.num_words} words)"


@dataclass(frozen=True)
class ErrorTable:
    """Errors of every hypothesis of every list.

    ``counts`` (num_hypotheses, 3) holds substitutions, deletions, insertions; ``num_words`` (num_lists,) the words of
    each reference; list i owns the rows ``offsets[i]:offsets[i + 1]``.
    """

    counts: IntArray
    num_words: IntArray
    offsets: IntArray

    @cached_property
    def errors(self) -> IntArray:
        """Errors of each hypothesis, shape (num_hypotheses,)."""
        return np.asarray(self.counts.sum(axis=1), dtype=np.int64)

    def oracle_picks(self) -> IntArray:
        """Rank (from 0) of each list's hypothesis with the fewest errors, the first of equals; (num_lists,)."""
        return _picks(self.errors, self.offsets, best=np.argmin)

    def anti_oracle_picks(self) -> IntArray:
        """Rank of each list's hypothesis with the most errors; (num_lists,)."""
        return _picks(self.errors, self.offsets, best=np.argmax)

    def picked_errors(self, picks: npt.ArrayLike | None = None) -> IntArray:
        """Errors per list of the hypotheses at rank ``picks`` (all 0 if not given); (num_lists,)."""
        return self.errors[self._rows(picks)]

    def total(self, picks: npt.ArrayLike | None = None) -> ErrorCounts:
        """Summed counts of the hypotheses at rank ``picks`` (all 0, the one-bests, if not given)."""
        summed = self.counts[self._rows(picks)].sum(axis=0)
        return ErrorCounts(int(summed[0]), int(summed[1]), int(summed[2]), int(self.num_words.sum()))

    def _rows(self, picks: npt.ArrayLike | None) -> IntArray:
        starts = self.offsets[:-1]
        if picks is None:
            return starts
        ranks = np.asarray(picks, dtype=np.int64)
        if ranks.shape != starts.shape or np.any(ranks < 0) or np.any(starts + ranks >= self.offsets[1:]):
            raise DataError(f"picks must give one existing rank for each of the {len(starts)} lists")
        return np.asarray(starts + ranks, dtype=np.int64)


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors of one text against another."""
    words = reference.split()
    found = kaldialign.edit_distance(words, hypothesis.split())
    return ErrorCounts(int(found["sub"]), int(found["del"]), int(found["ins"]), len(words))


def sum_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Summed errors of paired texts."""
    return sum((count_errors(*pair) for pair in zip(references, hypotheses, strict=True)), ErrorCounts())


def error_table(
    lists: Sequence[NBest], *, known: MutableMapping[tuple[str, str], ErrorCounts] | None = None
) -> ErrorTable:
    """Errors of all hypotheses of all lists.

    Args:
        known: counts by (reference, text), looked up and added to: the same hypotheses in another order cost nothing.

    Raises:
        DataError: naming the first utterance without a reference.
    """
    counts = []
    for entry, reference in zip(lists, reference_texts(lists), strict=True):
        for hypothesis in entry.hypotheses:
            found = None if known is None else known.get((reference, hypothesis.text))
            if found is None:
                found = count_errors(reference, hypothesis.text)
                if known is not None:
                    known[reference, hypothesis.text] = found
            counts.append((found.num_sub, found.num_del, found.num_ins))
    num_words = [len(reference.split()) for reference in reference_texts(lists)]
    return ErrorTable(
        np.asarray(counts, dtype=np.int64).reshape(-1, 3), np.asarray(num_words, dtype=np.int64), list_offsets(lists)
    )


def one_best_errors(lists: Sequence[NBest]) -> ErrorCounts:
    """Errors of every list's first hypothesis."""
    return sum_errors(reference_texts(lists), [entry.one_best.text for entry in lists])


def oracle_errors(lists: Sequence[NBest]) -> ErrorCounts:
    """Errors when each list's hypothesis with the fewest errors is chosen: the floor of any rescoring."""
    table = error_table(lists)
    return table.total(table.oracle_picks())


def _picks(values: IntArray, offsets: IntArray, *, best: Callable[[IntArray], object]) -> IntArray:
    return np.asarray([best(values[start:stop]) for start, stop in pairwise(offsets)], dtype=np.int64)

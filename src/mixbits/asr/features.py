"""The numbers a hypothesis is ranked by, as one table over all hypotheses of all lists.

total_score = Σ weight · feature, over the columns of :data:`FEATURES`:

* ``acoustic_score`` × acoustic_scale (fixed to 1 in tuning: only ratios of weights rank),
* ``lm_score`` × first_pass_lm_scale: the recognizer's own LM score, where the list has one,
* ``neural_lm_score`` × neural_lm_scale: natural-log probability by the rescoring LM, sentence end included,
* ``num_words`` × word_insertion_penalty: *added* per word, so a positive value favours longer hypotheses,
* ``num_unknown`` × unknown_word_penalty: added per word that is outside the LM's vocabulary,
* ``ngram_score`` × ngram_scale: natural-log probability by an n-gram model of one's own, sentence end included.

A column that the lists do not have is all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixbits.asr.nbest import NBest, list_offsets
from mixbits.errors import DataError

FEATURES = ("acoustic_score", "lm_score", "neural_lm_score", "num_words", "num_unknown", "ngram_score")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FeatureTable:
    """``values`` (num_hypotheses, len(FEATURES)); list i owns the rows ``offsets[i]:offsets[i + 1]``."""

    values: FloatArray
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = np.diff(self.offsets)
        if self.values.ndim != 2 or self.values.shape[1] != len(FEATURES) or len(self.values) != self.offsets[-1]:
            raise DataError(
                f"a feature table needs {self.offsets[-1]} rows of {len(FEATURES)} columns, got {self.values.shape}"
            )
        if np.any(sizes < 1):
            raise DataError(f"list {int(np.argmin(sizes))} of the feature table has no hypotheses")
        if not np.all(np.isfinite(self.values)):
            row, column = (int(part[0]) for part in np.nonzero(~np.isfinite(self.values)))
            raise DataError(
                f"{FEATURES[column]} of hypothesis row {row} is {self.values[row, column]}; expected finite"
            )

    @property
    def num_lists(self) -> int:
        """Number of utterances."""
        return len(self.offsets) - 1

    def total_scores(self, weights: npt.ArrayLike) -> FloatArray:
        """Σ weight · feature, (num_hypotheses,); the same sum to the last bit wherever a row stands."""
        total = np.zeros(len(self.values))
        for column, weight in enumerate(np.asarray(weights, dtype=np.float64)):
            if weight != 0:
                total += weight * self.values[:, column]
        return total

    def best_rows(self, weights: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Row of each list's highest total, the first of equals; (num_lists,)."""
        total = self.total_scores(weights)
        starts = self.offsets[:-1]
        owner = np.repeat(np.arange(self.num_lists), np.diff(self.offsets))
        highest = np.maximum.reduceat(total, starts)
        rows = np.flatnonzero(total == highest[owner])
        _, first = np.unique(owner[rows], return_index=True)
        return np.asarray(rows[first], dtype=np.int64)


def feature_table(
    lists: Sequence[NBest],
    *,
    neural_lm_score: npt.ArrayLike | None = None,
    num_unknown: npt.ArrayLike | None = None,
    ngram_score: npt.ArrayLike | None = None,
) -> FeatureTable:
    """Collect the features of all hypotheses.

    Args:
        neural_lm_score, num_unknown, ngram_score: one number a hypothesis, lists in order, shape (num_hypotheses,); None is zero.

    Raises:
        DataError: no lists; ``lm_score`` present in only some hypotheses (the first without is named); wrong shapes.
    """
    if not lists:
        raise DataError("there are no n-best lists to rescore")
    hypotheses = [hypothesis for entry in lists for hypothesis in entry.hypotheses]
    values = np.zeros((len(hypotheses), len(FEATURES)))
    values[:, 0] = [hypothesis.acoustic_score for hypothesis in hypotheses]
    if has_lm_score(lists):
        values[:, 1] = [hypothesis.lm_score for hypothesis in hypotheses]
    for column, given in ((2, neural_lm_score), (4, num_unknown), (5, ngram_score)):
        if given is not None:
            array = np.asarray(given, dtype=np.float64)
            if array.shape != (len(hypotheses),):
                raise DataError(f"{FEATURES[column]} has shape {array.shape}; expected ({len(hypotheses)},)")
            values[:, column] = array
    values[:, 3] = [len(hypothesis.words) for hypothesis in hypotheses]
    return FeatureTable(values, list_offsets(lists))


def has_lm_score(lists: Sequence[NBest]) -> bool:
    """True if every hypothesis has a first-pass ``lm_score``, False if none has.

    Raises:
        DataError: only some have one; names the first without.
    """
    missing = None
    present = False
    for entry in lists:
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            if hypothesis.lm_score is not None:
                present = True
            elif missing is None:
                missing = (entry.utterance, rank)
    if present and missing is not None:
        raise DataError(
            f"utterance {missing[0]!r}, hypothesis {missing[1]} has no lm_score while others have one; "
            "give it to all hypotheses or to none"
        )
    return present

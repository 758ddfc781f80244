"""What a comparison of recognizers needs beside the word error rate: tables by group, oracle curves, tests of a pair, WER by weight.

Counts are summed first and rates derived last, everywhere. Signs: a pair is (a, b), differences are b − a, negative is better for b.

* Oracle among the first N hypotheses: the fewest errors a perfect choice could make; anti-oracle: the most. Share of the gap
  recovered: (errors of first pass − errors) / (errors of first pass − oracle errors).
* A pair: MAPSSWE (:mod:`mixbits.asr.significance`); where it is undetermined, an exact sign test over its segments; a paired
  bootstrap; an upper bound of the difference, the larger of the bootstrap's and the score bound (:mod:`mixbits.asr.bootstrap`).
* WER by weight is exact: the winners change only where two hypotheses' totals cross (:mod:`mixbits.asr.linesearch`).

Limits: utterances (or blocks) count as independent. A bound holds for its pair alone; only p-values are corrected for many pairs,
by the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import kaldialign
import numpy as np
import numpy.typing as npt

from mixbits.asr.bootstrap import BootstrapResult, paired_bootstrap, score_upper_bound
from mixbits.asr.linesearch import PaddedLists, StepFunction, errors_along_line
from mixbits.asr.nbest import NBest
from mixbits.asr.significance import MapssweResult, error_segments, mapsswe_from_segments
from mixbits.asr.wer import ErrorCounts, ErrorTable, IntArray
from mixbits.errors import DataError

FloatArray = npt.NDArray[np.float64]
NO_GROUP = "(none)"


@dataclass(frozen=True)
class OraclePoint:
    """Best and worst possible choice among the first ``num_hypotheses`` of every list (of all of a shorter one)."""

    num_hypotheses: int
    oracle: ErrorCounts
    anti_oracle: ErrorCounts


@dataclass(frozen=True)
class ChangeCounts:
    """Outputs that differ in words: ``changed`` = ``better`` + ``worse`` + ``same_errors`` of b against a."""

    utterances: int
    changed: int
    better: int
    worse: int
    same_errors: int


@dataclass(frozen=True)
class PairComparison:
    """Two systems on the same utterances; percentage points. ``p`` is MAPSSWE's, or the sign test's where that is undetermined.

    ``delta_upper``: one-sided bound of b − a at the bootstrap's level, the larger of the bootstrap's and ``score_upper``.
    """

    mapsswe: MapssweResult
    sign_test_p: float | None
    bootstrap: BootstrapResult
    score_upper: float
    changes: ChangeCounts

    @property
    def p(self) -> float | None:
        """Two-sided, uncorrected; None if no segment differs in errors."""
        return self.sign_test_p if self.mapsswe.p is None else self.mapsswe.p

    @property
    def delta_upper(self) -> float:
        """The number that a claim of "no loss" has to answer to."""
        return max(self.bootstrap.delta_upper, self.score_upper)


def group_errors(errors: Sequence[ErrorCounts], groups: Sequence[str | None]) -> dict[str, ErrorCounts]:
    """Summed errors of every group, in order of first appearance; None is the group ``NO_GROUP``.

    Raises:
        DataError: not one group for each utterance.
    """
    if len(errors) != len(groups):
        raise DataError(f"{len(groups)} groups for {len(errors)} utterances; give one each")
    summed: dict[str, ErrorCounts] = {}
    for counts, group in zip(errors, groups, strict=True):
        name = NO_GROUP if group is None else group
        summed[name] = summed.get(name, ErrorCounts()) + counts
    return summed


def group_names(lists: Sequence[NBest], field: str) -> list[str | None]:
    """The value of ``field`` (``speaker``, ``conversation`` or any extra field) of every list as text.

    Raises:
        DataError: no list has the field; names those there are.
    """
    if field in ("speaker", "conversation"):
        values = [getattr(entry, field) for entry in lists]
    else:
        values = [entry.extra.get(field) for entry in lists]
    if all(value is None for value in values):
        known = sorted({name for entry in lists for name in entry.extra})[:20]
        raise DataError(
            f"no utterance has a field {field!r} to group by; expected speaker, conversation, or one of {known}"
        )
    return [None if value is None else str(value) for value in values]


def sclite_errors(references: Sequence[str], texts: Sequence[str]) -> ErrorCounts:
    """Summed errors by sclite's alignment (substitution 4, insertion and deletion 3); the total can exceed the edit distance."""
    found = [
        kaldialign.edit_distance(reference.split(), text.split(), sclite_mode=True)
        for reference, text in zip(references, texts, strict=True)
    ]
    return ErrorCounts(*(int(sum(entry[key] for entry in found)) for key in ("sub", "del", "ins", "ref_len")))


def list_sizes(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … below ``longest``, and ``longest``."""
    sizes, decade = [], 1
    while decade < longest:
        sizes += [step * decade for step in (1, 2, 5) if step * decade < longest]
        decade *= 10
    return (*sizes, longest)


def oracle_curve(table: ErrorTable, sizes: Sequence[int] | None = None) -> tuple[OraclePoint, ...]:
    """Oracle and anti-oracle errors among the first N hypotheses for every N (default: :func:`list_sizes`)."""
    if sizes is None:
        sizes = list_sizes(int(np.diff(table.offsets).max()))
    spans = [table.errors[start:stop] for start, stop in pairwise(table.offsets)]
    return tuple(
        OraclePoint(
            size,
            table.total([int(span[:size].argmin()) for span in spans]),
            table.total([int(span[:size].argmax()) for span in spans]),
        )
        for size in sizes
    )


def share_recovered(first_pass: ErrorCounts, system: ErrorCounts, oracle: ErrorCounts) -> float | None:
    """Share of the errors that the lists allow to avoid which ``system`` avoids; None if they allow none. Negative: it adds errors."""
    gap = first_pass.num_errors - oracle.num_errors
    return (first_pass.num_errors - system.num_errors) / gap if gap > 0 else None


def count_changes(
    texts_a: Sequence[str], texts_b: Sequence[str], errors_a: npt.ArrayLike, errors_b: npt.ArrayLike
) -> ChangeCounts:
    """How many outputs differ in words, and how their errors (per utterance) went."""
    more = np.asarray(errors_b, dtype=np.int64) - np.asarray(errors_a, dtype=np.int64)
    changed = np.array([a.split() != b.split() for a, b in zip(texts_a, texts_b, strict=True)], dtype=bool)
    counts = [int((changed & which).sum()) for which in (more < 0, more > 0, more == 0)]
    return ChangeCounts(len(changed), int(changed.sum()), *counts)


def sign_test(segments: Sequence[tuple[int, int]]) -> float | None:
    """Exact two-sided sign test: are segments with more errors of a as frequent as those with more of b? None without any."""
    from scipy.stats import binomtest

    more_a = sum(a > b for a, b in segments)
    more_b = sum(b > a for a, b in segments)
    if more_a + more_b == 0:
        return None
    return max(float(binomtest(more_a, more_a + more_b).pvalue), sys.float_info.min)


def compare_pair(
    references: Sequence[str],
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    errors_a: npt.ArrayLike,
    errors_b: npt.ArrayLike,
    *,
    blocks: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairComparison:
    """All tests and bounds of b against a.

    Args:
        errors_a, errors_b: word errors (plain edit distance) per utterance, shape (num_utterances,).
        blocks: speaker or conversation of each utterance, for the bootstrap.

    Raises:
        DataError: lengths differ, or the references hold no words.
    """
    segments = [
        pair for texts in zip(references, texts_a, texts_b, strict=True) for pair in error_segments(*texts)
    ]  # fmt: skip
    num_words = [len(reference.split()) for reference in references]
    drawn = paired_bootstrap(errors_a, errors_b, num_words, blocks=blocks, confidence=confidence, seed=seed)
    counts_a, counts_b = ([int(n) for n in np.asarray(errors)] for errors in (errors_a, errors_b))
    return PairComparison(
        mapsswe=mapsswe_from_segments(segments),
        sign_test_p=sign_test(segments),
        bootstrap=drawn,
        score_upper=score_upper_bound(counts_a, counts_b, sum(num_words), confidence=confidence),
        changes=count_changes(texts_a, texts_b, counts_a, counts_b),
    )


def errors_by_weight(
    base: npt.ArrayLike, score: npt.ArrayLike, table: ErrorTable, *, low: float = 0.0, high: float = np.inf
) -> StepFunction:
    """Summed errors of the lists' winners by total = base + weight · score, as an exact step function of the weight.

    Args:
        base, score: per hypothesis, shape (num_hypotheses,), in the order of ``table``.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in (base, score)]
    for values in arrays:
        if values.shape != table.errors.shape or not np.all(np.isfinite(values)):
            raise DataError(f"scores must be {table.errors.shape[0]} finite numbers, got shape {values.shape}")
    lists = PaddedLists.from_offsets(table.offsets)
    return errors_along_line(arrays[0], arrays[1], table.errors, lists, low=low, high=high)


def biggest_changes(errors_a: npt.ArrayLike, errors_b: npt.ArrayLike, num: int) -> Mapping[str, list[int]]:
    """Positions of the utterances that b improves (``best``) and worsens (``worst``) most, at most ``num`` each; equals in order."""
    more: IntArray = np.asarray(errors_b, dtype=np.int64) - np.asarray(errors_a, dtype=np.int64)
    order = np.argsort(more, kind="stable"), np.argsort(-more, kind="stable")
    best = [int(i) for i in order[0][:num] if more[i] < 0]
    return {"best": best, "worst": [int(i) for i in order[1][:num] if more[i] > 0]}

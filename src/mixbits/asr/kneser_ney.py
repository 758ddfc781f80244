"""Interpolated modified Kneser-Ney n-gram models, estimated from text (Chen & Goodman 1998, "An empirical study of smoothing techniques").

With a(g) the adjusted count of an n-gram g = (h, w): how often it occurs, if it is of the longest kind or begins with ``<s>``; otherwise the number
of different words before it (equation 25). For each length,

    p(w | h) = (a(h w) - D(a)) / a(h ·) + gamma(h) · p(w | h without its first word),   gamma(h) = sum over w of D(a(h w)) / a(h ·)
    D(k) = k - (k + 1) · Y · n_{k+1} / n_k for k = 1, 2, 3 or more,   Y = n_1 / (n_1 + 2 n_2)   (equation 26; n_k: n-grams with a = k)

and the 1-grams are interpolated with the uniform distribution over the vocabulary, ``</s>`` and ``<unk>`` counted, ``<s>`` not. So a word of the
vocabulary that the text does not hold, and ``<unk>`` if it does not occur, still get a probability. As in KenLM's lmplz (Heafield et al. 2013), to
which this agrees; the back-off weight of h is gamma(h). *Pruned* n-grams (those that occur no more often than a threshold) leave the model, and
their adjusted counts go to gamma(h), so the probabilities still sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mixbits.asr.ngram import LN10, BackoffModel, FloatArray, IntArray, NgramTable
from mixbits.asr.ngram_counts import BEGIN_ID, EncodedText, NgramCounts, count_ngrams
from mixbits.errors import DataError, SpecError

MAX_ORDER = 16
FALLBACK = (0.5, 1.0, 1.5)
_LOG_ZERO = -99.0 * LN10

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A model, and for each length its discounts (``D(1), D(2), D(3 or more)``) and whether they are the fallback; counts before pruning."""

    model: BackoffModel
    discounts: tuple[tuple[float, float, float], ...]
    is_fallback: tuple[bool, ...]
    num_counted: tuple[int, ...]


def estimate(
    text: EncodedText,
    *,
    order: int = 4,
    prune: Sequence[int] = (),
    fallback: tuple[float, float, float] | None = None,
) -> Estimate:
    """Estimate a model.

    Args:
        prune: for each length, leave out n-grams that occur at most so often; the last value holds for longer ones. The first is 0.
        fallback: discounts for lengths whose counts give none (small or artificial texts); lmplz takes :data:`FALLBACK`. None: an error.

    Raises:
        SpecError: order or thresholds that make no sense. DataError: counts that give no discounts, and no ``fallback``.
    """
    thresholds = _thresholds(prune, order)
    if fallback is not None and not all(0 <= discount <= k for k, discount in enumerate(fallback, 1)):
        raise SpecError(f"fallback discounts are {fallback}; expected three numbers, D(k) between 0 and k")
    counts = count_ngrams(text, order)
    adjusted = [_adjusted_counts(counts, length) for length in range(1, order + 1)]
    found = [_discounts(a, length, fallback) for length, a in enumerate(adjusted, 1)]
    tables: list[NgramTable] = []
    probability = np.full(1, 1.0 / (len(text.words) - 1))  # of the n-grams one word shorter, by index
    kept_before = renumbered = np.zeros(
        1, dtype=np.int64
    )  # which of them are in the model, in its order; the place of each there
    for length, (these, a) in enumerate(zip(counts, adjusted, strict=True), 1):
        is_kept = (these.count > thresholds[length - 1]) | (length == 1)
        share, gamma = _shares(these, a, is_kept, found[length - 1][0], num_contexts=len(probability))
        if length > 1:
            tables[-1] = replace(tables[-1], log_backoff=_log(gamma[kept_before]))
        probability = share + gamma[these.context] * probability[these.suffix]
        keys = np.where(is_kept, renumbered[these.context] * len(text.words) + these.last, -1)
        kept_before = np.argsort(keys)[np.count_nonzero(~is_kept) :]
        renumbered = np.full(len(these), -1, dtype=np.int64)
        renumbered[kept_before] = np.arange(len(kept_before))
        log_p = np.minimum(_log(probability[kept_before]), 0.0)
        if length == 1:
            log_p[BEGIN_ID] = _LOG_ZERO
        tables.append(NgramTable(keys[kept_before], log_p, None))
    model = BackoffModel(text.words, tuple(tables))
    return Estimate(model, tuple(d for d, _ in found), tuple(f for _, f in found), tuple(len(c) for c in counts))


def _thresholds(prune: Sequence[int], order: int) -> list[int]:
    if not 1 <= order <= MAX_ORDER:
        raise SpecError(f"order is {order}; expected 1 to {MAX_ORDER} words")
    given = [*prune] or [0]
    if len(given) > order or given[0] != 0 or given != sorted(given):
        raise SpecError(
            f"pruning thresholds are {given}; expected at most {order} numbers that do not fall, the first (for single words) 0"
        )
    return given + given[-1:] * (order - len(given))


def _adjusted_counts(counts: Sequence[NgramCounts], length: int) -> IntArray:
    """Chen & Goodman's adjusted counts of the n-grams of one length, (num_ngrams,)."""
    these = counts[length - 1]
    if length == len(counts):
        adjusted = these.count.copy()
    else:
        adjusted = np.bincount(counts[length].suffix, minlength=len(these))
        at_begin = these.first == BEGIN_ID
        adjusted[at_begin] = these.count[at_begin]
    if length == 1:
        adjusted[BEGIN_ID] = 0
    return adjusted


def _discounts(
    adjusted: IntArray, length: int, fallback: tuple[float, float, float] | None
) -> tuple[tuple[float, float, float], bool]:
    """(D(1), D(2), D(3 or more)), and whether they are the fallback."""
    n = [int(np.count_nonzero(adjusted == k)) for k in range(1, 5)]
    missing = next((k for k in (1, 2, 3) if n[k - 1] == 0), None)
    if missing is not None:
        reason = f"no {length}-gram has an adjusted count of {missing}"
    else:
        y = n[0] / (n[0] + 2 * n[1])
        d1, d2, d3 = (k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))
        if min(d1, d2, d3) >= 0:
            return (d1, d2, d3), False
        reason = f"the {length}-grams' discounts come out as {d1:.3g}, {d2:.3g}, {d3:.3g}"
    if fallback is None:
        raise DataError(
            f"Kneser-Ney discounts cannot be estimated: {reason}; the text is small or artificial. Give more text, or set fallback "
            "discounts (--discount-fallback)"
        )
    return fallback, True


def _shares(
    these: NgramCounts, adjusted: IntArray, is_kept: BoolArray, discounts: Sequence[float], *, num_contexts: int
) -> tuple[FloatArray, FloatArray]:
    """(a - D(a)) / a(h ·) of each n-gram; gamma of each history, 1 for one that nothing follows."""
    discount = np.array([0.0, *discounts])[np.minimum(adjusted, 3)]
    total = np.bincount(these.context, weights=adjusted, minlength=num_contexts)
    freed = np.bincount(these.context, weights=np.where(is_kept, discount, adjusted), minlength=num_contexts)
    followed = total > 0
    gamma = np.divide(freed, total, out=np.ones(num_contexts), where=followed)
    return (adjusted - discount) / total[these.context], gamma


def _log(values: FloatArray) -> FloatArray:
    """Natural logs; of 0, what ARPA files write as -99."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(values), _LOG_ZERO)

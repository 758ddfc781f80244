"""Paired bootstrap over utterances for two systems' word error rates (Bisani & Ney, ICASSP 2004).

Utterances are drawn with replacement, the same draw for both systems, and errors and words are summed before the
rate is taken. Errors of one speaker (or conversation) are related, so whole blocks are drawn where blocks are known.
Percentiles of few blocks are too narrow to trust: below ``MIN_BLOCKS`` blocks single utterances are drawn
instead, and the result says so (it then speaks about new utterances of the same speakers, not about new speakers).

Intervals are two-sided at the given level; ``delta_upper`` is the one-sided bound at that level (95 %: the 95th
percentile of the difference), the number a claim of "no loss" has to answer to.

The bootstrap is too sure where few outputs changed (none changed: its bound is 0 on a list of any size), so
:func:`score_upper_bound` stands beside it and the larger of the two counts:

    D + z²u/2 + z √(Σ d² + z²u²/4),   D = Σ d,   u = max(1, Σ d² / Σ |d|),

over per-utterance differences d in errors: the score bound of a Poisson count when every change is one error (2.7 errors
at 95 % when nothing changed). It takes utterances as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mixbits.asr.nbest import NBest
from mixbits.errors import DataError, SpecError

MIN_BLOCKS = 10
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class BootstrapResult:
    """Word error rates and their difference (b − a), all in percentage points, with percentile intervals.

    ``share_b_better`` is the share of draws in which b has the lower rate (Bisani & Ney's probability of improvement).
    """

    wer_a: float
    wer_a_interval: tuple[float, float]
    wer_b: float
    wer_b_interval: tuple[float, float]
    delta: float
    delta_interval: tuple[float, float]
    delta_upper: float
    delta_stderr: float
    share_b_better: float
    confidence: float
    num_blocks: int
    blocked: bool
    num_draws: int
    seed: int

    def __str__(self) -> str:
        low, high = self.delta_interval
        unit = "blocks" if self.blocked else "utterances"
        return (
            f"ΔWER {self.delta:+.2f} points, {self.confidence:.0%} interval [{low:+.2f}, {high:+.2f}], "
            f"upper bound {self.delta_upper:+.2f} ({self.num_draws} draws of {self.num_blocks} {unit})"
        )


def bootstrap_blocks(lists: Sequence[NBest]) -> list[str] | None:
    """The speaker of every list, else the conversation of every list, else None (some list names neither)."""
    for name in ("speaker", "conversation"):
        blocks = [getattr(entry, name) for entry in lists]
        if blocks and all(block is not None for block in blocks):
            return blocks
    return None


def paired_bootstrap(
    errors_a: npt.ArrayLike,
    errors_b: npt.ArrayLike,
    num_words: npt.ArrayLike,
    *,
    blocks: Sequence[str] | None = None,
    num_draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Intervals for both word error rates and their difference.

    Args:
        errors_a, errors_b, num_words: per utterance, shape (num_utterances,).
        blocks: the block of each utterance; None draws single utterances.

    Raises:
        DataError: shapes differ, or there are no words. SpecError: a level or number of draws that makes no sense.
    """
    if not 0.5 < confidence < 1 or num_draws < 100:
        raise SpecError(f"need confidence in (0.5, 1) and at least 100 draws, got {confidence} and {num_draws}")
    table = np.stack(_same_length(errors_a, errors_b, num_words), axis=1)
    if table[:, 2].sum() == 0:
        raise DataError("the references hold no words at all, so there is no word error rate to bootstrap")
    if blocks is not None and len(blocks) != len(table):
        raise DataError(f"{len(blocks)} block names for {len(table)} utterances; give one each")
    blocked = blocks is not None and len(set(blocks)) >= MIN_BLOCKS
    if blocked:
        _, owner = np.unique(np.asarray(blocks), return_inverse=True)
        summed = np.zeros((int(owner.max()) + 1, 3), dtype=np.int64)
        np.add.at(summed, owner, table)
        table = summed
    drawn = _draw_sums(table, num_draws, np.random.default_rng(seed))
    drawn = drawn[drawn[:, 2] > 0]
    rates = 100.0 * drawn[:, :2] / drawn[:, 2:]
    delta = rates[:, 1] - rates[:, 0]
    totals = table.sum(axis=0)
    wer_a, wer_b = 100.0 * totals[0] / totals[2], 100.0 * totals[1] / totals[2]
    return BootstrapResult(
        wer_a=float(wer_a),
        wer_a_interval=_interval(rates[:, 0], confidence),
        wer_b=float(wer_b),
        wer_b_interval=_interval(rates[:, 1], confidence),
        delta=float(wer_b - wer_a),
        delta_interval=_interval(delta, confidence),
        delta_upper=float(np.quantile(delta, confidence)),
        delta_stderr=float(delta.std(ddof=1)),
        share_b_better=float((delta < 0).mean()),
        confidence=confidence,
        num_blocks=len(table),
        blocked=blocked,
        num_draws=num_draws,
        seed=seed,
    )


def score_upper_bound(
    errors_a: Sequence[int], errors_b: Sequence[int], num_words: int, *, confidence: float = 0.95, scale: int = 1
) -> float:
    """The one-sided score bound above for the errors of b − a, in points of ``num_words`` words.

    Args:
        errors_a, errors_b: per utterance, ``scale`` times what they stand for.
    """
    differences = [(b - a) / scale for a, b in zip(errors_a, errors_b, strict=True)]
    z = NormalDist().inv_cdf(confidence)
    squares, sizes = sum(d * d for d in differences), sum(abs(d) for d in differences)
    unit = max(1.0, squares / sizes) if sizes else 1.0
    bound = math.fsum(differences) + z * z * unit / 2 + z * math.sqrt(squares + (z * unit / 2) ** 2)
    return 100.0 * bound / num_words


def _same_length(*columns: npt.ArrayLike) -> list[npt.NDArray[np.int64]]:
    arrays = [np.asarray(column, dtype=np.int64) for column in columns]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise DataError(f"errors and words must have one number an utterance, got {[a.shape for a in arrays]}")
    return arrays


def _draw_sums(table: npt.NDArray[np.int64], num_draws: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Column sums of ``num_draws`` samples with replacement of the rows of ``table``; (num_draws, columns)."""
    num_rows = len(table)
    at_once = max(1, _CHUNK_ELEMENTS // num_rows)
    sums = []
    for start in range(0, num_draws, at_once):
        rows = rng.integers(num_rows, size=(min(at_once, num_draws - start), num_rows))
        sums.append(np.stack([table[:, column][rows].sum(axis=1) for column in range(table.shape[1])], axis=1))
    return np.concatenate(sums)


def _interval(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)

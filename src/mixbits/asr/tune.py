"""Choose rescoring weights on dev lists by minimising their word errors.

Errors are a piecewise constant function of the weights, so gradients say nothing; an exact line search
(:mod:`mixbits.asr.linesearch`) runs over coordinate and seeded random directions until no line improves, from the
given weights and from seeded random restarts. The acoustic scale stays 1: only ratios rank. LM scales stay at or above zero.
Features are put on the scale of the acoustic score first (their spread within lists), so random directions mean
something. The same seed gives the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mixbits.asr.features import FEATURES, FeatureTable, FloatArray, feature_table
from mixbits.asr.linesearch import IntArray, PaddedLists, errors_along_line
from mixbits.asr.nbest import NBest
from mixbits.asr.weights import SCALES, Weights
from mixbits.asr.wer import error_table
from mixbits.errors import DataError

NONNEGATIVE = ("lm_score", "neural_lm_score", "ngram_score")
_MAX_SWEEPS = 30


@dataclass(frozen=True)
class TuneResult:
    """``num_errors`` on the lists given, before and after; ``num_line_searches`` tells the work."""

    weights: Weights
    num_errors: int
    num_errors_before: int
    num_line_searches: int


@dataclass
class _Search:
    """The problem in units of the acoustic score's spread; ``free`` are the columns that may move."""

    table: FeatureTable
    errors: IntArray
    padded: PaddedLists
    units: FloatArray
    free: IntArray
    num_line_searches: int = 0

    def num_errors(self, weights: FloatArray) -> int:
        """Word errors of all lists when the best totals win."""
        return int(self.errors[self.table.best_rows(weights)].sum())

    def step(self, weights: FloatArray, direction: FloatArray) -> FloatArray:
        """The best weights on the line through ``weights``; LM scales stay at or above zero."""
        self.num_line_searches += 1
        low, high = -np.inf, np.inf
        for column, name in enumerate(FEATURES):
            if name in NONNEGATIVE and direction[column] != 0:
                bound = -weights[column] / direction[column]
                low, high = (max(low, bound), high) if direction[column] > 0 else (low, min(high, bound))
        steps = errors_along_line(
            self.table.total_scores(weights),
            self.table.total_scores(direction),
            self.errors,
            self.padded,
            low=low,
            high=high,
        )
        moved = weights + steps.best_point()[0] * direction
        for column, name in enumerate(FEATURES):
            if name in NONNEGATIVE:
                moved[column] = max(moved[column], 0.0)
        return moved

    def descend(self, weights: FloatArray, num_random: int, rng: np.random.Generator) -> tuple[FloatArray, int]:
        """Line searches until a whole sweep brings nothing; equal errors still move to the middle of the interval."""
        lowest = self.num_errors(weights)
        for _ in range(_MAX_SWEEPS):
            before = lowest
            for direction in self._directions(num_random, rng):
                moved = self.step(weights, direction)
                errors = self.num_errors(moved)
                if errors <= lowest:
                    weights, lowest = moved, errors
            if lowest == before:
                break
        return weights, lowest

    def random_start(self, rng: np.random.Generator) -> FloatArray:
        """Weights to begin a search from, acoustic scale 1."""
        weights = np.zeros(len(FEATURES))
        weights[0] = 1.0
        for column in self.free:
            sample = rng.uniform(0, 2) if FEATURES[column] in NONNEGATIVE else rng.normal()
            weights[column] = sample * self.units[column]
        return weights

    def _directions(self, num_random: int, rng: np.random.Generator) -> list[FloatArray]:
        directions = []
        for column in self.free:
            direction = np.zeros(len(FEATURES))
            direction[column] = self.units[column]
            directions.append(direction)
        for _ in range(num_random if len(self.free) > 1 else 0):
            direction = np.zeros(len(FEATURES))
            direction[self.free] = rng.normal(size=len(self.free)) * self.units[self.free]
            directions.append(direction)
        return directions


def tune_weights(
    features: FeatureTable,
    errors: npt.ArrayLike,
    *,
    initial: Weights | None = None,
    fixed: Sequence[str] = (),
    num_restarts: int = 8,
    num_random_directions: int = 6,
    seed: int = 0,
) -> TuneResult:
    """Weights with the fewest summed errors found.

    Args:
        errors: word errors of every hypothesis, shape (num_hypotheses,).
        initial: where the first descent starts; by default the acoustic score alone. Its acoustic scale must be 1.
        fixed: names of weights (fields of :class:`Weights`) that keep their initial value.
        num_restarts: further descents from random weights; the best of all wins, the earliest of equals.

    Raises:
        DataError: the number of errors does not match, an unknown name in ``fixed``, or an acoustic scale other than 1.
    """
    counts = np.asarray(errors, dtype=np.int64)
    if counts.shape != (len(features.values),):
        raise DataError(f"{counts.shape} errors for {len(features.values)} hypotheses; expected one each")
    start = initial or Weights()
    if start.acoustic_scale != 1.0:
        raise DataError(f"tuning keeps the acoustic scale at 1, got {start.acoustic_scale}; divide all weights by it")
    unknown = sorted(set(fixed) - set(SCALES))
    if unknown:
        raise DataError(f"no weights are named {unknown}; expected some of {SCALES}")
    search = _prepare(features, counts, fixed)
    before = search.num_errors(start.as_array())
    best, lowest = search.descend(start.as_array(), num_random_directions, np.random.default_rng([seed, 0]))
    for restart in range(1, num_restarts + 1 if len(search.free) else 1):
        rng = np.random.default_rng([seed, restart])
        point = search.random_start(rng)
        held = [column for column in range(len(FEATURES)) if column not in search.free]
        point[held] = start.as_array()[held]
        found, num_errors = search.descend(point, num_random_directions, rng)
        if num_errors < lowest:
            best, lowest = found, num_errors
    scales = dict(zip(SCALES, (float(weight) for weight in best), strict=True))
    weights = replace(start, **scales, seed=seed, dev_errors=lowest)  # type: ignore[arg-type]
    return TuneResult(weights, lowest, before, search.num_line_searches)


def tune_on_lists(
    lists: Sequence[NBest],
    *,
    neural_lm_score: npt.ArrayLike | None = None,
    num_unknown: npt.ArrayLike | None = None,
    ngram_score: npt.ArrayLike | None = None,
    model_hash: str | None = None,
    data_hash: str | None = None,
    fixed: Sequence[str] = (),
    seed: int = 0,
) -> TuneResult:
    """Tune on dev lists with references; the weights remember model, data and dev utterances.

    Raises:
        DataError: a reference is missing, ``lm_score`` is given for some hypotheses only, shapes differ.
    """
    table = error_table(lists)
    features = feature_table(lists, neural_lm_score=neural_lm_score, num_unknown=num_unknown, ngram_score=ngram_score)
    result = tune_weights(features, table.errors, fixed=fixed, seed=seed)
    weights = replace(
        result.weights,
        model_hash=model_hash,
        data_hash=data_hash,
        dev_words=int(table.num_words.sum()),
        dev_utterances=tuple(entry.utterance for entry in lists),
    )
    return replace(result, weights=weights)


def _prepare(features: FeatureTable, errors: IntArray, fixed: Sequence[str]) -> _Search:
    starts, sizes = features.offsets[:-1], np.diff(features.offsets)
    centred = features.values - np.repeat(np.add.reduceat(features.values, starts) / sizes[:, None], sizes, axis=0)
    spread = np.sqrt((centred**2).mean(axis=0))
    moves = np.zeros(len(FEATURES), dtype=bool)
    for column in range(1, len(FEATURES)):
        differs = np.maximum.reduceat(features.values[:, column], starts) > np.minimum.reduceat(
            features.values[:, column], starts
        )
        moves[column] = bool(differs.any()) and SCALES[column] not in fixed
    reference = spread[0] if spread[0] > 0 else 1.0
    units = np.where(moves, reference / np.where(spread > 0, spread, 1.0), 0.0)
    return _Search(features, errors, PaddedLists.from_offsets(features.offsets), units, np.flatnonzero(moves))

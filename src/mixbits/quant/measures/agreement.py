"""Do two measures rank units and specs alike? Spearman's rank correlation, with a bootstrap standard error over units.

Units are what is drawn again, with all their specs, because the specs of one unit rise and fall together. The correlation over all pairs
of unit and spec says whether a measure orders everything an allocator chooses among; most of it comes from the
specs (1 bit hurts more than 8 anywhere), so the correlations within single specs, across units, are the harder test.

Limits: a correlation needs 3 units; with fewer than some ten its standard error is rough. Where either side is constant there is no
rank to correlate: the value is NaN and its error infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mixbits.errors import DataError
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import QuantSpec

Losses = Mapping[str, Mapping[QuantSpec, float]]
"""Unit name -> spec -> loss increase, however it was come by."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's coefficient, its standard error over units, and how many pairs it is of."""

    value: float
    stderr: float
    num_pairs: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; not a number and infinite become null."""
        value, stderr = (x if math.isfinite(x) else None for x in (self.value, self.stderr))
        return {"spearman": value, "stderr": stderr, "num_pairs": self.num_pairs}


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of two measures: over all pairs of unit and spec, and across units within each spec."""

    overall: RankCorrelation
    per_spec: Mapping[QuantSpec, RankCorrelation]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**self.overall.to_json(), "per_spec": {str(s): c.to_json() for s, c in self.per_spec.items()}}


def rank_agreement(
    one: Sensitivities | Losses, other: Sensitivities | Losses, *, seed: int = 0, num_resamples: int = 1000
) -> Agreement:
    """Rank correlations over the units and specs that both name.

    seed: of the bootstrap. Raises DataError when they share fewer than 3 units or no spec.
    """
    first, second = _losses(one), _losses(other)
    names = [n for n in first if n in second]
    if len(names) < 3:
        raise DataError(f"{len(names)} unit(s) in common; a rank correlation over units needs at least 3")
    shared = {n: [s for s in first[n] if s in second[n]] for n in names}
    specs = list(dict.fromkeys(s for own in shared.values() for s in own))
    if not specs:
        raise DataError("no spec in common; measure the same specs to compare measures")
    x, y = (np.full((len(names), len(specs)), np.nan) for _ in range(2))
    for i, name in enumerate(names):
        for spec in shared[name]:
            j = specs.index(spec)
            x[i, j], y[i, j] = first[name][spec], second[name][spec]
    draws = np.random.default_rng(seed).integers(0, len(names), (num_resamples, len(names)))
    per_spec = {s: _correlation(x[:, [j]], y[:, [j]], draws) for j, s in enumerate(specs)}
    return Agreement(_correlation(x, y, draws), per_spec)


def _losses(found: Sensitivities | Losses) -> Losses:
    if isinstance(found, Sensitivities):
        return {name: unit.loss_increase for name, unit in found.units.items()}
    return found


def _correlation(x: np.ndarray, y: np.ndarray, draws: np.ndarray) -> RankCorrelation:
    """x, y: (units, specs), NaN where not measured; draws: (resamples, units), which units each resample has."""
    value = _spearman(x.ravel(), y.ravel())
    samples = np.array([_spearman(x[draw].ravel(), y[draw].ravel()) for draw in draws])
    samples = samples[np.isfinite(samples)]
    known = math.isfinite(value) and len(samples) > 1
    return RankCorrelation(value, float(samples.std(ddof=1)) if known else math.inf, int(np.isfinite(x).sum()))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of ranks (ties share theirs), without the p-value, which would take most of the time."""
    there = np.isfinite(x)
    a, b = stats.rankdata(x[there]), stats.rankdata(y[there])
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan

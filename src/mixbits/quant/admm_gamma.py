"""ADMM's penalty weight over a training, its residuals, and when to stop.

Residual balancing (Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section 3.4.1): gamma doubles while
the primal residual is more than ten times the dual one, and halves in the opposite case. Stopping (section 3.3.1): both residuals small,
here for several updates in a row, because on a mini-batch loss one update says little. Both are relative to ||W||.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

GammaRule = Literal["constant", "geometric", "residual"]
_BALANCE, _FACTOR = 10.0, 2.0
_LIMIT = 2.0**10
"""Balancing leaves gamma within this factor of where it started: with a residual of exactly zero it would never end."""


@dataclass(frozen=True)
class Residuals:
    """primal ||W - alpha V|| / ||W||, dual gamma ||change of alpha V|| / ||W||, over all units together."""

    primal: float
    dual: float

    @classmethod
    def of(cls, gap: float, change: float, norm: float, gamma: float) -> Residuals:
        """From squared norms of the gap, of the targets' change, and of the weights."""
        norm = max(norm, 1e-30)
        return cls(math.sqrt(gap / norm), gamma * math.sqrt(change / norm))

    def within(self, primal_tolerance: float, dual_tolerance: float) -> bool:
        """Both below their tolerances."""
        return self.primal < primal_tolerance and self.dual < dual_tolerance


def scheduled_gamma(start: float, end: float, share: float) -> float:
    """Geometric between ``start`` and ``end`` at a share (0 to 1) of the updates."""
    return start * (end / start) ** share


def balanced_gamma(gamma: float, residuals: Residuals, *, start: float) -> float:
    """The next gamma by residual balancing; ``start`` is where it began."""
    if residuals.primal > _BALANCE * residuals.dual:
        gamma *= _FACTOR
    elif residuals.dual > _BALANCE * residuals.primal:
        gamma /= _FACTOR
    return min(max(gamma, start / _LIMIT), start * _LIMIT)

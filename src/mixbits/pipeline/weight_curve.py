"""Word errors of a list against one weight, all others as they were: what a tuning of that weight looks like.

The curve is exact, a step function (:func:`mixbits.asr.analysis.errors_by_weight`). It is for looking: a weight is chosen on other
lists than it is reported on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixbits.asr.analysis import FloatArray, errors_by_weight
from mixbits.asr.linesearch import StepFunction
from mixbits.asr.nbest import NBest
from mixbits.asr.wer import ErrorTable
from mixbits.errors import DataError
from mixbits.pipeline.compare_inputs import System


def weight_curves(systems: Sequence[System], tables: Sequence[ErrorTable]) -> list[dict[str, Any]]:
    """Word errors against the weight of the LM's score, all other weights as they were, for the systems whose lists have such a score.

    Rescored lists give the rest of the total as ``total_score`` − chosen weight · ``neural_lm_score``, which needs the weights they
    were made with; lists with a first-pass ``lm_score`` are ranked by acoustic score and words as ``weights`` say (1 and 0 by default).

    A curve has ``system``, ``weight`` (its name), ``edges`` and ``errors`` (the step function), ``words``, ``chosen`` (the weight that was
    used, or None), ``best`` and ``best_errors`` (the middle of the widest best interval). All end at the same weight.
    """
    pairs = zip(systems, tables, strict=True)
    found = [made for made in (_curve(system, table) for system, table in pairs) if made is not None]
    high = max((_shown_until(steps, curve["best"], curve["chosen"]) for curve, steps in found), default=1.0)
    for curve, steps in found:
        inside = steps.edges[:-1] < high
        curve |= {"edges": np.append(steps.edges[:-1][inside], high), "errors": steps.values[inside]}
    return [curve for curve, _ in found]


def _curve(system: System, table: ErrorTable) -> tuple[dict[str, Any], StepFunction] | None:
    weights = system.weights
    neural, total = (_extra(system.lists, name) for name in ("neural_lm_score", "total_score"))
    if neural is not None and total is not None and weights is not None:
        return _steps(
            system, table, "neural_lm_scale", total - weights.neural_lm_scale * neural, neural, weights.neural_lm_scale
        )
    hypotheses = [h for entry in system.lists for h in entry.hypotheses]
    own = [h.lm_score for h in hypotheses]
    if total is not None or system.longest == 1 or any(score is None for score in own):
        return None
    acoustic = np.array([h.acoustic_score for h in hypotheses])
    base, chosen = acoustic, None
    if weights is not None:
        words = np.array([len(h.words) for h in hypotheses])
        base = weights.acoustic_scale * acoustic + weights.word_insertion_penalty * words
        chosen = weights.first_pass_lm_scale
    return _steps(system, table, "first_pass_lm_scale", base, np.array(own, dtype=np.float64), chosen)


def _extra(lists: Sequence[NBest], name: str) -> FloatArray | None:
    """An extra field of all hypotheses as numbers; None unless all have it. Raises DataError for something else than a number."""
    values = [h.extra.get(name) for entry in lists for h in entry.hypotheses]
    if any(value is None for value in values):
        return None
    wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, (int, float))), None)
    if wrong is not None:
        raise DataError(f"field {name!r} of a hypothesis is {str(wrong)[:40]!r}; expected a number")
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise DataError(f"field {name!r} of a hypothesis is a number too large for a score") from None


def _steps(
    system: System, table: ErrorTable, weight: str, base: FloatArray, score: FloatArray, chosen: float | None
) -> tuple[dict[str, Any], StepFunction]:
    """Everything about a curve but the steps themselves, and these, to infinity."""
    steps = errors_by_weight(base, score, table)
    best, lowest = steps.best_point()
    words = int(table.num_words.sum())
    facts = {
        "system": system.name,
        "weight": weight,
        "words": words,
        "chosen": chosen,
        "best": best,
        "best_errors": lowest,
    }
    return facts, steps


def _shown_until(steps: StepFunction, best: float, chosen: float | None) -> float:
    """Twice the weight of interest, and at least far enough to see where the curve is flat in the end (99 % of its steps)."""
    finite = steps.edges[np.isfinite(steps.edges)]
    far = float(np.quantile(finite, 0.99)) if len(finite) else 0.0
    if chosen:
        return 2 * max(chosen, min(best, far))
    return min(2 * best, 1.2 * far) or 1.0

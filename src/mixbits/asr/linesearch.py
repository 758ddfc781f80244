"""Exact line search for rescoring weights (Och, ACL 2003).

Along a line w + t·d every hypothesis scores a + t·b, so the winner of a list is the upper envelope of straight lines
and the word errors of all lists are a step function of t whose steps are known exactly. Envelopes of all lists are
walked together, one crossing a round, in NumPy.

The best t is the middle of the widest interval with the fewest errors. An interval without an end (t → ±∞) wins only
if no bounded one is as good; t then lies beyond its finite end by half the distance between the outermost steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PaddedLists:
    """Rows of a flat table laid out as (num_lists, longest list); ``valid`` marks the rows that exist."""

    rows: IntArray
    valid: npt.NDArray[np.bool_]

    @staticmethod
    def from_offsets(offsets: IntArray) -> PaddedLists:
        """List i owns the rows ``offsets[i]:offsets[i + 1]``; offsets (num_lists + 1,)."""
        sizes = np.diff(offsets)
        rank = np.arange(int(sizes.max()))
        valid = rank[None, :] < sizes[:, None]
        return PaddedLists(np.where(valid, offsets[:-1, None] + rank[None, :], offsets[:-1, None]), valid)


@dataclass(frozen=True)
class StepFunction:
    """``values[i]`` holds on the open interval between ``edges[i]`` and ``edges[i + 1]``; outer edges may be infinite."""

    edges: FloatArray
    values: IntArray

    def best_point(self) -> tuple[float, int]:
        """The middle of the widest interval of the lowest value, and that value; t = 0 (stay) if there is no step."""
        lowest = int(self.values.min())
        if len(self.values) == 1:
            return 0.0, lowest
        left, right = self.edges[:-1], self.edges[1:]
        width = np.where(self.values == lowest, right - left, -1.0)
        bounded = np.where(np.isfinite(width), width, -1.0)
        if bounded.max() > 0:
            best = int(bounded.argmax())
            return float((left[best] + right[best]) / 2), lowest
        finite = self.edges[np.isfinite(self.edges)]
        margin = float(finite[-1] - finite[0]) / 2 or 1.0
        best = int(width.argmax())
        return float(right[best] - margin if np.isfinite(right[best]) else left[best] + margin), lowest


def errors_along_line(
    intercepts: FloatArray,
    slopes: FloatArray,
    errors: IntArray,
    lists: PaddedLists,
    *,
    low: float = -np.inf,
    high: float = np.inf,
) -> StepFunction:
    """Summed errors of the winners as a function of t in (low, high).

    Args:
        intercepts, slopes, errors: a, b and word errors of every hypothesis, shape (num_hypotheses,).
    """
    times, changes, start_errors = _crossings(intercepts, slopes, errors, lists)
    total = start_errors + int(changes[times <= low].sum())
    inside = (times > low) & (times < high) & (changes != 0)
    times, changes = times[inside], changes[inside]
    order = np.argsort(times, kind="stable")
    values = np.concatenate([[total], total + np.cumsum(changes[order])])
    edges = np.concatenate([[low], times[order], [high]])
    wide = np.flatnonzero(np.diff(edges) > 0)
    if len(wide) == 0:
        return StepFunction(np.array([low, high]), values[:1])
    values, lefts = values[wide], edges[wide]
    starts = np.concatenate([[True], values[1:] != values[:-1]])
    return StepFunction(np.append(lefts[starts], high), np.asarray(values[starts], dtype=np.int64))


def _crossings(
    intercepts: FloatArray, slopes: FloatArray, errors: IntArray, lists: PaddedLists
) -> tuple[FloatArray, IntArray, int]:
    """All t where some list's winner changes, the change of errors there, and the errors at t → −∞."""
    a = np.where(lists.valid, intercepts[lists.rows], -np.inf)
    b = np.where(lists.valid, slopes[lists.rows], np.inf)
    lowest = b.min(axis=1, keepdims=True)
    b = np.where(lists.valid, b, -np.inf)
    current = np.where(b == lowest, a, -np.inf).argmax(axis=1)
    e = errors[lists.rows]
    each = np.arange(len(a))
    start_errors = int(e[each, current].sum())
    last = np.full(len(a), -np.inf)
    times, changes = [np.empty(0)], [np.empty(0, dtype=np.int64)]
    while len(a):
        each = np.arange(len(a))
        rise = b - b[each, current][:, None]
        ahead = rise > 0
        crossing = np.full_like(a, np.inf)
        with np.errstate(over="ignore"):
            np.divide(a[each, current][:, None] - a, rise, out=crossing, where=ahead)
        first = crossing.min(axis=1)
        moving = np.isfinite(first)
        a, b, e, crossing, first, last = (x[moving] for x in (a, b, e, crossing, first, last))
        current = current[moving]
        each = np.arange(len(a))
        following = np.where(crossing == first[:, None], b, -np.inf).argmax(axis=1)
        last = np.maximum(first, last)
        times.append(last)
        changes.append(e[each, following] - e[each, current])
        current = following
    return np.concatenate(times), np.concatenate(changes), start_errors

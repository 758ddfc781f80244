"""The integer program behind bit allocation: one option a group of units, least total value, file no
larger than the limit.

Solver: scipy.optimize.milp (HiGHS) at zero relative gap, on a core. Before it, a Lagrangian bound drops the
options that cannot be in any solution better than one at hand (reduced-cost fixing, which loses nothing). With
fewer options the bounds of the header's length close in, which tightens the next round; nearly always one
header length is left and the core is a plain multiple-choice knapsack.

Where the header still has several lengths, its padding is a variable of the program and its digits enter by
their lower bounds, so that nothing possible is excluded: an answer that fits is optimal; one that does not is
cut off and the next best taken.

Limits: exact to the byte in practice (at most 0.3 s for 100 units), but the number of cuts is limited: for
units so small that they compare with their header entries, a gap may stay. Above 300 groups the search stops as
soon as the answer is proved to be within 10^-4 of the optimum, which takes about a second at 1,000 units, where
the last byte of the header can cost minutes. The bound that was proved is returned, and `allocate` records the
gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mixbits.quant.filesize import FileSizes, HeaderBounds, Within
from mixbits.quant.highs import smallest_core, solve_core
from mixbits.spec import HEADER_MULTIPLE

_ROUNDING = 1e-12
_CUT_COLUMNS = 2500
_MAX_LENGTHS = 8
_MAX_ROUNDS = 12
_EXACT_GROUPS = 300
_LARGE_GAP, _LARGE_NODES = 1e-4, 300
_NEXT_NODES = 200
_MOST_TRIED = 30
_LEAST_PRICE = 1e-250

Fits = Callable[[np.ndarray], bool]


@dataclass(frozen=True)
class Solution:
    """Chosen option per group (K,), total value, and the proved lower bound of the optimum."""

    choice: np.ndarray
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How much better the optimum can be at most; 0 when proved exact (to one part in 10^12)."""
        gap = self.value - self.bound
        return gap if gap > _ROUNDING * abs(self.value) else 0.0


@dataclass(frozen=True)
class Larger:
    """A choice of less value in a larger file; ``is_smallest``: proved that no smaller file has less value."""

    choice: np.ndarray
    num_bytes: int
    value: float
    is_smallest: bool


def _total(value: np.ndarray, choice: np.ndarray) -> float:
    return float(value[np.arange(len(value)), choice].sum())


def solve(value: np.ndarray, sizes: FileSizes, max_bytes: int, fits: Fits, start: np.ndarray) -> Solution:
    """Least total value among choices for which ``fits`` is true.

    value: (K, S), infinite where a group has no such option; fits: exact test of a choice (K,); start: a
    choice that fits; the answer is never worse.
    """
    cheapest = np.lexsort((sizes.data, value), axis=1)[:, 0]
    if fits(cheapest):
        total = _total(value, cheapest)
        return Solution(cheapest, total, total)
    best, kept, within = start, np.isfinite(value), Within.anything(value)
    best, kept, within = _reduce_fully(value, sizes, kept, within, best, max_bytes, fits)
    header = sizes.header_bounds(kept, within)
    is_large = len(value) > _EXACT_GROUPS
    nodes = _LARGE_NODES if is_large else None
    if is_large or not header.is_exact:
        # A good answer for the likely length closes the bounds for good.
        likely = _header_of(sizes, best)
        for length in (likely, likely + HEADER_MULTIPLE):
            found, _ = solve_core(value, sizes, kept, header, (length, length), max_bytes, [], nodes)
            if found is not None and fits(found):
                best = found if _total(value, found) < _total(value, best) else best
                break
        best, kept, within = _reduce_fully(value, sizes, kept, within, best, max_bytes, fits)
    total = _total(value, best)
    if is_large and within.limit <= _LARGE_GAP * total:
        filled = _fill(value, sizes.data, best, max_bytes - sizes.other_bytes - _header_of(sizes, best))
        best = filled if fits(filled) else best
        return Solution(best, _total(value, best), total - within.limit)
    return _search(value, sizes, kept, within, best, max_bytes, fits)


def smallest(sizes: FileSizes, is_option: np.ndarray, num_bytes: Callable[[np.ndarray], int]) -> np.ndarray:
    """The choice (K,) of the smallest file. ``is_option`` (K, S): the options there are; ``num_bytes``: exact bytes of a choice.

    Nearly always each group's own least of data and header. A header a little shorter can save a multiple of its padding, however,
    which no group sees alone: of the options that a file smaller than that one could use, the best combination is found by a
    dynamic program over the header's bytes. Limits: exact where the digits of the offsets do not depend on the options left; else several
    are tried.
    """
    huge = np.iinfo(np.int64).max
    best, kept, within = np.where(is_option, sizes.data + sizes.entries, huge).argmin(1), is_option, None
    size = num_bytes(best)
    for _ in range(_MAX_ROUNDS):
        header = sizes.header_bounds(kept, within)
        parts = np.where(kept, sizes.data + header.low, huge)
        excess = np.where(kept, parts - parts.min(1)[:, None], 0)
        limit = size - 1 - (sizes.other_bytes + header.fixed_low + int(parts.min(1).sum()))
        if limit < 0:
            return best
        before, kept = kept.sum(), kept & (excess <= limit)
        if kept.sum() == before:
            break
        within = Within(excess.astype(float), limit, (0.0, 0.25, 0.5, 1.0, 2.0))
    for found, at_least in islice(_by_size(sizes.data, header.low, header.fixed_low, kept), _MOST_TRIED):
        if at_least + sizes.other_bytes >= size:
            break
        if num_bytes(found) < size:
            best, size = found, num_bytes(found)
    return best


def _by_size(data: np.ndarray, entries: np.ndarray, fixed: int, kept: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """For each length of a header of ``fixed`` bytes and the chosen ``entries`` (K, S) the choice (K,) of least data, and this with the
    padded header; least sum first. A dynamic program: for each number of header bytes, the least data of the groups so far.
    """
    shortest = np.where(kept, entries, np.iinfo(np.int64).max).min(1)
    extra = np.where(kept, entries - shortest[:, None], 0)
    least, picks = np.zeros(1), []
    for k in range(len(data)):
        longer = np.full(len(least) + extra[k].max(), np.inf)
        pick = np.zeros(len(longer), dtype=np.int16)
        for i in np.flatnonzero(kept[k]):
            part = slice(extra[k, i], extra[k, i] + len(least))
            is_less = least + data[k, i] < longer[part]
            longer[part] = np.where(is_less, least + data[k, i], longer[part])
            pick[part] = np.where(is_less, i, pick[part])
        least = longer
        picks.append(pick)
    lengths = fixed + int(shortest.sum()) + np.arange(len(least))
    total = least - (-lengths // HEADER_MULTIPLE) * HEADER_MULTIPLE
    for end in np.argsort(total, kind="stable"):
        place = int(end)
        choice = np.zeros(len(data), dtype=int)
        for k in range(len(data) - 1, -1, -1):
            choice[k] = picks[k][place]
            place -= extra[k, choice[k]]
        yield choice, float(total[end])


def next_larger(
    value: np.ndarray, sizes: FileSizes, solution: Solution, max_bytes: int, num_bytes: Callable[[np.ndarray], int]
) -> Larger | None:
    """The smallest file of less value than ``solution``, the answer for ``max_bytes``; None if nothing has less value.

    First the best change of one group; then, up to 300 groups, the integer program for bytes over the options that a
    file no larger than that could use. ``num_bytes``: exact bytes of a choice.
    """
    choice, total = solution.choice, solution.value
    best = _next_by_one_change(value, sizes, choice, max_bytes, num_bytes)
    if best is None or solution.gap > 0 or len(value) > _EXACT_GROUPS:
        return best
    kept, within = np.isfinite(value), Within.anything(value)
    for _ in range(_MAX_ROUNDS):
        before, header = kept.sum(), sizes.header_bounds(kept, within)
        kept, within = _restrict(value, sizes, kept, header, best.num_bytes, total, choice)
        if kept.sum() == before:
            break
    header = sizes.header_bounds(kept, within)
    found, bound = smallest_core(value, sizes, kept, header, total, _NEXT_NODES)
    if found is not None and _total(value, found) < total:
        size = num_bytes(found)
        if max_bytes < size < best.num_bytes:
            best = Larger(found, size, _total(value, found), False)
    is_smallest = best.num_bytes <= int(np.ceil(min(bound, 2.0**62) - 1e-6))
    return Larger(best.choice, best.num_bytes, best.value, is_smallest)


def _next_by_one_change(
    value: np.ndarray,
    sizes: FileSizes,
    choice: np.ndarray,
    max_bytes: int,
    num_bytes: Callable[[np.ndarray], int],
) -> Larger | None:
    rows = np.arange(len(value))
    size = sizes.data + sizes.entries
    more = (size - size[rows, choice][:, None]).astype(float)
    more[value >= value[rows, choice][:, None]] = np.inf
    for place in np.argsort(more, axis=None, kind="stable"):
        k, i = np.unravel_index(int(place), more.shape)
        if np.isinf(more[k, i]):
            break
        changed = choice.copy()
        changed[k] = i
        larger = num_bytes(changed)
        if larger > max_bytes:
            return Larger(changed, larger, _total(value, changed), False)
    return None


def _reduce_fully(
    value: np.ndarray, sizes: FileSizes, kept: np.ndarray, within: Within, best: np.ndarray, max_bytes: int, fits: Fits
) -> tuple[np.ndarray, np.ndarray, Within]:
    for _ in range(_MAX_ROUNDS):
        before = kept.sum()
        best, kept, within = _reduce(value, sizes, kept, within, best, max_bytes, fits)
        if kept.sum() == before:
            break
    return best, kept, within


def _header_of(sizes: FileSizes, choice: np.ndarray) -> int:
    """Padded header of one choice, exactly."""
    single = np.zeros(sizes.data.shape, dtype=bool)
    single[np.arange(len(choice)), choice] = True
    return sizes.header_bounds(single).padded_high


def _search(
    value: np.ndarray, sizes: FileSizes, kept: np.ndarray, within: Within, best: np.ndarray, max_bytes: int, fits: Fits
) -> Solution:
    """Solve the core for each length the header may have (for all at once where they are many)."""
    header = sizes.header_bounds(kept, within)
    lengths = range(header.padded_low, header.padded_high + 1, HEADER_MULTIPLE)
    spans = [(n, n) for n in lengths] if len(lengths) <= _MAX_LENGTHS else [(lengths[0], lengths[-1])]
    bound = np.inf
    for span in spans:
        best, reached = _search_span(value, sizes, kept, header, span, best, max_bytes, fits)
        bound = min(bound, reached)
    total = _total(value, best)
    return Solution(best, total, min(bound, total))


def _search_span(
    value: np.ndarray,
    sizes: FileSizes,
    kept: np.ndarray,
    header: HeaderBounds,
    span: tuple[int, int],
    best: np.ndarray,
    max_bytes: int,
    fits: Fits,
) -> tuple[np.ndarray, float]:
    """Best choice with a header in ``span``, or ``best``; and the bound. Answers too large by their digits are
    cut off.
    """
    cuts: list[np.ndarray] = []
    while True:
        found, bound = solve_core(value, sizes, kept, header, span, max_bytes, cuts)
        if found is None or bound >= _total(value, best):
            return best, bound
        if fits(found):
            return (found if _total(value, found) < _total(value, best) else best), bound
        if len(cuts) >= _CUT_COLUMNS / kept.sum():
            return best, bound
        cuts.append(found)


def _reduce(
    value: np.ndarray, sizes: FileSizes, kept: np.ndarray, within: Within, best: np.ndarray, max_bytes: int, fits: Fits
) -> tuple[np.ndarray, np.ndarray, Within]:
    """A choice at least as good as ``best`` that fits, the options of ``kept`` that a better one could use, and
    how far it can stray.

    For a price p a byte, ``sum_u min_i (value + p * size) - p * room`` bounds every solution from below when
    size and room are optimistic. What a solution's options exceed their units' minima by adds to that bound, so
    that in a better one than ``best`` all excesses together stay below the difference.
    """
    header = sizes.header_bounds(kept, within)
    allowed = np.where(kept, value, np.inf)
    best = _improve(allowed, sizes, header, best, max_bytes - sizes.other_bytes, fits)
    kept, within = _restrict(value, sizes, kept, header, max_bytes, _total(value, best), best)
    return best, kept, within


def _restrict(
    value: np.ndarray,
    sizes: FileSizes,
    kept: np.ndarray,
    header: HeaderBounds,
    max_bytes: int,
    max_value: float,
    choice: np.ndarray,
) -> tuple[np.ndarray, Within]:
    """The options of ``kept`` that a choice of at most ``max_bytes`` and ``max_value`` can use, those of ``choice`` with
    them, and how far such a choice can stray.
    """
    allowed = np.where(kept, value, np.inf)
    room = max_bytes - sizes.other_bytes
    if header.is_exact:
        size, room_low = sizes.data, room - header.padded_low
    else:
        size, room_low = sizes.data + header.low, room - header.fixed_low
    price, _ = _price(allowed, size, room_low)
    priced = allowed + price * size
    least = priced.min(1)
    bound = float(least.sum() - price * room_low)
    slack = _ROUNDING * float(np.abs(least).sum() + price * abs(room_low))
    limit = max(0.0, max_value - bound) + slack
    excess = priced - least[:, None]
    kept = kept & (excess <= limit)
    kept[np.arange(len(value)), choice] = True
    # All values alike: the price is next to nothing, and rates would overflow.
    rates = (0.0, *(10.0 ** (k / 4) / price for k in range(-4, 17))) if price > _LEAST_PRICE else (0.0,)
    return kept, Within(np.where(np.isfinite(excess), excess, 0.0), limit, rates)


def _improve(
    value: np.ndarray, sizes: FileSizes, header: HeaderBounds, best: np.ndarray, room: int, fits: Fits
) -> np.ndarray:
    """``best``, or a greedy choice that is better and fits: first with the longest header, then with the header
    that gave.
    """
    longest = header.padded_high
    for _ in range(4):
        _, choice = _price(value, sizes.data, room - longest)
        if choice is None:
            break
        choice = _fill(value, sizes.data, choice, room - longest)
        if _total(value, choice) < _total(value, best) and fits(choice):
            best = choice
        needed = _header_of(sizes, choice)
        if needed >= longest:
            break
        longest = needed
    return best


def _price(value: np.ndarray, size: np.ndarray, room: int) -> tuple[float, np.ndarray | None]:
    """The price of a byte at which the cheapest choice just fits, by bisection; and that choice (None: nothing
    fits).
    """
    rows = np.arange(len(value))

    def at(price: float) -> np.ndarray:
        return np.argmin(value + price * size, axis=1)

    finite = value[np.isfinite(value)]
    high = 2.0 * float(finite.max() - finite.min()) + np.finfo(float).tiny
    low = high * 1e-30
    if size[rows, at(high)].sum() > room:
        return high, None
    for _ in range(100):
        middle = (low * high) ** 0.5
        if size[rows, at(middle)].sum() > room:
            low = middle
        else:
            high = middle
    return high, at(high)


def _fill(value: np.ndarray, size: np.ndarray, choice: np.ndarray, room: int) -> np.ndarray:
    """Use up the room left by ``choice``: the single best improvement that fits, again and again."""
    choice = choice.copy()
    rows = np.arange(len(value))
    for _ in range(size.size):
        left = room - size[rows, choice].sum()
        gain = np.where(size - size[rows, choice][:, None] <= left, value[rows, choice][:, None] - value, 0.0)
        g, i = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[g, i] <= 0:
            break
        choice[g] = i
    return choice

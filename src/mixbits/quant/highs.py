"""The core of bit allocation as an integer program for scipy.optimize.milp (HiGHS), at zero relative gap.

Limits: HiGHS stops at an absolute gap of 1e-6, which SciPy cannot change; values are scaled to a largest of
10^6, so that it is at most 10^-12 of the largest value. After 60 seconds the best answer so far is returned,
with the bound that was proved.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mixbits.quant.filesize import FileSizes, HeaderBounds
from mixbits.spec import HEADER_MULTIPLE

_logger = logging.getLogger(__name__)
_LARGEST_VALUE = 1e6
_TIME_LIMIT_SECONDS = 60.0
_Row = tuple[np.ndarray, float, float]


def solve_core(
    value: np.ndarray,
    sizes: FileSizes,
    kept: np.ndarray,
    header: HeaderBounds,
    span: tuple[int, int],
    max_bytes: int,
    cuts: list[np.ndarray],
    node_limit: int | None = None,
) -> tuple[np.ndarray | None, float]:
    """Least value over the options ``kept`` with a padded header in ``span``; choices in ``cuts`` excluded.

    Headers are taken by the lower bounds in ``header``, so nothing possible is excluded and the answer may be
    slightly too large. Returns (choice (K,), or None if none is possible or found; proved lower bound of the
    value).
    """
    groups, options = np.nonzero(kept)
    least = np.where(kept, value, np.inf).min(1)
    cost = np.append(value[groups, options] - least[groups], 0.0)
    scale = _LARGEST_VALUE / cost.max() if cost.max() > 0 else 1.0
    # Bytes are counted from the smallest choice's, to keep numbers small.
    data = sizes.data[groups, options]
    base = np.where(kept, sizes.data, np.iinfo(np.int64).max).min(1)
    room = max_bytes - sizes.other_bytes - int(base.sum())
    rows: list[_Row] = [(np.append(data - base[groups], HEADER_MULTIPLE), -np.inf, room)]
    rows += [(np.append(cut[groups] == options, 0), -np.inf, len(cut) - 1) for cut in cuts]
    return _run(cost * scale, rows, kept, header, span, node_limit, scale, float(least.sum()))


def smallest_core(
    value: np.ndarray, sizes: FileSizes, kept: np.ndarray, header: HeaderBounds, max_value: float, node_limit: int
) -> tuple[np.ndarray | None, float]:
    """The smallest file over the options ``kept`` (all in ``header``'s bounds) whose value is below ``max_value``, by at
    least 10^-9 of the largest difference in value. Returns (choice (K,) or None; proved lower bound of its bytes).
    """
    groups, options = np.nonzero(kept)
    least = np.where(kept, value, np.inf).min(1)
    cost = np.append(value[groups, options] - least[groups], 0.0)
    scale = _LARGEST_VALUE / cost.max() if cost.max() > 0 else 1.0
    base = np.where(kept, sizes.data, np.iinfo(np.int64).max).min(1)
    extra = np.append(sizes.data[groups, options] - base[groups], HEADER_MULTIPLE).astype(float)
    rows: list[_Row] = [(cost * scale, -np.inf, (max_value - least.sum()) * scale - 1e-9 * _LARGEST_VALUE)]
    span = (header.padded_low, header.padded_high)
    return _run(extra, rows, kept, header, span, node_limit, 1.0, float(sizes.other_bytes + base.sum()))


def _run(
    cost: np.ndarray,
    rows: list[_Row],
    kept: np.ndarray,
    header: HeaderBounds,
    span: tuple[int, int],
    node_limit: int | None,
    scale: float,
    offset: float,
) -> tuple[np.ndarray | None, float]:
    """Least ``cost`` over one option a group and the padded header's length in multiples (the last column), subject to
    ``rows`` (coefficients, low, high). Returns (choice (K,) or None, bound / scale + offset).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    groups, options = np.nonzero(kept)
    num = len(groups)
    one = csr_matrix((np.ones(num), (groups, np.arange(num))), shape=(len(kept), num + 1))
    if header.fixed_low + np.where(kept, header.low, 0).max(1).sum() > span[0]:
        rows = [*rows, (np.append(-header.low[groups, options], HEADER_MULTIPLE), header.fixed_low, np.inf)]
    constraints = [LinearConstraint(one, 1, 1)]
    constraints += [LinearConstraint(csr_matrix(row.astype(float)), low, high) for row, low, high in rows]
    multiples = [length // HEADER_MULTIPLE for length in span]
    with _stdout_captured():
        result = milp(
            cost,
            integrality=np.ones(num + 1),
            bounds=Bounds(np.append(np.zeros(num), multiples[0]), np.append(np.ones(num), multiples[1])),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": _TIME_LIMIT_SECONDS, "node_limit": node_limit},
        )
    if result.x is None:
        return None, -np.inf if result.status == 1 else np.inf
    chosen = np.zeros(len(kept), dtype=int)
    picked = result.x[:num] > 0.5
    chosen[groups[picked]] = options[picked]
    return chosen, float(result.mip_dual_bound / scale + offset)


@contextmanager
def _stdout_captured() -> Iterator[None]:
    """Send what C code prints on file descriptor 1 to the debug log (HiGHS prints stray lines). Process-wide
    while it lasts.
    """
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # no standard output at all
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            _flush_c_stdout()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                _logger.debug("HiGHS: %s", line)


def _flush_c_stdout() -> None:
    import ctypes

    try:
        ctypes.CDLL(None).fflush(None)
    except (OSError, AttributeError, TypeError):  # no C library to ask by that name (Windows)
        _logger.debug("cannot flush the C library's standard output")

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
    slightly too large. Returns (choice (G,), or None if none is possible or found; proved lower bound of the
    value).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    groups, options = np.nonzero(kept)
    num = len(groups)
    least = np.where(kept, value, np.inf).min(1)
    cost = np.append(value[groups, options] - least[groups], 0.0)
    scale = _LARGEST_VALUE / cost.max() if cost.max() > 0 else 1.0
    one = csr_matrix((np.ones(num), (groups, np.arange(num))), shape=(len(value), num + 1))
    # The last column counts the multiples the padded header takes. Bytes are counted from the smallest choice's, to keep numbers small.
    data = sizes.data[groups, options]
    base = np.where(kept, sizes.data, np.iinfo(np.int64).max).min(1)
    room = max_bytes - sizes.other_bytes - int(base.sum())
    constraints = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(csr_matrix(np.append(data - base[groups], HEADER_MULTIPLE).astype(float)), -np.inf, room),
    ]
    if header.fixed_low + np.where(kept, header.low, 0).max(1).sum() > span[0]:
        row = np.append(-header.low[groups, options], HEADER_MULTIPLE).astype(float)
        constraints.append(LinearConstraint(csr_matrix(row), header.fixed_low, np.inf))
    for cut in cuts:
        row = np.append(cut[groups] == options, 0).astype(float)
        constraints.append(LinearConstraint(csr_matrix(row), -np.inf, len(cut) - 1))
    multiples = [length // HEADER_MULTIPLE for length in span]
    with _stdout_captured():
        result = milp(
            cost * scale,
            integrality=np.ones(num + 1),
            bounds=Bounds(np.append(np.zeros(num), multiples[0]), np.append(np.ones(num), multiples[1])),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": _TIME_LIMIT_SECONDS, "node_limit": node_limit},
        )
    if result.x is None:
        return None, -np.inf if result.status == 1 else np.inf
    chosen = np.zeros(len(value), dtype=int)
    picked = result.x[:num] > 0.5
    chosen[groups[picked]] = options[picked]
    return chosen, float(result.mip_dual_bound / scale + least.sum())


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

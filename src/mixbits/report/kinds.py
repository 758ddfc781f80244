"""What sort of system a row of a summary is, for colours, headlines and plots.

Names decide where they follow the usual pattern (``learned-16x``, ``uniform-2``, ``full``); rows of any other name are told apart by
the measure that experiments record: that of learned bits, none of uniform ones. The page's template has the same rule.
"""

from __future__ import annotations

from typing import Literal

from mixbits.summary import SummaryRow

Kind = Literal["learned", "uniform", "full", ""]
_KINDS: tuple[Kind, ...] = ("learned", "uniform", "full")


def row_kind(row: SummaryRow) -> Kind:
    """The kind of a row; "" where nothing says what it is, as of ``first-pass``."""
    for kind in _KINDS:
        if row.name.split("-")[0] == kind:
            return kind
    if "measure" not in row.extra:
        return ""
    return "learned" if row.extra["measure"] else "uniform"

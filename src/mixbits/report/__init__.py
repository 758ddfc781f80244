"""Result files to something to look at: a terminal table and one self-contained HTML page.

:func:`render` writes the page, :func:`terminal_table` builds the table, :func:`headline` says in words what the numbers say.
Nothing is computed here but percentages and rounding: a number in the report is a number in ``summary.json``.
"""

from __future__ import annotations

from mixbits.report.headline import headline
from mixbits.report.page import render
from mixbits.report.terminal import terminal_table

__all__ = ["headline", "render", "terminal_table"]

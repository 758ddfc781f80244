"""A summary as a rich table for the terminal: the same columns and words as the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixbits.report.cells import cleaned, table
from mixbits.report.headline import headline
from mixbits.report.kinds import row_kind
from mixbits.summary import Summary

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(summary: Summary) -> Table:
    """The systems of ``summary``, its title above and its headline below. Print it with ``rich.console.Console``.

    Texts are shown as they are: markup and escape sequences in names have no effect.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summary = cleaned(summary)
    columns, rows = table(summary, "main")
    view = Table(
        title=Text(summary.title, style="bold"),
        caption=Text("\n".join(headline(summary))),
        title_justify="left",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, column in enumerate(columns):
        texts = [cells[i] for cells in rows]
        one_line = all(len(text) <= 24 and " ± " not in text for text in texts)
        view.add_column(Text(column.header), justify=column.align, vertical="bottom", overflow="fold", no_wrap=one_line)
    for row, cells in zip(summary.rows, rows, strict=True):
        learned = row_kind(row) == "learned"
        view.add_row(*(Text(cell, style="bold" if learned else "") for cell in cells))
    return view

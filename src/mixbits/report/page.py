"""Summaries to one HTML file that needs nothing else: inline style, inline SVG, no script, no network.

Every text from a summary is escaped by the template; a content security policy in the page forbids loading anything.
Several summaries make one page with one section each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbits import __version__
from mixbits.errors import DataError
from mixbits.jsonfile import write_text
from mixbits.report.cells import DASH, Column, both_errors, cleaned, number, table, with_error
from mixbits.report.headline import headline
from mixbits.summary import Summary, read_summary

if TYPE_CHECKING:
    from mixbits.report.figures import Plot

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class _Section:
    """What the template shows of one summary."""

    summary: Summary
    paragraphs: list[str]
    columns: list[Column]
    rows: list[list[str]]
    detail_columns: list[Column]
    detail_rows: list[list[str]]
    equal_bytes: list[list[str]]
    lists: list[list[str]]
    weights: list[list[str]]
    plots: list[Plot]


def render(summary_paths: Sequence[str | Path] | str | Path, out_html: str | Path) -> Path:
    """Write ``out_html`` from one or more ``summary.json`` files (or run folders that hold one). Returns its path.

    Raises DataError for a missing file or no file at all, FormatError for a broken one; nothing is written then.
    """
    paths = [summary_paths] if isinstance(summary_paths, (str, Path)) else list(summary_paths)
    if not paths:
        raise DataError("report: no summary given; expected at least one summary.json or run folder")
    return write_text(out_html, page([read_summary(path) for path in paths]))


def page(summaries: Sequence[Summary]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = lambda text: Markup(text)  # our own drawing, written by an XML serializer
    text = resources.files("mixbits.report").joinpath("templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    sections = [_section(cleaned(summary), prefix=f"s{i}") for i, summary in enumerate(summaries, 1)]
    return environment.from_string(text).render(sections=sections, version=__version__, dash=DASH)


def _section(summary: Summary, *, prefix: str) -> _Section:
    from mixbits.report.plots import all_plots

    columns, rows = table(summary, "main")
    detail_columns, detail_rows = table(summary, "details")
    return _Section(
        summary=summary,
        paragraphs=headline(summary),
        columns=columns,
        rows=rows,
        detail_columns=detail_columns,
        detail_rows=detail_rows,
        equal_bytes=[_equal_bytes_cells(entry) for entry in summary.equal_bytes],
        lists=[_list_cells(name, entry) for name, entry in (summary.asr.get("lists") or {}).items()],
        weights=_weight_cells(summary),
        plots=all_plots(summary, prefix=prefix),
    )


def _equal_bytes_cells(entry: Any) -> list[str]:
    neighbours = entry.get("neighbours")
    return [
        str(entry.get("name") or DASH),
        " and ".join(str(n) for n in neighbours) if isinstance(neighbours, (list, tuple)) and neighbours else DASH,
        number(entry.get("nats"), 4),
        number(entry.get("interpolated_nats"), 4),
        with_error(entry.get("delta_nats"), both_errors(entry.get("delta_nats_stderr"), entry), 4, sign=True),
        str(entry.get("verdict") or DASH),
    ]


def _list_cells(name: str, entry: Any) -> list[str]:
    entry = entry or {}
    counts = [DASH if entry.get(key) is None else f"{entry[key]:,}" for key in ("utterances", "words")]
    return [name, *counts, *(number(entry.get(key)) for key in ("first_pass_wer", "oracle_wer"))]


def _weight_cells(summary: Summary) -> list[list[str]]:
    weights = summary.asr.get("weights")
    rows = []
    for name, features in weights.items() if isinstance(weights, dict) else ():
        known = features.items() if isinstance(features, dict) else ()
        rows.append([name, ", ".join(f"{k} {number(v, 3) if isinstance(v, float) else v}" for k, v in known) or DASH])
    return rows

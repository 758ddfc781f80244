"""How each number of a summary is written: one list of columns, used by the terminal table and by the HTML page.

Unknown values are a dash, and a column without a single value is left out. Sizes are exact bytes in tables and decimal
megabytes (10^6 bytes) in sentences and plots. ``±`` is one standard error, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mixbits.summary import Summary, SummaryRow

DASH = "–"
MINUS = "\N{MINUS SIGN}"
Number = float | int | None


def printable(text: object) -> str:
    """Text with control characters and broken Unicode replaced, so that no name can steer a terminal or break a file."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def cleaned(summary: Summary) -> Summary:
    """The same summary with every text in it printable."""
    return Summary.from_json(_clean(summary.to_json()))


def number(value: Number, digits: int = 2, *, sign: bool = False) -> str:
    """Fixed digits, thousands separated, a real minus sign; very large or small values in scientific notation."""
    if value is None:
        return DASH
    if value != 0 and (abs(value) >= 1e7 or abs(value) < 0.5 * 10**-digits):
        text = f"{value:+.2g}" if sign else f"{value:.2g}"
    else:
        text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    return text.replace("-", MINUS) if text.startswith("-") else text


def with_error(value: Number, stderr: Number, digits: int = 2, *, sign: bool = False) -> str:
    """``value ± stderr``, or the value alone where the standard error is unknown."""
    if value is None or stderr is None:
        return number(value, digits, sign=sign)
    return f"{number(value, digits, sign=sign)} ± {number(stderr, digits)}"


def both_errors(stderr: Number, facts: Mapping[str, Any]) -> Number:
    """Standard error of a difference: over sentences, and where ``facts`` hold ``delta_nats_seed_stderr`` over seeds too, in quadrature."""
    over_seeds = facts.get("delta_nats_seed_stderr")
    if stderr is None or isinstance(over_seeds, bool) or not isinstance(over_seeds, (int, float)):
        return stderr
    return math.hypot(stderr, over_seeds) if math.isfinite(over_seeds) else stderr


def megabytes(num_bytes: Number) -> str:
    """``0.41 MB``: three significant digits, decimal megabytes."""
    if num_bytes is None:
        return DASH
    value = num_bytes / 1e6
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB" if value >= 0.001 else f"{num_bytes:,.0f} bytes"


def count(value: Number) -> str:
    """A short count for labels: ``2.56 M``, ``262 k``."""
    if value is None:
        return DASH
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def p_text(value: Number) -> str:
    """A p-value: three digits, or a bound."""
    return DASH if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def ppl_digits(ppl: Number) -> int:
    """Digits after the point that make sense for a perplexity of this size."""
    return 2 if ppl is None or ppl < 1000 else 0


def percent_over_baseline(row: SummaryRow, summary: Summary) -> float | None:
    """Perplexity of ``row`` over the baseline's, in percent: positive = worse. None if either is unknown."""
    base = summary.row(summary.baseline)
    if base is None or not base.ppl or row.ppl is None or row.name == "first-pass":
        return None
    return 100 * (row.ppl / base.ppl - 1)


def _is_baseline(row: SummaryRow, summary: Summary) -> bool:
    return summary.baseline is not None and row.name == summary.baseline


def _percent_cell(row: SummaryRow, summary: Summary) -> str:
    if _is_baseline(row, summary):
        return "base"
    value = percent_over_baseline(row, summary)
    return DASH if value is None else f"{number(value, 1, sign=True)} %"


def _delta_cell(row: SummaryRow, summary: Summary) -> str:
    stderr = both_errors(row.delta_nats_stderr, row.extra)
    return DASH if _is_baseline(row, summary) else with_error(row.delta_nats, stderr, 4, sign=True)


def _errors_cell(row: SummaryRow, summary: Summary) -> str:
    if not row.errors:
        return DASH
    parts = [f"{row.errors[key]:,} {key}" for key in ("sub", "del", "ins", "words") if row.errors.get(key) is not None]
    return ", ".join(parts) or DASH


def _seconds_cell(row: SummaryRow, summary: Summary) -> str:
    seconds = row.train_seconds
    if seconds is None or not math.isfinite(seconds):
        return DASH
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@dataclass(frozen=True)
class Column:
    """One column: header, what it means (a tooltip), how a cell is written, and whether it is in the main table."""

    header: str
    meaning: str
    cell: Callable[[SummaryRow, Summary], str]
    align: Literal["left", "right"] = "right"
    where: Literal["main", "details"] = "main"


COLUMNS: tuple[Column, ...] = (
    Column("System", "name of the row in summary.json", lambda r, s: r.name, "left"),
    Column("Bytes", "bytes of the weight file", lambda r, s: DASH if r.bytes is None else f"{r.bytes:,}"),
    Column("Ratio", "4 bytes a parameter over the bytes of the weight file", lambda r, s: number(r.ratio, 2)),
    Column("Bits/\nweight", "all stored bits over distinct weights", lambda r, s: number(r.bits_per_weight, 2)),
    Column(
        "ppl",
        "test perplexity per token ± standard error",
        lambda r, s: with_error(r.ppl, r.ppl_stderr, ppl_digits(r.ppl)),
    ),
    Column("Δ ppl", "perplexity over the baseline's; positive = worse", _percent_cell),
    Column(
        "Δ nats\nper\u00a0token",
        "paired difference to the baseline ± standard error, over sentences and seeds; positive = worse",
        _delta_cell,
    ),
    Column("WER %", "word error rate, percent", lambda r, s: number(r.wer, 2)),
    Column(
        "p\u00a0vs\nbase",
        "MAPSSWE against the full-precision baseline, two-sided",
        lambda r, s: p_text(r.p_value_vs_full),
    ),
    Column("System", "name of the row in summary.json", lambda r, s: r.name, "left", "details"),
    Column("Method", "how it was trained quantized", lambda r, s: r.method or DASH, "left", "details"),
    Column(
        "Epochs", "epochs of this training", lambda r, s: DASH if r.epochs is None else f"{r.epochs:g}", where="details"
    ),
    Column("Time", "training time", _seconds_cell, where="details"),
    Column("Valid perplexity", "what choices were made on", lambda r, s: number(r.valid_ppl, 2), where="details"),
    Column("Nats per token", "test negative log-likelihood", lambda r, s: number(r.nats, 4), where="details"),
    Column("Word errors", "summed counts over the test list", _errors_cell, "left", "details"),
    Column(
        "ΔWER at most",
        "upper 95 % bound of WER minus WER of full, in percent points",
        lambda r, s: number(r.delta_wer_upper_95, 2, sign=True),
        where="details",
    ),
    Column("Significance", "verdict of the run", lambda r, s: r.significance or DASH, "left", "details"),
)


def table(summary: Summary, where: Literal["main", "details"]) -> tuple[list[Column], list[list[str]]]:
    """Columns that hold at least one value, and the cells row by row. Only the name left: no rows at all."""
    columns = [c for c in COLUMNS if c.where == where]
    rows = [[c.cell(row, summary) for c in columns] for row in summary.rows]
    keep = [i for i in range(len(columns)) if i == 0 or any(row[i] not in (DASH, "base") for row in rows)]
    if where == "details":
        rows = [row for row in rows if any(row[i] != DASH for i in keep if i > 0)]
        if len(keep) == 1:
            rows = []
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]

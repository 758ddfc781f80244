"""The four plots of a report, each a function from a summary to a :class:`Plot`, or None where its data are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixbits.report.bits_plot import plot_bits
from mixbits.report.cells import number, p_text
from mixbits.report.figures import (
    FULL,
    INK,
    LEARNED,
    LINE,
    MUTED,
    UNIFORM,
    Plot,
    bits_colour,
    clip,
    kind_colour,
    log_ticks,
    new_figure,
    style,
    to_svg,
)
from mixbits.report.headline import first_pass_wer, list_fact
from mixbits.report.kinds import row_kind
from mixbits.report.units import bits_of, unit_labels
from mixbits.summary import Summary, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_UNITS, MAX_BARS = 40, 40
_REFERENCE_ROWS = ("first-pass", "full", "full-continued")


def all_plots(summary: Summary, *, prefix: str) -> list[Plot]:
    """Every plot whose data are there, in reading order. ``prefix`` keeps ids of several summaries apart."""
    functions = (plot_size, plot_bits, plot_wer, plot_sensitivity)
    plots = [function(summary, prefix=f"{prefix}-{function.__name__}") for function in functions]
    return [plot for plot in plots if plot is not None]


# ---- size against perplexity --------------------------------------------------------------------------------------------


def plot_size(summary: Summary, *, prefix: str) -> Plot | None:
    """Perplexity over bytes of the weight file, both logarithmic; full precision as horizontal lines."""
    rows = [r for r in summary.rows if r.bytes and r.ppl and r.name not in _REFERENCE_ROWS]
    if not rows:
        return None
    full = [r for r in summary.rows if r.name in _REFERENCE_ROWS[1:] and r.ppl]
    with style():
        figure = new_figure(3.7)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for row in full:
            is_baseline = row.name == summary.baseline
            axes.axhline(row.ppl or 0, color=FULL, lw=1.2, ls="-" if is_baseline else (0, (2, 3)), zorder=1)
        groups: dict[str, list[SummaryRow]] = {}
        for row in rows:
            groups.setdefault(row_kind(row) or row.name.split("-")[0], []).append(row)
        for name, members in groups.items():
            _draw_points(axes, members, is_curve=name == "uniform")
        _log_limits(axes, rows, full)
        _full_labels(axes, full)
        axes.set_xlabel("weight file, MB (logarithmic)")
        axes.set_ylabel("test perplexity (logarithmic)")
        svg = to_svg(figure, prefix=prefix, label="Size against perplexity")
    caption = (
        "Lower and further left is better. The curve joins the uniform rows (log-perplexity linear in bytes); a learned row below it beats uniform bits at "
        "equal bytes. Bars are one standard error; horizontal lines are full precision (solid: the baseline)."
    )
    return Plot("Size against perplexity", caption, svg)


def _draw_points(axes: Axes, rows: list[SummaryRow], *, is_curve: bool) -> None:
    """``rows`` of one kind, in the order of the summary."""
    first, rows = rows[0], sorted(rows, key=lambda r: r.bytes or 0)
    x, y = [(r.bytes or 0) / 1e6 for r in rows], [r.ppl or 0 for r in rows]
    errors = [r.ppl_stderr or 0 for r in rows]
    colour = kind_colour(row_kind(rows[0]))
    if is_curve:
        axes.plot(*_equal_bytes_curve(*_curve_points(rows, like=first)), color=colour, lw=1.3, zorder=2)
    marker = {LEARNED: "D", UNIFORM: "o"}.get(colour, "s")
    axes.errorbar(
        x,
        y,
        yerr=errors,
        color=colour,
        marker=marker,
        ms=6,
        lw=1.3,
        ls="none",
        capsize=2.5,
        zorder=3 if colour == LEARNED else 2,
    )
    for i, row in enumerate(rows):
        offset = (6, 5) if is_curve else (-7, -6 - 11 * (i % 2))
        axes.annotate(
            clip(row.name, 24),
            (x[i], y[i]),
            xytext=offset,
            textcoords="offset points",
            color=colour,
            ha="left" if is_curve else "right",
            va="bottom" if is_curve else "top",
            fontsize=8,
            fontweight="bold" if colour == LEARNED else "normal",
        )


def _curve_points(rows: Sequence[SummaryRow], *, like: SummaryRow) -> tuple[list[float], list[float]]:
    """MB and perplexity of the uniform rows that the curve joins: those of one method and kind of scales, of one size the first."""
    alike = [row for row in rows if (row.method, row.extra.get("scales")) == (like.method, like.extra.get("scales"))]
    first = {row.bytes or 0: row.ppl or 0 for row in reversed(alike)}
    return [size / 1e6 for size in sorted(first)], [first[size] for size in sorted(first)]


def _equal_bytes_curve(x: list[float], y: list[float], *, steps: int = 24) -> tuple[list[float], list[float]]:
    """Log-perplexity linear in bytes between neighbours: the curve that "at equal bytes" is measured against."""
    across, up = [x[0]], [y[0]]
    for i in range(1, len(x)):
        for k in range(1, steps + 1):
            share = k / steps
            across.append(x[i - 1] + share * (x[i] - x[i - 1]))
            up.append(y[i - 1] ** (1 - share) * y[i] ** share)
    return across, up


def _log_limits(axes: Axes, rows: list[SummaryRow], full: list[SummaryRow]) -> None:
    sizes, values = [(r.bytes or 0) / 1e6 for r in rows], [r.ppl or 0 for r in rows + full]
    for data, limit, ticks, labels, pad in (
        (sizes, axes.set_xlim, axes.set_xticks, axes.set_xticklabels, 0.16),
        (values, axes.set_ylim, axes.set_yticks, axes.set_yticklabels, 0.13),
    ):
        low, high = min(data), max(data)
        spread = max(high / low, 1.2)
        bounds = (low / spread**pad, high * spread**pad)
        limit(*bounds)
        marks = log_ticks(*bounds)
        ticks(marks)
        labels([f"{m:.4g}" for m in marks])
    axes.minorticks_off()
    axes.grid(True, lw=0.5)
    axes.set_axisbelow(True)


def _full_labels(axes: Axes, full: list[SummaryRow]) -> None:
    ordered = sorted(full, key=lambda r: r.ppl or 0)
    for i, row in enumerate(ordered):
        axes.annotate(
            f"{row.name} {number(row.ppl, 1)}",
            (0, row.ppl or 0),
            xycoords=("axes fraction", "data"),
            xytext=(5, -3 if i == 0 else 3),
            textcoords="offset points",
            ha="left",
            va="top" if i == 0 else "bottom",
            fontsize=8,
            color=FULL,
        )


# ---- WER by system --------------------------------------------------------------------------------------------------------


def plot_wer(summary: Summary, *, prefix: str) -> Plot | None:
    """Word error rates as bars from zero, with the first pass and the oracle as vertical lines."""
    rows = [r for r in summary.rows if r.wer is not None and r.name != "first-pass"][:MAX_BARS]
    lines = {"oracle": list_fact(summary, "oracle_wer"), "first pass": first_pass_wer(summary)}
    lines = {name: value for name, value in lines.items() if value is not None}
    if not rows:
        return None
    longest = max([r.wer or 0 for r in rows] + list(lines.values()) + [1e-9])
    with style():
        figure = new_figure(0.95 + 0.31 * len(rows))
        axes = figure.subplots()
        for i, row in enumerate(rows):
            axes.barh(i, row.wer or 0, height=0.66, color=kind_colour(row_kind(row)), zorder=2)
            text = f"{number(row.wer)} %"
            if row.p_value_vs_full is not None and row.name != "full":
                text += f" · p {p_text(row.p_value_vs_full)}"
            axes.text(longest * 1.03, i, text, va="center", fontsize=8.5, color=INK)
        for name, value in lines.items():
            axes.axvline(value, color=INK, lw=1.1, ls=(0, (3, 2)), zorder=3)
            axes.annotate(
                f"{name} {number(value)} %", (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="right" if value > 0.5 * longest else "center", va="bottom", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [clip(r.name, 28) for r in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.28)
        axes.set_xlabel("word error rate, %")
        axes.tick_params(axis="y", length=0, colors=INK)
        svg = to_svg(figure, prefix=prefix, label="Word error rate by system")
    caption = "Shorter is better. p: MAPSSWE against full precision, two-sided. The oracle picks the best hypothesis of every list."
    return Plot("Word error rate by system", caption, svg)


# ---- sensitivity per unit -------------------------------------------------------------------------------------------------


def plot_sensitivity(summary: Summary, *, prefix: str) -> Plot | None:
    """Predicted loss increase of each unit under each spec, most sensitive units first if there are many."""
    units: dict[str, Any] = {
        u: {s: v for s, v in (e.get("sensitivity") or {}).items() if v is not None}
        for u, e in (summary.sensitivity.get("units") or {}).items()
    }
    units = {u: table for u, table in units.items() if table}
    if not units:
        return None
    everything, labels = len(units), unit_labels(list(units))
    if everything > MAX_UNITS:
        keep = set(sorted(units, key=lambda u: -max(units[u].values()))[:MAX_UNITS])
        units = {u: t for u, t in units.items() if u in keep}
    specs = sorted({s for t in units.values() for s in t}, key=lambda s: (bits_of(s) or 0, s))
    with style():
        figure = new_figure(1.1 + 0.21 * len(units))
        axes = figure.subplots()
        for spec in specs:
            points = [(i, t[spec], _relative_error(summary, u)) for i, (u, t) in enumerate(units.items()) if spec in t]
            y, x, share = (list(column) for column in zip(*points, strict=True))
            axes.errorbar(
                x, y, xerr=[abs(v * e) for v, e in zip(x, share, strict=True)], ls="none", marker="o", ms=6, lw=0.8,
                color=bits_colour(bits_of(spec)), markeredgecolor=MUTED, markeredgewidth=0.5, ecolor=MUTED, label=clip(spec),
            )  # fmt: skip
        if all(v > 0 for t in units.values() for v in t.values()):
            axes.set_xscale("log")
        axes.set_yticks(range(len(units)), [clip(labels[u]) for u in units], fontsize=8)
        axes.set_ylim(len(units) - 0.4, -0.6)
        axes.grid(True, axis="y", lw=0.5, color=LINE)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("predicted loss increase, nats per token")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, handletextpad=0.2, columnspacing=1)
        svg = to_svg(figure, prefix=prefix, label="Sensitivity per unit")
    measure = str(summary.sensitivity.get("measure") or "unknown")
    caption = f"Measure: {measure}. Further right: quantizing this unit costs more. Bars: standard error of the trace."
    if everything > len(units):
        caption += f" The {len(units)} most sensitive of {everything} units are shown."
    return Plot("Sensitivity per unit", caption, svg)


def _relative_error(summary: Summary, unit: str) -> float:
    entry = summary.sensitivity["units"][unit]
    trace, stderr = entry.get("trace"), entry.get("trace_stderr")
    known = isinstance(trace, (int, float)) and isinstance(stderr, (int, float)) and trace
    return min(abs(stderr / trace), 0.9) if known else 0.0

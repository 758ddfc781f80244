"""The plot of learned bits: a grid of layers and kinds, and a strip in which a unit is as wide as it has weights.

In the strip an area is a share of the file, which shows at a glance where the bytes went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixbits.report.cells import count, megabytes
from mixbits.report.figures import MUTED, PAPER, Plot, bits_colour, bits_ink, clip, new_figure, style, to_svg
from mixbits.report.kinds import row_kind
from mixbits.report.units import bits_of, place, short_names, unit_labels
from mixbits.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ALLOCATIONS, MAX_LAYERS = 6, 48


def plot_bits(summary: Summary, *, prefix: str) -> Plot | None:
    """For each learned row: bits by layer and kind, and a strip in which a unit is as wide as it has weights."""
    named = [r.name for r in summary.rows if summary.allocations.get(r.name)]
    named += [name for name, units in summary.allocations.items() if units and name not in named]
    rows = {row.name: row for row in summary.rows}
    learned = [n for n in named if (row_kind(rows[n]) == "learned" if n in rows else n.startswith("learned"))]
    chosen = (learned or named)[:MAX_ALLOCATIONS]
    if not chosen:
        return None
    panels: list[tuple[str, dict[str, float | None]]] = []
    for name in chosen:
        units = summary.allocations[name]
        ordered = [u for u in summary.unit_weights if u in units] + [u for u in units if u not in summary.unit_weights]
        panels.append((name, {u: bits_of(units[u]) for u in ordered}))
    kinds = [max(len({place(u)[1] for u in bits}), 2) for _, bits in panels]
    with_strip = any(summary.unit_weights.get(u) for _, bits in panels for u in bits)
    heights = [h for k in kinds for h in ([0.5 + 0.27 * k, 1.25] if with_strip else [0.5 + 0.27 * k])]
    with style():
        figure = new_figure(sum(heights) + 0.2)
        grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for i, (name, bits) in enumerate(panels):
            row = summary.row(name)
            size = "" if row is None or row.bytes is None else f", {megabytes(row.bytes)}"
            _draw_grid(grid[i * (2 if with_strip else 1)], bits, summary, title=f"{clip(name)}{size}: bits per unit")
            if with_strip:
                _draw_strip(grid[2 * i + 1], bits, summary)
        svg = to_svg(figure, prefix=prefix, label="Bits per unit")
    caption = (
        "Top: the bits of each unit by layer; at the right, weights per unit. "
        "Bottom: the same units side by side, as wide as they have weights and as high as they have bits, so that an area is a "
        "share of the file. "
    )
    left_out = len(learned) - len(chosen)
    return Plot("Bits per unit", caption + (f"{left_out} more allocation(s) not drawn." if left_out > 0 else ""), svg)


def _draw_grid(axes: Axes, bits: dict[str, float | None], summary: Summary, *, title: str) -> None:
    from matplotlib.patches import Rectangle

    places = {unit: place(unit) for unit in bits}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    layers = sorted({layer for layer, _ in places.values() if layer is not None})[:MAX_LAYERS]
    columns: list[int | None] = ([None] if any(layer is None for layer, _ in places.values()) else []) + list(layers)
    labels, sizes = short_names(kinds), dict.fromkeys(kinds, "")
    for unit, value in bits.items():
        layer, kind = places[unit]
        if layer not in columns:
            continue
        x, y = columns.index(layer), kinds.index(kind)
        axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, facecolor=bits_colour(value), edgecolor="none"))
        text = "?" if value is None else f"{value:g}"
        if len(columns) <= 26:
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=bits_ink(value))
        if summary.unit_weights.get(unit):
            sizes[kind] = count(summary.unit_weights[unit])
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(kinds), 0)
    axes.set_yticks([k + 0.5 for k in range(len(kinds))], [clip(labels[k], 30) for k in kinds], fontsize=8)
    step = -(-len(columns) // 24)
    marks = list(range(0, len(columns), step))
    axes.set_xticks(
        [m + 0.5 for m in marks], ["–" if columns[m] is None else f"{columns[m]}" for m in marks], fontsize=8
    )
    if layers:
        axes.set_xlabel("layer (–: outside the layers)", fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for k, kind in enumerate(kinds):
        axes.annotate(
            sizes[kind], (1, k + 0.5), xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set_title(title)


def _draw_strip(axes: Axes, bits: dict[str, float | None], summary: Summary) -> None:
    sizes = {unit: summary.unit_weights.get(unit) or 0 for unit in bits}
    total = sum(sizes.values())
    if not total:
        axes.axis("off")
        return
    labels, left = unit_labels(list(bits)), 0.0
    top = max([b for b in bits.values() if b is not None] or [1])
    for unit, value in bits.items():
        width = sizes[unit] / 1e6
        axes.bar(left, value or 0, width=width, align="edge", color=bits_colour(value), edgecolor=PAPER, linewidth=0.6)
        if sizes[unit] > 0.07 * total and value:
            text = clip(labels[unit], max(4, int(90 * sizes[unit] / total)))
            axes.text(left + width / 2, value / 2, text, ha="center", va="center", fontsize=8, color=bits_ink(value))
        left += width
    axes.set_xlim(0, left)
    axes.set_ylim(0, top * 1.08)
    axes.set_xlabel("weights, millions", fontsize=8)
    axes.set_ylabel("bits", fontsize=8)
    axes.tick_params(labelsize=8)

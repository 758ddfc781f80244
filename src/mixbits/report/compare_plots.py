"""Plots of a comparison record, each a function from the record to a :class:`Plot`, or None where its data are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixbits.report.cells import megabytes, number
from mixbits.report.figures import (
    FULL,
    INK,
    LEARNED,
    LINE,
    MUTED,
    OTHER,
    UNIFORM,
    Plot,
    clip,
    log_ticks,
    new_figure,
    style,
    to_svg,
)

MAX_DRAWN_STEPS = 1500
_COLOURS = (MUTED, LEARNED, UNIFORM, FULL, OTHER, INK)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def all_plots(record: Mapping[str, Any]) -> list[Plot]:
    """Every plot whose data are there, in reading order."""
    plots = (plot_differences(record), plot_oracle(record), plot_weights(record), plot_bytes(record))
    return [plot for plot in plots if plot is not None]


def _look(record: Mapping[str, Any], system: str) -> dict[str, Any]:
    """Colour and dash of a system: by its place among the systems."""
    place = list(record["systems"]).index(system)
    return {"color": _COLOURS[place % len(_COLOURS)], "ls": _DASHES[place // len(_COLOURS) % len(_DASHES)]}


def _marker(record: Mapping[str, Any], system: str) -> str:
    return _MARKERS[list(record["systems"]).index(system) % len(_MARKERS)]


def plot_differences(record: Mapping[str, Any]) -> Plot | None:
    """ΔWER of every pair with its interval and upper bound, the line of no difference, and the margin where there is one."""
    tests = record["tests"]
    if not tests:
        return None
    margin, level = record["settings"]["margin"], level_text(record)
    with style():
        figure = new_figure(0.9 + 0.34 * len(tests))
        axes = figure.subplots()
        axes.axvline(0, color=LINE, lw=1)
        if margin is not None:
            axes.axvline(margin, color=MUTED, lw=1, ls=(0, (2, 3)))
        for row, test in enumerate(tests):
            look = _look(record, test["b"])
            low, high = test["delta_wer_interval"]
            axes.plot([low, high], [row, row], color=look["color"], lw=2.2, solid_capstyle="butt")
            axes.plot([test["delta_wer_upper"]] * 2, [row - 0.22, row + 0.22], color=look["color"], lw=1.2)
            axes.plot(test["delta_wer"], row, marker=_marker(record, test["b"]), color=look["color"], ms=5)
        axes.set_yticks(range(len(tests)), [f"{clip(t['b'], 24)}\nagainst {clip(t['a'], 24)}" for t in tests])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(tests) - 0.5, -0.5)
        axes.set_xlabel("difference in WER, percentage points (left: better)")
        svg = to_svg(figure, prefix="differences", label="Differences in word error rate")
    caption = f"Point: difference. Bar: its {level} interval. Tick: upper {level} bound, the larger of bootstrap and score bound."
    if margin is not None:
        caption += f" Dotted: the margin, {number(margin)} points."
    return Plot("Differences", caption, svg)


def plot_oracle(record: Mapping[str, Any]) -> Plot | None:
    """Oracle and anti-oracle WER among the first N hypotheses, a panel each."""
    curves = record["oracle"]
    if not curves:
        return None
    with style():
        figure = new_figure(3.0)
        panels = figure.subplots(1, 2)
        largest = max(points[-1]["hypotheses"] for points in curves.values())
        sizes = sorted({point["hypotheses"] for points in curves.values() for point in points})
        for axes, key, title in zip(panels, ("oracle_wer", "anti_oracle_wer"), ("Oracle", "Anti-oracle"), strict=True):
            for system, points in curves.items():
                axes.plot(
                    [p["hypotheses"] for p in points],
                    [p[key] for p in points],
                    marker=_marker(record, system),
                    ms=3.5,
                    lw=1.4,
                    label=clip(system, 24),
                    **_look(record, system),
                )
            if largest > 1:
                axes.set_xscale("log")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel("first N hypotheses of every list")
        panels[0].set_ylabel("WER, %")
        panels[1].legend(fontsize=8)
        svg = to_svg(figure, prefix="oracle", label="Oracle and anti-oracle word error rate")
    caption = "What the best and the worst possible choice among the first N hypotheses would give. Systems that rank the same hypotheses end at the same point."
    return Plot("Oracle by N", caption, svg)


def plot_weights(record: Mapping[str, Any]) -> Plot | None:
    """WER as a step function of the LM's weight; the weight that was used as a vertical line."""
    curves = record["weights"]
    if not curves:
        return None
    with style():
        figure = new_figure(3.2)
        axes = figure.subplots()
        for curve, label in _distinct(curves):
            look = _look(record, curve["system"])
            edges, errors = thinned(curve["edges"], curve["errors"])
            rates = [100 * count / curve["words"] for count in errors]
            axes.stairs(rates, edges, baseline=None, lw=1.3, label=clip(label, 60), **look)
            if curve["chosen"] is not None:
                axes.axvline(curve["chosen"], color=look["color"], lw=1, ls=(0, (2, 3)))
        axes.set_xlabel("weight of the language model's score")
        axes.set_ylabel("WER, %")
        axes.margins(x=0)
        axes.legend(fontsize=8)
        svg = to_svg(figure, prefix="weights", label="Word error rate against the language model's weight")
    caption = (
        "Exact: the winners change only where two totals cross. All other weights as they were; dotted: the weight that was used. For looking only: "
        "the lowest point of a curve was found on the very list it is shown for."
    )
    return Plot("WER against the language model's weight", caption, svg)


def _distinct(curves: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Curves with a label each; where several systems have the very same one (another order of the same lists), it is drawn once."""
    found: list[tuple[Mapping[str, Any], str]] = []
    mixed = len({curve["weight"] for curve in curves}) > 1
    for curve in curves:
        own = " (the list's own LM)" if mixed and curve["weight"] == "first_pass_lm_scale" else ""
        for place, (other, label) in enumerate(found):
            if all(curve[key] == other[key] for key in ("edges", "errors", "chosen")):
                found[place] = (other, f"{label}, {curve['system']}{own}")
                break
        else:
            found.append((curve, curve["system"] + own))
    return found


def thinned(
    edges: Sequence[float], values: Sequence[int], limit: int = MAX_DRAWN_STEPS
) -> tuple[list[float], list[int]]:
    """A step function with at most ``limit`` steps for drawing: of equal slices of its range the lowest and highest value stay."""
    if len(values) <= limit:
        return list(edges), list(values)
    low, high, num = edges[0], edges[-1], limit // 2
    slices: list[list[int]] = [[] for _ in range(num)]
    for left, value in zip(edges, values, strict=False):
        slices[min(int((left - low) / (high - low) * num), num - 1)].append(value)
    kept_edges, kept = [], []
    last = values[0]
    for place, found in enumerate(slices):
        here = found or [last]
        for half, value in enumerate((max(here), min(here)) if here[0] >= here[-1] else (min(here), max(here))):
            kept_edges.append(low + (place + half / 2) * (high - low) / num)
            kept.append(value)
        last = here[-1]
    return [*kept_edges, high], kept


def plot_bytes(record: Mapping[str, Any]) -> Plot | None:
    """WER over bytes of the language model's weight files, for the systems that have one; the first system as a line if it has none."""
    sized = {name: entry for name, entry in record["systems"].items() if entry["bytes"]}
    if not sized:
        return None
    intervals = wer_intervals(record)
    with style():
        figure = new_figure(3.2)
        axes = figure.subplots()
        axes.set_xscale("log")
        for name, entry in record["systems"].items():
            look = _look(record, name)
            if name not in sized:
                axes.axhline(entry["wer"], lw=1.1, label=clip(name, 28), **look)
                continue
            low, high = intervals.get(name, (entry["wer"], entry["wer"]))
            axes.plot([entry["bytes"]] * 2, [low, high], color=look["color"], lw=1)
            label = f"{clip(name, 28)}, {megabytes(entry['bytes'])}"
            axes.plot(
                entry["bytes"],
                entry["wer"],
                marker=_marker(record, name),
                ms=6,
                color=look["color"],
                ls="",
                label=label,
            )
        smallest, largest = min(e["bytes"] for e in sized.values()), max(e["bytes"] for e in sized.values())
        axes.set_xlim(smallest / 1.8, largest * 1.8)
        ticks = log_ticks(smallest / 1.8, largest * 1.8)
        axes.set_xticks(ticks, [megabytes(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("weight files of the language model (logarithmic)")
        axes.set_ylabel("WER, %")
        axes.legend(fontsize=8)
        svg = to_svg(figure, prefix="bytes", label="Word error rate against model bytes")
    caption = f"Bars: {level_text(record)} bootstrap interval of each rate alone; the differences above are paired and far sharper. Lines: systems without a language model of ours."
    return Plot("WER against model bytes", caption, svg)


def level_text(record: Mapping[str, Any]) -> str:
    """``95 %``: the level of intervals and bounds."""
    return f"{100 * (1 - record['settings']['alpha']):g} %"


def wer_intervals(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Bootstrap interval of each system's rate, from the first pair it is in."""
    found: dict[str, tuple[float, float]] = {}
    for test in record["tests"]:
        for name, (low, high) in zip((test["a"], test["b"]), test["wer_intervals"], strict=True):
            found.setdefault(name, (low, high))
    return found

"""The Pareto front as a picture file: bytes of the weight file (logarithmic) against loss, learned and uniform.

Takes the plain data of a front file (see :mod:`mixbits.quant.front`), and measured losses from a list of points or from
an experiment's summary. Drawn with matplotlib's own file writers, no display, no global state.

Limit: predicted losses are before training, measured ones after; they share an axis, not a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbits.errors import DataError, FormatError
from mixbits.report.figures import clip, log_ticks
from mixbits.summary import SUMMARY_FORMAT, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = ("png", "svg", "pdf")
_LEARNED, _UNIFORM, _MEASURED, _GRID = "#1b6ca8", "#7a7a7a", "#c0392b", "#dddddd"


@dataclass(frozen=True)
class MeasuredPoint:
    """A trained model: bytes of its weight file, loss increase in nats per token, name."""

    name: str
    bytes: float
    nats: float


def measured_points(data: Any, *, where: str = "measured losses") -> tuple[MeasuredPoint, ...]:
    """Points from a summary (rows with bytes and ``delta_nats``, quantized ones only), a list of ``{bytes, nats, name}``, or
    a mapping of name to ``{bytes, nats}``. Raises FormatError naming ``where``.
    """
    if isinstance(data, Mapping) and (data.get("format") == SUMMARY_FORMAT or isinstance(data.get("rows"), list)):
        rows = [r for r in Summary.from_json(data, where=where).rows if r.name.split("-")[0] != "full"]
        entries: list[Any] = [
            {"name": r.name, "bytes": r.bytes, "nats": r.delta_nats}
            for r in rows
            if r.bytes is not None and r.delta_nats is not None
        ]
    elif isinstance(data, Mapping):
        entries = [{"name": name, **(entry if isinstance(entry, Mapping) else {})} for name, entry in data.items()]
    elif isinstance(data, list):
        entries = data
    else:
        raise FormatError(f"{where}: expected a summary, a list of {{bytes, nats, name}}, or a mapping of name to them")
    return tuple(_measured(entry, f"{where}: point {i}") for i, entry in enumerate(entries))


def _measured(entry: Any, where: str) -> MeasuredPoint:
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where} is {entry!r:.60}; expected an object with bytes, nats and name")
    for key in ("bytes", "nats"):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{where}: {key!r} is {value!r:.60}; expected a number")
    if entry["bytes"] <= 0:
        raise FormatError(f"{where}: 'bytes' is {entry['bytes']}; expected a positive number")
    return MeasuredPoint(str(entry.get("name", "")), entry["bytes"], entry["nats"])


def check_plot_path(path: str | Path) -> Path:
    """``path`` if its ending is one that can be drawn. Raises DataError."""
    path = Path(path)
    if path.suffix.lower().lstrip(".") not in _FORMATS:
        raise DataError(f"{path}: cannot draw that kind of file; expected a name ending in .{', .'.join(_FORMATS)}")
    return path


def draw_front(front: Mapping[str, Any], path: str | Path, *, measured: Sequence[MeasuredPoint] = ()) -> Path:
    """Draw a front (plain data of its file) to ``path`` (.png, .svg or .pdf). Returns ``path``."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_plot_path(path)
    loss = "predicted_loss_increase_nats"
    learned = [(p["bytes"], p[loss]) for p in front["points"]]
    uniform = [(u["bytes"], u[loss]) for u in front["uniform"]]
    with rc_context(
        {
            "text.parse_math": False,
            "font.size": 9,
            "svg.hashsalt": "front",
            "svg.fonttype": "none",
            "axes.axisbelow": True,
        }
    ):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(*zip(*learned, strict=True), "-o", ms=3, lw=1.2, color=_LEARNED, label="learned bits, predicted")
        if uniform:
            axes.plot(
                *zip(*uniform, strict=True), "s", ms=6, mfc="none", color=_UNIFORM, label="uniform bits, predicted"
            )
        if measured:
            points = [(m.bytes, m.nats) for m in measured]
            axes.plot(*zip(*points, strict=True), "D", ms=5, color=_MEASURED, label="measured after training")
        _scale(axes, [*learned, *uniform, *((m.bytes, m.nats) for m in measured)], front["full_bytes"])
        _labels(axes, [(_short(u["spec"]), at) for u, at in zip(front["uniform"], uniform, strict=True)], _UNIFORM)
        _labels(axes, [(clip(m.name, 24), (m.bytes, m.nats)) for m in measured], _MEASURED, slanted=True)
        axes.set_ylabel("loss increase, nats per token")
        axes.set_title(f"Bytes against loss, {clip(str(front['measure']))} sensitivities", loc="left", weight="bold")
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(
            path.suffix[1:].lower(), {}
        )
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def _short(spec: str) -> str:
    """Spec text without what is usual: ``1.58-papers-row`` is ``1.58``, ``2-half-step-tensor`` stays."""
    return spec.removesuffix("-row").replace("-papers", "")


def _labels(
    axes: Axes, points: Sequence[tuple[str, tuple[float, float]]], colour: str, *, slanted: bool = False
) -> None:
    """A text beside each point, on the side with room; a point that lies upon the one before shares its text.

    ``slanted``: falling from below the point, so that texts of neighbours are parallel.
    """
    low, high = axes.get_xlim()
    last, texts = None, dict[tuple[float, float], list[str]]()
    for text, at in sorted(points, key=lambda point: point[1]):
        if last is None or at[0] > 1.04 * last[0] or not 0.5 * at[1] <= last[1] <= 2 * at[1]:
            last = at
        texts.setdefault(last, []).append(text)
    for at, names in texts.items():
        right = at[0] < low * (high / low) ** 0.75
        angle = (-60 if right else 60) if slanted else 0
        axes.annotate(
            ", ".join(names), at, xytext=(6 if right else -6, -8 if slanted else 5), textcoords="offset points",
            ha="left" if right else "right", rotation=angle, rotation_mode="anchor", fontsize=7.5, color=colour,
        )  # fmt: skip


def _scale(axes: Axes, points: Sequence[tuple[float, float]], full_bytes: float) -> None:
    """Logarithmic axes; the loss axis is linear near 0 where a loss is 0 or less."""
    sizes, losses = zip(*points, strict=True)
    axes.set_xscale("log")
    low, high = min(sizes) / 1.08, max(sizes) * 1.08
    axes.set_xlim(low, high)
    axes.set_xticks([], minor=True)
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [f"{t / 1e6:g} MB\n{full_bytes / t:.1f}×" for t in ticks])
    axes.set_xlabel("weight file (below: times smaller than float32)")
    positive = sorted(abs(y) for y in losses if y != 0)
    if min(losses) > 0:
        axes.set_yscale("log")
    elif positive:
        linear = positive[len(positive) // 10]
        axes.set_yscale("symlog", linthresh=linear)
        axes.set_ylim(
            min(losses) - 0.5 * linear if min(losses) == 0 else 1.5 * min(losses), 3 * max(max(losses), linear)
        )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, color=_GRID, lw=0.6)

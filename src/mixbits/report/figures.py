"""From a matplotlib figure to inline SVG that follows the page's light or dark colours.

A figure is drawn in marker colours (``INK``, ``LEARNED``, …), which become CSS variables in the SVG, so that one drawing serves
both colour schemes. Text stays text, ids get a prefix of their own (several SVGs share one page), and the SVG is parsed
and written as XML, so that no name of a row or unit can break out of it. Mathematics in names (``$…$``) is not interpreted.

Limit: text is laid out with DejaVu Sans and shown in the page's font, which is narrower.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
LEARNED, UNIFORM, FULL, OTHER = "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    LEARNED: "--learned",
    UNIFORM: "--uniform",
    FULL: "--full",
    OTHER: "--other",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_BITS = (
    (1, "#fbe7a6"),
    (1.58, "#f9cf73"),
    (2, "#f0ab45"),
    (3, "#e8853b"),
    (4, "#cf5a35"),
    (8, "#97334a"),
    (16, "#5a2a5c"),
)
WIDTH_INCHES = 7.4


@dataclass(frozen=True)
class Plot:
    """One drawn plot: heading, what is to be seen, and inline SVG."""

    title: str
    caption: str
    svg: str


def bits_colour(bits: float | None) -> str:
    """Fill colour of a bit-width: light = few bits, dark = many, grey = unknown."""
    return "#9a9a9a" if bits is None else min(_BITS, key=lambda entry: abs(entry[0] - bits))[1]


def bits_ink(bits: float | None) -> str:
    """Text colour that reads well on :func:`bits_colour`."""
    return "#1a1a1a" if bits is None or bits < 3.5 else "#ffffff"


def kind_colour(kind: str) -> str:
    """Marker colour of a row's kind: learned, uniform, full or anything else."""
    return {"learned": LEARNED, "uniform": UNIFORM, "full": FULL}.get(kind, OTHER)


def clip(text: str, length: int = 34) -> str:
    """Text for a label: one line, at most ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def style() -> Iterator[None]:
    """matplotlib settings for one figure; nothing global is changed."""
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "grid.color": LINE,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width, outside pyplot's global list. Call inside :func:`style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive limits, for a logarithmic axis: three to nine of them."""
    import math

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), [1 + k / 10 for k in range(90)]):
        ticks: Sequence[float] = [m * 10.0**d for d in decades for m in steps]
        found = sorted(t for t in ticks if low <= t <= high)
        if len(found) >= 4:
            break
    step = -(-len(found) // 9) or 1
    return found[::step]


def to_svg(figure: Figure, *, prefix: str, label: str) -> str:
    """The figure as an ``<svg>`` element: no width and height, marker colours as CSS variables, ids under ``prefix``."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _rewrite(name, value, prefix))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _rewrite(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == f"{{{_XLINK}}}href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    if name == "clip-path":
        return value.replace("url(#", f"url(#{prefix}-")
    if name in ("style", "fill", "stroke"):
        for colour, variable in _VARIABLES.items():
            value = value.replace(colour, f"var({variable})")
        value = re.sub(r"'DejaVu Sans'[^;]*", "var(--font)", value)
    return value

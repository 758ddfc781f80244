"""Unit names as rows and columns of a picture: layer number and kind, the common prefix dropped; bits read from specs.

``model.decoder.layers.3.self_attn.q_proj`` is layer 3, kind ``self_attn.q_proj``; a unit without a number in its name, such
as the embedding, has no layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Place = tuple[int | None, str]


def bits_of(spec: object) -> float | None:
    """Bit-width of a spec text such as ``2-half-step-row``; None if it has none."""
    try:
        value = float(str(spec).split("-", 1)[0])
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def place(unit: str) -> Place:
    """(layer number, kind) of a unit name; the first all-digit part of the name is the layer."""
    parts = unit.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) < 7:
            return int(part), ".".join(parts[:i] + parts[i + 1 :])
    return None, unit


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each name's shortest trailing parts (at the dots) that still tell it from the others."""
    distinct = list(dict.fromkeys(names))
    short: dict[str, str] = {}
    for name in distinct:
        parts = name.split(".")
        tails = (".".join(parts[-k:]) for k in range(1, len(parts)))
        others = [other for other in distinct if other != name]
        short[name] = next((t for t in tails if not any(o == t or o.endswith("." + t) for o in others)), name)
    return short


def unit_labels(units: Sequence[str]) -> dict[str, str]:
    """A short label per unit: kind, then layer number where there is one."""
    kinds = short_names(place(unit)[1] for unit in units)
    labels = {}
    for unit in units:
        layer, kind = place(unit)
        labels[unit] = kinds[kind] if layer is None else f"{layer} {kinds[kind]}"
    return labels

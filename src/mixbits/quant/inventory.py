"""A model inventory as JSON, so that a sensitivity file can be solved for any budget without the model.

The reader trusts nothing: every field is checked and a bad one is named.
"""

from __future__ import annotations

from typing import Any

from mixbits.errors import FormatError
from mixbits.spec import ModelInventory, Unit

_KINDS = ("linear", "conv1d", "embedding")


def inventory_to_json(inventory: ModelInventory) -> dict[str, Any]:
    """Plain data for a JSON file."""
    return {
        "units": [
            {"name": u.name, "weight": u.weight, "rows": u.rows, "cols": u.cols, "kind": u.kind, "tied": list(u.tied)}
            for u in inventory.units
        ],
        "others": [[name, list(shape)] for name, shape in inventory.others],
        "unused_position_weights": inventory.unused_position_weights,
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _unit(data: Any, where: str) -> Unit:
    if not isinstance(data, dict):
        raise FormatError(f"{where} is not an object")
    for key in ("name", "weight"):
        if not isinstance(data.get(key), str) or not data[key]:
            raise FormatError(f"{where}: {key!r} is {data.get(key)!r}; expected a name")
    for key in ("rows", "cols"):
        if not _is_count(data.get(key)) or data[key] == 0:
            raise FormatError(f"{where}: {key!r} is {data.get(key)!r}; expected a positive integer")
    if data.get("kind") not in _KINDS:
        raise FormatError(f"{where}: 'kind' is {data.get('kind')!r}; expected one of {', '.join(_KINDS)}")
    tied = data.get("tied", [])
    if not isinstance(tied, list) or not all(isinstance(t, str) for t in tied):
        raise FormatError(f"{where}: 'tied' is {tied!r}; expected a list of module names")
    return Unit(data["name"], data["weight"], data["rows"], data["cols"], data["kind"], tuple(tied))


def inventory_from_json(data: Any, *, where: str = "inventory") -> ModelInventory:
    """Inverse of :func:`inventory_to_json`. Raises FormatError naming ``where`` and the field."""
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("units"), list)
        or not isinstance(data.get("others"), list)
    ):
        raise FormatError(f"{where}: expected an object with the lists 'units' and 'others'")
    units = tuple(_unit(u, f"{where}: unit {i}") for i, u in enumerate(data["units"]))
    if not units:
        raise FormatError(f"{where}: 'units' is empty; there is nothing to allocate")
    others = []
    for i, entry in enumerate(data["others"]):
        good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)
        if not good or not all(_is_count(n) for n in entry[1]):
            raise FormatError(f"{where}: other tensor {i} is {entry!r}; expected [name, [sizes]]")
        others.append((entry[0], tuple(entry[1])))
    for what, names in (
        ("unit", [u.name for u in units]),
        ("tensor", [u.weight for u in units] + [n for n, _ in others]),
    ):
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise FormatError(f"{where}: {what} {twice[0]} is listed more than once")
    unused = data.get("unused_position_weights", 0)
    if not _is_count(unused):
        raise FormatError(f"{where}: 'unused_position_weights' is {unused!r}; expected a count")
    return ModelInventory(units, tuple(others), unused)

"""Groups of units that share one spec: a matrix each, an attention or feed-forward block, or a whole layer.

The papers search widths per sublayer; kernels and readers may want fewer different widths. Groups come from module
names (OPT, Llama, GPT-2, GPT-NeoX, BERT and T5 style: ``...layers.N.self_attn.q_proj``, ``...h.N.mlp.c_fc``) and from lists that
a user gives. Embeddings, and whatever is outside the numbered layers (softmax, position table), are always groups of
their own unless a user's list names them.

Limit: names are all that is looked at. A matrix of a layer whose block is not recognized is a group of its own at
granularity ``sublayer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from mixbits.errors import SpecError
from mixbits.spec import ModelInventory, QuantSpec, Unit

UnitGranularity = Literal["matrix", "sublayer", "layer"]
Groups = tuple[tuple[str, ...], ...]

_LAYER_WORDS = frozenset({"layers", "layer", "h", "blocks", "block"})
_FEED_FORWARD = frozenset(
    {"mlp", "ffn", "ff", "feed_forward", "feedforward", "fc1", "fc2", "linear1", "linear2", "gate_proj", "up_proj"}
    | {"down_proj", "c_fc", "w1", "w2", "w3", "intermediate", "output", "densereludense", "block_sparse_moe"}
)


def _place(name: str) -> tuple[str, str] | None:
    """(layer, block) of a unit name, e.g. ("model.layers.3", "self_attn"); block "" if unknown; None outside the
    layers.
    """
    parts = name.split(".")
    for i in range(1, len(parts)):
        if parts[i].isdecimal() and parts[i - 1] in _LAYER_WORDS:
            break
    else:
        return None
    rest = [part.lower() for part in parts[i + 1 :]]
    attention = next((part for part in rest if "attn" in part or "attention" in part), "")
    block = attention or ("feed_forward" if _FEED_FORWARD & set(rest) else "")
    return ".".join(parts[: i + 1]), block


def _key(unit: Unit, granularity: UnitGranularity) -> tuple[str, ...]:
    place = _place(unit.name)
    if granularity == "matrix" or unit.kind == "embedding" or place is None:
        return ("unit", unit.name)
    layer, block = place
    if granularity == "layer":
        return ("layer", layer)
    return ("block", layer, block) if block else ("unit", unit.name)


def matching_units(inventory: ModelInventory, pattern: str) -> tuple[str, ...]:
    """Names of the units that ``pattern`` names: a unit, a module tied to one, or an fnmatch pattern of either.

    Raises SpecError if it names none.
    """
    names = {u.name: (u.name, *u.tied) for u in inventory.units}
    exact = tuple(name for name, also in names.items() if pattern in also)
    found = exact or tuple(name for name, also in names.items() if any(fnmatchcase(n, pattern) for n in also))
    if not found:
        what = (
            f"pattern {pattern!r} matches no unit" if any(c in pattern for c in "*?[") else f"unknown unit {pattern!r}"
        )
        raise SpecError(f"{what}; the model has {len(names)} units, e.g. {inventory.units[0].name!r}")
    return found


def matching_specs(inventory: ModelInventory, specs: Iterable[tuple[str, QuantSpec]]) -> dict[str, QuantSpec]:
    """Unit name -> spec from (name or pattern, spec) pairs. Raises SpecError: no match, or two specs for a unit."""
    found: dict[str, QuantSpec] = {}
    for pattern, spec in specs:
        for name in matching_units(inventory, pattern):
            if found.setdefault(name, spec) != spec:
                raise SpecError(f"unit {name!r} is to be both {found[name]} and {spec} ({pattern!r}); give it one spec")
    return found


def group_units(
    inventory: ModelInventory, granularity: UnitGranularity = "matrix", lists: Sequence[Sequence[str]] = ()
) -> Groups:
    """All units in groups that share a spec, in the order of each group's first unit in the file.

    lists: the user's own groups, each a list of names or fnmatch patterns; they come first, ``granularity`` groups what is
    left. Raises SpecError: unknown granularity, a name or pattern without a unit, an empty list, lists that overlap.
    """
    if granularity not in get_args(UnitGranularity):
        raise SpecError(f"granularity is {granularity!r}; expected one of {', '.join(get_args(UnitGranularity))}")
    key_of: dict[str, tuple[str, ...]] = {}
    for i, patterns in enumerate(lists):
        if isinstance(patterns, str) or not patterns:
            raise SpecError(f"group {i + 1} is {patterns!r}; expected a list of unit names or patterns")
        for name in dict.fromkeys(n for pattern in patterns for n in matching_units(inventory, pattern)):
            if name in key_of:
                first = ", ".join(lists[int(key_of[name][1])])
                raise SpecError(
                    f"unit {name!r} is in two groups: {first} and {', '.join(patterns)}; groups must not overlap"
                )
            key_of[name] = ("list", str(i))
    groups: dict[tuple[str, ...], list[str]] = {}
    for unit in inventory.units:
        groups.setdefault(key_of.get(unit.name) or _key(unit, granularity), []).append(unit.name)
    return tuple(map(tuple, groups.values()))


def complete_groups(inventory: ModelInventory, groups: Sequence[Sequence[str]] | None) -> Groups:
    """``groups`` with every unit not named as a group of its own. Raises SpecError: unknown unit, unit named twice."""
    known = {u.name: i for i, u in enumerate(inventory.units)}
    seen: set[str] = set()
    for group in groups or ():
        for name in group:
            if name not in known:
                raise SpecError(f"a group names unknown unit {name!r}; the model has e.g. {inventory.units[0].name!r}")
            if name in seen:
                raise SpecError(f"unit {name!r} is named twice in the groups; groups must not overlap")
            seen.add(name)
    given = [tuple(sorted(group, key=known.__getitem__)) for group in groups or () if group]
    return tuple(sorted(given + [(name,) for name in known if name not in seen], key=lambda group: known[group[0]]))


def group_spec(group: Sequence[str], fixed: Mapping[str, QuantSpec]) -> QuantSpec | None:
    """The spec that ``fixed`` gives the units of a group; None if it names none of them.

    Raises SpecError if only some are fixed, or in different specs: then the group could not share one.
    """
    found = {fixed.get(name) for name in group}
    if len(found) == 1:
        return found.pop()
    held = next(name for name in group if name in fixed)
    other = next(name for name in group if fixed.get(name) != fixed[held])
    how = f"fixed at {fixed[other]}" if other in fixed else "free"
    raise SpecError(
        f"unit {held!r} is fixed at {fixed[held]}, but {other!r}, which shares its spec, is {how}; fix all {len(group)} units of "
        "the group alike, or choose a finer granularity"
    )

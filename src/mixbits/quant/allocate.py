"""Bits per unit under an exact byte budget for the whole weight file: an integer program solved to optimality.

Minimise the sum of predicted loss increases over one spec a unit, such that header, scales, codes, norms,
biases and positions together take at most ``max_bytes`` (the very bytes of
:func:`mixbits.spec.predicted_bytes`). The papers name no solver; this one is exact (see
:mod:`mixbits.quant.knapsack`), and a budget that cannot be met is refused at once.

Rules: a negative sensitivity counts as 0 (bits never hurt), which provenance tells; of specs that predict the
same loss the smaller is taken; nothing assumes that more bits predict less loss. A unit in ``fixed`` has its
spec; if that was not measured (16 bits, say), its loss counts as 0, which provenance tells.

Limits: units are taken to act independently, as the sensitivities are. Above 300 units the answer is proved to
be within 10^-4 of the optimum rather than equal to it; ``gap_nats`` in provenance says what was proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from mixbits.errors import SpecError
from mixbits.quant.filesize import FileSizes
from mixbits.quant.knapsack import solve
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import (
    BitAllocation,
    ModelInventory,
    QuantSpec,
    bits_per_weight,
    compression_ratio,
    predicted_bytes,
)


def budget_bytes(
    inventory: ModelInventory,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    bits_per_weight: float | None = None,
) -> int:
    """The largest file that meets the one target given; exactly one is. Raises SpecError."""
    given = {"ratio": ratio, "bytes": bytes, "bits_per_weight": bits_per_weight}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        got = ", ".join(named) or "none"
        raise SpecError(f"expected exactly one of ratio, bytes, bits_per_weight as the budget; got {got}")
    ((name, value),) = named.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise SpecError(f"{name} is {value!r}; expected a positive number")
    exact = Fraction(value)
    if name == "ratio":
        return math.floor(inventory.full_bytes / exact)
    if name == "bits_per_weight":
        return math.floor(exact * inventory.num_parameters / 8)
    return math.floor(exact)


def _candidates(
    inventory: ModelInventory,
    sensitivities: Sensitivities,
    specs: Sequence[QuantSpec] | None,
    fixed: Mapping[str, QuantSpec],
) -> list[list[QuantSpec]]:
    """Per unit the specs it may take, smallest bit-width first."""
    result = []
    for unit in inventory.units:
        if unit.name in fixed:
            result.append([fixed[unit.name]])
            continue
        measured = sensitivities.units[unit.name].loss_increase
        wanted = list(dict.fromkeys(specs if specs is not None else measured))
        missing = [s for s in wanted if s not in measured]
        if missing:
            raise SpecError(
                f"unit {unit.name}: spec {missing[0]} was not measured; the sensitivities hold "
                f"{', '.join(map(str, measured))}: measure again with it, or leave it out"
            )
        result.append(sorted(wanted))
    return result


def _values(
    sensitivities: Sensitivities, names: Sequence[str], candidates: Sequence[Sequence[QuantSpec]]
) -> np.ndarray:
    """Clamped predicted losses (G, S); infinite: no such option; unmeasured (fixed) specs count 0."""
    value = np.full((len(candidates), max(map(len, candidates))), np.inf)
    for g, (name, specs) in enumerate(zip(names, candidates, strict=True)):
        measured = sensitivities.units[name].loss_increase
        value[g, : len(specs)] = [max(0.0, measured.get(s, 0.0)) for s in specs]
    return value


def _drop_dominated(value: np.ndarray, sizes: FileSizes) -> np.ndarray:
    """``value``, infinite where another option of the unit is no worse in loss, data and header."""
    result = value.copy()
    order = np.lexsort((sizes.entries, value, sizes.data), axis=1)
    for g, columns in enumerate(order):
        kept: list[int] = []
        for i in columns:
            if any(value[g, k] <= value[g, i] and sizes.entries[g, k] <= sizes.entries[g, i] for k in kept):
                result[g, i] = np.inf
            elif np.isfinite(value[g, i]):
                kept.append(int(i))
    return result


def check_budget(inventory: ModelInventory, specs: Sequence[QuantSpec], *, max_bytes: int) -> None:
    """Raise SpecError, naming the smallest size, if no choice of ``specs`` fits; needs no sensitivities."""
    if not specs:
        raise SpecError("no specs to choose among; give at least one, e.g. 1,1.58,2,4")
    candidates = [sorted(set(specs))] * len(inventory.units)
    _check_size(inventory, candidates, FileSizes.of(inventory, candidates), max_bytes)


def _check_size(
    inventory: ModelInventory, candidates: Sequence[Sequence[QuantSpec]], sizes: FileSizes, max_bytes: int
) -> None:
    exists = np.arange(sizes.data.shape[1]) < np.array([[len(c)] for c in candidates])
    choice = np.where(exists, sizes.data + sizes.entries, np.iinfo(np.int64).max).argmin(1)
    smallest = _allocation([u.name for u in inventory.units], candidates, choice)
    needed = predicted_bytes(inventory, smallest)
    if needed <= max_bytes:
        return
    names = {str(s) for s in smallest.specs.values()}
    how = (
        f"all units at {names.pop()}" if len(names) == 1 else f"each unit at its smallest of {', '.join(sorted(names))}"
    )
    raise SpecError(
        f"a budget of {max_bytes} bytes cannot be met: the smallest file possible with these specs is {needed} bytes, ratio "
        f"{math.floor(100 * compression_ratio(inventory, needed)) / 100:.2f} ({bits_per_weight(inventory, needed):.3f} bits "
        f"per weight), {how}; raise the budget or allow smaller specs"
    )


def _allocation(names: Sequence[str], candidates: Sequence[Sequence[QuantSpec]], choice: np.ndarray) -> BitAllocation:
    return BitAllocation({n: c[i] for n, c, i in zip(names, candidates, choice, strict=True)})


def allocate(
    inventory: ModelInventory,
    sensitivities: Sensitivities,
    *,
    max_bytes: int,
    specs: Sequence[QuantSpec] | None = None,
    fixed: Mapping[str, QuantSpec] | None = None,
) -> BitAllocation:
    """The allocation of least predicted loss whose weight file takes at most ``max_bytes``.

    specs: choose among these only (default: all that were measured); fixed: unit name -> spec it must have.
    Provenance holds solver, gap, budget, predicted bytes and loss. Raises SpecError: budget too small (naming
    the smallest size), unknown unit, spec not measured, sensitivities of another model.
    """
    fixed = dict(fixed or {})
    _check(inventory, sensitivities, max_bytes, specs, fixed)
    candidates = _candidates(inventory, sensitivities, specs, fixed)
    names = [u.name for u in inventory.units]

    sizes = FileSizes.of(inventory, candidates)
    value = _drop_dominated(_values(sensitivities, names, candidates), sizes)
    allocation = partial(_allocation, names, candidates)
    _check_size(inventory, candidates, sizes, max_bytes)
    smallest = np.where(np.isfinite(value), sizes.data + sizes.entries, np.iinfo(np.int64).max).argmin(1)
    solution = solve(value, sizes, max_bytes, partial(_fits, inventory, allocation, max_bytes), smallest)
    best = allocation(solution.choice)
    facts = _provenance(inventory, sensitivities, best, fixed)
    facts |= {"budget_bytes": max_bytes, "gap_nats": solution.gap}
    return BitAllocation(best.specs, facts)


def _fits(
    inventory: ModelInventory, allocation: Callable[[np.ndarray], BitAllocation], max_bytes: int, choice: np.ndarray
) -> bool:
    return predicted_bytes(inventory, allocation(choice)) <= max_bytes


def _check(
    inventory: ModelInventory,
    sensitivities: Sensitivities,
    max_bytes: int,
    specs: Sequence[QuantSpec] | None,
    fixed: Mapping[str, QuantSpec],
) -> None:
    if sensitivities.inventory != inventory:
        raise SpecError("the sensitivities were measured on a model with other tensors; measure this model")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise SpecError(f"max_bytes is {max_bytes!r}; expected a positive whole number of bytes")
    if specs is not None and not specs:
        raise SpecError("no specs to choose among; give at least one, e.g. 1,1.58,2,4")
    unknown = sorted(set(fixed) - {u.name for u in inventory.units})
    if unknown:
        raise SpecError(f"fixed names unknown unit {unknown[0]!r}; the model has e.g. {inventory.units[0].name!r}")


def _provenance(
    inventory: ModelInventory, sensitivities: Sensitivities, best: BitAllocation, fixed: Mapping[str, QuantSpec]
) -> dict[str, Any]:
    from importlib.metadata import version

    losses, errors, clamped, unmeasured = [], [], [], []
    for name, spec in best.specs.items():
        unit = sensitivities.units[name]
        if any(value < 0 for value in unit.loss_increase.values()):
            clamped.append(name)
        if spec not in unit.loss_increase:
            unmeasured.append(name)
            continue
        losses.append(max(0.0, unit.loss_increase[spec]))
        errors.append(unit.stderr[spec])
    size = predicted_bytes(inventory, best)
    bound = math.fsum(errors)
    return {
        "method": f"integer program over {sensitivities.measure} sensitivities",
        "measure": sensitivities.measure,
        "solver": f"scipy.optimize.milp (HiGHS), scipy {version('scipy')}, mip_rel_gap 0",
        "predicted_bytes": size,
        "compression_ratio": compression_ratio(inventory, size),
        "bits_per_weight": bits_per_weight(inventory, size),
        "predicted_loss_increase_nats": math.fsum(losses),
        # Units share probes, so that their errors are correlated: the sum bounds the standard error of the total.
        "predicted_loss_increase_stderr_at_most_nats": bound if math.isfinite(bound) else None,
        "negative_sensitivities_clamped_to_zero": clamped,
        "fixed": {name: str(spec) for name, spec in fixed.items()},
        "fixed_but_not_measured_counted_as_zero": unmeasured,
        "sensitivities": dict(sensitivities.provenance),
    }

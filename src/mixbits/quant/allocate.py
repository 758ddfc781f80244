"""Bits per unit under an exact byte budget for the whole weight file: an integer program solved to optimality.

Minimise the sum of predicted loss increases over one spec a unit (or a group of units that share one), such that
header, scales, codes, norms, biases and positions together take at most ``max_bytes`` (the very bytes of
:func:`mixbits.spec.predicted_bytes`). The papers name no solver; this one is exact (see
:mod:`mixbits.quant.knapsack`), and a budget that cannot be met is refused at once. No uniform allocation that fits
predicts less loss (:mod:`mixbits.quant.problem`).

Rules: a negative sensitivity counts as 0 (bits never hurt), unit by unit, which provenance tells; of specs that predict
the same loss the smaller is taken; nothing assumes that more bits predict less loss. A unit in ``fixed`` has its
spec; if that was not measured (16 bits, say), its loss counts as 0, which provenance tells. Between two achievable
sizes the best that fits is taken; provenance tells the bytes that stay unused and the next larger file that helps.

Limits: units are taken to act independently, as the sensitivities are. Above 300 groups the answer is proved to
be within 10^-4 of the optimum rather than equal to it; ``gap_nats`` in provenance says what was proved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from mixbits.errors import SpecError
from mixbits.quant.problem import Problem
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


def check_budget(
    inventory: ModelInventory,
    specs: Sequence[QuantSpec],
    *,
    max_bytes: int,
    groups: Sequence[Sequence[str]] | None = None,
) -> None:
    """Raise SpecError, naming the smallest size, if no choice of ``specs`` fits; needs no sensitivities."""
    Problem.of_sizes(inventory, specs, groups).check_size(max_bytes)


def allocate(
    inventory: ModelInventory,
    sensitivities: Sensitivities,
    *,
    max_bytes: int,
    specs: Sequence[QuantSpec] | None = None,
    fixed: Mapping[str, QuantSpec] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
) -> BitAllocation:
    """The allocation of least predicted loss whose weight file takes at most ``max_bytes``.

    specs: choose among these only (default: all that were measured); fixed: unit name -> spec it must have; groups:
    units that must share a spec (:func:`mixbits.quant.groups.group_units`; a unit not named is a group of its own).
    Provenance holds solver, gap, budget, predicted bytes and loss, the next larger file that helps, and a hash of the
    solver's input. Raises SpecError: budget too small (naming the smallest size), unknown unit, spec not measured,
    sensitivities of another model, groups that overlap or are fixed in part.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise SpecError(f"max_bytes is {max_bytes!r}; expected a positive whole number of bytes")
    problem = Problem.of(inventory, sensitivities, specs=specs, fixed=fixed, groups=groups)
    solution = problem.solve(max_bytes)
    best = problem.allocation(solution.choice)
    facts = solution_facts(problem, sensitivities, best)
    larger = problem.next_larger(solution, max_bytes)
    facts |= {
        "budget_bytes": max_bytes,
        "unused_bytes": max_bytes - facts["predicted_bytes"],
        "gap_nats": solution.gap,
        "next_larger": None
        if larger is None
        else {
            "bytes": larger.num_bytes,
            "predicted_loss_increase_nats": problem.loss(larger.choice),
            "proved_smallest": larger.is_smallest,
        },
        "solver_input_sha256": problem.solver_input_sha256(max_bytes),
    }
    return BitAllocation(best.specs, facts)


def solution_facts(problem: Problem, sensitivities: Sensitivities, best: BitAllocation) -> dict[str, Any]:
    """Provenance of an allocation: method, solver, sizes, predicted loss, and what was clamped or not measured."""
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
    size = predicted_bytes(problem.inventory, best)
    bound = math.fsum(errors)
    return {
        "method": f"integer program over {sensitivities.measure} sensitivities",
        "measure": sensitivities.measure,
        "solver": f"scipy.optimize.milp (HiGHS), scipy {version('scipy')}, mip_rel_gap 0",
        "predicted_bytes": size,
        "compression_ratio": compression_ratio(problem.inventory, size),
        "bits_per_weight": bits_per_weight(problem.inventory, size),
        "predicted_loss_increase_nats": math.fsum(losses),
        # Units share probes, so that their errors are correlated: the sum bounds the standard error of the total.
        "predicted_loss_increase_stderr_at_most_nats": bound if math.isfinite(bound) else None,
        "negative_sensitivities_clamped_to_zero": clamped,
        "fixed": {name: str(spec) for name, spec in problem.fixed.items()},
        "fixed_but_not_measured_counted_as_zero": unmeasured,
        "groups": [list(names) for names in problem.groups if len(names) > 1],
        "sensitivities": dict(sensitivities.provenance),
    }


def allocation_notes(allocation: BitAllocation) -> list[str]:
    """Sentences on what :func:`allocate` could not use or had to clamp: bytes between two sizes, negative sensitivities."""
    facts, notes = allocation.provenance, []
    larger = facts["next_larger"]
    if larger is not None:
        proved = "the next size that helps" if larger["proved_smallest"] else "a larger size that helps"
        notes.append(
            f"{facts['unused_bytes']:,} bytes stay unused; {proved} is {larger['bytes']:,} bytes "
            f"({larger['predicted_loss_increase_nats']:.4g} nats)"
        )
    clamped = facts["negative_sensitivities_clamped_to_zero"]
    if clamped:
        notes.append(f"{len(clamped)} unit(s) with a negative sensitivity counted as 0: {', '.join(clamped[:5])}")
    return notes

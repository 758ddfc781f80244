"""Interaction-aware measuring: measure around the current allocation, allocate again, until nothing changes.

Measured one at a time on the full-precision model, units look independent; once the others are quantized, a unit may matter
more or less. Each round measures with the other units held at the last round's allocation and solves again: a fixed point is an
allocation that is best under its own sensitivities. Rounds need not get better, and may go in a circle, so every round's
allocation is measured as a whole and the best one is picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mixbits.errors import DataError, SpecError
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation


@dataclass(frozen=True)
class Round:
    """One round: what was measured (the first on the full-precision model), the allocation of it, and what it leads to.

    ``predicted_loss_increase``: sum over units in nats per token, negative ones as 0; ``measured_loss``: as the callable gives it.
    """

    sensitivities: Sensitivities
    allocation: BitAllocation
    predicted_loss_increase: float
    measured_loss: float


@dataclass(frozen=True)
class Iteration:
    """All rounds, and how it ended: ``same`` allocation as the round before, ``circle`` (as an earlier round), ``rounds`` used up."""

    rounds: tuple[Round, ...]
    ended: Literal["same", "circle", "rounds"]

    @property
    def best(self) -> Round:
        """The round of the lowest measured loss; the earliest of equals."""
        return min(self.rounds, key=lambda r: r.measured_loss)

    @property
    def cost_forward_backwards(self) -> float:
        """Cost of all measuring, in forward-backward passes over the measured tokens; measured losses not included."""
        return math.fsum(r.sensitivities.cost_forward_backwards for r in self.rounds)


def iterate_allocation(
    measure_fn: Callable[[BitAllocation | None], Sensitivities],
    allocate_fn: Callable[[Sensitivities], BitAllocation],
    rounds: int,
    *,
    measured_loss: Callable[[BitAllocation], float],
) -> Iteration:
    """Measure, allocate, and again around the allocation, for at most ``rounds`` rounds.

    measure_fn(around): sensitivities around an allocation, None at first; allocate_fn: solves under the budget; measured_loss: the
    loss of the model with all units quantized at an allocation, best on held-out text. An allocation that a round
    repeats is not measured twice. Raises SpecError for no rounds, DataError for a loss that is not finite.
    """
    if rounds < 1:
        raise SpecError(f"rounds is {rounds}; expected at least 1 (which is plain measuring)")
    found: list[Round] = []
    around: BitAllocation | None = None
    for _ in range(rounds):
        sensitivities = measure_fn(around)
        allocation = allocate_fn(sensitivities)
        same = next((r for r in found if dict(r.allocation.specs) == dict(allocation.specs)), None)
        loss = measured_loss(allocation) if same is None else same.measured_loss
        if not math.isfinite(loss):
            raise DataError(f"round {len(found) + 1}: the measured loss is {loss}; check the model and the text")
        predicted = math.fsum(
            max(0.0, sensitivities.units[name].loss_increase.get(spec, 0.0)) for name, spec in allocation.specs.items()
        )
        last = found[-1] if found else None
        found.append(Round(sensitivities, allocation, predicted, loss))
        if same is not None:
            return Iteration(
                tuple(found),
                "same" if last is not None and same.allocation.specs == last.allocation.specs else "circle",
            )
        around = allocation
    return Iteration(tuple(found), "rounds")

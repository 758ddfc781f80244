"""How large the searched model is expected to get, in bytes of its file, and what pulls it to the budget.

A group k of units takes ``bytes[k, n]`` in candidate n, so that choices drawn with probabilities p have the expected size
``E = fixed + sum p[k, n] * bytes[k, n]``; ``fixed`` is every other tensor and the largest header of any uniform choice (headers
differ by a few multiples of 64 bytes between choices), so that E errs on the large side and nothing else is rounded.

:class:`LagrangePenalty` adds ``max(0, m + damping * v)`` times the gradient of the violation ``v = (E - budget) / budget``
to that of the loss, and raises the multiplier m by ``rate * v`` (never below zero): the augmented Lagrangian of an inequality
(Hestenes; Powell; Rockafellar, 1973). At a stationary point the budget is met exactly, or it is slack and m is 0: no weight to
be set by hand. :class:`PapersPenalty` is ``beta * sum p[k, n] * sqrt(bits of n)`` (Xu et al., 2021), which counts every group
alike, whatever its size, and leaves the size to a hand-set beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mixbits.errors import SpecError
from mixbits.quant.allocate import check_budget
from mixbits.quant.groups import Groups
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, predicted_bytes


@dataclass(frozen=True)
class ExpectedSize:
    """``group_bytes``: float64 (K, N), of each group in each candidate; ``fixed_bytes``: of everything else, header included."""

    group_bytes: torch.Tensor
    fixed_bytes: int

    @classmethod
    def of(cls, inventory: ModelInventory, groups: Groups, candidates: Sequence[QuantSpec]) -> ExpectedSize:
        """Sizes of the groups' units; header and other tensors from whole uniform files."""
        units = {u.name: u for u in inventory.units}
        table = [
            [sum(spec.unit_bytes(units[n].rows, units[n].cols) for n in group) for spec in candidates]
            for group in groups
        ]
        fixed = max(
            predicted_bytes(inventory, BitAllocation.uniform(inventory, spec)) - sum(row[i] for row in table)
            for i, spec in enumerate(candidates)
        )
        return cls(torch.tensor(table, dtype=torch.float64), fixed)

    def expected(self, probabilities: torch.Tensor) -> float:
        """Expected bytes of the file for ``probabilities`` (K, N)."""
        return self.fixed_bytes + float((probabilities.double() * self.group_bytes).sum())


def check_search_budget(
    inventory: ModelInventory, candidates: Sequence[QuantSpec], *, max_bytes: int, groups: Groups | None = None
) -> None:
    """Raise SpecError unless ``max_bytes`` lies between the smallest and the largest file of ``candidates``."""
    check_budget(inventory, candidates, max_bytes=max_bytes, groups=groups)
    largest = {u.name: max(candidates, key=lambda s: s.unit_bytes(u.rows, u.cols)) for u in inventory.units}
    num_bytes = predicted_bytes(inventory, BitAllocation(largest))
    if max_bytes >= num_bytes:
        raise SpecError(
            f"a budget of {max_bytes} bytes leaves nothing to search: the largest file possible with these candidates is "
            f"{num_bytes} bytes; lower the budget, or add larger candidates"
        )


class Penalty(Protocol):
    """What is added to the loss to make the model small."""

    multiplier: float

    def gradient(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to ``probabilities`` (K, N), float64."""

    def update(self, probabilities: torch.Tensor) -> None:
        """After an architecture step."""


class LagrangePenalty:
    """Multiplier (nats) of the relative violation of the budget; see the module's text."""

    def __init__(self, size: ExpectedSize, max_bytes: int, *, rate: float = 0.1, damping: float = 10.0) -> None:
        if not (rate > 0 and damping >= 0):
            raise SpecError(f"rate is {rate!r}, damping {damping!r}; expected rate > 0 and damping >= 0")
        self.size, self.max_bytes, self.rate, self.damping, self.multiplier = size, max_bytes, rate, damping, 0.0

    def violation(self, probabilities: torch.Tensor) -> float:
        """Expected bytes above the budget, over the budget; negative below it."""
        return (self.size.expected(probabilities) - self.max_bytes) / self.max_bytes

    def gradient(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Gradient of the augmented Lagrangian's term."""
        force = max(0.0, self.multiplier + self.damping * self.violation(probabilities))
        return force * self.size.group_bytes / self.max_bytes

    def update(self, probabilities: torch.Tensor) -> None:
        """Projected ascent of the multiplier."""
        self.multiplier = max(0.0, self.multiplier + self.rate * self.violation(probabilities))


class PapersPenalty:
    """``beta * sum p sqrt(n)`` over groups and candidates of n bits."""

    def __init__(self, candidates: Sequence[QuantSpec], *, beta: float) -> None:
        if not beta >= 0:
            raise SpecError(f"beta is {beta!r}; expected at least 0")
        self.multiplier = beta
        self._roots = torch.tensor([spec.bit_width**0.5 for spec in candidates], dtype=torch.float64)

    def gradient(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The same for all groups."""
        return (self.multiplier * self._roots).expand(probabilities.shape)

    def update(self, probabilities: torch.Tensor) -> None:
        """Nothing: beta is fixed."""

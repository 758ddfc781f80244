"""Bit allocation as a problem: one option a group of units, its predicted loss and its exact bytes; and its solution.

What :mod:`mixbits.quant.allocate` (one budget) and :mod:`mixbits.quant.front` (all budgets) share. A group's value is
the sum of its units' predicted losses, each clamped at 0 on its own: clamping the sum instead would let one unit's
negative value (noise, or a saddle) pay for another's real loss, and coarser groups would seem better than finer ones.

Never worse than uniform: what is proved optimal cannot be; what is not proved is held against every uniform allocation
that fits, and the better one is returned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixbits.errors import SpecError
from mixbits.quant.filesize import FileSizes
from mixbits.quant.groups import Groups, complete_groups, group_spec
from mixbits.quant.knapsack import Larger, Solution, next_larger, smallest, solve
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, bits_per_weight, compression_ratio, predicted_bytes


@dataclass(frozen=True)
class Problem:
    """K groups with up to S options each.

    ``candidates``: per group its specs, smallest bit-width first; ``value``: clamped predicted losses (K, S), infinite
    where no option is; ``fixed``: unit -> the spec it must have.
    """

    inventory: ModelInventory
    groups: Groups
    candidates: tuple[tuple[QuantSpec, ...], ...]
    value: np.ndarray
    sizes: FileSizes
    fixed: Mapping[str, QuantSpec]

    @classmethod
    def of(
        cls,
        inventory: ModelInventory,
        sensitivities: Sensitivities,
        *,
        specs: Sequence[QuantSpec] | None = None,
        fixed: Mapping[str, QuantSpec] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> Problem:
        """The problem for these sensitivities. Raises SpecError: another model, unknown or doubly grouped unit, spec not
        measured, no specs, units of a group fixed differently.
        """
        if sensitivities.inventory != inventory:
            raise SpecError("the sensitivities were measured on a model with other tensors; measure this model")
        _check_specs(specs)
        fixed = dict(fixed or {})
        unknown = sorted(set(fixed) - {u.name for u in inventory.units})
        if unknown:
            raise SpecError(f"fixed names unknown unit {unknown[0]!r}; the model has e.g. {inventory.units[0].name!r}")
        complete = complete_groups(inventory, groups)
        known: dict[tuple[QuantSpec, ...], tuple[QuantSpec, ...]] = {}
        options = (tuple(_candidates(group, sensitivities, specs, fixed)) for group in complete)
        candidates = tuple(known.setdefault(c, c) for c in options)  # equal ones are one object
        value = _values(sensitivities, complete, candidates)
        return cls(inventory, complete, candidates, value, FileSizes.of(inventory, candidates, complete), fixed)

    @classmethod
    def of_sizes(
        cls, inventory: ModelInventory, specs: Sequence[QuantSpec], groups: Sequence[Sequence[str]] | None = None
    ) -> Problem:
        """The problem without sensitivities: sizes alone, every loss 0. Raises SpecError for no specs or bad groups."""
        _check_specs(specs)
        complete = complete_groups(inventory, groups)
        candidates = (tuple(sorted(set(specs), key=_by_width)),) * len(complete)
        value = np.zeros((len(complete), len(candidates[0])))
        return cls(inventory, complete, candidates, value, FileSizes.of(inventory, candidates, complete), {})

    def allocation(self, choice: np.ndarray) -> BitAllocation:
        """Specs of all units, in file order, for one option a group (K,)."""
        specs = {n: c[i] for names, c, i in zip(self.groups, self.candidates, choice, strict=True) for n in names}
        return BitAllocation({u.name: specs[u.name] for u in self.inventory.units})

    def num_bytes(self, choice: np.ndarray) -> int:
        """Exact bytes of the file for one option a group (K,)."""
        return predicted_bytes(self.inventory, self.allocation(choice))

    def loss(self, choice: np.ndarray) -> float:
        """Clamped predicted loss, nats per token, correctly rounded."""
        return math.fsum(self.value[np.arange(len(choice)), choice])

    @cached_property
    def useful(self) -> np.ndarray:
        """``value``, infinite where another option of the group is no worse in loss and in any part of the file."""
        result = self.value.copy()
        for k, row in enumerate(self.value):
            for i, better in enumerate(self._dominators[k]):
                if better != i or not np.isfinite(row[i]):
                    result[k, i] = np.inf
        return result

    @cached_property
    def _dominators(self) -> np.ndarray:
        """For each option (K, S) the one that replaces it: itself, or one no worse in loss, data and header."""
        sizes, value = self.sizes, self.value
        order = np.lexsort((sizes.entries, value, sizes.data), axis=1)
        result = np.tile(np.arange(value.shape[1]), (len(value), 1))
        for k, columns in enumerate(order):
            kept: list[int] = []
            for i in (int(c) for c in columns if np.isfinite(value[k, c])):
                parts = (value[k], sizes.entries[k], sizes.data_before[k])
                better = next((j for j in kept if all(part[j] <= part[i] for part in parts)), i)
                result[k, i] = better
                if better == i:
                    kept.append(i)
        return result

    @cached_property
    def smallest(self) -> np.ndarray:
        """The choice of the smallest file (K,)."""
        return smallest(self.sizes, np.isfinite(self.useful), self.num_bytes)

    @cached_property
    def cheapest(self) -> np.ndarray:
        """The choice of least predicted loss (K,), and of these the one of least data."""
        return np.lexsort((self.sizes.data, self.useful), axis=1)[:, 0]

    @cached_property
    def uniforms(self) -> tuple[tuple[QuantSpec, np.ndarray], ...]:
        """(spec, choice (K,)) of every uniform allocation that the candidates allow, fixed units aside.

        As :meth:`mixbits.spec.BitAllocation.uniform` has it; where its bits for position tables are no candidate, the
        same spec everywhere.
        """
        found = []
        for spec in sorted({s for c in self.candidates for s in c}, key=_by_width):
            for everywhere in (False, True):
                wanted = BitAllocation.uniform(self.inventory, spec, everywhere=everywhere).specs
                choice = self._choice({**wanted, **self.fixed})
                if choice is not None:
                    found.append((spec, choice))
                    break
        return tuple(found)

    def _choice(self, specs: Mapping[str, QuantSpec]) -> np.ndarray | None:
        """The options (K,) that give every unit its spec; None if a group cannot."""
        choice, index = [], dict[tuple[int, int], int | None]()  # few distinct objects: hashing a spec costs more
        for names, options in zip(self.groups, self.candidates, strict=True):
            wanted = specs[names[0]]
            key = id(options), id(wanted)
            if key not in index:
                index[key] = options.index(wanted) if wanted in options else None
            place = index[key]
            if place is None or any(specs[name] != wanted for name in names[1:]):
                return None
            choice.append(place)
        return np.array(choice)

    def _better_uniform(self, solution: Solution, max_bytes: int) -> Solution:
        """``solution``, or the uniform allocation of least loss that fits, if that has less."""
        rows, at_least = np.arange(len(self.groups)), self.sizes.data + self.sizes.entries
        for loss, choice in sorted(((self.loss(c), c) for _, c in self.uniforms), key=lambda pair: pair[0]):
            if loss >= self.loss(solution.choice):
                break
            if at_least[rows, choice].sum() <= max_bytes and self.num_bytes(choice) <= max_bytes:
                return Solution(self._dominators[rows, choice], loss, min(loss, solution.bound))
        return solution

    def check_size(self, max_bytes: int) -> None:
        """Raise SpecError, naming the smallest size, if no choice fits."""
        needed = self.num_bytes(self.smallest)
        if needed <= max_bytes:
            return
        names = {str(s) for s in self.allocation(self.smallest).specs.values()}
        how = (
            f"all units at {names.pop()}"
            if len(names) == 1
            else f"each unit at its smallest of {', '.join(sorted(names))}"
        )
        raise SpecError(
            f"a budget of {max_bytes} bytes cannot be met: the smallest file possible with these specs is {needed} bytes, ratio "
            f"{math.floor(100 * compression_ratio(self.inventory, needed)) / 100:.2f} "
            f"({bits_per_weight(self.inventory, needed):.3f} bits per weight), {how}; raise the budget or allow smaller specs"
        )

    def solve(self, max_bytes: int, *, starts: Sequence[np.ndarray] = ()) -> Solution:
        """Least predicted loss in at most ``max_bytes``. ``starts``: further choices known to fit, which can save time.

        Raises SpecError when nothing fits.
        """
        self.check_size(max_bytes)
        rows = np.arange(len(self.groups))
        start = min((self._dominators[rows, choice] for choice in (self.smallest, *starts)), key=self.loss)
        solution = solve(self.useful, self.sizes, max_bytes, lambda c: self.num_bytes(c) <= max_bytes, start)
        return self._better_uniform(solution, max_bytes) if solution.gap > 0 else solution

    def next_larger(self, solution: Solution, max_bytes: int) -> Larger | None:
        """The smallest file that predicts less loss than ``solution``, the answer for ``max_bytes``; None: nothing does."""
        return next_larger(self.useful, self.sizes, solution, max_bytes, self.num_bytes)

    def solver_input_sha256(self, max_bytes: int | None = None) -> str:
        """sha256 of all that the answer depends on: groups, specs, values (every bit), sizes, fixed units, budget."""
        parts = {
            "max_bytes": max_bytes,
            "groups": self.groups,
            "candidates": [[str(s) for s in c] for c in self.candidates],
            "values": [
                [v.hex() for v in row[: len(c)].tolist()] for row, c in zip(self.value, self.candidates, strict=True)
            ],
            "tensor_bytes": [self.sizes.before.tolist(), self.sizes.after.tolist()],
            "header_entries": self.sizes.unit_entries.tolist(),
            "others": [[t.name, t.dtype, list(t.shape)] for t in self.sizes.others],
            "fixed": {name: str(spec) for name, spec in sorted(self.fixed.items())},
        }
        return hashlib.sha256(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def _check_specs(specs: Sequence[QuantSpec] | None) -> None:
    if specs is not None and not specs:
        raise SpecError("no specs to choose among; give at least one, e.g. 1,1.58,2,4")


def _by_width(spec: QuantSpec) -> tuple[float, str]:
    return spec.bit_width, str(spec)


def _candidates(
    group: Sequence[str],
    sensitivities: Sensitivities,
    specs: Sequence[QuantSpec] | None,
    fixed: Mapping[str, QuantSpec],
) -> list[QuantSpec]:
    """The specs that all units of a group may take, smallest bit-width first."""
    pinned = group_spec(group, fixed)
    if pinned is not None:
        return [pinned]
    measured = [sensitivities.units[name].loss_increase for name in group]
    if specs is None:
        found = sorted((s for s in measured[0] if all(s in other for other in measured)), key=_by_width)
        if not found:
            raise SpecError(f"units {', '.join(group[:5])} share a spec, but none was measured for all of them")
        return found
    for name, known in zip(group, measured, strict=True):
        missing = [s for s in specs if s not in known]
        if missing:
            raise SpecError(
                f"unit {name}: spec {missing[0]} was not measured; the sensitivities hold "
                f"{', '.join(map(str, known))}: measure again with it, or leave it out"
            )
    return sorted(set(specs), key=_by_width)


def _values(sensitivities: Sensitivities, groups: Groups, candidates: Sequence[Sequence[QuantSpec]]) -> np.ndarray:
    """Predicted losses (K, S), clamped unit by unit, then summed; unmeasured (fixed) specs count 0."""
    value = np.full((len(candidates), max(map(len, candidates))), np.inf)
    for k, (names, specs) in enumerate(zip(groups, candidates, strict=True)):
        measured = [sensitivities.units[name].loss_increase for name in names]
        value[k, : len(specs)] = [math.fsum(max(0.0, m.get(s, 0.0)) for m in measured) for s in specs]
    return value

"""What a search of precisions learned, and the allocations that follow from it.

:class:`Preferences` holds, per group of units and candidate spec, the learned probability and the mean marginal loss: how much
the held-out loss rises, to first order, per unit of probability moved from the largest candidate to this one, averaged over
the first quarter of the architecture steps (nats per token, with a standard error over steps).

From them an allocation in two ways: :func:`one_best` takes every group's most probable candidate (the papers), and where that
does not fit the budget, the most probable choice that does, ``max sum log p``, found by the integer program of
`mixbits.quant.allocate`. Or :func:`to_sensitivities` makes an ordinary sensitivity file (measure ``search``) of them, so that any
budget can be solved for.

Measured on one small Transformer (2 layers, d 48, 14 units, 4 candidates, the bytes of 2 bits everywhere, one seed; losses
measured unit by unit; six searches): the marginals rank units and specs as the measured losses do (Spearman 0.75 to 0.81 over
all pairs, up to 0.9 within a spec while the search is young), log-probabilities do not (-0.13 to 0.10), because the size penalty
is in them. That is why the sensitivity file holds marginals, which are nats. But they are of first order and make large
perturbations look too harmless: trained at the search's own budget, the most probable choice that fits ended better in four
of six, with Gumbel noise at 0.12 and 0.13 nats above full precision (marginals 0.17 and 0.19), with softmax at 0.16 to 0.18 (0.15 to
0.18); uniform 0.22, measured losses 0.12. So: search with Gumbel noise, :func:`one_best` at that budget, the file for others.

Limits: probabilities were learned under one budget and hold its pull; the further another budget is from it, the less they
say. A group's value is shared out to its units by their numbers of weights, so solve with the same groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mixbits.errors import FormatError, SpecError
from mixbits.quant.allocate import allocate
from mixbits.quant.groups import Groups
from mixbits.quant.inventory import inventory_from_json, inventory_to_json
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.spec import (
    BitAllocation,
    ModelInventory,
    QuantSpec,
    bits_per_weight,
    compression_ratio,
    predicted_bytes,
)

Basis = Literal["marginal", "probability"]
BASIS: Basis = "marginal"
FORMAT = "mixbits-preferences"
FORMAT_VERSION = 1
_SMALLEST_PROBABILITY = 1e-30


@dataclass(frozen=True)
class Preferences:
    """Per group (K) and candidate (N): ``probabilities``, ``marginals`` (nats per token, 0 for the largest candidate) and their
    ``stderr`` (infinite: one step only); ``perturbation``: unit -> spec -> squared norm of Q(w) - w when the search began.
    """

    inventory: ModelInventory
    candidates: tuple[QuantSpec, ...]
    groups: Groups
    probabilities: tuple[tuple[float, ...], ...]
    marginals: tuple[tuple[float, ...], ...]
    stderr: tuple[tuple[float, ...], ...]
    perturbation: Mapping[str, Mapping[QuantSpec, float]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()

    def __post_init__(self) -> None:
        names = [name for group in self.groups for name in group]
        if sorted(names) != sorted(u.name for u in self.inventory.units):
            raise SpecError("preferences: the groups do not hold every unit of the model exactly once")
        for what, table in (
            ("probabilities", self.probabilities),
            ("marginals", self.marginals),
            ("stderr", self.stderr),
        ):
            if len(table) != len(self.groups) or any(len(row) != len(self.candidates) for row in table):
                raise SpecError(
                    f"preferences: {what} must be {len(self.groups)} groups x {len(self.candidates)} candidates"
                )
        for group, row, values in zip(self.groups, self.probabilities, self.marginals, strict=True):
            good = all(0 <= p <= 1 for p in row) and abs(sum(row) - 1) < 1e-4 and all(map(math.isfinite, values))
            if not good:
                raise SpecError(
                    f"preferences: group of {group[0]}: {row} are not probabilities, or {values} not finite"
                )

    def one_best(self) -> BitAllocation:
        """The most probable candidate of each group, whatever its size; of equal ones the smaller."""
        specs: dict[str, QuantSpec] = {}
        for group, row in zip(self.groups, self.probabilities, strict=True):
            specs |= dict.fromkeys(group, self.candidates[row.index(max(row))])
        return BitAllocation({u.name: specs[u.name] for u in self.inventory.units})

    def file_bytes(self, allocation: BitAllocation) -> int:
        """Exact bytes of the weight file."""
        return predicted_bytes(self.inventory, allocation)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; an infinite standard error becomes null."""

        def table(rows: tuple[tuple[float, ...], ...]) -> list[dict[str, float | None]]:
            return [
                {str(s): v if math.isfinite(v) else None for s, v in zip(self.candidates, row, strict=True)}
                for row in rows
            ]

        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "groups": [list(group) for group in self.groups],
            "probabilities": table(self.probabilities),
            "marginals_nats": table(self.marginals),
            "stderr_nats": table(self.stderr),
            "perturbation": {n: {str(s): v for s, v in row.items()} for n, row in self.perturbation.items()},
            "provenance": dict(self.provenance),
            "history": [dict(entry) for entry in self.history],
            "inventory": inventory_to_json(self.inventory),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "preferences") -> Preferences:
        """Inverse of :meth:`to_json`. Raises FormatError naming ``where``."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{where}: not a mixbits preferences file of version {FORMAT_VERSION}; mixbits search makes them"
            )
        try:
            inventory = inventory_from_json(data["inventory"], where=f"{where}: inventory")
            candidates = tuple(QuantSpec.parse(text) for text in data["probabilities"][0])

            def table(name: str) -> tuple[tuple[float, ...], ...]:
                rows = ([row[str(s)] for s in candidates] for row in data[name])
                return tuple(tuple(math.inf if v is None else float(v) for v in row) for row in rows)

            perturbation = {
                str(n): {QuantSpec.parse(s): float(v) for s, v in row.items()}
                for n, row in data["perturbation"].items()
            }
            return cls(
                inventory, candidates, tuple(tuple(map(str, group)) for group in data["groups"]), table("probabilities"),
                table("marginals_nats"), table("stderr_nats"), perturbation, dict(data["provenance"]), tuple(data["history"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, SpecError) as error:
            raise FormatError(f"{where}: {type(error).__name__}: {error}; make it again with mixbits search") from None


def to_sensitivities(
    preferences: Preferences, *, basis: Basis = BASIS, provenance: Mapping[str, Any] | None = None
) -> Sensitivities:
    """The preferences as sensitivities of the measure ``search``; see the module's text for the two bases.

    ``marginal``: the mean marginal loss, as it is. ``probability``: ``log max p - log p`` (no nats of loss, although of that
    unit's scale; standard errors unknown). Raises SpecError for another basis.
    """
    if basis not in ("marginal", "probability"):
        raise SpecError(f"basis is {basis!r}; expected 'marginal' or 'probability'")
    sizes = {u.name: u.num_weights for u in preferences.inventory.units}
    units = {}
    for k, group in enumerate(preferences.groups):
        values, errors = preferences.marginals[k], preferences.stderr[k]
        if basis == "probability":
            logs = [math.log(max(p, _SMALLEST_PROBABILITY)) for p in preferences.probabilities[k]]
            values, errors = tuple(max(logs) - x for x in logs), (math.inf,) * len(logs)
        for name in group:
            share = sizes[name] / sum(sizes[n] for n in group)
            units[name] = UnitSensitivity(
                {s: share * v for s, v in zip(preferences.candidates, values, strict=True)},
                {s: share * e for s, e in zip(preferences.candidates, errors, strict=True)},
                dict(preferences.perturbation[name]),
            )
    facts = {
        **preferences.provenance,
        "basis": basis,
        "groups": [list(group) for group in preferences.groups if len(group) > 1],
        "probabilities": preferences.to_json()["probabilities"],
        "cost": "in batches of the search: training steps and architecture steps",
        "stderr": "over architecture steps, which are correlated" if basis == "marginal" else "unknown",
        **(provenance or {}),
    }
    cost = float(facts.get("steps", 0) + facts.get("architecture_steps", 0))
    return Sensitivities("search", preferences.inventory, {u: units[u] for u in sizes}, cost, facts)


def one_best(preferences: Preferences, *, max_bytes: int) -> BitAllocation:
    """Every group's most probable candidate; if that takes more than ``max_bytes``, the most probable choice that fits.

    Provenance says whether it was repaired, and by how much it was too large. Raises SpecError when nothing fits.
    """
    best = preferences.one_best()
    wanted = preferences.file_bytes(best)
    facts: dict[str, Any] = {
        "measure": "search",
        "one_best_bytes": wanted,
        "budget_bytes": max_bytes,
        "repaired": wanted > max_bytes,
    }
    if wanted > max_bytes:
        by_probability = to_sensitivities(preferences, basis="probability")
        best = allocate(preferences.inventory, by_probability, max_bytes=max_bytes, groups=preferences.groups)
        facts["solver_input_sha256"] = best.provenance["solver_input_sha256"]
    size = preferences.file_bytes(best)
    method = "most probable choice of the search"
    facts |= {
        "method": f"{method} that fits, by the integer program" if wanted > max_bytes else method,
        "predicted_bytes": size,
        "compression_ratio": compression_ratio(preferences.inventory, size),
        "bits_per_weight": bits_per_weight(preferences.inventory, size),
        "search": dict(preferences.provenance),
    }
    return BitAllocation(best.specs, facts)

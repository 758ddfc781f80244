"""Sensitivities: by how many nats per token the loss is predicted to rise when one unit is stored in one spec.

One type, one JSON file, whatever the measure; the measures themselves are in :mod:`mixbits.quant.measures`.

The file carries the model's inventory, so it can be solved for any budget without the model, and keeps the sign
of a negative value (a negative Hessian trace: a saddle, or noise; a measured loss that fell); the allocator clamps it
and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.jsonfile import read_json, write_json
from mixbits.quant.curvature import TraceEstimate
from mixbits.quant.inventory import inventory_from_json, inventory_to_json
from mixbits.spec import ModelInventory, QuantSpec

FORMAT = "mixbits-sensitivities"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class UnitSensitivity:
    """One unit, per spec: predicted loss increase (nats per token), its standard error (infinite: unknown) and
    perturbation.

    ``trace`` is there for measures that have one. All three mappings have the same keys.
    """

    loss_increase: Mapping[QuantSpec, float]
    stderr: Mapping[QuantSpec, float]
    perturbation: Mapping[QuantSpec, float]
    trace: TraceEstimate | None = None

    def __post_init__(self) -> None:
        if not (set(self.loss_increase) == set(self.stderr) == set(self.perturbation)):
            raise SpecError("loss_increase, stderr and perturbation must name the same specs")
        for spec, value in self.loss_increase.items():
            if not math.isfinite(value) or not math.isfinite(self.perturbation[spec]) or not self.stderr[spec] >= 0:
                raise DataError(f"spec {spec}: loss increase {value} +- {self.stderr[spec]} is not a measurement")


@dataclass(frozen=True)
class Sensitivities:
    """What a measure found for every unit of a model.

    ``cost_forward_backwards``: nominal cost, in forward-backward passes over the measured tokens.
    """

    measure: str
    inventory: ModelInventory
    units: Mapping[str, UnitSensitivity]
    cost_forward_backwards: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {u.name for u in self.inventory.units}
        for problem, names in (("misses", known - set(self.units)), ("names unknown", set(self.units) - known)):
            if names:
                raise SpecError(f"the {self.measure} sensitivities: {problem} unit(s) {', '.join(sorted(names)[:5])}")

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """The specs that were measured for every unit, in the order of the first unit."""
        first, *rest = self.units.values()
        return tuple(s for s in first.loss_increase if all(s in u.loss_increase for u in rest))

    @property
    def largest_relative_stderr(self) -> tuple[float, str, QuantSpec]:
        """The largest standard error over |loss increase|, with its unit and spec; infinite where it is unknown.

        A loss increase of exactly zero with no error (nothing changed) counts as 0.
        """

        def ratio(unit: UnitSensitivity, spec: QuantSpec) -> float:
            value, error = abs(unit.loss_increase[spec]), unit.stderr[spec]
            return 0.0 if error == 0 else error / value if value else math.inf

        return max(
            ((ratio(u, s), name, s) for name, u in self.units.items() for s in u.loss_increase), key=lambda x: x[0]
        )

    @property
    def negative_units(self) -> list[str]:
        """Units with a negative loss increase at some spec, which the allocator counts as 0."""
        return [name for name, u in self.units.items() if any(v < 0 for v in u.loss_increase.values())]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; an infinite standard error becomes null."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "measure": self.measure,
            "cost_forward_backwards": self.cost_forward_backwards,
            "provenance": dict(self.provenance),
            "units": {name: _unit_to_json(unit) for name, unit in self.units.items()},
            "inventory": inventory_to_json(self.inventory),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "sensitivities") -> Sensitivities:
        """Inverse of :meth:`to_json`. Raises FormatError or SpecError naming ``where``."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(f"{where}: not a mixbits sensitivity file; expected a JSON object with format {FORMAT!r}")
        if data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version is {data.get('format_version')!r}; this mixbits reads {FORMAT_VERSION}"
            )
        units, measure = data.get("units"), data.get("measure")
        if not isinstance(units, dict) or not isinstance(measure, str):
            raise FormatError(f"{where}: 'units' (unit name -> sensitivity) or 'measure' (a name) is missing")
        inventory = inventory_from_json(data.get("inventory"), where=f"{where}: inventory")
        cost = _number(data.get("cost_forward_backwards"), f"{where}: cost_forward_backwards")
        read = {name: _unit_from_json(unit, f"{where}: unit {name}") for name, unit in units.items()}
        provenance = data.get("provenance")
        try:
            return cls(measure, inventory, read, cost, provenance if isinstance(provenance, dict) else {})
        except SpecError as error:
            raise FormatError(f"{where}: {error}") from None


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{where} is {value!r}; expected a finite number")
    return float(value)


def _number_or_unknown(value: Any, where: str) -> float:
    return math.inf if value is None else _number(value, where)


def _unit_to_json(unit: UnitSensitivity) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    trace = unit.trace
    return {
        "trace": None if trace is None else trace.trace,
        "trace_stderr": None if trace is None else finite(trace.trace_stderr),
        "num_probes": None if trace is None else trace.num_probes,
        "specs": {
            str(s): {
                "loss_increase_nats": value,
                "stderr_nats": finite(unit.stderr[s]),
                "perturbation": unit.perturbation[s],
            }
            for s, value in unit.loss_increase.items()
        },
    }


def _unit_from_json(data: Any, where: str) -> UnitSensitivity:
    if not isinstance(data, dict) or not isinstance(data.get("specs"), dict) or not data["specs"]:
        raise FormatError(f"{where}: expected an object with 'specs' (spec -> loss increase)")
    losses, stderrs, perturbations = {}, {}, {}
    for text, entry in data["specs"].items():
        at = f"{where}: spec {text}"
        try:
            spec = QuantSpec.parse(text)
        except SpecError as error:
            raise FormatError(f"{at}: {error}") from None
        if not isinstance(entry, dict):
            raise FormatError(f"{at}: expected an object, got {entry!r}")
        losses[spec] = _number(entry.get("loss_increase_nats"), f"{at}: loss_increase_nats")
        stderrs[spec] = _number_or_unknown(entry.get("stderr_nats"), f"{at}: stderr_nats")
        perturbations[spec] = _number(entry.get("perturbation"), f"{at}: perturbation")
    trace = None
    if data.get("trace") is not None:
        num_probes = data.get("num_probes")
        if not isinstance(num_probes, int) or num_probes < 1:
            raise FormatError(f"{where}: num_probes is {num_probes!r}; expected a positive integer")
        stderr = _number_or_unknown(data.get("trace_stderr"), f"{where}: trace_stderr")
        trace = TraceEstimate(_number(data["trace"], f"{where}: trace"), stderr, num_probes)
    try:
        return UnitSensitivity(losses, stderrs, perturbations, trace)
    except (DataError, SpecError) as error:
        raise FormatError(f"{where}: {error}") from None


def read_sensitivities(path: str | Path) -> Sensitivities:
    """Read a sensitivity file. Raises DataError when it cannot be read, FormatError when it is not one."""
    return Sensitivities.from_json(read_json(path), where=str(path))


def write_sensitivities(path: str | Path, sensitivities: Sensitivities) -> Path:
    """Write a sensitivity file atomically; the same measurement gives the same bytes."""
    return write_json(path, sensitivities.to_json())

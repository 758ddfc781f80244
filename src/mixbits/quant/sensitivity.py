"""Sensitivities: by how many nats per token the loss is predicted to rise when one unit is stored in one spec.

One type, one JSON file, whatever the measure. Built here: ``hessian``, the second-order prediction of Xu et al.
(ICASSP 2021) in natural units, ``1/2 * trace / num_weights * perturbation`` (:func:`measure_hessian`). A
measure that joins later (Fisher, KL, measured loss) returns the same :class:`Sensitivities`, with ``trace``
left out where it has none.

The file carries the model's inventory, so it can be solved for any budget without the model, and keeps the sign
of a negative trace (a saddle, or noise); the allocator clamps it and says so.

Limits: the Hessian prediction assumes a pre-trained model at a minimum, noise independent of the weights and
equal curvature within a unit, and ignores what training afterwards repairs and how units interact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.jsonfile import read_json, write_json
from mixbits.quant.curvature import (
    Loss,
    TraceEstimate,
    double_backward_ready,
    hessian_traces,
    num_predictions,
    split_batches,
)
from mixbits.quant.fingerprint import data_hash, model_hash
from mixbits.quant.grid import perturbation
from mixbits.quant.inventory import inventory_from_json, inventory_to_json
from mixbits.quant.units import unit_matrices
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


def hessian_sensitivity(
    trace: TraceEstimate, num_weights: int, perturbations: Mapping[QuantSpec, float]
) -> UnitSensitivity:
    """``1/2 * trace / num_weights * perturbation`` per spec, signed, with the standard error of the trace
    carried over.
    """
    factor = 0.5 / num_weights
    return UnitSensitivity(
        {s: factor * trace.trace * p for s, p in perturbations.items()},
        # 0 * inf: no perturbation, no loss, however uncertain the trace.
        {s: factor * trace.trace_stderr * p if p > 0 else 0.0 for s, p in perturbations.items()},
        dict(perturbations),
        trace,
    )


def measure_hessian(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    loss: Loss,
    specs: Sequence[QuantSpec],
    *,
    num_probes: int = 50,
    seed: int = 0,
    micro_batch_size: int = 8,
    token_count: Callable[[torch.Tensor], int] = num_predictions,
    show_progress: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Sensitivities:
    """Hessian sensitivities of all units for all ``specs``; see :func:`mixbits.quant.curvature.hessian_traces`.

    Switches the model for the while (:func:`double_backward_ready`) and leaves it as it was. ``provenance``:
    entries to add to the file's. Raises SpecError for no specs or probes, DataError for NaN or no tokens.
    """
    if not specs:
        raise SpecError("no specs to measure; give at least one, e.g. 1,1.58,2,3,4,8")
    parts = split_batches(batches, micro_batch_size)
    with double_backward_ready(model):
        traces = hessian_traces(
            model,
            inventory,
            batches,
            loss,
            num_probes=num_probes,
            seed=seed,
            micro_batch_size=micro_batch_size,
            token_count=token_count,
            show_progress=show_progress,
        )
    matrices = unit_matrices(model, inventory)
    units = {}
    for unit in inventory.units:
        perturbations = {spec: perturbation(matrices[unit.name], spec) for spec in dict.fromkeys(specs)}
        units[unit.name] = hessian_sensitivity(traces[unit.name], unit.num_weights, perturbations)
    facts = {
        "seed": seed,
        "num_probes": num_probes,
        "num_tokens": sum(token_count(p) for p in parts),
        "num_sequences": sum(len(p) for p in parts),
        "micro_batch_size": micro_batch_size,
        "model_hash": model_hash(model),
        "data_hash": data_hash(batches),
        "negative_traces": [name for name, t in traces.items() if t.trace < 0],
        "stderr": "over probes on these tokens; the choice of text is not included",
    }
    # One graph of forward and backward, then each product runs backward through both.
    return Sensitivities("hessian", inventory, units, 1.0 + 2.0 * num_probes, {**facts, **(provenance or {})})

"""What the quantizing training methods share: the units they act on, and how stored weights are put in and taken out.

A method is handed to the trainer (`mixbits.lm.train.TrainingMethod` is the interface). Methods swap ``parameter.data``,
never modules, so that ties, optimizer state and checkpoints stay those of the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mixbits.errors import DataError, SpecError
from mixbits.quant import product
from mixbits.quant.grid import dequantize, project, quantize_weight
from mixbits.quant.units import as_matrix, unit_parameters
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec


@dataclass(frozen=True)
class TrainedUnit:
    """A quantized unit while it is trained: its parameter, how it is oriented, and its spec."""

    name: str
    parameter: nn.Parameter
    kind: str
    spec: QuantSpec

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (rows, cols), detached."""
        return as_matrix(self.parameter.detach(), self.kind)

    def put(self, matrix: torch.Tensor) -> None:
        """Make a (rows, cols) matrix the weight that the forward pass sees."""
        self.parameter.data = as_matrix(matrix, self.kind).to(self.parameter.dtype).contiguous()

    def gradient(self) -> torch.Tensor | None:
        """The gradient as (rows, cols), or None."""
        return None if self.parameter.grad is None else as_matrix(self.parameter.grad, self.kind)


def trained_units(model: nn.Module, inventory: ModelInventory, allocation: BitAllocation) -> tuple[TrainedUnit, ...]:
    """The units with a grid (16-bit ones are trained like any other parameter). Raises SpecError on a wrong allocation."""
    allocation.check(inventory)
    parameters = unit_parameters(model, inventory)
    return tuple(
        TrainedUnit(u.name, parameters[u.name], u.kind, allocation.specs[u.name])
        for u in inventory.units
        if allocation.specs[u.name].is_quantized
    )


def refuse_product_units(units: tuple[TrainedUnit, ...], method: str) -> None:
    """Raise SpecError if a unit has a codebook in place of levels."""
    named = [unit.name for unit in units if unit.spec.is_product]
    if named:
        raise SpecError(
            f"unit {named[0]}: {method} needs a grid of levels, and a product unit has none; train it straight-through"
        )


def starting_scale(unit: TrainedUnit) -> torch.Tensor:
    """The best scale (rows, 1) or (1, 1) for the unit's present weight. Raises DataError naming the unit."""
    with _naming(unit):
        return project(unit.matrix, unit.spec)[1]


def starting_codebook(unit: TrainedUnit) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebook (256, v) and row scales (rows, 1) learned from a product unit's present weight. Raises DataError naming the unit."""
    with _naming(unit):
        return product.learn(unit.matrix, unit.spec)


@contextmanager
def stored_weights(
    model: nn.Module, units: tuple[TrainedUnit, ...], weights: Mapping[str, QuantizedWeight]
) -> Iterator[None]:
    """Within it ``model`` has the very values that would be read back from the packed file.

    Units are dequantized, every other saved floating-point tensor is rounded to float16. Afterwards, whatever happened,
    all tensors are the ones they were.
    """
    quantized = {id(unit.parameter) for unit in units}
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()}
    kept = [(tensor, tensor.data) for tensor in saved.values()]
    try:
        for unit in units:
            unit.put(dequantize(weights[unit.name]))
        for tensor, data in kept:
            if id(tensor) not in quantized:
                tensor.data = data.to(torch.float16).to(data.dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def quantize_units(
    units: tuple[TrainedUnit, ...],
    scales: Mapping[str, torch.Tensor] | None = None,
    codebooks: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, QuantizedWeight]:
    """Exact projection of every unit on its storable grid, with the given scales (and product units' codebooks) or the best ones.

    Raises DataError (NaN) or SpecError (scale beyond float16) naming the unit.
    """
    found = {}
    for unit in units:
        with _naming(unit):
            scale = None if scales is None else scales[unit.name]
            codebook = None if codebooks is None else codebooks.get(unit.name)
            found[unit.name] = quantize_weight(unit.matrix, unit.spec, scale=scale, codebook=codebook)
    return found


def on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its tensors in main memory, ready to be packed."""
    codebook = None if weight.codebook is None else weight.codebook.cpu()
    return replace(weight, codes=weight.codes.cpu(), scales=weight.scales.cpu(), codebook=codebook)


@contextmanager
def _naming(unit: TrainedUnit) -> Iterator[None]:
    """Put the unit's name before the grid's complaints."""
    try:
        yield
    except (DataError, SpecError) as error:
        raise type(error)(f"unit {unit.name}: {error}") from None


def copy_into(target: dict[str, torch.Tensor], source: Mapping[str, Any]) -> None:
    """Overwrite tensors in place from a saved state of the same names."""
    for name, tensor in target.items():
        tensor.data.copy_(source[name])

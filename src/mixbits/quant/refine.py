"""The last step of every method: codes fixed, scales, codebooks and all unquantized parameters (biases, norms) trained on.

With W = scale * V the gradient of a group's scale is the sum of the weight gradients times the levels. In a product unit V
are the codebook's entries: an entry's gradient is the sum of scale times weight gradient over the vectors that use it.
Delivered scales and codebooks are rounded as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mixbits.quant import product
from mixbits.quant.grid import codes_of, group_sum
from mixbits.quant.method import TrainedUnit, copy_into, stored_weights, trained_units
from mixbits.scales import compact_scale, expand_scale, storable_scale
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight


class Refine:
    """Method object that trains scales, codebooks and unquantized parameters around fixed codes.

    ``weights``: every quantized unit's codes, starting scales and codebook.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        weights: Mapping[str, QuantizedWeight],
    ) -> None:
        self.units = trained_units(model, inventory, allocation)
        self.levels: dict[str, torch.Tensor] = {}
        self.codes: dict[str, torch.Tensor] = {}
        self.scales: dict[str, nn.Parameter] = {}
        self.codebooks: dict[str, nn.Parameter] = {}
        for unit in self.units:
            weight = weights[unit.name]
            if weight.codebook is None:
                table = torch.tensor(unit.spec.levels, dtype=torch.float32, device=weights[unit.name].codes.device)
                self.levels[unit.name] = table[weight.codes.long()]
            else:
                self.codes[unit.name] = weight.codes.clone()
                self.codebooks[unit.name] = nn.Parameter(weight.codebook.float().clone())
            if unit.spec.has_scales:
                compact = compact_scale(weight.scales.float(), unit.spec, weight.shape[1])
                self.scales[unit.name] = nn.Parameter(compact.clone())
        self.before_forward(model)

    def parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """Scales, codebooks, and every parameter that is not a quantized unit; no weight decay."""
        quantized = {id(unit.parameter) for unit in self.units}
        others = [p for p in model.parameters() if id(p) not in quantized and p.requires_grad]
        return [{"params": [*self.scales.values(), *self.codebooks.values(), *others], "weight_decay": 0.0}]

    def _stored_scale(self, unit: TrainedUnit) -> torch.Tensor | None:
        """The present scales as they will be stored, compact; None for a unit without scales."""
        scale = self.scales.get(unit.name)
        return None if scale is None else storable_scale(scale.detach(), unit.spec)

    def _stored_levels(self, unit: TrainedUnit) -> torch.Tensor:
        """Levels (rows, cols), or the vectors of the codebook as it will be stored."""
        if not unit.spec.is_product:
            return self.levels[unit.name]
        codebook = product.storable_codebook(self.codebooks[unit.name].detach())
        return product.look_up(self.codes[unit.name], codebook, unit.matrix.shape[1])

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Write scale * levels into the weights, both as they will be stored."""
        for unit in self.units:
            levels, scale = self._stored_levels(unit), self._stored_scale(unit)
            unit.put(levels if scale is None else levels * expand_scale(scale, levels.shape[1], unit.spec))

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Turn weight gradients into those of scales and codebooks (straight through the rounding)."""
        for unit in self.units:
            gradient, scale = unit.gradient(), self._stored_scale(unit)
            if gradient is None:
                continue
            if scale is not None:
                self.scales[unit.name].grad = group_sum(gradient * self._stored_levels(unit), unit.spec)
            if unit.spec.is_product:
                per_row = gradient.new_ones(1, 1) if scale is None else scale
                sums = product.scaled_sums(gradient, self.codes[unit.name], per_row, unit.spec)
                self.codebooks[unit.name].grad = sums
            unit.parameter.grad = None

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Keep the scales from turning negative and drop their gradients."""
        for scale in self.scales.values():
            scale.clamp_min_(0.0)
        for parameter in (*self.scales.values(), *self.codebooks.values()):
            parameter.grad = None
        return {}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The fixed codes with the present scales and codebooks, rounded as they are stored."""
        return {unit.name: self._quantized(unit) for unit in self.units}

    def _quantized(self, unit: TrainedUnit) -> QuantizedWeight:
        scale = self._stored_scale(unit)
        flat = torch.empty(0) if scale is None else scale.flatten().clone()
        if not unit.spec.is_product:
            return QuantizedWeight(unit.spec, codes_of(self.levels[unit.name], unit.spec), flat)
        codebook = product.storable_codebook(self.codebooks[unit.name].detach())
        return QuantizedWeight(unit.spec, self.codes[unit.name].clone(), flat, codebook, unit.matrix.shape[1])

    def state_dict(self) -> dict[str, Any]:
        """Scales, codebooks, and the fixed levels and codes."""
        trained = {"scales": self.scales, "codebooks": self.codebooks}
        found = {key: {n: p.detach() for n, p in values.items()} for key, values in trained.items()}
        return {**found, "levels": self.levels, "codes": self.codes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        for key, values in (("scales", self.scales), ("codebooks", self.codebooks)):
            copy_into({n: p.data for n, p in values.items()}, state[key])
        copy_into(self.levels, state["levels"])
        copy_into(self.codes, state["codes"])

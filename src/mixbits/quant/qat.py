"""Straight-through training: the forward pass sees quantized weights, the gradient goes to the full-precision ones.

Before each forward pass every unit's weight is replaced by its projection; after the backward pass the full-precision weight is
put back and receives the gradient unchanged (Bengio et al., 2013). The scale follows the weights: one alternating step
(nearest codes, least-squares scale) from the last scale each time, which costs a few passes over the weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mixbits.quant.grid import best_scale, nearest_levels
from mixbits.quant.method import copy_into, quantize_units, starting_scale, stored_weights, trained_units
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight


class StraightThrough:
    """Method object for straight-through training of ``model``'s units under ``allocation``."""

    def __init__(self, model: nn.Module, inventory: ModelInventory, allocation: BitAllocation) -> None:
        self.units = trained_units(model, inventory, allocation)
        self.scales = {unit.name: starting_scale(unit) for unit in self.units}
        self._kept: dict[str, torch.Tensor] = {}

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Show the forward pass the projected weights. What an interrupted step left is put back first."""
        self.after_backward(model)
        for unit in self.units:
            weight, scale = unit.matrix, self.scales[unit.name]
            levels = nearest_levels(weight, scale, unit.spec)
            scale.copy_(best_scale(weight, levels, unit.spec))
            self._kept[unit.name] = unit.parameter.data
            unit.put(levels.mul_(scale))

    def after_backward(self, model: nn.Module) -> None:
        """Put the full-precision weights back; their gradient is the projected weights' one."""
        for unit in self.units:
            if unit.name in self._kept:
                unit.parameter.data = self._kept.pop(unit.name)

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Nothing to do."""
        return {}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The units' exact projection with the present scales."""
        return quantize_units(self.units, self.scales)

    def state_dict(self) -> dict[str, Any]:
        """The scales."""
        return {"scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scales."""
        copy_into(self.scales, state["scales"])

"""The last step of every method: codes fixed, scales and all unquantized parameters (biases, norms, positions) trained on.

With W = scale * V the gradient of a group's scale is the sum of the weight gradients times the levels. Delivered scales are
rounded to float16, as they are stored.

Limits: the trainer clips the gradients of the model's own parameters only, so those of the scales are not clipped. That does no
harm with AdamW, whose step is at most about the learning rate however large a gradient is; it would with plain gradient descent.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mixbits.quant.grid import codes_of, compact_scale, expand_scale, group_sum, storable_scale
from mixbits.quant.method import copy_into, stored_weights, trained_units
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight


class Refine:
    """Method object that trains scales and unquantized parameters around fixed codes.

    ``weights``: every quantized unit's codes and starting scales.
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
        self.scales: dict[str, nn.Parameter] = {}
        for unit in self.units:
            table = torch.tensor(unit.spec.levels, dtype=torch.float32)
            self.levels[unit.name] = table[weights[unit.name].codes.long()]
            self.scales[unit.name] = nn.Parameter(
                compact_scale(weights[unit.name].scales.float(), unit.spec, unit.matrix.shape[1]).clone()
            )
        self.before_forward(model)

    def parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """The scales, and every parameter that is not a quantized unit; no weight decay."""
        quantized = {id(unit.parameter) for unit in self.units}
        others = [p for p in model.parameters() if id(p) not in quantized and p.requires_grad]
        return [{"params": [*self.scales.values(), *others], "weight_decay": 0.0}]

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Write scale * levels into the weights."""
        for unit in self.units:
            levels = self.levels[unit.name]
            unit.put(levels * expand_scale(self.scales[unit.name], levels.shape[1], unit.spec))

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Turn weight gradients into scale gradients."""
        for unit in self.units:
            gradient = unit.gradient()
            if gradient is None:
                continue
            self.scales[unit.name].grad = group_sum(gradient * self.levels[unit.name], unit.spec)
            unit.parameter.grad = None

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Keep the scales from turning negative and drop their gradients."""
        for scale in self.scales.values():
            scale.clamp_min_(0.0)
            scale.grad = None
        return {}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The fixed codes with the present scales, rounded to float16."""
        return {
            u.name: QuantizedWeight(
                u.spec,
                codes_of(self.levels[u.name], u.spec),
                storable_scale(self.scales[u.name].detach(), u.spec).flatten().clone(),
            )
            for u in self.units
        }

    def state_dict(self) -> dict[str, Any]:
        """Scales and levels."""
        return {"scales": {n: s.detach() for n, s in self.scales.items()}, "levels": self.levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        copy_into({n: s.data for n, s in self.scales.items()}, state["scales"])
        copy_into(self.levels, state["levels"])

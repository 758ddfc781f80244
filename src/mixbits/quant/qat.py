"""Straight-through training: the forward pass sees quantized weights, the gradient goes to the full-precision ones.

Before each forward pass every unit's weight is replaced by its projection ``scale * V``; after the backward pass the
full-precision weight W is put back and receives the gradient G of the projected one (Bengio et al., 2013). What differs is
where the scale comes from:

* ``follow``: one alternating step (nearest codes, least-squares scale) from the last scale each time;
* ``fixed``: the best scale of the weights that training started from;
* ``learned``: LSQ (Esser et al., 2020): the scale is a parameter with gradient ``sum G * (V - W/scale)`` inside the grid and
  ``sum G * V`` beyond its ends, over the n weights that share it, divided by sqrt(n). It is trained as a logarithm, so that a step of the
  optimizer is a relative change, whatever the unit's magnitude, at 32 times the learning rate of the weights. A step of Adam moves
  a weight by some percent of a unit's root mean square, and the scale has to keep up with what that does to a row; at the weights' own rate
  it hardly moves, and ``learned`` is no better than ``fixed`` (validation loss of a tiny model at 2 bits, nats: fixed 3.828, 1 x 3.822,
  10 x 3.791, 30 x 3.766, 100 x 3.771, follow 3.772; at 1.58 bits: 1 x 3.896, 30 x 3.811, follow 3.870).

Beyond the ends of the grid a weight can no longer change its code soon, and ``learned`` cuts its gradient there. At two bits
and below the ends are stretched by half a step (ParetoQ, Liu et al., 2025), which leaves the outermost cells as wide as the
others: the half-step and ternary grids with nearest codes are ParetoQ's stretched grids, up to this rule.

A product unit (`mixbits.quant.product`) always follows its weights: nearest entries, then one least-squares step of
codebook and row scales.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant import product
from mixbits.quant.grid import best_scale, group_sum, nearest_levels
from mixbits.quant.method import (
    TrainedUnit,
    copy_into,
    quantize_units,
    starting_codebook,
    starting_scale,
    stored_weights,
    trained_units,
)
from mixbits.scales import expand_scale
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec

ScaleRule = Literal["follow", "fixed", "learned"]
_STRETCHED_UP_TO_BITS = 2
_SMALLEST_LOG_SCALE = -18.0
SCALE_SPEED = 32.0
"""Learned scales are ``exp(SCALE_SPEED * parameter)``: one learning rate for all, and they move this much faster than weights. A power
of two, so that a checkpoint, which has the logarithms, gives the parameters back to the bit."""


class StraightThrough:
    """Method object for straight-through training of ``model``'s units under ``allocation``.

    ``scales``: where scales come from (see above); ``scale_learning_rate``: of the logarithms of learned scales, None is
    ``SCALE_SPEED`` times the trainer's own. Raises SpecError for an unknown rule.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        *,
        scales: ScaleRule = "follow",
        scale_learning_rate: float | None = None,
    ) -> None:
        if scales not in ("follow", "fixed", "learned"):
            raise SpecError(f"scales is {scales!r}; expected 'follow', 'fixed' or 'learned'")
        self.rule, self.scale_learning_rate = scales, scale_learning_rate
        self.units = trained_units(model, inventory, allocation)
        self.scales: dict[str, torch.Tensor] = {}
        self.codebooks: dict[str, torch.Tensor] = {}
        for unit in self.units:
            if unit.spec.is_product:
                self.codebooks[unit.name], self.scales[unit.name] = starting_codebook(unit)
            else:
                self.scales[unit.name] = starting_scale(unit)
        self.log_scales: dict[str, nn.Parameter] = {}
        if scales == "learned":
            plain = [unit.name for unit in self.units if not unit.spec.is_product]
            self.log_scales = {name: nn.Parameter(_log(self.scales[name])) for name in plain}
        self._kept: dict[str, torch.Tensor] = {}
        self._levels: dict[str, torch.Tensor] = {}

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    def extra_parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """The logarithms of learned scales over ``SCALE_SPEED``; no weight decay."""
        if not self.log_scales:
            return []
        group: dict[str, Any] = {"params": list(self.log_scales.values()), "weight_decay": 0.0}
        rate = self.scale_learning_rate
        return [group if rate is None else group | {"lr": rate / SCALE_SPEED}]

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Show the forward pass the projected weights. What an interrupted step left is put back first."""
        self._put_back()
        for unit in self.units:
            projected = self._follow_codebook(unit) if unit.spec.is_product else self._project(unit)
            self._kept[unit.name] = unit.parameter.data
            unit.put(projected)

    def _project(self, unit: TrainedUnit) -> torch.Tensor:
        """The unit's weight on its grid of levels, scales by the rule."""
        weight, scale = unit.matrix, self.scales[unit.name]
        if self.rule == "learned":
            scale.copy_(_exp(self.log_scales[unit.name]))
        levels = nearest_levels(weight, scale, unit.spec)
        if self.rule == "follow":
            scale.copy_(best_scale(weight, levels, unit.spec))
        wide = expand_scale(scale, weight.shape[1], unit.spec)
        if self.rule == "learned":
            self._levels[unit.name] = levels
            return levels * wide
        return levels.mul_(wide)

    def _follow_codebook(self, unit: TrainedUnit) -> torch.Tensor:
        weight, scale, codebook = unit.matrix, self.scales[unit.name], self.codebooks[unit.name]
        codes = product.assign(weight, codebook, scale, unit.spec)
        if self.rule != "fixed":
            codebook.copy_(product.update_codebook(weight, codes, codebook, scale, unit.spec))
            scale.copy_(product.best_row_scale(weight, codes, codebook, unit.spec))
        return product.look_up(codes, codebook, weight.shape[1]) * scale

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Put the full-precision weights back; their gradient is the projected weights' one."""
        self._put_back()
        for unit in self.units:
            gradient, levels = unit.gradient(), self._levels.pop(unit.name, None)
            if levels is not None and gradient is not None:
                self._scale_gradient(unit, gradient, levels)

    def _scale_gradient(self, unit: TrainedUnit, gradient: torch.Tensor, levels: torch.Tensor) -> None:
        """LSQ's gradient of the scale's logarithm; cuts ``gradient`` (of the weight) beyond the ends of the grid, in place."""
        scale = self.scales[unit.name]
        ratio = unit.matrix / expand_scale(scale, levels.shape[1], unit.spec)
        inside = ratio.abs() <= _end(unit.spec)
        log_scale = self.log_scales[unit.name]
        # Divided by the root of the number of weights (LSQ) and without SCALE_SPEED, so that clipping sees gradients of one size; Adam
        # does not mind.
        damped = scale * (log_scale.numel() / ratio.numel()) ** 0.5
        share = group_sum(gradient * (levels - ratio.mul_(inside)), unit.spec).mul_(damped)
        log_scale.grad = share if log_scale.grad is None else log_scale.grad.add_(share)
        gradient.mul_(inside)

    def _put_back(self) -> None:
        for unit in self.units:
            if unit.name in self._kept:
                unit.parameter.data = self._kept.pop(unit.name)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Drop the learned scales' gradients (the trainer clears those of the model only) and follow their values."""
        for name, log_scale in self.log_scales.items():
            log_scale.grad = None
            log_scale.clamp_min_(_SMALLEST_LOG_SCALE / SCALE_SPEED)
            self.scales[name].copy_(_exp(log_scale))
        return {}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The units' exact projection with the present scales."""
        return quantize_units(self.units, self.scales, self.codebooks)

    def state_dict(self) -> dict[str, Any]:
        """The scales, the logarithms they are learned as, and product units' codebooks."""
        log_scales = {n: p.detach() * SCALE_SPEED for n, p in self.log_scales.items()}
        return {"scales": self.scales, "log_scales": log_scales, "codebooks": self.codebooks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        copy_into(self.scales, state["scales"])
        copy_into(self.codebooks, state["codebooks"])
        for name, log_scale in self.log_scales.items():
            log_scale.data.copy_(state["log_scales"][name] / SCALE_SPEED)


def _log(scale: torch.Tensor) -> torch.Tensor:
    """A scale as it is trained: the logarithm over SCALE_SPEED."""
    return scale.detach().clone().log().clamp_min_(_SMALLEST_LOG_SCALE) / SCALE_SPEED


def _exp(log_scale: torch.Tensor) -> torch.Tensor:
    return (SCALE_SPEED * log_scale).exp()


def _end(spec: QuantSpec) -> float:
    """Where the gradient of a weight is cut, in units of the scale: the outermost level, or half a step beyond it."""
    top, step = spec.levels[-1], spec.levels[1] - spec.levels[0]
    return top + step / 2 if spec.bit_width <= _STRETCHED_UP_TO_BITS else top

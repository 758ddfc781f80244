"""Proximal annealing: the forward pass sees weights pulled ever harder to the grid, exactly on it in the end.

Latent weights u collect the gradients that are taken at ``w = prox(u)``; the proximal map turns from the identity into the
projection as the hardness h goes from 0 to 1 (aggregate proximal gradient: PARQ, Jin et al., ICML 2025, which contains straight-through
training as its limit h = 1). With cells [q, q + s] between neighbouring levels, midpoint m and distance d to the nearest level:

* ``parq``: between levels ``m + (u - m) / (1 - h)``, cut at the levels: a ramp that steepens into a step. It is the minimum of
  ``1/2 (w - u)^2 + h/2 (s^2/4 - (w - m)^2)``. Beyond the ends ``end + (1 - h)(u - end)``, the minimum with
  ``h / (2 (1 - h)) (w - end)^2``.
* ``soft-threshold``: ProxQuant (Bai et al., ICLR 2019) with the piecewise-affine regularizer ``t * d``: u moves to its nearest
  level by at most t. Inside the grid ``t = h s / 2``, so that at h = 1 every weight arrives; beyond the ends ``t = h s / (2 (1 - h))``.
* ``average``: BinaryRelax (Yin et al., SIAM J. Imaging Sci. 2018) with ``h / (2 (1 - h)) d^2``: ``(1 - h) u + h q``.

h follows a sigmoid of the training's share from ``anneal_start`` to ``anneal_end``, normalized to reach 0 and 1 there; after
``anneal_end`` training is straight-through. Scales follow the latent weights: nearest codes, then least squares, at each step.
Limits: product units have no neighbouring levels and are refused.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.grid import best_scale, nearest_levels
from mixbits.quant.method import (
    copy_into,
    quantize_units,
    refuse_product_units,
    starting_scale,
    stored_weights,
    trained_units,
)
from mixbits.scales import expand_scale
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec

ProximalMap = Literal["parq", "soft-threshold", "average"]


def hardness_at(share: float, *, start: float, end: float, steepness: float) -> float:
    """h at a share (0 to 1) of the training: 0 up to ``start``, 1 from ``end`` on, a normalized sigmoid between."""
    if share >= end:
        return 1.0
    if share <= start:
        return 0.0
    place = (share - start) / (end - start) - 0.5
    low, high = (1 / (1 + math.exp(-steepness * x)) for x in (-0.5, 0.5))
    return (1 / (1 + math.exp(-steepness * place)) - low) / (high - low)


def proximal_map(
    ratio: torch.Tensor, levels: torch.Tensor, spec: QuantSpec, *, hardness: float, kind: ProximalMap
) -> torch.Tensor:
    """prox of weights in units of their scale.

    ratio: any shape; levels: the grid levels nearest to it; hardness: 0 (identity) to 1 (levels). Returns ratio's shape.
    """
    if hardness >= 1.0:
        return levels.clone()
    if hardness <= 0.0:
        return ratio.clone()
    low, high, step = spec.levels[0], spec.levels[-1], spec.levels[1] - spec.levels[0]
    if kind == "average":
        return torch.lerp(ratio, levels, hardness)
    away = ratio - levels
    outside = (ratio < low) | (ratio > high)
    if kind == "soft-threshold":
        reach = torch.where(outside, hardness / (1 - hardness), hardness).mul_(step / 2)
        return levels + away.sign() * (away.abs() - reach).clamp_min_(0.0)
    # The nearest midpoint lies half a step from the nearest level, on the weight's side of it.
    side = torch.where(away >= 0, 0.5 * step, -0.5 * step)
    ramp = side + (away - side) / (1 - hardness)
    inside = torch.where(away >= 0, ramp.clamp_min(0.0), ramp.clamp_max(0.0))
    return levels + torch.where(outside, away * (1 - hardness), inside)


class Proximal:
    """Method object for proximal annealing of ``model``'s units under ``allocation``.

    ``kind``: the proximal map; ``anneal_start``, ``anneal_end``: shares of the training between which it hardens;
    ``steepness`` of the sigmoid. Raises SpecError for settings out of range and for product units.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        *,
        kind: ProximalMap = "parq",
        anneal_start: float = 0.0,
        anneal_end: float = 0.6,
        steepness: float = 10.0,
    ) -> None:
        if kind not in get_args(ProximalMap):
            raise SpecError(f"proximal map is {kind!r}; expected one of {', '.join(get_args(ProximalMap))}")
        if not 0 <= anneal_start < anneal_end <= 1 or not 0 < steepness <= 100:
            raise SpecError(
                "proximal annealing needs 0 <= anneal_start < anneal_end <= 1 and 0 < steepness <= 100; got "
                f"{anneal_start}, {anneal_end}, {steepness}"
            )
        self.units = trained_units(model, inventory, allocation)
        refuse_product_units(self.units, "proximal annealing")
        self.kind: ProximalMap = kind
        self._schedule = {"start": anneal_start, "end": anneal_end, "steepness": steepness}
        self.hardness = hardness_at(0.0, **self._schedule)
        self.scales = {unit.name: starting_scale(unit) for unit in self.units}
        self._kept: dict[str, torch.Tensor] = {}

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Show the forward pass prox(u). What an interrupted step left is put back first."""
        self._put_back()
        for unit in self.units:
            weight, scale = unit.matrix, self.scales[unit.name]
            scale.copy_(best_scale(weight, nearest_levels(weight, scale, unit.spec), unit.spec))
            wide = expand_scale(scale, weight.shape[1], unit.spec)
            levels = nearest_levels(weight, scale, unit.spec)
            ratio = weight / torch.where(wide > 0, wide, torch.full_like(wide, torch.inf))
            soft = proximal_map(ratio, levels, unit.spec, hardness=self.hardness, kind=self.kind)
            self._kept[unit.name] = unit.parameter.data
            unit.put(soft.mul_(wide))

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Put the latent weights back; their gradient is the one at prox(u)."""
        self._put_back()

    def _put_back(self) -> None:
        for unit in self.units:
            if unit.name in self._kept:
                unit.parameter.data = self._kept.pop(unit.name)

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Set the hardness of the next step; logs it twenty times over the training."""
        self.hardness = hardness_at(step / num_steps, **self._schedule)
        if step * 20 // num_steps == (step - 1) * 20 // num_steps:
            return {}
        return {"proximal_hardness": self.hardness}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The latent weights' exact projection with the present scales."""
        return quantize_units(self.units, self.scales)

    def state_dict(self) -> dict[str, Any]:
        """Hardness and scales; latent weights are the model's parameters."""
        return {"hardness": self.hardness, "scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.hardness = float(state["hardness"])
        copy_into(self.scales, state["scales"])

"""ADMM training: minimise the loss subject to every weight lying on its grid (Xu et al., ICASSP 2021).

With the scaled dual lambda, the augmented Lagrangian is ``CE(W) + gamma/2 ||W - alpha V + lambda||^2 - gamma/2 ||lambda||^2``.

1. W: AdamW steps on CE(W) + gamma (W - alpha V + lambda) (the papers' extra-gradient is not used here).
2. (alpha, V): minimise ||W + lambda - alpha V||^2 by alternating nearest codes and least-squares scale.
3. lambda <- lambda + W - alpha V.

Steps 2 and 3 run ``num_updates`` times over the training, and gamma grows geometrically from ``gamma`` to ``gamma_final``. Two things
decide whether it converges: gamma has to outweigh the loss gradient (the papers' constant 1e-3 does not), and between two updates the weights
need time to reach their targets (steps x learning rate of the order of ||W - alpha V|| per weight); otherwise lambda, a running sum of
gaps, grows, and the targets run away with it. When gamma changes, the scaled dual is rescaled so that the multiplier
gamma * lambda stays the same. Residuals (primal ||W - alpha V|| / ||W||, dual gamma ||change of alpha V|| / ||W||)
are logged at each update.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.grid import alternate, expand_scale
from mixbits.quant.method import copy_into, quantize_units, starting_scale, stored_weights, trained_units
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight

_MAX_INNER_ITERATIONS = 20


class Admm:
    """Method object for ADMM training of ``model``'s units under ``allocation``."""

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        *,
        gamma: float = 0.1,
        gamma_final: float = 3.0,
        num_updates: int = 10,
    ) -> None:
        if not 0 < gamma <= gamma_final < math.inf or num_updates < 1:
            raise SpecError(
                f"ADMM needs 0 < gamma <= gamma_final and num_updates >= 1; got {gamma}, {gamma_final}, {num_updates}"
            )
        self.units = trained_units(model, inventory, allocation)
        self.num_updates, self._gamma_start, self._gamma_final = num_updates, gamma, gamma_final
        self.gamma = gamma
        self.scales = {unit.name: starting_scale(unit) for unit in self.units}
        self.duals = {unit.name: torch.zeros_like(unit.matrix) for unit in self.units}
        self.targets = {u.name: self._project(u.matrix, self.scales[u.name], u.spec) for u in self.units}

    @staticmethod
    def _project(weight: torch.Tensor, scale: torch.Tensor, spec: Any) -> torch.Tensor:
        levels, best = alternate(weight, scale, spec, max_iterations=_MAX_INNER_ITERATIONS)
        scale.copy_(best)
        return levels.mul_(expand_scale(best, levels.shape[1], spec))

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    def before_forward(self, model: nn.Module) -> None:
        """The forward pass sees the full-precision weights."""

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Add the gradient of the quadratic term."""
        for unit in self.units:
            gradient = unit.gradient()
            if gradient is not None:
                gradient.add_(unit.matrix, alpha=self.gamma).sub_(self.targets[unit.name], alpha=self.gamma)
                gradient.add_(self.duals[unit.name], alpha=self.gamma)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Every ``num_steps / num_updates`` steps: project, update the duals, raise gamma; returns the residuals."""
        done, before = step * self.num_updates // num_steps, (step - 1) * self.num_updates // num_steps
        if done == before:
            return {}
        primal, dual, norm = 0.0, 0.0, 0.0
        for unit in self.units:
            weight, lam = unit.matrix, self.duals[unit.name]
            target = self._project(weight + lam, self.scales[unit.name], unit.spec)
            dual += float((target - self.targets[unit.name]).square().sum())
            self.targets[unit.name].copy_(target)
            gap = weight - target
            lam.add_(gap)
            primal, norm = primal + float(gap.square().sum()), norm + float(weight.square().sum())
        share = done / self.num_updates
        gamma = self._gamma_start * (self._gamma_final / self._gamma_start) ** share
        figures = {
            "admm_primal": math.sqrt(primal / max(norm, 1e-30)),
            "admm_dual": self.gamma * math.sqrt(dual / max(norm, 1e-30)),
            "admm_gamma": self.gamma,
        }
        for lam in self.duals.values():
            lam.mul_(self.gamma / gamma)
        self.gamma = gamma
        return figures

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Exact projection of the present weights, scales searched anew from the last ones."""
        scales = {
            u.name: alternate(u.matrix, self.scales[u.name], u.spec, max_iterations=_MAX_INNER_ITERATIONS)[1]
            for u in self.units
        }
        return quantize_units(self.units, scales)

    def state_dict(self) -> dict[str, Any]:
        """gamma, scales, duals and targets."""
        return {"gamma": self.gamma, "scales": self.scales, "duals": self.duals, "targets": self.targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.gamma = float(state["gamma"])
        for mine, saved in ((self.scales, "scales"), (self.duals, "duals"), (self.targets, "targets")):
            copy_into(mine, state[saved])

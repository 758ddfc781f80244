"""ADMM training: minimise the loss subject to every weight lying on its grid (Xu et al., ICASSP 2021).

With the scaled dual lambda, the augmented Lagrangian is ``CE(W) + gamma/2 ||W - alpha V + lambda||^2 - gamma/2 ||lambda||^2``.

1. W: gradient steps, by one of four solvers (below).
2. (alpha, V): minimise ||W + lambda - alpha V||^2 by alternating nearest codes and least-squares scale, one scale for whatever the
   unit's granularity says.
3. lambda <- lambda + step * (W - alpha V).

Solvers. ``adamw``: the trainer's optimizer on the Lagrangian's gradient. ``extragradient``: the papers' two plain gradient steps
(`mixbits.quant.extragradient`), all parameters at the fixed rates eta1 = ``lookahead_rate`` and eta2 = ``descent_rate``, whatever the trainer's
learning rate; ``extragradient-adamw``: the optimizer takes the gradient at the lookahead point. ``projected`` (the default):
the loss is linearized at the feasible point alpha V instead of W, and the penalty acts beside the optimizer, as decoupled weight decay
does: after each step every weight goes the share ``1 - exp(-gamma / num_steps)`` of its way to alpha V - lambda, so that gamma
counts e-folds over the training. It updates (alpha, V) and lambda at every step.

Why ``projected``: the other three see the gradient at W, where the loss is near its minimum and says nothing about what
a weight's code costs; weights are pulled to the codes nearest at the start and hardly any code changes
(benchmarks/bench_methods.py). In one step the weights make only part of their way to the targets, so ``step`` in 3 is that
part; a full step lets lambda run away. Without penalty (gamma -> 0) ``projected`` is straight-through training. A Lagrangian
solver needs gamma large enough to outweigh the loss gradient and updates far enough apart to let the weights reach
their targets.

When gamma changes, lambda is rescaled so that the multiplier gamma * lambda stays the same. Limits: product units are refused.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.admm_gamma import GammaRule, Residuals, balanced_gamma, scheduled_gamma
from mixbits.quant.extragradient import Lookahead, descend
from mixbits.quant.grid import alternate, best_scale, nearest_levels
from mixbits.quant.method import (
    TrainedUnit,
    copy_into,
    quantize_units,
    refuse_product_units,
    starting_scale,
    stored_weights,
    trained_units,
)
from mixbits.quant.units import as_matrix
from mixbits.scales import expand_scale
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight

Solver = Literal["projected", "adamw", "extragradient", "extragradient-adamw"]
_MAX_INNER_ITERATIONS = 20
_NUM_LOGGED = 20
_DEFAULT_GAMMA = {"projected": (0.8, 0.8)}
_LAGRANGIAN_GAMMA, _LAGRANGIAN_UPDATES, _BALANCED_UPDATES = (0.1, 3.0), 10, 20


class Admm:
    """Method object for ADMM training of ``model``'s units under ``allocation``.

    ``gamma``, ``gamma_final``: penalty at the start and end (None: the solver's own; 'constant' and 'residual' rules start at
    gamma and do not look at gamma_final). ``num_updates`` of targets and duals over the training; None: at each step for ``projected``, else
    10, with balancing 20. ``primal_tolerance``, ``dual_tolerance``, ``patience``: ask the trainer to stop once both
    residuals were below their tolerances that many updates in a row (0: never). ``dual_step``: factor of the duals' step, 0 leaves them
    out (a plain quadratic penalty). ``finish_straight_through``: share of the training,
    at its end, in which the forward pass sees projected weights and there is no penalty. Raises SpecError.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        *,
        solver: Solver = "projected",
        gamma: float | None = None,
        gamma_final: float | None = None,
        gamma_rule: GammaRule = "geometric",
        num_updates: int | None = None,
        lookahead_rate: float = 0.02,
        descent_rate: float = 0.001,
        primal_tolerance: float = 0.0,
        dual_tolerance: float = 0.0,
        patience: int = 3,
        dual_step: float = 1.0,
        finish_straight_through: float = 0.0,
    ) -> None:
        if solver not in get_args(Solver) or gamma_rule not in get_args(GammaRule):
            raise SpecError(
                f"ADMM has the solvers {', '.join(get_args(Solver))} and the gamma rules {', '.join(get_args(GammaRule))}; "
                f"got {solver!r} and {gamma_rule!r}"
            )
        usual = _DEFAULT_GAMMA.get(solver, _LAGRANGIAN_GAMMA)
        gamma = usual[0] if gamma is None else gamma
        gamma_final = max(gamma, usual[1]) if gamma_final is None else gamma_final
        _check(gamma, gamma_final, num_updates, lookahead_rate, descent_rate)
        _check_ending(primal_tolerance, dual_tolerance, patience, finish_straight_through, dual_step)
        if num_updates is None and (gamma_rule == "residual" or solver != "projected"):
            num_updates = _BALANCED_UPDATES if gamma_rule == "residual" else _LAGRANGIAN_UPDATES
        self.units = trained_units(model, inventory, allocation)
        refuse_product_units(self.units, "ADMM")
        self.solver, self.gamma_rule, self.num_updates = solver, gamma_rule, num_updates
        self.gamma, self._gamma_start, self._gamma_final = gamma, gamma, gamma_final
        self._tolerances, self._patience, self._finish = (
            (primal_tolerance, dual_tolerance),
            patience,
            finish_straight_through,
        )
        self._lookahead, self._descent_rate, self._dual_step = Lookahead(lookahead_rate), descent_rate, dual_step
        self.num_converged, self.finishing = 0, False
        self.scales = {unit.name: starting_scale(unit) for unit in self.units}
        self.duals = {unit.name: torch.zeros_like(unit.matrix) for unit in self.units}
        self.targets = {u.name: self._project(u, u.matrix, _MAX_INNER_ITERATIONS) for u in self.units}
        self._kept: dict[str, torch.Tensor] = {}

    def _project(self, unit: TrainedUnit, weight: torch.Tensor, max_iterations: int) -> torch.Tensor:
        """The projection of ``weight``, from the unit's last scale, which is replaced."""
        scale = self.scales[unit.name]
        if max_iterations == 1:
            levels = nearest_levels(weight, scale, unit.spec)
            scale.copy_(best_scale(weight, levels, unit.spec))
        else:
            levels, best = alternate(weight, scale, unit.spec, max_iterations=max_iterations)
            scale.copy_(best)
        return levels.mul_(expand_scale(scale, levels.shape[1], unit.spec))

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Show the forward pass the targets (``projected``), the projection (finishing), or the weights themselves."""
        self._put_back()
        if not self.finishing and self.solver != "projected":
            return
        for unit in self.units:
            shown = self._project(unit, unit.matrix, 1) if self.finishing else self.targets[unit.name]
            self._kept[unit.name] = unit.parameter.data
            unit.put(shown)

    def _put_back(self) -> None:
        self._lookahead.put_back()
        for unit in self.units:
            if unit.name in self._kept:
                unit.parameter.data = self._kept.pop(unit.name)

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Put the weights back; a Lagrangian solver adds the quadratic term's gradient where the loss's was taken."""
        if self.finishing or self.solver == "projected":
            self._put_back()
            return
        for unit in self.units:
            gradient = unit.gradient()
            if gradient is not None:
                gradient.add_(unit.matrix, alpha=self.gamma).sub_(self.targets[unit.name], alpha=self.gamma)
                gradient.add_(self.duals[unit.name], alpha=self.gamma)
        if self._lookahead.active:
            self._put_back()
            if self.solver == "extragradient":
                descend(model.parameters(), self._descent_rate)

    def second_gradient(self, model: nn.Module) -> bool:
        """Look ahead, for the extra-gradient solvers."""
        if self.finishing or self.solver not in ("extragradient", "extragradient-adamw"):
            return False
        self._lookahead.go(model.parameters())
        return True

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Pull (``projected``); at an update project, move the duals and set gamma. Returns residuals when it measured them."""
        main_steps = max(1, round(num_steps * (1 - self._finish)))
        if step > main_steps:
            return {}
        share = -math.expm1(-self.gamma / num_steps) if self.solver == "projected" else 0.0
        if share:
            for unit in self.units:
                unit.matrix.lerp_(self.targets[unit.name] - self.duals[unit.name], share)
        updates = self.num_updates or main_steps
        done, before = step * updates // main_steps, (step - 1) * updates // main_steps
        figures = {} if done == before else self._update(done, before, updates, share * main_steps / updates)
        if step == main_steps and self._finish > 0:
            self._start_finishing()
        return figures

    def _update(self, done: int, before: int, updates: int, moved: float) -> dict[str, float]:
        """Targets, duals, gamma. ``moved``: the part of their way that the weights made since the last update (0: all of it)."""
        log = self.num_updates is not None or done * _NUM_LOGGED // updates != before * _NUM_LOGGED // updates
        measure = log or self._tolerances != (0.0, 0.0)
        gap_sum, change_sum, norm = 0.0, 0.0, 0.0
        for unit in self.units:
            weight, dual = unit.matrix, self.duals[unit.name]
            target = self._project(unit, weight + dual, 1 if self.num_updates is None else _MAX_INNER_ITERATIONS)
            gap = weight - target
            dual.add_(gap, alpha=self._dual_step * (min(1.0, moved) if moved else 1.0))
            if measure:
                change_sum += float((target - self.targets[unit.name]).square().sum())
                gap_sum, norm = gap_sum + float(gap.square().sum()), norm + float(weight.square().sum())
            self.targets[unit.name] = target
        figures: dict[str, float] = {}
        used = self.gamma
        if measure:
            residuals = Residuals.of(gap_sum, change_sum, norm, used)
            self.num_converged = self.num_converged + 1 if residuals.within(*self._tolerances) else 0
            if self.gamma_rule == "residual":
                self._set_gamma(balanced_gamma(used, residuals, start=self._gamma_start))
            if log:
                figures = {"admm_primal": residuals.primal, "admm_dual": residuals.dual, "admm_gamma": used}
        if self.gamma_rule == "geometric":
            self._set_gamma(scheduled_gamma(self._gamma_start, self._gamma_final, done / updates))
        return figures

    def _set_gamma(self, gamma: float) -> None:
        if gamma != self.gamma:
            for dual in self.duals.values():
                dual.mul_(self.gamma / gamma)
            self.gamma = gamma

    def _start_finishing(self) -> None:
        """From here on straight-through, from the point whose projection the forward pass saw."""
        self.finishing = True
        for unit in self.units:
            if self.solver == "projected":
                unit.matrix.add_(self.duals[unit.name])
            self.duals[unit.name].zero_()

    def should_stop(self) -> bool:
        """True once both residuals have been below their tolerances for ``patience`` updates."""
        return self.num_converged >= self._patience

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Exact projection: of W, with the best scales (the last ones are of W + lambda, which may be far from W before the
        end); for ``projected``, and when finishing, of W + lambda at the last scales, which the forward pass saw."""
        if self.solver == "projected" or self.finishing:
            return quantize_units(tuple(_moved(u, self.duals[u.name]) for u in self.units), self.scales)
        return quantize_units(self.units)

    def state_dict(self) -> dict[str, Any]:
        """gamma, scales, duals, targets, and where the method stands."""
        return {
            "gamma": self.gamma,
            "num_converged": self.num_converged,
            "finishing": self.finishing,
            "scales": self.scales,
            "duals": self.duals,
            "targets": self.targets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.gamma = float(state["gamma"])
        self.num_converged, self.finishing = int(state["num_converged"]), bool(state["finishing"])
        for mine, saved in ((self.scales, "scales"), (self.duals, "duals"), (self.targets, "targets")):
            copy_into(mine, state[saved])


def _moved(unit: TrainedUnit, by: torch.Tensor) -> TrainedUnit:
    return replace(unit, parameter=nn.Parameter(unit.parameter.detach() + as_matrix(by, unit.kind)))


def _check(gamma: float, gamma_final: float, num_updates: int | None, *rates: float) -> None:
    if not 0 < gamma <= gamma_final < math.inf or (num_updates is not None and num_updates < 1):
        raise SpecError(
            f"ADMM needs 0 < gamma <= gamma_final and num_updates >= 1; got {gamma}, {gamma_final}, {num_updates}"
        )
    if not all(0 < rate < math.inf for rate in rates):
        raise SpecError(f"ADMM needs lookahead_rate and descent_rate above 0; got {rates[0]}, {rates[1]}")


def _check_ending(primal: float, dual: float, patience: int, finish: float, dual_step: float) -> None:
    fine = 0 <= primal < math.inf and 0 <= dual < math.inf and patience >= 1
    if not (fine and 0 <= finish < 1 and 0 <= dual_step <= 2):
        raise SpecError(
            "ADMM needs tolerances >= 0, patience >= 1, finish_straight_through in [0, 1) and dual_step in [0, 2]; got "
            f"{primal}, {dual}, {patience}, {finish}, {dual_step}"
        )

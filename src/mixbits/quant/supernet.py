"""Differentiable search of precisions: every unit is all of its candidates at once, and which one it should be is learned.

A group of units has one vector of architecture weights a over the candidate specs; p = softmax(a) mixes them (Xu et al., 2021;
`mixbits.quant.mixing` says how, by weights or by outputs). Or p = softmax((a + g) / t) with fresh Gumbel noise g each step and a
temperature t that falls geometrically (Jang et al., 2017; Maddison et al., 2017), which ends in single choices.

The model's own weights are trained on the training text, straight through the mixture. Every ``arch_every`` steps, a takes one
step of Adam on the loss of the next held-out batch (DARTS, Liu et al., 2019, first order) plus the penalty on the expected size
(`mixbits.quant.search_size`): ``d loss / d p_n = <G, Q_n(W)>``, chained through the softmax. Without held-out text the training
gradient itself is used. Scales follow the weights by one alternating step after each architecture step.

While it searches, the figures that count are logged: entropy, expected bytes, multiplier, held-out loss. A search that settled
early, or on one choice for all groups, is warned about and recorded; if that choice does not fit, it is an error
(`mixbits.quant.search` reads the result).

Limits: grids with fixed levels only. Weights of all candidates are shared (no prototypes). First order: the architecture gradient
takes the weights as they are. Dropout in an architecture step is the held-out loss's own business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from mixbits.errors import DataError, SpecError
from mixbits.quant.fingerprint import model_hash
from mixbits.quant.groups import complete_groups
from mixbits.quant.method import copy_into, quantize_units, stored_weights
from mixbits.quant.mixing import CandidateUnit, OutputMixing, check_finite
from mixbits.quant.search import Preferences
from mixbits.quant.search_size import ExpectedSize, LagrangePenalty, PapersPenalty, Penalty, check_search_budget
from mixbits.quant.units import unit_parameters
from mixbits.spec import ModelInventory, QuantizedWeight, QuantSpec

Mode = Literal["weights", "outputs"]
Relaxation = Literal["softmax", "gumbel"]
HeldOutLoss = Callable[[nn.Module, int], torch.Tensor]
"""(model, number of architecture steps so far) -> differentiable loss (nats per token) of that step's held-out batch."""

TEMPERATURES: dict[Relaxation, tuple[float, float]] = {"softmax": (1.0, 1.0), "gumbel": (2.0, 0.2)}
MARGINALS_UNTIL = 0.25
"""Share of the search whose architecture steps are averaged into the marginal losses: later the trained weights have settled in
the mixture, the probabilities are no longer alike, and the marginals rank units worse (`mixbits.quant.search`)."""
_SHARP = 0.99
_NO_ENTROPY = 0.05  # share of the largest entropy
_logger = logging.getLogger(__name__)


@runtime_checkable
class NamesThePlace(Protocol):
    """A held-out loss that can say where its forward pass goes wrong."""

    def place(self, model: nn.Module, index: int) -> str:
        """Asked where the loss of architecture step ``index`` is not finite, the mixture in place: '; first not finite: ...'."""


class SuperNet:
    """Method object that trains ``model`` as a mixture of ``candidates`` and learns which one each group should be.

    ``max_bytes``: budget of the whole file; ``groups``: unit names that share a choice (others stand alone); ``temperatures``:
    at the start and the end (None: 1, 1 for softmax, 2, 0.2 for gumbel); ``beta``: of the papers' penalty, which then stands in
    for the Lagrange multiplier. Raises SpecError: fewer than two candidates, a product grid, a budget outside the range of the
    candidates, wrong groups or settings; DataError for weights that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        candidates: Sequence[QuantSpec],
        *,
        max_bytes: int,
        held_out_loss: HeldOutLoss | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        mode: Mode = "weights",
        relaxation: Relaxation = "softmax",
        temperatures: tuple[float, float] | None = None,
        arch_every: int = 4,
        arch_learning_rate: float = 0.05,
        beta: float | None = None,
        multiplier_rate: float = 0.1,
        damping: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.candidates = tuple(sorted(set(candidates)))
        _check(self.candidates, mode, relaxation, temperatures, arch_every, arch_learning_rate)
        self.inventory, self.max_bytes, self.held_out_loss = inventory, max_bytes, held_out_loss
        self.groups = complete_groups(inventory, groups)
        check_search_budget(inventory, self.candidates, max_bytes=max_bytes, groups=self.groups)
        self.mode, self.relaxation, self.arch_every = mode, relaxation, arch_every
        self.temperatures = temperatures or TEMPERATURES[relaxation]
        self.temperature = self.temperatures[0]
        parameters = unit_parameters(model, inventory)
        self.units = {u.name: CandidateUnit(u, parameters[u.name], self.candidates) for u in inventory.units}
        self.mixing = OutputMixing(model, inventory, self.groups, self.units) if mode == "outputs" else None
        wrapped = set(self.mixing.by_outputs) if self.mixing else set()
        self._by_weights = [k for k in range(len(self.groups)) if k not in wrapped]
        self.size = ExpectedSize.of(inventory, self.groups, self.candidates)
        self.penalty: Penalty = LagrangePenalty(self.size, max_bytes, rate=multiplier_rate, damping=damping)
        if beta is not None:
            self.penalty = PapersPenalty(self.candidates, beta=beta)
        shape = (len(self.groups), len(self.candidates))
        self.weights = nn.Parameter(torch.zeros(shape))
        self.optimizer = torch.optim.Adam([self.weights], lr=arch_learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self._noise = torch.zeros(shape)
        self._shown: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None
        self.arch_steps, self.averaged_steps, self.steps = 0, 0, 0
        self._mean, self._square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        self.history: list[dict[str, float]] = []
        self.events: list[dict[str, Any]] = []
        self._perturbations = {name: unit.perturbations() for name, unit in self.units.items()}
        self._facts = {
            "seed": seed, "model_hash": model_hash(model), "mode": mode, "relaxation": relaxation,
            "temperatures": list(self.temperatures), "arch_every": arch_every, "arch_learning_rate": arch_learning_rate,
            "penalty": "lagrange" if beta is None else f"papers, beta {beta:g}", "budget_bytes": max_bytes,
            "architecture_data": "training" if held_out_loss is None else "held-out",
        }  # fmt: skip

    # -- what the trainer calls -------------------------------------------------------------------------------------

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters; the architecture has an optimizer of its own."""
        return None

    @torch.no_grad()
    def before_forward(self, model: nn.Module) -> None:
        """Show the forward pass the mixture. What an interrupted step left is put back first."""
        self._put_back()
        if self.relaxation == "gumbel":
            uniform = torch.rand(self._noise.shape, generator=self.generator, dtype=torch.float64)
            self._noise = (-(-uniform.clamp_min(1e-12).log()).log()).float()
        mixed = self.mixed_probabilities()
        rows, sums, shown = mixed.tolist(), [], []
        for k in self._by_weights:
            for name in self.groups[k]:
                shown.append(self.units[name])
                sums.append(shown[-1].show(rows[k]))
        check_finite(shown, sums, "its mixed weight")
        if self.mixing is not None:
            self._shown = mixed.to(next(model.parameters()).device).requires_grad_()
            self.mixing.enter(model, self._shown)

    @torch.no_grad()
    def after_backward(self, model: nn.Module) -> None:
        """Put the trained weights back; their gradient is the mixture's. Without held-out text, also the architecture's."""
        shown = self._shown
        self._put_back()
        if self.held_out_loss is None:
            parameters = self._parameters()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            self._gradient = self._probability_gradient(gradients, None if shown is None else shown.grad)

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Every ``arch_every`` steps one architecture step. Returns its figures."""
        self.steps = step
        start, end = self.temperatures
        self.temperature = start * (end / start) ** min(1.0, step / num_steps)
        if step % self.arch_every:
            return {}
        loss = self._held_out_gradient(model) if self.held_out_loss is not None else None
        self._architecture_step(averaged=not self.arch_steps or step <= MARGINALS_UNTIL * num_steps)
        with torch.no_grad():
            for unit in self.units.values():
                unit.follow()
        figures = self._figures()
        if loss is not None:
            figures["search_held_out_loss"] = loss
        self.history.append({"step": step, **figures})
        self._watch(step, num_steps, figures["search_entropy"])
        return figures

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it every unit has the stored value of its most probable candidate."""
        best = self._best_units()
        return stored_weights(model, best, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The units' exact projection on their most probable candidate (16-bit ones are left out)."""
        best = self._best_units()
        return quantize_units(best, {u.name: self.units[u.name].scales[u.spec] for u in best})

    def state_dict(self) -> dict[str, Any]:
        """Architecture, its optimizer, multiplier, random state, scales, and what was found so far."""
        return {
            "weights": self.weights.detach(), "optimizer": self.optimizer.state_dict(),
            "multiplier": self.penalty.multiplier, "temperature": self.temperature,
            "generator": self.generator.get_state(), "arch_steps": self.arch_steps, "averaged_steps": self.averaged_steps, "steps": self.steps,
            "mean": self._mean, "square": self._square, "history": self.history, "events": self.events,
            "scales": {name: {str(s): t for s, t in unit.scales.items()} for name, unit in self.units.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.weights.data.copy_(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.penalty.multiplier, self.temperature = state["multiplier"], state["temperature"]
        self.generator.set_state(state["generator"])
        self.arch_steps, self.steps, self.averaged_steps = state["arch_steps"], state["steps"], state["averaged_steps"]
        self._mean, self._square = state["mean"].clone(), state["square"].clone()
        self.history, self.events = list(state["history"]), list(state["events"])
        for name, unit in self.units.items():
            copy_into({str(s): t for s, t in unit.scales.items()}, state["scales"][name])

    # -- the architecture -------------------------------------------------------------------------------------------

    def probabilities(self) -> torch.Tensor:
        """Of each group's candidates (K, N), without noise: softmax(a / t), or softmax(a), which Gumbel noise draws from."""
        return torch.softmax(self._logits(), -1)

    def mixed_probabilities(self) -> torch.Tensor:
        """The shares (K, N) the candidates have in the mixture of the present step."""
        if self.relaxation == "softmax":
            return self.probabilities()
        return torch.softmax((self.weights + self._noise) / self.temperature, -1)

    def _logits(self) -> torch.Tensor:
        return self.weights if self.relaxation == "gumbel" else self.weights / self.temperature

    def _parameters(self) -> list[nn.Parameter]:
        return [self.units[name].parameter for k in self._by_weights for name in self.groups[k]]

    def _put_back(self) -> None:
        for unit in self.units.values():
            unit.put_back()
        if self.mixing is not None:
            self.mixing.leave()
            self._shown = None

    def _probability_gradient(self, gradients: Sequence[torch.Tensor], shown: torch.Tensor | None) -> torch.Tensor:
        """d loss / d p (K, N), float64, from the gradients of the mixed weights and of the shares that mixed outputs."""
        result = torch.zeros(self.weights.shape, dtype=torch.float64)
        names = [(k, name) for k in self._by_weights for name in self.groups[k]]
        units = [self.units[name] for _, name in names]
        parts = [unit.inner_products(gradient) for unit, gradient in zip(units, gradients, strict=True)]
        check_finite(units, [part.sum() for part in parts], "the architecture gradient")
        for (k, _), part in zip(names, parts, strict=True):
            result[k] += part.cpu()
        for k in self.mixing.by_outputs if self.mixing else ():
            if shown is not None:
                result[k] = shown[k].double().cpu()
            if not bool(torch.isfinite(result[k]).all()):
                raise DataError(
                    f"unit {self.groups[k][0]}: the architecture gradient is not finite; search again with a lower learning rate"
                )
        return result

    def _held_out_gradient(self, model: nn.Module) -> float:
        """Take d loss / d p on the next held-out batch; returns the loss."""
        assert self.held_out_loss is not None
        self.before_forward(model)
        try:
            loss = self.held_out_loss(model, self.arch_steps)
            value = float(loss.detach())
            if not math.isfinite(value):
                where = ""
                if isinstance(self.held_out_loss, NamesThePlace):
                    where = self.held_out_loss.place(model, self.arch_steps)
                raise DataError(
                    f"held-out loss is {value} at architecture step {self.arch_steps + 1}{where}; expected a finite value: search "
                    "again with a lower learning rate (the training checkpoints so far are kept)"
                )
            wanted: list[torch.Tensor] = [*self._parameters(), *([] if self._shown is None else [self._shown])]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        finally:
            self._put_back()
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
        shown = gradients.pop() if len(gradients) > len(self._parameters()) else None
        with torch.no_grad():
            self._gradient = self._probability_gradient(gradients, shown)
        return value

    def _architecture_step(self, *, averaged: bool) -> None:
        """One step of Adam on a, from ``self._gradient`` and the penalty, then the multiplier's."""
        if self._gradient is None:
            raise SpecError("no gradient of a training step yet: after_step was called before after_backward")
        probabilities = self.probabilities()
        slope = self.penalty.gradient(probabilities.detach())
        total = (self.mixed_probabilities() * self._gradient).sum() + (probabilities * slope).sum()
        (self.weights.grad,) = torch.autograd.grad(total, [self.weights])
        self.optimizer.step()
        self.weights.grad = None
        self.penalty.update(self.probabilities().detach())
        self.arch_steps += 1
        if averaged:
            largest = self.size.group_bytes.argmax(1, keepdim=True)
            against = self._gradient - self._gradient.gather(1, largest)
            before = against - self._mean
            self.averaged_steps += 1
            self._mean += before / self.averaged_steps
            self._square += before * (against - self._mean)
        self._gradient = None

    # -- what was found ---------------------------------------------------------------------------------------------

    def _figures(self) -> dict[str, float]:
        p = self.probabilities().detach().double()
        entropy = float(-(p * p.clamp_min(1e-300).log()).sum(1).mean())
        figures = {"search_entropy": entropy, "search_expected_bytes": self.size.expected(p)}
        return figures | {"search_multiplier": self.penalty.multiplier, "search_temperature": self.temperature}

    def _collapsed_to(self) -> QuantSpec | None:
        """The one spec that every group has settled on, if there are several groups and one spec."""
        best = self.probabilities().detach().max(1)
        if len(self.groups) < 2 or float(best.values.min()) < _SHARP or len(set(best.indices.tolist())) > 1:
            return None
        return self.candidates[int(best.indices[0])]

    def _watch(self, step: int, num_steps: int, entropy: float) -> None:
        """Warn once of a search that is over too early, and of one choice everywhere."""
        seen = {event["what"] for event in self.events}
        found = []
        if 2 * step < num_steps and entropy < _NO_ENTROPY * math.log(len(self.candidates)):
            found.append(("settled early", "the entropy is nearly 0 before half of the search"))
        spec = self._collapsed_to()
        if spec is not None:
            found.append(("one choice", f"every group has settled on {spec}"))
        for what, message in found:
            if what not in seen:
                _logger.warning("search, step %d of %d: %s; try a lower arch_learning_rate", step, num_steps, message)
                self.events.append({"step": step, "what": what, "message": message})

    def _best_units(self) -> tuple[Any, ...]:
        best = self.probabilities().detach().argmax(1).tolist()
        chosen = [self.units[name].variants[n] for group, n in zip(self.groups, best, strict=True) for name in group]
        return tuple(unit for unit in chosen if unit.spec.is_quantized)

    def preferences(self) -> Preferences:
        """What was learned so far. Raises SpecError when nothing was, or when all groups have settled on one spec that does
        not fit the budget.
        """
        if not self.arch_steps:
            raise SpecError(
                f"no architecture step was taken in {self.steps} steps (one every {self.arch_every}); search for longer, or lower "
                "arch_every"
            )
        p = self.probabilities().detach().double()
        n = self.averaged_steps
        stderr = (self._square / max(1, n - 1) / n).sqrt() if n > 1 else torch.full_like(self._square, math.inf)
        found = Preferences(
            self.inventory, self.candidates, self.groups, _rows(p), _rows(self._mean), _rows(stderr), self._perturbations,
            {**self._facts, **self._figures(), "steps": self.steps, "architecture_steps": self.arch_steps,
             "averaged_steps": n, "events": list(self.events)},
            tuple(self.history),
        )  # fmt: skip
        spec = self._collapsed_to()
        if spec is not None and found.file_bytes(best := found.one_best()) > self.max_bytes:
            raise SpecError(
                f"the search collapsed: every group settled on {spec}, {found.file_bytes(best)} bytes, above the budget of "
                f"{self.max_bytes}; search with a lower arch_learning_rate or a higher multiplier_rate (or beta)"
            )
        return found


def _rows(values: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def _check(
    candidates: Sequence[QuantSpec],
    mode: str,
    relaxation: str,
    temperatures: tuple[float, float] | None,
    arch_every: int,
    arch_learning_rate: float,
) -> None:
    if len(candidates) < 2:
        raise SpecError(f"{len(candidates)} candidate(s); a search needs at least two different specs, e.g. 1,1.58,2,4")
    for spec in candidates:
        if spec.is_product:
            raise SpecError(
                f"candidate {spec} is a product grid, which has no fixed levels; search among the other grids"
            )
    for name, value, allowed in (
        ("mode", mode, ("weights", "outputs")),
        ("relaxation", relaxation, tuple(TEMPERATURES)),
    ):
        if value not in allowed:
            raise SpecError(f"{name} is {value!r}; expected {' or '.join(map(repr, allowed))}")
    if temperatures is not None and not all(math.isfinite(t) and t > 0 for t in temperatures):
        raise SpecError(f"temperatures are {temperatures!r}; expected two positive numbers")
    if arch_every < 1 or not arch_learning_rate > 0:
        raise SpecError(
            f"arch_every is {arch_every}, arch_learning_rate {arch_learning_rate}; expected at least 1, and above 0"
        )

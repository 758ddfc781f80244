"""One unit in several candidate grids at once, and modules that mix the outputs of a whole sublayer over the candidates.

Mixing the weights of a matrix, ``sum p_n Q_n(W)``, is mixing its outputs, because it is linear: one product whatever the number
of candidates, and ``d loss / d p_n = <G, Q_n(W)>`` from the gradient G of the mixed weight. :class:`CandidateUnit` does this
without keeping any ``Q_n``.

The papers mix the outputs of attention and feed-forward blocks, which are not linear. :class:`OutputMixing` does that: for the
while of a step such a block is replaced by a wrapper that runs it once per candidate, with that candidate's weights
(``torch.func.functional_call``), and adds the outputs up; autograd gives every gradient, straight through the projections. A
block without a module of its own (the two linear layers in OPT's decoder layer) is run as a chain: its first matrix gives the
candidates' outputs stacked along the first dimension, its last takes them apart and mixes.

Limits: a chain needs a layer that treats its rows alike between its matrices. Matrices that are tied, embeddings, and the output
layer (which the chunked loss reads directly) are mixed by their weights, which is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mixbits.errors import DataError, SpecError
from mixbits.quant.grid import best_scale, expand_scale, nearest_levels
from mixbits.quant.groups import Groups
from mixbits.quant.method import TrainedUnit, starting_scale
from mixbits.quant.units import as_matrix
from mixbits.spec import ModelInventory, QuantSpec, Unit


class CandidateUnit:
    """A unit and the scales of its candidates. ``variants``: the unit with each candidate spec."""

    def __init__(self, unit: Unit, parameter: nn.Parameter, candidates: Sequence[QuantSpec]) -> None:
        self.name, self.tied = unit.name, unit.tied
        self.variants = tuple(TrainedUnit(unit.name, parameter, unit.kind, spec) for spec in candidates)
        self.scales = {v.spec: starting_scale(v) for v in self.variants if v.spec.is_quantized}
        self._kept: torch.Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The model's own parameter."""
        return self.variants[0].parameter

    @property
    def weight(self) -> torch.Tensor:
        """The trained weight (rows, cols), whatever the forward pass is shown."""
        data = self.parameter.detach() if self._kept is None else self._kept
        return as_matrix(data, self.variants[0].kind)

    def value(self, index: int) -> torch.Tensor:
        """``Q_n(W)``, (rows, cols); 16 bits are the weight itself."""
        weight, spec = self.weight, self.variants[index].spec
        if not spec.is_quantized:
            return weight
        scale = self.scales[spec]
        return nearest_levels(weight, scale, spec).mul_(expand_scale(scale, weight.shape[1], spec))

    def perturbations(self) -> dict[QuantSpec, float]:
        """Squared norm of ``Q_n(W) - W`` per candidate."""
        return {
            v.spec: float((self.value(i) - self.weight).double().square().sum()) for i, v in enumerate(self.variants)
        }

    def follow(self) -> None:
        """One alternating step of every scale: nearest codes, then the best scale for them."""
        weight = self.weight
        for spec, scale in self.scales.items():
            scale.copy_(best_scale(weight, nearest_levels(weight, scale, spec), spec))

    def show(self, probabilities: Sequence[float]) -> torch.Tensor:
        """Show the forward pass the mixed weight; returns its sum, by which a number that is not finite is found."""
        weight = self.weight
        mixed = torch.zeros_like(weight)
        for v, share in zip(self.variants, probabilities, strict=True):
            if not v.spec.is_quantized:
                mixed.add_(weight, alpha=share)
                continue
            scale = self.scales[v.spec]
            wide = expand_scale(scale, weight.shape[1], v.spec).to(weight.dtype) * share
            mixed.addcmul_(nearest_levels(weight, scale, v.spec), wide)
        self._kept = self.parameter.data
        self.variants[0].put(mixed)
        return mixed.sum()

    def put_back(self) -> None:
        """Undo :meth:`show`."""
        if self._kept is not None:
            self.parameter.data, self._kept = self._kept, None

    def inner_products(self, gradient: torch.Tensor) -> torch.Tensor:
        """``<G, Q_n(W)>`` for each candidate (N,), float64; ``gradient`` in the parameter's own orientation."""
        matrix = as_matrix(gradient, self.variants[0].kind)
        return torch.stack([(self.value(i) * matrix).sum(dtype=torch.float64) for i in range(len(self.variants))])


def check_finite(units: Sequence[CandidateUnit], sums: Sequence[torch.Tensor], what: str) -> None:
    """Raise DataError naming the first unit whose sum is not finite."""
    if not sums or bool(torch.isfinite(torch.stack(list(sums))).all()):
        return
    name = next(u.name for u, total in zip(units, sums, strict=True) if not bool(torch.isfinite(total).all()))
    raise DataError(f"unit {name}: {what} is not finite; search again with a lower learning rate")


class _Through(torch.autograd.Function):
    """The projected weight, its gradient handed to the trained one."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return projected

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient[0], None


class _Sublayer(nn.Module):
    """What the wrappers share: candidates' weights (each by name within ``inner``) and the group's probabilities (N,)."""

    def __init__(self, inner: nn.Module, units: Mapping[str, CandidateUnit], probabilities: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.probabilities = inner, probabilities
        self.units = dict(units)

    def run(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """``inner`` with the weights of one candidate."""
        weights = {}
        for name, unit in self.units.items():
            projected = as_matrix(unit.value(index), unit.variants[0].kind).to(unit.parameter.dtype)
            weights[f"{name}.weight".lstrip(".")] = _Through.apply(unit.parameter, projected)
        return functional_call(self.inner, weights, args, kwargs)


class _MixedModule(_Sublayer):
    """A module run once per candidate, its outputs (the first one, if it gives several) mixed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        results = [self.run(i, *args, **kwargs) for i in range(len(self.probabilities))]
        several = isinstance(results[0], tuple)
        outputs = [result[0] if several else result for result in results]
        mixed = _mix(outputs, self.probabilities)
        return (mixed, *results[0][1:]) if several else mixed


class _ChainLink(_Sublayer):
    """One matrix of a chain; ``place`` is "first", "middle" or "last"."""

    place = "middle"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        num = len(self.probabilities)
        if self.place == "first":
            self.rows_seen[:] = [inputs.shape[0]]
            parts = [inputs] * num
        elif not self.rows_seen or inputs.shape[0] != num * self.rows_seen[0]:
            raise SpecError(
                f"unit {next(iter(self.units.values())).name} does not follow the first unit of its group, so that they are no "
                "sublayer whose outputs can be mixed; use mode 'weights', or other groups"
            )
        else:
            parts = list(inputs.chunk(num))
        outputs = [self.run(i, part) for i, part in enumerate(parts)]
        if self.place == "last":
            self.rows_seen.clear()
            return _mix(outputs, self.probabilities)
        return torch.cat(outputs)

    rows_seen: list[int]


def _mix(outputs: Sequence[torch.Tensor], probabilities: torch.Tensor) -> torch.Tensor:
    mixed = probabilities[0].to(outputs[0].dtype) * outputs[0]
    for share, output in zip(probabilities[1:], outputs[1:], strict=True):
        mixed = mixed + share.to(output.dtype) * output
    return mixed


class OutputMixing:
    """Which groups are mixed by outputs, and the wrappers put in for the while of a step.

    ``by_outputs``: indices of those groups; all others (tied, embedding, output layer) are to be mixed by weights.
    Raises SpecError for a group of several units that holds one of the latter.
    """

    def __init__(
        self, model: Any, inventory: ModelInventory, groups: Groups, units: Mapping[str, CandidateUnit]
    ) -> None:
        self.groups, self.units = groups, units
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        by_weight = {
            u.name for u in inventory.units if u.tied or u.kind == "embedding" or model.get_submodule(u.name) is head
        }
        self.by_outputs: list[int] = []
        for index, group in enumerate(groups):
            held = sorted(by_weight & set(group))
            if held and len(group) > 1:
                raise SpecError(
                    f"unit {held[0]} shares a group with others, whose outputs cannot be mixed with it; give it its own"
                )
            if not held:
                self._check_block(model, group)
                self.by_outputs.append(index)
        self._wrapped: list[tuple[nn.Module, str, nn.Module]] = []

    def _whole_module(self, model: nn.Module, group: Sequence[str]) -> str | None:
        """The path of the module that holds the group and no other unit, if there is one."""
        path = _common_path(group)
        inside = {n for n in self.units if n == path or n.startswith(path + ".")}
        return (
            path if path and inside == set(group) and not isinstance(model.get_submodule(path), nn.ModuleList) else None
        )

    def _check_block(self, model: nn.Module, group: Sequence[str]) -> None:
        if self._whole_module(model, group) is None and len({name.rpartition(".")[0] for name in group}) > 1:
            raise SpecError(
                f"units {', '.join(group)} are neither all of one module nor a chain within one, so that there is no output to mix; "
                "use mode 'weights', or other groups"
            )

    @torch.enable_grad()
    def enter(self, model: nn.Module, probabilities: torch.Tensor) -> None:
        """Put the wrappers in. ``probabilities`` (K, N) receives a gradient."""
        for index in self.by_outputs:
            group, share = self.groups[index], probabilities[index]
            path = self._whole_module(model, group)
            if path is not None:
                units = {name[len(path) + 1 :]: self.units[name] for name in group}
                self._wrap(model, path, _MixedModule(model.get_submodule(path), units, share))
                continue
            seen: list[int] = []
            for i, name in enumerate(group):
                link = _ChainLink(model.get_submodule(name), {"": self.units[name]}, share)
                link.place = "first" if i == 0 else "last" if i == len(group) - 1 else "middle"
                link.rows_seen = seen
                self._wrap(model, name, link)

    def _wrap(self, model: nn.Module, path: str, wrapper: nn.Module) -> None:
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        self._wrapped.append((parent, child, parent._modules[child]))  # type: ignore[arg-type]
        parent._modules[child] = wrapper

    def leave(self) -> None:
        """Take the wrappers out."""
        while self._wrapped:
            parent, child, module = self._wrapped.pop()
            parent._modules[child] = module


def _common_path(group: Sequence[str]) -> str:
    """The path of the smallest module that holds all of the group: the unit itself, if it is alone."""
    parts = [name.split(".") for name in group]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)

"""Finding the units of a model: every matrix that can be quantized, ties counted once, and all that is left.

Units are the layers of :mod:`mixbits.layers`; whatever is not a unit is listed in ``ModelInventory.others``, stored as
float16 and counted, never skipped.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.layers import layer_kind
from mixbits.spec import ModelInventory, Unit, is_position_table

_logger = logging.getLogger(__name__)
_LARGE_SHARE = 0.02


def find_units(model: nn.Module) -> ModelInventory:
    """List the units of ``model`` and all other tensors.

    A parameter shared by several modules is one unit, owned by an embedding if one is among them. Raises SpecError when
    there is nothing to quantize or a shared parameter is used in two orientations.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if layer_kind(module) is not None:
            owners.setdefault(id(module.weight), []).append((name, module))
    units = []
    for modules in owners.values():
        modules.sort(key=lambda pair: layer_kind(pair[1]) != "embedding")
        name, module = modules[0]
        kind = layer_kind(module)
        assert kind is not None
        if {layer_kind(m) == "conv1d" for _, m in modules} == {True, False}:
            raise SpecError(
                f"{name}: its weight is shared with a Conv1D in the other orientation, which cannot be packed"
            )
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, cols = as_matrix(weight, kind).shape
        units.append(Unit(name, f"{name}.weight", rows, cols, kind, tuple(n for n, _ in modules[1:])))
    if not units:
        raise SpecError(f"{type(model).__name__} has no nn.Linear, Conv1D or nn.Embedding to quantize")
    others = _other_tensors(model, set(owners))
    inventory = ModelInventory(tuple(units), others, _unused_position_weights(model))
    for name, shape in others:
        if math.prod(shape) > _LARGE_SHARE * inventory.num_parameters:
            _say_once(name, shape, 100 * math.prod(shape) / inventory.num_parameters)
    return inventory


@functools.cache
def _say_once(name: str, shape: tuple[int, ...], share: float) -> None:
    _logger.warning("%s %s is not a unit: kept at 16 bits (%.1f %% of the parameters)", name, shape, share)


def _other_tensors(model: nn.Module, unit_ids: set[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    tensors = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True)
    tensors.update({n: t for n, t in saved.items() if not isinstance(t, nn.Parameter) and t.is_floating_point()})
    return tuple((n, tuple(t.shape)) for n, t in tensors.items() if id(t) not in unit_ids)


def _unused_position_weights(model: nn.Module) -> int:
    """Weights of position tables beyond ``max_position_embeddings`` (OPT stores two more rows than it can use)."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return 0
    unused = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and is_position_table(name):
            unused += max(0, module.num_embeddings - limit) * module.embedding_dim
    return unused


def as_matrix(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """View of a unit's parameter as (rows = outputs, cols = inputs)."""
    return weight.T if kind == "conv1d" else weight


def unit_parameters(model: nn.Module, inventory: ModelInventory) -> dict[str, nn.Parameter]:
    """Unit name -> its parameter (in the module's own orientation). Raises SpecError for a name that is not there."""
    found: dict[str, nn.Parameter] = {}
    for unit in inventory.units:
        try:
            parameter: Any = model.get_submodule(unit.name).weight
        except AttributeError:
            raise SpecError(f"unit {unit.name!r} is not a module with a weight in {type(model).__name__}") from None
        found[unit.name] = parameter
    return found


def unit_matrices(model: nn.Module, inventory: ModelInventory) -> dict[str, torch.Tensor]:
    """Unit name -> detached (rows, cols) view of its weight."""
    parameters = unit_parameters(model, inventory)
    return {u.name: as_matrix(parameters[u.name].detach(), u.kind) for u in inventory.units}

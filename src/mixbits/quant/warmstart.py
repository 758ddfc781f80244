"""Starting weights of a mixed-precision model from uniform ones: each unit from the model that was trained at its spec.

Xu et al. fine-tune a learned allocation from the parameters of uniformly quantized models and find it as good as
training anew (table II of the journal version). A *prototype* is the state dict of such a model, by its spec. A unit whose own spec has no prototype takes
the nearest one; biases, norms and positions come together from one model, since they were trained together: the prototype
that gives the most weights, or the full-precision model. The result is a state dict, for any training method to start from.

Limits: units of different prototypes were never trained side by side, so the loss right after the start may be far above
either prototype's; training, or at least refinement, has to follow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from mixbits.errors import DataError, SpecError
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec

OthersFrom = Literal["largest", "full"]
StateDict = Mapping[str, torch.Tensor]


def nearest_spec(wanted: QuantSpec, available: Iterable[QuantSpec]) -> QuantSpec:
    """The available spec nearest to ``wanted``: itself, else the nearest width (ratio; of two the wider), then same grid and scales.

    Raises SpecError when there is none.
    """

    def distance(spec: QuantSpec) -> tuple[bool, float, float, bool, bool, str]:
        ratio = abs(math.log2(spec.bit_width / wanted.bit_width))
        other_scales = (spec.granularity, spec.group_size) != (wanted.granularity, wanted.group_size)
        return spec != wanted, round(ratio, 9), -spec.bit_width, spec.grid != wanted.grid, other_scales, str(spec)

    found = min(available, key=distance, default=None)
    if found is None:
        raise SpecError("there is no uniform prototype to start from; expected at least one spec with its weights")
    return found


def choose_prototypes(
    inventory: ModelInventory, allocation: BitAllocation, available: Iterable[QuantSpec]
) -> dict[str, QuantSpec]:
    """Unit name -> the prototype spec that it starts from. Raises SpecError (wrong allocation, no prototype)."""
    allocation.check(inventory)
    specs = tuple(available)
    return {u.name: nearest_spec(allocation.specs[u.name], specs) for u in inventory.units}


def starting_weights(
    inventory: ModelInventory,
    allocation: BitAllocation,
    prototypes: Mapping[QuantSpec, StateDict],
    *,
    full: StateDict | None = None,
    others: OthersFrom = "largest",
) -> dict[str, torch.Tensor]:
    """A state dict with every unit's weights from its prototype; copies.

    ``prototypes``: uniform spec -> state dict of the same architecture; ``full``: the full-precision model's, which also serves
    units kept at 16 bits; ``others``: where biases, norms and positions come from. Raises SpecError (``others`` is 'full' without
    one, no prototype), DataError (names or shapes differ between the models).
    """
    if others not in ("largest", "full") or (others == "full" and full is None):
        raise SpecError(f"others is {others!r}; expected 'largest', or 'full' together with the full-precision weights")
    models = dict(prototypes)
    if full is not None:
        models.setdefault(QuantSpec(16), full)
    available = models if any(not s.is_quantized for s in allocation.specs.values()) else prototypes
    chosen = choose_prototypes(inventory, allocation, available)
    weights: Counter[QuantSpec] = Counter()
    for unit in inventory.units:
        weights[chosen[unit.name]] += unit.num_weights
    largest = min(weights, key=lambda spec: (-weights[spec], str(spec)))
    base = full if others == "full" and full is not None else models[largest]
    result = {name: tensor.detach().clone() for name, tensor in base.items()}
    for name, shape in inventory.others:
        _matching(base, name, shape)
    for unit in inventory.units:
        shape = (unit.cols, unit.rows) if unit.kind == "conv1d" else (unit.rows, unit.cols)
        weight = _matching(models[chosen[unit.name]], unit.weight, shape)
        for name in (unit.weight, *(f"{tied}.weight" for tied in unit.tied)):
            result[name] = weight.detach().clone()
    return result


def _matching(source: StateDict, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    found = source.get(name)
    if found is None or tuple(found.shape) != shape:
        got = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise DataError(
            f"{name} {got} in a model to start from; expected shape {shape}: all must be of one architecture"
        )
    return found

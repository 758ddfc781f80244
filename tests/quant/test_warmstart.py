"""Warm start: which prototype each unit takes, ties, everything else from one model, errors."""

import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant.admm import Admm
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.quant.warmstart import choose_prototypes, nearest_spec, starting_weights
from mixbits.spec import BitAllocation, QuantSpec


@pytest.mark.parametrize(
    ("wanted", "available", "expected"),
    [
        ("2", ["1", "2", "4"], "2"),
        ("3", ["1", "2", "4", "8"], "4"),
        ("1.58", ["1", "2", "8"], "2"),
        ("2", ["1", "4"], "4"),  # as far in ratio: the wider
        ("16", ["1", "8"], "8"),
        ("2-papers", [], None),
        ("4-half-step", ["4", "4-half-step-tensor"], "4-half-step-tensor"),  # the same grid before the same scales
        ("1.58-tensor", ["1.58", "2-tensor"], "1.58"),
    ],
)
def test_the_nearest_spec(wanted, available, expected):
    specs = [QuantSpec.parse(text) for text in available]
    if expected is None:
        with pytest.raises(SpecError, match="no uniform prototype"):
            nearest_spec(QuantSpec(2), specs)
        return
    assert nearest_spec(QuantSpec.parse(wanted), specs) == QuantSpec.parse(expected)
    assert nearest_spec(QuantSpec.parse(wanted), specs[::-1]) == QuantSpec.parse(expected)


def constant_prototypes(model, values):
    """A prototype per spec, all its tensors one number, so that it shows where a weight came from."""
    return {
        QuantSpec.parse(text): {name: torch.full_like(t, value) for name, t in model.state_dict().items()}
        for text, value in values.items()
    }


def test_every_unit_comes_from_its_spec_and_the_rest_from_the_largest(model, mixed):
    inventory = find_units(model)
    allocation = mixed(inventory, float_unit=False)
    values = {"1": 1.0, "1.58": 1.58, "2": 2.0, "4": 4.0, "8": 8.0}
    prototypes = constant_prototypes(model, values)
    state = starting_weights(inventory, allocation, prototypes)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    total = dict.fromkeys(values.values(), 0)
    for unit in inventory.units:
        wanted = allocation.specs[unit.name].bit_width
        expected = 4.0 if wanted == 3 else wanted
        total[expected] += unit.num_weights
        for module in (unit.name, *unit.tied):
            assert bool((model.get_submodule(module).weight == expected).all())
    largest = max(total, key=total.__getitem__)
    for name, _ in inventory.others:
        assert bool((state[name] == largest).all()), name


def test_full_precision_serves_16_bit_units_and_if_asked_the_rest(opt, mixed):
    inventory = find_units(opt)
    allocation = mixed(inventory)
    prototypes = constant_prototypes(opt, {"1": 1.0, "2": 2.0})
    full = {name: torch.full_like(t, 32.0) for name, t in opt.state_dict().items()}
    state = starting_weights(inventory, allocation, prototypes, full=full, others="full")
    float_unit = next(u for u in inventory.units if allocation.specs[u.name].bit_width == 16)
    assert bool((state[float_unit.weight] == 32).all())
    assert all(bool((state[name] == 32).all()) for name, _ in inventory.others)
    without = starting_weights(inventory, allocation, prototypes)
    assert bool((without[float_unit.weight] == 2).all())
    quantized = next(u for u in inventory.units if allocation.specs[u.name].bit_width == 1)
    assert bool((state[quantized.weight] == 1).all())
    # full precision is no prototype of a quantized unit
    assert set(choose_prototypes(inventory, allocation, prototypes).values()) == set(prototypes)


def test_the_weights_are_copies_and_any_method_starts_from_them(opt, mixed):
    inventory = find_units(opt)
    allocation = mixed(inventory)
    prototypes = {QuantSpec(2): {n: t.clone() for n, t in opt.state_dict().items()}}
    state = starting_weights(inventory, allocation, prototypes)
    assert all(t.data_ptr() != prototypes[QuantSpec(2)][n].data_ptr() for n, t in state.items())
    opt.load_state_dict(state)
    for kind in (Admm, StraightThrough):
        assert kind(opt, inventory, allocation).quantized().keys() == {
            n for n, s in allocation.specs.items() if s.is_quantized
        }


def test_wrong_input_is_named(opt, mixed):
    inventory = find_units(opt)
    allocation = mixed(inventory)
    good = dict(opt.state_dict())
    unit = next(u for u in inventory.units if u.name.endswith("q_proj"))
    name = unit.weight
    narrow = {**good, name: good[name][:3]}
    with pytest.raises(DataError, match=rf"{name} has shape \(3, 16\) in a model .*; expected shape \(16, 16\)"):
        starting_weights(inventory, allocation, {QuantSpec(2): narrow})
    for gone in (name, inventory.others[0][0]):
        rest = {n: t for n, t in good.items() if n != gone}
        with pytest.raises(DataError, match=f"{gone} is missing"):
            starting_weights(inventory, BitAllocation.uniform(inventory, QuantSpec(1)), {QuantSpec(1): rest})
    with pytest.raises(SpecError, match="others is 'full'"):
        starting_weights(inventory, allocation, {QuantSpec(2): good}, others="full")
    with pytest.raises(SpecError, match="unknown unit"):
        starting_weights(inventory, BitAllocation({"nowhere": QuantSpec(2)}), {QuantSpec(2): good})

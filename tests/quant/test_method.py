"""Units while they are trained: stored values put in, everything put back whatever happens."""

import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant.grid import dequantize
from mixbits.quant.method import quantize_units, stored_weights, trained_units
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec


def test_units_at_16_bits_are_left_out(model, mixed):
    inventory = find_units(model)
    units = trained_units(model, inventory, mixed(inventory))
    assert [u.name for u in units] == [u.name for u in inventory.units[:-1]]
    for unit in units:
        entry = next(u for u in inventory.units if u.name == unit.name)
        assert unit.matrix.shape == (entry.rows, entry.cols)


def test_an_allocation_must_name_exactly_the_units(opt):
    inventory = find_units(opt)
    specs = dict(BitAllocation.uniform(inventory, QuantSpec(2)).specs)
    missing = specs.popitem()[0]
    with pytest.raises(SpecError, match="misses"):
        trained_units(opt, inventory, BitAllocation(specs))
    with pytest.raises(SpecError, match=r"unknown unit.*nowhere"):
        trained_units(opt, inventory, BitAllocation({**specs, missing: QuantSpec(2), "nowhere": QuantSpec(2)}))


def test_stored_values_are_what_the_file_holds(model, mixed, values_of):
    inventory = find_units(model)
    units = trained_units(model, inventory, mixed(inventory))
    weights, before = quantize_units(units), values_of(model)
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    with stored_weights(model, units, weights):
        for unit in units:
            assert torch.equal(unit.matrix, dequantize(weights[unit.name]))
        quantized = {id(u.parameter) for u in units}
        for name, p in model.named_parameters():
            if id(p) not in quantized:
                assert torch.equal(p, before[name].half().float())
    for name, p in model.named_parameters():
        assert p.data_ptr() == tensors[name]
        assert torch.equal(p, before[name])


def test_everything_is_put_back_after_an_exception(opt, mixed, values_of):
    inventory = find_units(opt)
    units = trained_units(opt, inventory, mixed(inventory))
    weights, before = quantize_units(units), values_of(opt)
    with pytest.raises(KeyboardInterrupt), stored_weights(opt, units, weights):
        raise KeyboardInterrupt
    incomplete = dict(list(weights.items())[:-1])
    with pytest.raises(KeyError), stored_weights(opt, units, incomplete):
        pass
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(opt, mixed, bad):
    inventory = find_units(opt)
    units = trained_units(opt, inventory, mixed(inventory))
    units[2].parameter.data[0, 0] = bad
    with pytest.raises(DataError, match=f"unit {units[2].name}: weight has NaN or infinite"):
        quantize_units(units)


def test_a_scale_beyond_float16_is_named(opt, mixed):
    inventory = find_units(opt)
    units = trained_units(opt, inventory, mixed(inventory))
    units[1].parameter.data.mul_(1e7)
    with pytest.raises(SpecError, match=f"unit {units[1].name}: a scale of .* does not fit float16"):
        quantize_units(units)

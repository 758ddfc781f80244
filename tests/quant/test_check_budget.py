"""The budget check that needs no sensitivities: the smallest file by trying everything, and allocate's own words."""

import itertools
import re

import pytest
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.allocate import allocate, check_budget
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, parse_specs, predicted_bytes


@pytest.fixture
def inventory():
    # Shapes for which different specs are the smallest: 1-bit codes in whole bytes, 16 bits without scales.
    return find_units(nn.ModuleList([nn.Linear(1, 9), nn.Linear(40, 3), nn.Embedding(7, 2)]))


@pytest.mark.parametrize("texts", [("2", "4"), ("1", "1.58", "16"), ("8", "16"), ("4-papers-tensor", "1")])
def test_the_smallest_file_is_just_possible(inventory, texts):
    specs = parse_specs(texts)
    names = [u.name for u in inventory.units]
    choices = itertools.product(specs, repeat=len(names))
    smallest = min(predicted_bytes(inventory, BitAllocation(dict(zip(names, c, strict=True)))) for c in choices)
    check_budget(inventory, specs, max_bytes=smallest)
    with pytest.raises(SpecError, match=f"smallest file possible with these specs is {smallest} bytes") as caught:
        check_budget(inventory, specs, max_bytes=smallest - 1)
    flat = {s: 1.0 for s in specs}
    units = {n: UnitSensitivity(flat, flat, flat) for n in names}
    sensitivities = Sensitivities("made up", inventory, units, 0.0)
    with pytest.raises(SpecError, match=re.escape(str(caught.value))):
        allocate(inventory, sensitivities, max_bytes=smallest - 1)
    assert predicted_bytes(inventory, allocate(inventory, sensitivities, max_bytes=smallest)) == smallest


def test_no_specs(inventory):
    with pytest.raises(SpecError, match="no specs to choose among"):
        check_budget(inventory, (), max_bytes=10**6)
    check_budget(inventory, [QuantSpec(8)], max_bytes=10**6)

"""Progressive bit lowering: specs of each stage, re-projection, what is delivered, resuming."""

import pytest
import torch

from mixbits.errors import SpecError
from mixbits.quant.grid import dequantize, project
from mixbits.quant.progressive import Progressive, stage_allocation, stage_spec
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec


def method_for(model, mixed, **options):
    inventory = find_units(model)
    return Progressive(model, inventory, mixed(inventory), **options)


@pytest.mark.parametrize(
    ("final", "width", "expected"),
    [
        ("2", 8, "8"),
        ("2", 4, "4-half-step"),
        ("1.58", 4, "4"),
        ("1.58-tensor", 8, "8-papers-tensor"),
        ("4", 4, "4"),
        ("8", 4, "8"),
        ("16", 8, "16"),
        ("0.5", 4, "4"),
    ],
)
def test_the_spec_of_a_stage(final, width, expected):
    assert stage_spec(QuantSpec.parse(final), width) == QuantSpec.parse(expected)


def test_a_stage_keeps_the_final_group_scales():
    spec = stage_spec(QuantSpec(1.58, granularity="group", group_size=8, scale_bits=8), 4)
    assert (spec.bit_width, spec.granularity, spec.group_size, spec.scale_bits) == (4, "group", 8, 8)


@pytest.mark.parametrize("scales", ["follow", "learned"])
def test_units_step_down_with_scales_searched_anew(opt, mixed, run_steps, scales):
    method = method_for(opt, mixed, stages=((0.25, 8), (0.5, 3)), scales=scales)
    final = {u.name: u.spec for u in method.units}
    assert {u.name: u.spec for u in method.method.units} == {n: stage_spec(s, 8) for n, s in final.items()}
    groups = method.extra_parameters(opt)
    own = [id(p) for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW([{"params": list(opt.parameters())}, *groups], lr=1e-3)
    logged = run_steps(opt, method, optimizer, first=1, last=2, num_steps=8)
    assert logged[-1]["progressive_bits"] == 3.0
    assert {u.name: u.spec for u in method.method.units} == {n: stage_spec(s, 3) for n, s in final.items()}
    for unit in method.method.units:
        best = project(unit.matrix, unit.spec)[1]
        torch.testing.assert_close(method.method.scales[unit.name], best, rtol=1e-5, atol=1e-9)
    logged = run_steps(opt, method, optimizer, first=3, last=8, num_steps=8)
    assert [f.get("progressive_bits") for f in logged] == [None, 0.0, None, None, None, None]
    assert {u.name: u.spec for u in method.method.units} == final
    if scales == "learned":  # the optimizer's tensors are still the method's
        assert [id(p) for p in method.method.log_scales.values()] == own
        assert all(bool((optimizer.state[p]["exp_avg"] != 0).any()) for p in method.method.log_scales.values())


def test_the_last_half_is_plain_straight_through(opt, mixed, values_of, run_steps):
    inventory = find_units(opt)
    method = Progressive(opt, inventory, mixed(inventory), stages=((0.5, 8),))
    run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=1, last=4, num_steps=8)
    start = values_of(opt)
    run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=5, last=8, num_steps=8)
    reached = values_of(opt)
    with torch.no_grad():
        for name, p in opt.named_parameters():
            p.copy_(start[name])
    plain = StraightThrough(opt, inventory, mixed(inventory))
    run_steps(opt, plain, torch.optim.SGD(opt.parameters(), lr=0.1), first=5, last=8, num_steps=8)
    assert all(torch.equal(p, reached[name]) for name, p in opt.named_parameters())


def test_what_is_delivered_is_on_the_final_grid_in_every_stage(opt, mixed, run_steps):
    method = method_for(opt, mixed)
    for first, last in ((1, 1), (2, 3), (4, 8)):
        run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=first, last=last, num_steps=8)
        weights = method.quantized()
        assert {name: w.spec for name, w in weights.items()} == {u.name: u.spec for u in method.units}
        with method.delivered(opt):
            for unit in method.units:
                assert torch.equal(unit.matrix, dequantize(weights[unit.name]))


@pytest.mark.parametrize("scales", ["follow", "learned"])
@pytest.mark.parametrize("middle", [1, 3, 8])
def test_resuming_is_bit_identical_in_every_stage(resumes, mixed, scales, middle):
    resumes(lambda model: method_for(model, mixed, scales=scales), middle=middle)


def test_an_allocation_at_or_above_the_stages_widths_does_not_change(opt):
    inventory = find_units(opt)
    allocation = BitAllocation.uniform(inventory, QuantSpec(8))
    assert stage_allocation(allocation, 4).specs == allocation.specs
    assert stage_allocation(allocation, None) is allocation


@pytest.mark.parametrize(
    "stages",
    [(), ((0.6, 8),), ((0.3, 4), (0.4, 8)), ((0.3, 8), (0.2, 4)), ((0.0, 8),), ((float("nan"), 8),)],
)
def test_wrong_stages_are_rejected(opt, mixed, stages):
    with pytest.raises(SpecError, match=r"shares rising to at most 0.5 and widths falling"):
        method_for(opt, mixed, stages=stages)


def test_widths_without_a_grid_are_rejected(opt, mixed):
    with pytest.raises(SpecError, match="start at 8 or below"):
        method_for(opt, mixed, stages=((0.2, 16),))
    with pytest.raises(SpecError, match="bit width 5"):
        method_for(opt, mixed, stages=((0.2, 5),))

"""Proximal annealing: each map against a brute-force minimisation, its limits, the schedule, resuming."""

import math

import pytest
import torch

from mixbits.errors import SpecError
from mixbits.quant.grid import dequantize, nearest_levels
from mixbits.quant.proximal import Proximal, hardness_at, proximal_map
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec

KINDS = ["parq", "soft-threshold", "average"]


def regularizer(w, spec, hardness, kind):
    """The function whose proximal map it should be, written out, at w (float64), in units of the scale."""
    levels = torch.tensor(spec.levels, dtype=torch.float64)
    step = float(levels[1] - levels[0])
    distance = (w[:, None] - levels).abs().amin(1)
    outside = (w < levels[0]) | (w > levels[-1])
    odds = hardness / (1 - hardness)
    if kind == "average":
        return 0.5 * odds * distance.square()
    if kind == "soft-threshold":
        return torch.where(outside, odds, hardness) * step / 2 * distance
    middle_distance = step / 2 - distance
    return torch.where(
        outside, 0.5 * odds * distance.square(), 0.5 * hardness * (step**2 / 4 - middle_distance.square())
    )


def mapped(u, spec, hardness, kind):
    levels = nearest_levels(
        u.reshape(1, -1), torch.ones(1, 1, dtype=u.dtype), QuantSpec(spec.bit_width, spec.grid, "tensor")
    )
    return proximal_map(u, levels.reshape(-1), spec, hardness=hardness, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hardness", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [1, 1.58, 2, 3])
def test_the_map_is_the_minimum_found_by_brute_force(width, hardness, kind):
    spec = QuantSpec(width)
    top = spec.levels[-1]
    u = (torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1) * (top + 1.5)
    grid = torch.linspace(-top - 2, top + 2, 40_001, dtype=torch.float64)
    objective = 0.5 * (grid - u[:, None]).square() + regularizer(grid, spec, hardness, kind)
    found = mapped(u, spec, hardness, kind)
    reached = 0.5 * (found - u).square() + regularizer(found, spec, hardness, kind)
    spacing = float(grid[1] - grid[0])
    # At least as low as every point of the fine grid; the minimum itself may lie between two of its points.
    assert bool((reached <= objective.amin(1) + 1e-12).all())
    assert bool(((found - grid[objective.argmin(1)]).abs() <= 2 * spacing).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 1.58, 2, 4])
def test_identity_at_zero_levels_at_one_and_monotone_between(width, kind):
    spec = QuantSpec(width)
    u = torch.linspace(-spec.levels[-1] - 2, spec.levels[-1] + 2, 1001)
    assert torch.equal(mapped(u, spec, 0.0, kind), u)
    levels = torch.tensor(spec.levels)
    assert bool(torch.isin(mapped(u, spec, 1.0, kind), levels).all())
    for hardness in (0.2, 0.6, 0.95):
        soft = mapped(u, spec, hardness, kind)
        assert bool((soft.diff() >= -1e-6).all())
        far, near = (u[:, None] - levels).abs().amin(1), (soft[:, None] - levels).abs().amin(1)
        assert bool((near <= far + 1e-6).all())


def test_the_schedule():
    settings = {"start": 0.2, "end": 0.7, "steepness": 8.0}
    assert [hardness_at(x, **settings) for x in (0.0, 0.2, 0.7, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert hardness_at(0.45, **settings) == pytest.approx(0.5)
    values = [hardness_at(x / 100, **settings) for x in range(101)]
    assert values == sorted(values)
    raw = [1 / (1 + math.exp(-8 * x)) for x in (-0.5, -0.25, 0.5)]
    assert hardness_at(0.325, **settings) == pytest.approx((raw[1] - raw[0]) / (raw[2] - raw[0]))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_from_full_precision_to_straight_through(opt, mixed, values_of, run_steps, granularity):
    inventory = find_units(opt)
    allocation = mixed(inventory, granularity=granularity)
    method, before = Proximal(opt, inventory, allocation, anneal_end=0.5), values_of(opt)
    method.before_forward(opt)
    for name, p in opt.named_parameters():  # ratio times scale is the weight up to rounding
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-5, atol=1e-8, msg=name)
    method.after_backward(opt)
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())
    run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.05), first=1, last=5, num_steps=10)
    assert method.hardness == 1.0
    method.before_forward(opt)
    seen = values_of(opt)
    method.after_backward(opt)
    names = {id(p): name for name, p in opt.named_parameters()}
    for unit in method.units:
        scale = method.scales[unit.name]
        assert torch.equal(seen[names[id(unit.parameter)]], nearest_levels(unit.matrix, scale, unit.spec) * scale)


def test_group_scales_and_the_delivered_weights(opt, run_steps):
    inventory = find_units(opt)
    spec = QuantSpec(2, granularity="group", group_size=5)
    method = Proximal(opt, inventory, BitAllocation.uniform(inventory, spec))
    figures = run_steps(opt, method, torch.optim.AdamW(opt.parameters(), lr=1e-2), first=1, last=8, num_steps=8)
    assert figures[-1] == {"proximal_hardness": 1.0}
    weights = method.quantized()
    with method.delivered(opt):
        for unit in method.units:
            assert torch.equal(unit.matrix, dequantize(weights[unit.name]))


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_identical(resumes, mixed, kind):
    def build(model):
        inventory = find_units(model)
        return Proximal(model, inventory, mixed(inventory), kind=kind)

    resumes(build)


@pytest.mark.parametrize(
    "wrong",
    [{"anneal_end": 1.5}, {"anneal_start": 0.6}, {"anneal_start": -0.1}, {"steepness": 0.0}, {"anneal_end": math.nan}],
)
def test_wrong_settings_are_rejected(opt, mixed, wrong):
    inventory = find_units(opt)
    with pytest.raises(SpecError, match="proximal annealing needs"):
        Proximal(opt, inventory, mixed(inventory), **wrong)


def test_unknown_maps_and_product_units_are_rejected(opt, mixed):
    inventory = find_units(opt)
    with pytest.raises(SpecError, match="proximal map is 'hard'; expected one of parq"):
        Proximal(opt, inventory, mixed(inventory), kind="hard")
    product = BitAllocation.uniform(inventory, QuantSpec.parse("0.5"))
    with pytest.raises(SpecError, match="proximal annealing needs a grid of levels"):
        Proximal(opt, inventory, product)

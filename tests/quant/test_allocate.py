"""Allocation against enumeration of everything, a dynamic program and a bound; budgets; refusals."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.errors import SpecError
from mixbits.quant.allocate import allocate, budget_bytes, check_budget
from mixbits.quant.filesize import FileSizes, Within
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit, parse_specs, predicted_bytes

SPECS = parse_specs(["1", "1.58", "2", "4", "8", "16", "1-tensor", "2-tensor"])


FORMATS = (
    *SPECS,
    *(QuantSpec(2, granularity="group", group_size=8), QuantSpec(3, granularity="group", group_size=64, scale_bits=8)),
    *(QuantSpec(4, scale_bits=8), QuantSpec(1), QuantSpec(2, "product"), QuantSpec(1, "product", "tensor")),
)


def inventory_of(num_units, seed, *, others=3, largest=60):
    rng = random.Random(seed)
    units = []
    for i in range(num_units):
        kind = rng.choice(["linear", "conv1d", "embedding"])
        rows, cols = rng.randint(1, largest), rng.randint(1, largest)
        units.append(Unit(f"layer.{i}", f"layer.{i}.weight", rows, cols, kind))
    shapes = [tuple(rng.randint(1, 40) for _ in range(rng.randint(0, 2))) for _ in range(others)]
    return ModelInventory(tuple(units), tuple((f"other.{i}", s) for i, s in enumerate(shapes)))


def sensitivities_of(inventory, seed, specs=SPECS, *, spread=2.0, monotone=False):
    rng = random.Random(seed)
    units = {}
    for unit in inventory.units:
        base = math.exp(rng.gauss(0, spread)) * unit.num_weights
        noise = 0.1 if monotone else 1.5
        loss = {s: base * 4.0**-s.bit_width * math.exp(rng.gauss(0, noise)) for s in specs}
        units[unit.name] = UnitSensitivity(loss, dict.fromkeys(specs, 0.0), dict.fromkeys(specs, 1.0))
    return Sensitivities("test", inventory, units, 1.0)


def loss_of(sensitivities, allocation):
    return sum(max(0.0, sensitivities.units[n].loss_increase[s]) for n, s in allocation.specs.items())


def everything(inventory, specs):
    names = [u.name for u in inventory.units]
    for choice in itertools.product(specs, repeat=len(names)):
        yield BitAllocation(dict(zip(names, choice, strict=True)))


@pytest.mark.parametrize("seed", range(6))
def test_against_enumeration_of_every_allocation_by_its_real_bytes(seed):
    inventory = inventory_of(3, seed)
    found = sensitivities_of(inventory, seed)
    table = [(predicted_bytes(inventory, a), loss_of(found, a)) for a in everything(inventory, SPECS)]
    sizes = sorted({size for size, _ in table})
    budgets = {
        *sizes[:: max(1, len(sizes) // 25)],
        *(s - 1 for s in sizes[1 :: max(1, len(sizes) // 10)]),
        sizes[-1] + 999,
    }
    for budget in budgets:
        best = min(loss for size, loss in table if size <= budget)
        allocation = allocate(inventory, found, max_bytes=budget)
        assert loss_of(found, allocation) == pytest.approx(best, rel=1e-9)
        assert predicted_bytes(inventory, allocation) <= budget
        assert allocation.provenance["predicted_bytes"] == predicted_bytes(inventory, allocation)
        assert allocation.provenance["predicted_loss_increase_nats"] == pytest.approx(best, rel=1e-9)
        assert allocation.provenance["gap_nats"] == 0
        assert allocation.provenance["budget_bytes"] == budget


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_against_enumeration_at_random(seed, share):
    inventory = inventory_of(4, seed, largest=300)
    specs = random.Random(seed).sample(SPECS, 4)
    found = sensitivities_of(inventory, seed, specs)
    table = [(predicted_bytes(inventory, a), loss_of(found, a)) for a in everything(inventory, specs)]
    low, high = min(table)[0], max(table)[0]
    budget = low + round(share * (high - low))
    best = min(loss for size, loss in table if size <= budget)
    assert loss_of(found, allocate(inventory, found, max_bytes=budget)) == pytest.approx(best, rel=1e-9)


# In 49, 226, 256, 939 and 2382 a larger choice has a header that is a multiple of its padding shorter, which makes the smallest file.
@pytest.mark.parametrize("seed", [49, 226, 256, 939, 2382, *range(15)])
def test_the_smallest_file_and_every_budget_up_to_a_padding_above_it(seed):
    rng = random.Random(seed)
    inventory = inventory_of(rng.choice([1, 2, 3, 4]), seed, others=rng.randint(0, 3), largest=rng.choice([4, 12, 60]))
    specs = rng.sample(list(dict.fromkeys(FORMATS)), 3)
    found = sensitivities_of(inventory, seed, specs)
    table = [(predicted_bytes(inventory, a), loss_of(found, a)) for a in everything(inventory, specs)]
    smallest = min(size for size, _ in table)
    with pytest.raises(SpecError, match=f"smallest file possible with these specs is {smallest} bytes"):
        allocate(inventory, found, max_bytes=smallest - 1)
    for budget in sorted({smallest, smallest + 65, *(s for s, _ in table if s <= smallest + 65)}):
        best = min(loss for size, loss in table if size <= budget)
        check_budget(inventory, specs, max_bytes=budget)
        assert loss_of(found, allocate(inventory, found, max_bytes=budget)) == pytest.approx(best, rel=1e-9)


def dynamic_program(value, data, room):
    """Least total value with at most ``room`` data bytes, one option a group, byte by byte."""
    best = np.zeros(room + 1)
    for values, sizes in zip(value, data, strict=True):
        new = np.full(room + 1, np.inf)
        for v, s in zip(values, sizes, strict=True):
            if s <= room:
                new[s:] = np.minimum(new[s:], best[: room + 1 - s] + v)
        best = new
    return best[room]


@pytest.mark.parametrize(("seed", "num", "largest"), [(0, 40, 60), (1, 40, 60), (0, 20, 150), (1, 20, 150)])
def test_many_units_against_a_dynamic_program(seed, num, largest):
    """Between the optima with the shortest and the longest header possible; and equal where they agree."""
    specs = parse_specs(["1", "1.58", "2", "3", "4", "8"])
    inventory = inventory_of(num, seed, largest=largest)
    found = sensitivities_of(inventory, seed, specs, monotone=True)
    sizes = FileSizes.of(inventory, [list(specs)] * num)
    header = sizes.header_bounds(np.ones((num, 6), dtype=bool))
    value = [list(u.loss_increase.values()) for u in found.units.values()]
    for ratio in (20, 12, 7):
        budget = budget_bytes(inventory, ratio=1) * 2 // ratio + header.padded_high
        room = budget - sizes.other_bytes
        optimistic = dynamic_program(value, sizes.data, room - header.padded_low)
        safe = dynamic_program(value, sizes.data, room - header.padded_high)
        allocation = allocate(inventory, found, max_bytes=budget)
        loss, gap = loss_of(found, allocation), allocation.provenance["gap_nats"]
        # Units of a few hundred weights are no larger than their header entries: there a small gap may stay, and is told.
        assert gap == 0 or (largest == 60 and gap < 0.02 * loss)
        assert optimistic * (1 - 1e-9) <= loss <= safe * (1 + 1e-9)
        # Exactly: the best over all padded lengths, each judged by the header it really gives.
        actual = predicted_bytes(inventory, allocation) - sizes.other_bytes
        chosen = [specs.index(allocation.specs[u.name]) for u in inventory.units]
        length = actual - int(sizes.data[np.arange(num), chosen].sum())
        assert loss - gap <= dynamic_program(value, sizes.data, room - length) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_grouped", [False, True])
def test_file_sizes_agree_with_predicted_bytes(seed, is_grouped):
    """Every format a unit can have; groups of units that lie apart in the file."""
    inventory = inventory_of(6, seed, largest=3000)
    names = [u.name for u in inventory.units]
    groups = (
        [(names[0], names[4]), (names[1],), (names[2], names[3], names[5])] if is_grouped else [(n,) for n in names]
    )
    num = len(groups)
    sizes = FileSizes.of(inventory, [list(FORMATS)] * num, groups)
    everything_kept = sizes.header_bounds(np.ones((num, len(FORMATS)), dtype=bool))
    rng = random.Random(seed)
    excess = np.array([[rng.random() for _ in FORMATS] for _ in range(num)])
    excess -= excess.min(1, keepdims=True)
    within = Within(excess, 1.0, (0.0, 1.0, 10.0, 100.0, 1e4, 1e6))
    narrowed = sizes.header_bounds(np.ones((num, len(FORMATS)), dtype=bool), within)
    num_within = 0
    for _ in range(60):
        choice = [rng.randrange(len(FORMATS)) for _ in range(num)]
        allocation = BitAllocation({n: FORMATS[i] for g, i in zip(groups, choice, strict=True) for n in g})
        single = np.zeros((num, len(FORMATS)), dtype=bool)
        single[range(num), choice] = True
        header = sizes.header_bounds(single)
        assert header.is_exact
        data = sizes.other_bytes + int(sizes.data[single].sum())
        total = predicted_bytes(inventory, allocation)
        assert data + header.padded_low == total
        assert everything_kept.padded_low <= total - data <= everything_kept.padded_high
        if excess[single].sum() <= 1.0:
            num_within += 1
            assert narrowed.padded_low <= total - data <= narrowed.padded_high
    assert num_within or not is_grouped


def test_larger_budgets_never_cost_more_and_the_file_always_fits():
    inventory = inventory_of(25, 3, largest=200)
    found = sensitivities_of(inventory, 3, monotone=True)
    last = math.inf
    for ratio in (24, 20, 16, 12, 8, 4, 2, 1):
        budget = budget_bytes(inventory, ratio=ratio)
        try:
            allocation = allocate(inventory, found, max_bytes=budget)
        except SpecError:
            continue
        assert predicted_bytes(inventory, allocation) <= budget
        assert loss_of(found, allocation) <= last
        last = loss_of(found, allocation)
    generous = allocate(inventory, found, max_bytes=10**9)
    assert loss_of(found, generous) == pytest.approx(
        sum(min(u.loss_increase.values()) for u in found.units.values()), rel=1e-12
    )


def test_an_impossible_budget_names_the_smallest_size():
    inventory = inventory_of(5, 0)
    found = sensitivities_of(inventory, 0, parse_specs(["1", "2", "4"]))
    smallest = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(1)))
    message = rf"{smallest - 1} bytes cannot be met.* {smallest} bytes, ratio {math.floor(100 * inventory.full_bytes / smallest) / 100}.*1-papers-row"
    with pytest.raises(SpecError, match=message):
        allocate(inventory, found, max_bytes=smallest - 1)
    with pytest.raises(SpecError, match=message):
        check_budget(inventory, parse_specs(["1", "2", "4"]), max_bytes=smallest - 1)
    check_budget(inventory, parse_specs(["1", "2", "4"]), max_bytes=smallest)
    exact = allocate(inventory, found, max_bytes=smallest)
    assert set(exact.specs.values()) == {QuantSpec(1)}


def test_negative_sensitivities_count_as_zero_and_are_told():
    inventory = inventory_of(2, 1)
    one, four = QuantSpec(1), QuantSpec(4)
    losses = {"layer.0": {one: -0.5, four: -0.1}, "layer.1": {one: 0.5, four: 0.1}}
    units = {n: UnitSensitivity(v, {s: math.inf for s in v}, dict.fromkeys(v, 1.0)) for n, v in losses.items()}
    allocation = allocate(inventory, Sensitivities("hessian", inventory, units, 1), max_bytes=10**6)
    assert allocation.specs == {"layer.0": one, "layer.1": four}  # no loss to avoid: the smaller one
    facts = allocation.provenance
    assert facts["negative_sensitivities_clamped_to_zero"] == ["layer.0"]
    assert facts["predicted_loss_increase_nats"] == pytest.approx(0.1)
    assert facts["predicted_loss_increase_stderr_at_most_nats"] is None
    json.dumps(allocation.to_json(), allow_nan=False)


def test_more_bits_need_not_be_better():
    inventory = inventory_of(2, 1)
    two, eight = QuantSpec(2), QuantSpec(8)
    loss = {two: 0.1, eight: 0.3}
    unit = UnitSensitivity(loss, dict.fromkeys(loss, 0.0), dict.fromkeys(loss, 1.0))
    found = Sensitivities("x", inventory, {u.name: unit for u in inventory.units}, 1)
    assert set(allocate(inventory, found, max_bytes=10**6).specs.values()) == {two}


def test_specs_and_fixed_units():
    inventory = inventory_of(5, 2)
    found = sensitivities_of(inventory, 2, parse_specs(["1", "2", "4"]))
    only = allocate(inventory, found, max_bytes=10**6, specs=parse_specs(["2", "1"]))
    assert set(only.specs.values()) <= {QuantSpec(1), QuantSpec(2)}
    fixed = {"layer.0": QuantSpec(16), "layer.3": QuantSpec(1)}
    allocation = allocate(inventory, found, max_bytes=10**6, fixed=fixed)
    assert {n: allocation.specs[n] for n in fixed} == fixed
    assert allocation.provenance["fixed_but_not_measured_counted_as_zero"] == ["layer.0"]
    assert allocation.provenance["fixed"] == {"layer.0": "16-float-row", "layer.3": "1-papers-row"}


def test_same_input_same_output():
    inventory = inventory_of(20, 5)
    found = sensitivities_of(inventory, 5)
    flat = Sensitivities(  # all units and specs alike: nothing but ties
        "x", inventory, {n: UnitSensitivity(*[dict.fromkeys(SPECS, 0.5)] * 3) for n in found.units}, 1
    )
    for sensitivities in (found, flat):
        first, again = (allocate(inventory, sensitivities, max_bytes=20_000) for _ in range(2))
        assert json.dumps(first.to_json()) == json.dumps(again.to_json())


def test_nothing_is_printed(capfd):
    inventory = inventory_of(60, 7, largest=300)
    found = sensitivities_of(inventory, 7, monotone=True)
    for ratio in (22, 18, 14, 11):
        allocate(inventory, found, max_bytes=budget_bytes(inventory, ratio=ratio))
    assert capfd.readouterr() == ("", "")
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_a_large_problem_is_proved_close_to_the_optimum():
    specs = parse_specs(["1", "1.58", "2", "3", "4", "8"])
    inventory = inventory_of(400, 11, largest=400)
    found = sensitivities_of(inventory, 11, specs, monotone=True)
    allocation = allocate(inventory, found, max_bytes=budget_bytes(inventory, ratio=12))
    facts = allocation.provenance
    assert 0 <= facts["gap_nats"] <= 1e-4 * facts["predicted_loss_increase_nats"]
    assert facts["predicted_bytes"] <= facts["budget_bytes"]


def test_budgets():
    inventory = inventory_of(4, 9)
    parameters = inventory.num_parameters
    assert budget_bytes(inventory, ratio=16) == 4 * parameters // 16
    assert budget_bytes(inventory, bytes=1234) == 1234
    assert budget_bytes(inventory, bits_per_weight=2) == 2 * parameters // 8
    for ratio in (3.3, 16.1, 1 / 3):
        budget = budget_bytes(inventory, ratio=ratio)
        assert inventory.full_bytes / budget >= ratio > inventory.full_bytes / (budget + 1)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "got none"),
        ({"ratio": 16, "bytes": 5}, "exactly one .* got ratio, bytes"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"ratio": math.inf}, "ratio is inf"),
        ({"ratio": -1}, "ratio is -1"),
        ({"bytes": 0}, "bytes is 0"),
        ({"bits_per_weight": 0.0}, "bits_per_weight is 0.0"),
        ({"bits_per_weight": True}, "bits_per_weight is True"),
        ({"ratio": "16"}, "ratio is '16'"),
    ],
)
def test_bad_budgets(budget, message):
    with pytest.raises(SpecError, match=message):
        budget_bytes(inventory_of(2, 0), **budget)


def test_bad_requests():
    inventory = inventory_of(3, 0)
    found = sensitivities_of(inventory, 0, parse_specs(["1", "2"]))
    with pytest.raises(SpecError, match=r"4-papers-row was not measured; .*1-papers-row, 2-half-step-row"):
        allocate(inventory, found, max_bytes=10**6, specs=parse_specs(["4"]))
    with pytest.raises(SpecError, match="unknown unit 'head'"):
        allocate(inventory, found, max_bytes=10**6, fixed={"head": QuantSpec(1)})
    with pytest.raises(SpecError, match="no specs"):
        allocate(inventory, found, max_bytes=10**6, specs=[])
    with pytest.raises(SpecError, match="no specs"):
        check_budget(inventory, [], max_bytes=10**6)
    with pytest.raises(SpecError, match="other tensors"):
        allocate(inventory_of(3, 1), found, max_bytes=10**6)
    for bad in (0, -5, 1.5, True, math.nan):
        with pytest.raises(SpecError, match="max_bytes"):
            allocate(inventory, found, max_bytes=bad)

"""The Pareto front against trying everything, its proofs against allocate, its file, and the guard of predicted losses."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.quant.allocate import allocate
from mixbits.quant.front import Front, front, read_front, write_front
from mixbits.quant.knapsack import Solution
from mixbits.quant.problem import Problem
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit, parse_specs, predicted_bytes

SPECS = parse_specs(["1", "1.58", "2", "4-tensor", "8"])


def problem_of(num_units, seed, *, specs=SPECS, largest=200, position_table=False, noise=1.0):
    rng = random.Random(seed)
    units = [
        Unit(
            f"m.layers.{i}.fc1", f"m.layers.{i}.fc1.weight", rng.randint(1, largest), rng.randint(1, largest), "linear"
        )
        for i in range(num_units)
    ]
    if position_table:
        units.append(Unit("embed_positions", "embed_positions.weight", 16, 8, "embedding"))
    inventory = ModelInventory(tuple(units), (("norm", (largest,)),))
    measured = {}
    for unit in units:
        base = math.exp(rng.gauss(0, 2)) * unit.num_weights
        loss = {s: base * 4.0**-s.bit_width * math.exp(rng.gauss(0, noise)) * rng.choice([1, 1, 1, -1]) for s in specs}
        measured[unit.name] = UnitSensitivity(loss, dict.fromkeys(specs, 0.0), dict.fromkeys(specs, 1.0))
    return Sensitivities("test", inventory, measured, 1.0, {"seed": seed})


def loss_of(found, allocation):
    return math.fsum(max(0.0, found.units[n].loss_increase.get(s, 0.0)) for n, s in allocation.specs.items())


@pytest.mark.parametrize("seed", range(4))
def test_every_point_is_the_best_of_its_size_and_all_points_improve(seed):
    found = problem_of(4, seed)
    inventory = found.inventory
    names = [u.name for u in inventory.units]
    table = []
    for choice in itertools.product(SPECS, repeat=len(names)):
        allocation = BitAllocation(dict(zip(names, choice, strict=True)))
        table.append((predicted_bytes(inventory, allocation), loss_of(found, allocation)))
    result = front(inventory, found, num_points=15)
    for p in result.points:
        assert p.bytes == predicted_bytes(inventory, p.allocation)
        assert p.predicted_loss_increase_nats == pytest.approx(loss_of(found, p.allocation), rel=1e-12)
        assert p.predicted_loss_increase_nats == pytest.approx(min(v for size, v in table if size <= p.bytes), rel=1e-9)
        assert p.gap_nats == 0
        assert p.ratio == inventory.full_bytes / p.bytes
        assert p.bits_per_weight == 8 * p.bytes / inventory.num_parameters
    assert result.points[0].bytes == min(table)[0]
    assert result.points[-1].predicted_loss_increase_nats == pytest.approx(min(v for _, v in table), rel=1e-9)
    for a, b in itertools.pairwise(result.points):
        assert a.bytes < b.bytes
        assert a.predicted_loss_increase_nats > b.predicted_loss_increase_nats
    for u in result.uniform:
        assert u.bytes == predicted_bytes(inventory, BitAllocation.uniform(inventory, u.spec))
        if u.bytes >= result.points[0].bytes:
            assert result.best(u.bytes).predicted_loss_increase_nats <= u.predicted_loss_increase_nats
    with pytest.raises(SpecError, match=f"smallest file of the front takes {min(table)[0]} bytes"):
        result.best(min(table)[0] - 1)


def test_a_front_solved_on_hull_vertices_agrees_with_allocate():
    found = problem_of(30, 5, noise=0.1)
    result = front(found.inventory, found, num_points=12)
    assert len(result.points) >= 12
    for p in result.points[::4]:
        allocation = allocate(found.inventory, found, max_bytes=p.bytes)
        own = allocation.provenance
        assert own["predicted_loss_increase_nats"] + own["gap_nats"] >= p.predicted_loss_increase_nats * (1 - 1e-9)
        assert own["predicted_loss_increase_nats"] <= p.predicted_loss_increase_nats * (1 + 1e-9) + p.gap_nats


def test_groups_and_fixed_units_hold_at_every_point():
    found = problem_of(6, 2)
    names = [u.name for u in found.inventory.units]
    result = front(
        found.inventory, found, groups=[names[:3]], fixed={names[5]: QuantSpec(16)}, specs=SPECS[:4], num_points=8
    )
    for p in result.points:
        assert len({p.allocation.specs[n] for n in names[:3]}) == 1
        assert p.allocation.specs[names[5]] == QuantSpec(16)
        assert {p.allocation.specs[n] for n in names[:5]} <= set(SPECS[:4])
    assert result.provenance["groups"] == [names[:3]]
    assert result.provenance["fixed"] == {names[5]: "16-float-row"}
    assert {u.spec for u in result.uniform} == {*SPECS[:4]}


def test_one_choice_makes_a_front_of_one_point():
    found = problem_of(3, 1, specs=SPECS[:1])
    result = front(found.inventory, found)
    assert len(result.points) == 1
    assert set(result.points[0].allocation.specs.values()) == {SPECS[0]}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans(), st.booleans())
def test_learned_never_predicts_more_loss_than_a_uniform_allocation_that_fits(seed, share, position_table, grouped):
    found = problem_of(7, seed, largest=60, position_table=position_table)
    inventory = found.inventory
    uniform = [BitAllocation.uniform(inventory, s) for s in SPECS]
    if position_table:  # below 4 bits they want 4-papers-row for positions
        unit = found.units["embed_positions"]
        measured = dict.fromkeys((*SPECS, QuantSpec(4)), 0.25)
        found = Sensitivities(
            "test", inventory, {**found.units, "embed_positions": UnitSensitivity(measured, measured, measured)}, 1.0
        )
        assert unit is not None
    sizes = [predicted_bytes(inventory, u) for u in uniform]
    budget = min(sizes) + round(share * (max(sizes) - min(sizes)))
    groups = [[u.name for u in inventory.units[:3]]] if grouped else None
    learned = allocate(inventory, found, max_bytes=budget, groups=groups).provenance["predicted_loss_increase_nats"]
    for allocation, size in zip(uniform, sizes, strict=True):
        if size <= budget:
            assert learned <= loss_of(found, allocation) * (1 + 1e-12)


def test_a_search_that_is_cut_short_still_is_no_worse_than_uniform(monkeypatch):
    """The guarantee does not rest on the solver: here it finds nothing at all."""
    monkeypatch.setattr("mixbits.quant.problem.solve", lambda *given: Solution(given[-1], 1.0, 0.0))
    found = problem_of(5, 11)
    problem = Problem.of(found.inventory, found)
    for spec, choice in problem.uniforms:
        size = problem.num_bytes(choice)
        kept = problem.solve(size).choice
        assert problem.loss(kept) <= problem.loss(choice), spec
        assert problem.num_bytes(kept) <= size


def test_solver_input_hash_and_bytes_of_json_repeat_and_change_with_any_input():
    found = problem_of(8, 4)
    inventory = found.inventory
    size = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))
    first, again = (allocate(inventory, found, max_bytes=size).to_json() for _ in range(2))
    assert json.dumps(first) == json.dumps(again)
    fronts = [json.dumps(front(inventory, found, num_points=6).to_json()) for _ in range(2)]
    assert fronts[0] == fronts[1]
    names = [u.name for u in inventory.units]
    first_unit = found.units[names[0]]
    nudged = {s: math.nextafter(v, math.inf) for s, v in first_unit.loss_increase.items()}
    other = Sensitivities(
        "test",
        inventory,
        {**found.units, names[0]: UnitSensitivity(nudged, first_unit.stderr, first_unit.perturbation)},
        1,
    )
    hashes = [
        first["provenance"]["solver_input_sha256"],
        allocate(inventory, found, max_bytes=size + 1).provenance["solver_input_sha256"],
        allocate(inventory, found, max_bytes=size, groups=[names[:2]]).provenance["solver_input_sha256"],
        allocate(inventory, found, max_bytes=size, fixed={names[0]: QuantSpec(1)}).provenance["solver_input_sha256"],
        allocate(inventory, found, max_bytes=size, specs=SPECS[:3]).provenance["solver_input_sha256"],
        allocate(inventory, other, max_bytes=size).provenance["solver_input_sha256"],
        json.loads(fronts[0])["provenance"]["solver_input_sha256"],
    ]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 64 for h in hashes)


def test_file(tmp_path):
    found = problem_of(5, 7)
    result = front(found.inventory, found, num_points=6)
    path = write_front(tmp_path / "front.json", result)
    assert read_front(path).to_json() == result.to_json()
    assert read_front(path).points == result.points
    data = json.loads(path.read_text())
    for change, message in (
        ({"format": "x"}, "not a mixbits front"),
        ({"format_version": 9}, "format_version is 9"),
        ({"points": []}, "'points'"),
        ({"points": data["points"][::-1]}, "order of their bytes"),
        ({"points": [{**data["points"][0], "bytes": -1}]}, "point 0: 'bytes' is -1"),
        ({"points": [{**data["points"][0], "specs": {"a": "7"}}]}, "point 0: 'specs' cannot be read"),
        ({"points": [3]}, "point 0: 'bytes' is None"),
        ({"uniform": [{"spec": "7"}]}, "uniform 0: 'spec'"),
        ({"full_bytes": None}, "'full_bytes' is None"),
    ):
        with pytest.raises(FormatError, match=message):
            Front.from_json({**data, **change})
    with pytest.raises(DataError, match="no such file"):
        read_front(tmp_path / "none.json")


def test_bad_requests():
    found = problem_of(3, 0)
    for bad in (1, 0, -3, 2.5, True):
        with pytest.raises(SpecError, match="num_points"):
            front(found.inventory, found, num_points=bad)
    with pytest.raises(SpecError, match="no specs"):
        front(found.inventory, found, specs=[])
    with pytest.raises(SpecError, match="other tensors"):
        front(problem_of(3, 1).inventory, found)

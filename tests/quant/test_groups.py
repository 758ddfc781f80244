"""Groups by module names of real models and by lists; exact allocation with groups against trying everything."""

import itertools
import math
import random

import pytest
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.allocate import allocate, check_budget
from mixbits.quant.groups import complete_groups, group_units, matching_specs, matching_units
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit, parse_specs, predicted_bytes

SPECS = parse_specs(["1", "2", "4-tensor", "16"])


def named(*names, kind="linear"):
    return ModelInventory(tuple(Unit(n, f"{n}.weight", 4, 6, kind) for n in names), ())


def sensitivities_of(inventory, seed, specs=SPECS, *, negative=False):
    rng = random.Random(seed)
    units = {}
    for unit in inventory.units:
        loss = {s: math.exp(rng.gauss(0, 2)) * 4.0**-s.bit_width for s in specs}
        if negative:
            loss = {s: v * rng.choice([-1, 1]) for s, v in loss.items()}
        units[unit.name] = UnitSensitivity(loss, dict.fromkeys(specs, 0.0), dict.fromkeys(specs, 1.0))
    return Sensitivities("test", inventory, units, 1.0)


def test_a_real_model_of_each_family(model):
    inventory = find_units(model)
    names = {u.name for u in inventory.units}
    for granularity in ("matrix", "sublayer", "layer"):
        groups = group_units(inventory, granularity)
        assert sorted(n for g in groups for n in g) == sorted(names)
        outside = {n for n in names if not any(f".{i}." in n for i in range(9))}
        assert outside
        assert {(n,) for n in outside} <= set(groups)
        inside = [g for g in groups if g[0] not in outside]
        assert len(inside) == {"matrix": len(names - outside), "sublayer": 2, "layer": 1}[granularity]
    blocks = [g for g in group_units(inventory, "sublayer") if len(g) > 1]
    assert ["attn" in n for n in blocks[0]] == [True] * len(blocks[0])
    assert not any("attn" in n for n in blocks[1])


@pytest.mark.parametrize(
    ("name", "layer", "block"),
    [
        ("model.decoder.layers.3.self_attn.q_proj", "model.decoder.layers.3", "self_attn"),
        ("model.decoder.layers.3.encoder_attn.q_proj", "model.decoder.layers.3", "encoder_attn"),
        ("model.decoder.layers.3.fc1", "model.decoder.layers.3", "feed_forward"),
        ("model.layers.12.mlp.gate_proj", "model.layers.12", "feed_forward"),
        ("model.layers.12.mlp.experts.7.down_proj", "model.layers.12", "feed_forward"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0", "attn"),
        ("transformer.h.0.mlp.c_proj", "transformer.h.0", "feed_forward"),
        ("gpt_neox.layers.5.attention.query_key_value", "gpt_neox.layers.5", "attention"),
        ("bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1", "attention"),
        ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.1", "feed_forward"),
        ("layers.0.self_attn.q_proj", "layers.0", "self_attn"),
    ],
)
def test_names(name, layer, block):
    parent = f"{layer}.{'self_attn' if block == 'feed_forward' else 'fc1'}.other"
    same = {"feed_forward": f"{layer}.fc2"}.get(block, f"{layer}.{block}.another")
    inventory = named(name, parent, same, "embed", f"{layer}9.fc1")
    assert group_units(inventory, "sublayer")[0] == (name, same)
    assert group_units(inventory, "layer")[0] == (name, parent, same)
    assert group_units(inventory) == tuple((u.name,) for u in inventory.units)


def test_names_that_are_not_recognized_stand_alone():
    inventory = named("model.layers.0.conv", "model.layers.0.strange.thing", "embed.0", "lm_head", "stack.3.fc1")
    assert group_units(inventory, "sublayer") == tuple((u.name,) for u in inventory.units)
    assert group_units(inventory, "layer")[0] == ("model.layers.0.conv", "model.layers.0.strange.thing")
    tables = named("model.layers.0.attn.a", "model.layers.0.attn.b", kind="embedding")
    assert group_units(tables, "layer") == (("model.layers.0.attn.a",), ("model.layers.0.attn.b",))


def test_lists_come_first_and_the_rest_is_grouped():
    inventory = named(*(f"m.layers.{i}.{n}" for i in (0, 1) for n in ("attn.q", "attn.k", "fc1", "fc2")), "head")
    groups = group_units(inventory, "sublayer", [["m.layers.*.attn.q", "head"], ["m.layers.0.fc1"]])
    assert groups == (
        ("m.layers.0.attn.q", "m.layers.1.attn.q", "head"),
        ("m.layers.0.attn.k",),
        ("m.layers.0.fc1",),
        ("m.layers.0.fc2",),
        ("m.layers.1.attn.k",),
        ("m.layers.1.fc1", "m.layers.1.fc2"),
    )
    assert group_units(inventory, lists=[["*"]]) == (tuple(u.name for u in inventory.units),)


def test_a_tied_name_and_a_name_that_looks_like_a_pattern():
    inventory = ModelInventory(
        (Unit("embed", "embed.weight", 4, 4, "embedding", ("lm_head",)), Unit("a[0]", "a[0].weight", 2, 2, "linear")),
        (),
    )
    assert matching_units(inventory, "lm_head") == ("embed",)
    assert matching_units(inventory, "lm_*") == ("embed",)
    assert matching_units(inventory, "a[0]") == ("a[0]",)
    assert matching_specs(inventory, [("*", QuantSpec(2)), ("lm_head", QuantSpec(2))]) == {
        "embed": QuantSpec(2),
        "a[0]": QuantSpec(2),
    }
    with pytest.raises(SpecError, match=r"'embed' is to be both 2-half-step-row and 4-papers-row"):
        matching_specs(inventory, [("*", QuantSpec(2)), ("lm_head", QuantSpec(4))])


@pytest.mark.parametrize(
    ("granularity", "lists", "message"),
    [
        ("sublayers", [], "'sublayers'; expected one of matrix, sublayer, layer"),
        ("matrix", [["nowhere"]], "unknown unit 'nowhere'"),
        ("matrix", [["x.*"]], r"pattern 'x\.\*' matches no unit; the model has 3 units"),
        ("matrix", [["a.0"], ["a.*"]], r"'a\.0' is in two groups: a\.0 and a\.\*"),
        ("matrix", [[]], r"group 1 is \[\]"),
        ("matrix", [["a.0"], "a.1"], "group 2 is 'a.1'; expected a list"),
    ],
)
def test_bad_lists(granularity, lists, message):
    with pytest.raises(SpecError, match=message):
        group_units(named("a.0", "a.1", "b"), granularity, lists)


def test_groups_given_to_the_solver_are_checked_and_completed():
    inventory = named("a", "b", "c", "d")
    assert complete_groups(inventory, [("d", "b")]) == (("a",), ("b", "d"), ("c",))
    assert complete_groups(inventory, None) == (("a",), ("b",), ("c",), ("d",))
    found = sensitivities_of(inventory, 0)
    for groups, message in (
        ([("a", "z")], "unknown unit 'z'"),
        ([("a", "b"), ("b", "c")], "'b' is named twice"),
        ([("a", "a")], "'a' is named twice"),
    ):
        with pytest.raises(SpecError, match=message):
            allocate(inventory, found, max_bytes=10**6, groups=groups)


def random_inventory(num_units, seed):
    """Units of mixed sizes and kinds; groups of them spread over the file."""
    rng = random.Random(seed)
    units = tuple(
        Unit(f"u.{i}", f"u.{i}.weight", rng.randint(1, 300), rng.randint(1, 60), rng.choice(["linear", "conv1d"]))
        for i in range(num_units)
    )
    return ModelInventory(units, tuple((f"o.{i}", (rng.randint(1, 90),)) for i in range(3)))


@pytest.mark.parametrize("seed", range(8))
def test_exact_with_groups_against_trying_everything(seed):
    rng = random.Random(seed)
    inventory = random_inventory(9, seed)
    names = [u.name for u in inventory.units]
    rng.shuffle(names)
    groups = [tuple(names[:4]), tuple(names[4:7]), (names[7],), (names[8],)]
    found = sensitivities_of(inventory, seed, negative=seed % 2 == 1)
    table = []
    for choice in itertools.product(SPECS, repeat=len(groups)):
        specs = {n: s for g, s in zip(groups, choice, strict=True) for n in g}
        loss = math.fsum(max(0.0, found.units[n].loss_increase[s]) for n, s in specs.items())
        table.append((predicted_bytes(inventory, BitAllocation(specs)), loss))
    sizes = sorted({size for size, _ in table})
    for budget in {*sizes[:: max(1, len(sizes) // 8)], *(s - 1 for s in sizes[1 :: len(sizes) // 5]), sizes[-1] + 99}:
        allocation = allocate(inventory, found, max_bytes=budget, groups=groups)
        facts = allocation.provenance
        best = min(loss for size, loss in table if size <= budget)
        assert facts["predicted_loss_increase_nats"] == pytest.approx(best, rel=1e-9)
        assert facts["gap_nats"] == 0
        assert facts["predicted_bytes"] == predicted_bytes(inventory, allocation) <= budget
        assert facts["unused_bytes"] == budget - facts["predicted_bytes"]
        assert all(len({allocation.specs[n] for n in group}) == 1 for group in groups)
        # The next larger file that helps: the smallest of all that predict less, where it says it is proved.
        better = [size for size, loss in table if loss < best * (1 - 1e-7)]
        larger = facts["next_larger"]
        assert (larger is None) == (not better)
        if larger is not None:
            assert larger["bytes"] >= min(better) > budget
            assert larger["predicted_loss_increase_nats"] < best
            assert larger["bytes"] == min(better) or not larger["proved_smallest"]
    smallest = sizes[0]
    check_budget(inventory, SPECS, max_bytes=smallest, groups=groups)
    for call in (
        lambda: check_budget(inventory, SPECS, max_bytes=smallest - 1, groups=groups),
        lambda: allocate(inventory, found, max_bytes=smallest - 1, groups=groups),
    ):
        with pytest.raises(SpecError, match=f"smallest file possible with these specs is {smallest} bytes"):
            call()


def test_negative_values_are_clamped_unit_by_unit_not_in_the_sum():
    """Else unit a's -5 would hide b's real 1.0, and the group would seem free at one bit."""
    inventory = named("a", "b")
    one, four = QuantSpec(1), QuantSpec(4)
    losses = {"a": {one: -5.0, four: -0.1}, "b": {one: 1.0, four: 0.2}}
    units = {n: UnitSensitivity(v, dict.fromkeys(v, 0.0), dict.fromkeys(v, 1.0)) for n, v in losses.items()}
    allocation = allocate(inventory, Sensitivities("x", inventory, units, 1), max_bytes=10**6, groups=[("a", "b")])
    assert set(allocation.specs.values()) == {four}
    assert allocation.provenance["predicted_loss_increase_nats"] == pytest.approx(0.2)
    assert allocation.provenance["negative_sensitivities_clamped_to_zero"] == ["a"]


def test_sharing_a_spec_never_helps():
    inventory = random_inventory(8, 3)
    found = sensitivities_of(inventory, 3)
    pairs = [(f"u.{i}", f"u.{i + 1}") for i in range(0, 8, 2)]
    whole = [tuple(u.name for u in inventory.units)]
    budget = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))
    losses = [
        allocate(inventory, found, max_bytes=budget, groups=g).provenance["predicted_loss_increase_nats"]
        for g in (None, pairs, whole)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_fixed_units_in_a_group():
    inventory = named("a", "b", "c")
    found = sensitivities_of(inventory, 1)
    two = QuantSpec(2)
    allocation = allocate(
        inventory, found, max_bytes=10**6, groups=[("a", "b")], fixed={"a": two, "b": two, "c": QuantSpec(8)}
    )
    assert allocation.specs == {"a": two, "b": two, "c": QuantSpec(8)}
    with pytest.raises(SpecError, match=r"'a' is fixed at 2-half-step-row, but 'b', .* is free; fix all 2"):
        allocate(inventory, found, max_bytes=10**6, groups=[("a", "b")], fixed={"a": two})
    with pytest.raises(SpecError, match="is fixed at 4-papers-row; fix all 2"):
        allocate(inventory, found, max_bytes=10**6, groups=[("a", "b")], fixed={"a": two, "b": QuantSpec(4)})


def test_a_group_takes_only_what_was_measured_for_all_of_it():
    inventory = named("a", "b")
    units = {
        n: UnitSensitivity(*[dict.fromkeys(parse_specs(specs), 0.5)] * 3)
        for n, specs in {"a": ["1", "2"], "b": ["2", "4"]}.items()
    }
    found = Sensitivities("x", inventory, units, 1)
    shared = allocate(inventory, found, max_bytes=10**6, groups=[("a", "b")])
    assert set(shared.specs.values()) == {QuantSpec(2)}
    units["b"] = UnitSensitivity(*[{QuantSpec(4): 0.5}] * 3)
    with pytest.raises(SpecError, match="units a, b share a spec, but none was measured for all"):
        allocate(inventory, Sensitivities("x", inventory, units, 1), max_bytes=10**6, groups=[("a", "b")])


def test_position_tables_and_embeddings_stay_alone():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(3, 4), "fc2": nn.Linear(4, 3)})])})
    model["embed_positions"] = nn.Embedding(8, 3)
    model["embed_tokens"] = nn.Embedding(9, 3)
    groups = group_units(find_units(model), "layer")
    assert set(groups) == {("layers.0.fc1", "layers.0.fc2"), ("embed_positions",), ("embed_tokens",)}

"""Predicted loss increase against a loss whose increase is known; the file round trip; hostile files."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.quant.curvature import TraceEstimate
from mixbits.quant.fingerprint import data_hash, model_hash
from mixbits.quant.grid import fake_quantize, perturbation
from mixbits.quant.inventory import inventory_from_json, inventory_to_json
from mixbits.quant.sensitivity import (
    Sensitivities,
    UnitSensitivity,
    hessian_sensitivity,
    measure_hessian,
    read_sensitivities,
    write_sensitivities,
)
from mixbits.quant.units import find_units
from mixbits.spec import QuantSpec, parse_specs

SPECS = parse_specs(["1", "1.58", "2", "4-papers-tensor", "16"])
IDS = torch.zeros(2, 3, dtype=torch.long)


def bowl(curvature=3.0):
    """``curvature / 2 * ||w - w0||^2`` at its minimum: the prediction is exact for every spec."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Linear(4, 6)})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(model, batch):
        return 0.5 * curvature * sum((p - start[n]).square().sum() for n, p in model.named_parameters())

    return model, loss


def test_prediction_is_exact_for_a_quadratic_loss():
    model, loss = bowl()
    found = measure_hessian(model, find_units(model), [IDS], loss, SPECS, num_probes=3, seed=0)
    for name in ("a", "b"):
        for spec in SPECS:
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed[name].weight.copy_(fake_quantize(changed[name].weight, spec))
            expected = float(loss(changed, IDS).detach())
            assert found.units[name].loss_increase[spec] == pytest.approx(expected, rel=1e-5)
            assert found.units[name].stderr[spec] == pytest.approx(0, abs=1e-6)


def test_formula_and_standard_error():
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(2)
    unit = hessian_sensitivity(TraceEstimate(-6.0, 1.5, 9), 12, {spec: perturbation(w, spec), QuantSpec(8): 0.0})
    assert unit.loss_increase[spec] == pytest.approx(0.5 * -6.0 / 12 * perturbation(w, spec))
    assert unit.stderr[spec] == pytest.approx(0.5 * 1.5 / 12 * perturbation(w, spec))
    single = hessian_sensitivity(TraceEstimate(1.0, math.inf, 1), 12, {spec: 2.0, QuantSpec(8): 0.0})
    assert single.stderr == {spec: math.inf, QuantSpec(8): 0.0}


def test_measuring_a_language_model(model, ids, loss_of, tmp_path):
    inventory = find_units(model)
    before = model_hash(model)
    found, again = (
        measure_hessian(model, inventory, [ids], loss_of, SPECS, num_probes=2, seed=4, provenance={"text": "x"})
        for _ in range(2)
    )
    assert model_hash(model) == before
    assert list(found.units) == [u.name for u in inventory.units]
    assert found.specs == SPECS
    assert found.measure == "hessian"
    assert found.cost_forward_backwards == 5
    facts = found.provenance
    assert (facts["seed"], facts["num_probes"], facts["num_tokens"], facts["text"]) == (4, 2, 24, "x")
    assert facts["model_hash"] == before
    assert facts["data_hash"] == data_hash([ids])
    assert facts["negative_traces"] == [n for n, u in found.units.items() if u.trace.trace < 0]
    first = write_sensitivities(tmp_path / "a.json", found).read_bytes()
    assert write_sensitivities(tmp_path / "b.json", again).read_bytes() == first
    back = read_sensitivities(tmp_path / "a.json")
    assert back == found
    assert back.inventory == inventory


def test_negative_and_unknown_survive_the_file(tmp_path):
    model, _ = bowl()
    spec = QuantSpec(2)
    unit = hessian_sensitivity(TraceEstimate(-6.0, math.inf, 1), 12, {spec: 2.0})
    bare = UnitSensitivity({spec: 0.25}, {spec: math.inf}, {spec: 2.0})  # a measure without a trace
    found = Sensitivities("kl", find_units(model), {"a": unit, "b": bare}, 7.5)
    back = read_sensitivities(write_sensitivities(tmp_path / "s.json", found))
    assert back == found
    assert back.units["a"].loss_increase[spec] < 0
    assert "Infinity" not in (tmp_path / "s.json").read_text()


def test_model_hash_sees_every_change():
    model, _ = bowl()
    hashes = {model_hash(model)}
    with torch.no_grad():
        model["a"].bias[0] += 1
    hashes.add(model_hash(model))
    hashes.add(model_hash(model.to(torch.bfloat16)))
    assert len(hashes) == 3
    assert data_hash([IDS]) != data_hash([IDS.view(3, 2)])


def test_bad_measurements():
    model, loss = bowl()
    inventory = find_units(model)
    with pytest.raises(SpecError, match="no specs"):
        measure_hessian(model, inventory, [IDS], loss, [])
    with pytest.raises(SpecError, match="num_probes is 0"):
        measure_hessian(model, inventory, [IDS], loss, SPECS, num_probes=0)
    spec = QuantSpec(2)
    with pytest.raises(DataError, match="not a measurement"):
        UnitSensitivity({spec: math.nan}, {spec: 0}, {spec: 0})
    with pytest.raises(SpecError, match="same specs"):
        UnitSensitivity({spec: 0.0}, {}, {spec: 0})
    unit = UnitSensitivity({spec: 0.0}, {spec: 0.0}, {spec: 0.0})
    with pytest.raises(SpecError, match="misses unit"):
        Sensitivities("x", inventory, {"a": unit}, 1)
    with pytest.raises(SpecError, match="unknown unit"):
        Sensitivities("x", inventory, {"a": unit, "b": unit, "c": unit}, 1)
    with torch.no_grad():
        model["a"].weight[0] = math.nan
    with pytest.raises(DataError, match="unit a"):
        measure_hessian(model, inventory, [IDS], loss, SPECS)


def good():
    model, loss = bowl()
    return measure_hessian(model, find_units(model), [IDS], loss, SPECS, num_probes=1, seed=0).to_json()


def broken(*path, value):
    data = good()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


ONE = "1-papers-row"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a mixbits sensitivity file"),
        (broken("format", value="mixbits-allocation"), "not a mixbits sensitivity file"),
        (broken("format_version", value=99), "format_version is 99"),
        (broken("units", value=None), "'units'"),
        (broken("units", "a", value=3), "unit a: expected an object"),
        (broken("units", "a", "specs", value={}), "unit a"),
        (broken("units", "c", value=good()["units"]["a"]), r"unknown unit\(s\) c"),
        (broken("units", value={"a": good()["units"]["a"]}), r"misses unit\(s\) b"),
        (broken("units", "a", "specs", "5", value={}), "spec 5: bit width 5"),
        (broken("units", "a", "specs", ONE, value=[]), f"spec {ONE}: expected an object"),
        (broken("units", "a", "specs", ONE, "loss_increase_nats", value="1"), "loss_increase_nats is '1'"),
        (broken("units", "a", "specs", ONE, "loss_increase_nats", value=None), "expected a finite number"),
        (broken("units", "a", "specs", ONE, "stderr_nats", value=-1), "not a measurement"),
        (broken("units", "a", "num_probes", value=0), "num_probes is 0"),
        (broken("cost_forward_backwards", value=True), "cost_forward_backwards is True"),
        (broken("inventory", value=None), "'units' and 'others'"),
        (broken("inventory", "units", value=[]), "is empty"),
        (broken("inventory", "units", 0, "rows", value=-5), "'rows' is -5"),
        (broken("inventory", "units", 0, "rows", value=1.5), "'rows' is 1.5"),
        (broken("inventory", "units", 0, "kind", value="conv"), "'kind' is 'conv'"),
        (broken("inventory", "units", 0, "name", value=""), "'name' is ''"),
        (broken("inventory", "units", 0, "tied", value="lm_head"), "'tied'"),
        (broken("inventory", "units", 1, "name", value="a"), "unit a is listed more than once"),
        (broken("inventory", "others", 0, value=["x"]), "other tensor 0"),
        (broken("inventory", "others", 0, value=["a.weight", [5]]), "tensor a.weight is listed more than once"),
        (broken("inventory", "unused_position_weights", value=-1), "unused_position_weights"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_hostile_files_are_refused_with_the_place(data, message, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message) as caught:
        read_sensitivities(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_sensitivities(tmp_path / "none.json")
    for text in ("", "{", json.dumps(good())[:-20], '{"cost": NaN}', "[" * 100000):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(FormatError, match=r"s\.json"):
            read_sensitivities(tmp_path / "s.json")


def test_inventory_round_trip(model):
    inventory = find_units(model)
    assert inventory_from_json(json.loads(json.dumps(inventory_to_json(inventory)))) == inventory

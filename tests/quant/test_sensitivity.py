"""Sensitivity data: what is refused, summaries, the file round trip, hostile files."""

import json
import math

import pytest
import torch
from torch import nn

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.quant.curvature import TraceEstimate
from mixbits.quant.fingerprint import data_hash, model_hash
from mixbits.quant.inventory import inventory_from_json, inventory_to_json
from mixbits.quant.measures.hessian import hessian_sensitivity, measure_hessian
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity, read_sensitivities, write_sensitivities
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
    model, _ = bowl()
    inventory = find_units(model)
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


def test_largest_relative_error_and_negative_units():
    model, _ = bowl()
    two, eight = QuantSpec(2), QuantSpec(8)

    def found(a, b):
        """a, b: (loss increases, standard errors), each at 2 and 8 bits."""
        units = {
            name: UnitSensitivity({two: v[0], eight: v[1]}, {two: e[0], eight: e[1]}, {two: 1, eight: 1})
            for name, (v, e) in {"a": a, "b": b}.items()
        }
        return Sensitivities("loss", find_units(model), units, 1.0)

    some = found(((0.5, -0.01), (0.1, 0.003)), ((2.0, 0.0), (0.2, 0.0)))
    assert some.largest_relative_stderr == (pytest.approx(0.3), "a", eight)
    assert some.negative_units == ["a"]
    assert found(((1, 1), (0, 0)), ((1, 0), (0, 0.1))).largest_relative_stderr == (math.inf, "b", eight)
    assert found(((1, 1), (0, math.inf)), ((1, 0), (0, 0))).largest_relative_stderr == (math.inf, "a", eight)


def good():
    model, loss = bowl()
    return measure_hessian(model, find_units(model), [IDS], SPECS, loss=loss, num_probes=1, seed=0).to_json()


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

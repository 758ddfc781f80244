"""``mixbits allocate``: budgets, groups, the front, its plot; one-line errors."""

import json
import math
import random

import pytest

from mixbits.cli.main import main
from mixbits.quant.front import read_front
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity, write_sensitivities
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit, parse_specs

SPECS = parse_specs(["1", "1.58", "2", "4", "8"])


@pytest.fixture
def file(tmp_path):
    rng = random.Random(4)
    names = [f"layers.{i}.{n}" for i in (0, 1, 2) for n in ("attn.q", "attn.k", "fc1")]
    units = tuple(Unit(n, f"{n}.weight", rng.randint(5, 60), rng.randint(5, 60), "linear") for n in names)
    inventory = ModelInventory(units, (("norm", (9,)),))
    measured = {}
    for unit in units:
        loss = {s: rng.random() * 4.0**-s.bit_width for s in SPECS}
        if unit.name == "layers.2.fc1":
            loss[QuantSpec(1)] = -0.1
        measured[unit.name] = UnitSensitivity(loss, dict.fromkeys(SPECS, math.inf), dict.fromkeys(SPECS, 1.0))
    return write_sensitivities(tmp_path / "s.json", Sensitivities("test", inventory, measured, 1.0))


def test_the_command_needs_the_file_alone(file, tmp_path, capsys):
    output = tmp_path / "allocation.json"
    assert main(["allocate", str(file), "--bytes", "6000", "-o", str(output), "--fix", "layers.2.attn.k=8"]) == 0
    shown = capsys.readouterr().out
    data = json.loads(output.read_text())
    facts = data["provenance"]
    allocation = BitAllocation.from_json(data)
    assert allocation.specs["layers.2.attn.k"] == QuantSpec(8)
    assert facts["predicted_bytes"] <= 6000
    for name, spec in allocation.specs.items():
        assert any(name in line and str(spec) in line for line in shown.splitlines())
    assert f"{facts['predicted_bytes']:,} bytes of 6,000" in shown
    assert "the optimum" in shown
    assert f"{6000 - facts['predicted_bytes']:,} bytes stay unused" in shown
    assert f"size that helps is {facts['next_larger']['bytes']:,} bytes" in shown
    assert "1 unit(s) with a negative sensitivity counted as 0: layers.2.fc1" in shown


def test_the_size_that_is_said_to_help_does(file, tmp_path, capsys):
    output = tmp_path / "a.json"

    def loss_within(budget):
        assert main(["allocate", str(file), "--bytes", str(budget), "-o", str(output), "--granularity", "layer"]) == 0
        return json.loads(output.read_text())["provenance"]

    before = loss_within(4400)
    larger = before["next_larger"]
    assert larger["proved_smallest"]
    just_below, at = loss_within(larger["bytes"] - 1), loss_within(larger["bytes"])
    assert just_below["predicted_loss_increase_nats"] == before["predicted_loss_increase_nats"]
    assert at["predicted_loss_increase_nats"] == larger["predicted_loss_increase_nats"]
    assert at["unused_bytes"] == 0
    capsys.readouterr()


def test_groups(file, tmp_path, capsys):
    output = tmp_path / "a.json"

    def specs(*arguments):
        assert main(["allocate", str(file), "--bytes", "5500", "-o", str(output), *arguments]) == 0
        return BitAllocation.from_json(json.loads(output.read_text())).specs

    def num_specs(found, words):
        return len({s for n, s in found.items() if all(w in n for w in words)})

    layers, blocks = specs("--granularity", "layer"), specs("--granularity", "sublayer")
    listed = specs("--group", "layers.*.fc1", "--group", "layers.0.attn.*, layers.1.attn.q")
    for i in range(3):
        assert num_specs(layers, (f"layers.{i}.",)) == 1
        assert num_specs(blocks, (f"layers.{i}.attn",)) == 1
    assert num_specs(listed, ("fc1",)) == 1
    assert len({listed[n] for n in ("layers.0.attn.q", "layers.0.attn.k", "layers.1.attn.q")}) == 1
    fixed = specs("--granularity", "sublayer", "--fix", "layers.1.attn.*=1.58")
    assert {fixed["layers.1.attn.q"], fixed["layers.1.attn.k"]} == {QuantSpec(1.58)}
    capsys.readouterr()


def test_front_alone_with_a_budget_and_with_a_plot(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["allocate", str(file), "--front", "front.json", "--points", "7", "--granularity", "sublayer"]) == 0
    result = read_front("front.json")
    shown = capsys.readouterr().out
    first, last = result.points[0], result.points[-1]
    assert f"{len(result.points)} points from {first.bytes:,} bytes" in shown
    assert f"to {last.bytes:,} ({last.ratio:.2f}x), {len(result.points)} proved optimal" in shown
    assert all(f"of uniform {u.spec} " in shown for u in result.uniform)
    assert not (tmp_path / "allocation.json").exists()
    measured = [{"bytes": 5000, "nats": 0.2, "name": "learned"}, {"bytes": 7000, "nats": -0.01, "name": "uniform-4"}]
    (tmp_path / "m.json").write_text(json.dumps(measured))
    arguments = ["--plot", "front.png", "--measured", "m.json", "--points", "3", "--bytes", "5500"]
    assert main(["allocate", str(file), "--front", "again.json", *arguments]) == 0
    assert (tmp_path / "allocation.json").exists()
    assert (tmp_path / "again.json").exists()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote front.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of ratio"),
        (["--ratio", "1000"], "smallest file possible"),
        (["--ratio", "2", "--bytes", "9"], "exactly one"),
        (["--ratio", "2", "--specs", ","], "--specs"),
        (["--ratio", "2", "--specs", "3"], "was not measured"),
        (["--ratio", "2", "--fix", "layers.2"], "UNIT=SPEC"),
        (["--ratio", "2", "--fix", "nowhere=2"], "unknown unit"),
        (["--ratio", "2", "--fix", "no*=2"], "pattern 'no*' matches no unit"),
        (["--ratio", "2", "--granularity", "block"], "expected one of matrix, sublayer, layer"),
        (["--ratio", "2", "--granularity", "layer", "--fix", "layers.0.fc1=2"], "shares its spec, is free"),
        (["--ratio", "2", "--group", "layers.0.*", "--group", "*.fc1"], "groups must not overlap"),
        (["--ratio", "2", "--group", "x*"], "matches no unit"),
        (["--ratio", "2", "--group", ","], "group 1 is []"),
        (["--front", "f.json", "--points", "1"], "num_points is 1"),
        (["--front", "f.json", "--ratio", "1000"], "smallest file possible"),
        (["--plot", "f.xyz"], "ending in .png, .svg, .pdf"),
        (["--front", "f.json", "--measured", "m.json"], "--plot FILE, which was not given"),
        (["--plot", "f.png", "--measured", "none.json"], "no such file"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(file, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["allocate", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]

"""What holds for every sensitivity measure: one table of checks, run for each on four families of models."""

import json
import math

import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant.allocate import allocate
from mixbits.quant.fingerprint import data_hash, model_hash
from mixbits.quant.grid import fake_quantize, perturbation
from mixbits.quant.measures import MEASURES
from mixbits.quant.sensitivity import Sensitivities, read_sensitivities, write_sensitivities
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec, parse_specs, predicted_bytes

SPECS = parse_specs(["1", "2", "4-papers-tensor", "16"])


def prototypes_of(model):
    """The model's own units, fake-quantized and changed a little."""
    matrices = unit_matrices(model, find_units(model))
    specs = [*SPECS, QuantSpec(8)]
    return {s: {n: fake_quantize(m.float(), s) * 1.01 for n, m in matrices.items()} for s in specs}


def run(name, model, batches, specs=SPECS, **options):
    """Measure with few probes, or with the model's own prototypes."""
    inventory = find_units(model)
    if name == "hessian":
        options.setdefault("num_probes", 2)
    if name == "prototypes" and "prototypes" not in options:
        options["prototypes"] = prototypes_of(model)
    return MEASURES[name](model, inventory, batches, specs, **{"seed": 3, **options})


@pytest.fixture(params=list(MEASURES))
def name(request):
    return request.param


def test_every_unit_and_spec_is_measured_and_the_model_left_alone(name, model, ids, values_of):
    inventory = find_units(model)
    model.lm_head.weight.requires_grad_(False)
    model.base_model.eval()
    before, modes = values_of(model), [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(11)
    found = run(name, model, [ids])
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1)), "the global generator was used"
    for key, value in values_of(model).items():
        assert torch.equal(value, before[key]), key
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert found.measure == name
    assert list(found.units) == [u.name for u in inventory.units]
    assert found.specs == SPECS
    for unit in found.units.values():
        assert all(math.isfinite(v) for v in unit.loss_increase.values())
        assert all(0 <= e < math.inf for e in unit.stderr.values())
    some = found.units[inventory.units[0].name]
    assert some.stderr[QuantSpec(1)] > 0
    if name != "prototypes":
        own = unit_matrices(model, inventory)[inventory.units[0].name]
        assert some.perturbation[SPECS[1]] == pytest.approx(perturbation(own, SPECS[1]))


def test_deterministic_for_a_seed_with_facts_and_a_file(name, opt, ids, tmp_path):
    found, again = (run(name, opt, [ids], provenance={"text": "x"}) for _ in range(2))
    facts = found.provenance
    assert (facts["seed"], facts["num_tokens"], facts["num_sequences"], facts["text"]) == (3, 24, 3, "x")
    assert facts["model_hash"] == model_hash(opt)
    assert facts["data_hash"] == data_hash([ids])
    assert facts["around"] is None
    path = write_sensitivities(tmp_path / "a.json", found)
    assert write_sensitivities(tmp_path / "b.json", again).read_bytes() == path.read_bytes()
    assert read_sensitivities(path) == found
    assert Sensitivities.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_batches_may_be_cut_anyhow(name, opt, ids):
    whole, cut = run(name, opt, [ids]), run(name, opt, [ids[:1], ids[1:], ids[:0]])
    if name == "hessian":  # other micro-batches have other probes
        return
    for unit in whole.units:
        assert cut.units[unit].loss_increase == pytest.approx(whole.units[unit].loss_increase, rel=1e-4, abs=1e-7)


def test_cost_is_counted(name, opt, ids):
    num_units, num_specs = len(find_units(opt).units), len(SPECS)
    expected = {
        "hessian": 5.0,
        "fisher": 1.0,
        "kl": (num_units * (num_specs + 1) + 1) / 3,
        "loss": (num_units * num_specs + 1) / 3,
        "prototypes": (num_units * num_specs + 1) / 3,
    }
    assert run(name, opt, [ids]).cost_forward_backwards == pytest.approx(expected[name])


def test_half_precision_models_are_measured_in_float32_and_left_as_they_were(name, opt, ids, values_of):
    full = opt.to(torch.bfloat16)
    before = values_of(full)
    found = run(name, full, [ids])
    assert all(torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in values_of(full).items())
    same = run(name, opt.float(), [ids])
    for unit in found.units:
        assert found.units[unit].loss_increase == pytest.approx(same.units[unit].loss_increase, rel=1e-3, abs=1e-6)


def test_around_an_allocation(name, opt, ids, values_of):
    inventory, before = find_units(opt), values_of(opt)
    around = BitAllocation({u.name: QuantSpec(1) for u in inventory.units})
    plain, found = run(name, opt, [ids]), run(name, opt, [ids], around=around)
    assert all(torch.equal(v, before[k]) for k, v in values_of(opt).items())
    assert found.provenance["around"] == {u.name: "1-papers-row" for u in inventory.units}
    unit = inventory.units[0].name
    assert found.units[unit].loss_increase != plain.units[unit].loss_increase
    assert found.units[unit].perturbation == plain.units[unit].perturbation
    with pytest.raises(SpecError, match="misses unit"):
        run(name, opt, [ids], around=BitAllocation({unit: QuantSpec(1)}))


def test_specs_may_differ_from_unit_to_unit(name, opt, ids):
    units = [u.name for u in find_units(opt).units]
    wanted = {n: SPECS[1:3] if i else SPECS for i, n in enumerate(units)}
    found = run(name, opt, [ids], specs=wanted)
    assert {n: tuple(u.loss_increase) for n, u in found.units.items()} == wanted
    with pytest.raises(SpecError, match=f"no specs to measure for unit {units[0]}"):
        run(name, opt, [ids], specs={n: SPECS for n in units[1:]})


def test_the_allocator_takes_it(name, opt, ids):
    inventory = find_units(opt)
    budget = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))
    allocation = allocate(inventory, run(name, opt, [ids]), max_bytes=budget)
    allocation.check(inventory)
    assert predicted_bytes(inventory, allocation) <= budget


def test_one_sequence_is_a_warning_and_an_unknown_error(name, opt, ids):
    found = run(name, opt, [ids[:1]])
    assert any("single sequence" in w for w in found.provenance["warnings"])
    if name != "hessian":
        assert found.largest_relative_stderr[0] == math.inf
    assert not any("single sequence" in w for w in run(name, opt, [ids]).provenance["warnings"])


def test_bad_input(name, opt, ids):
    with pytest.raises(SpecError, match="no specs"):
        run(name, opt, [ids], specs=[])
    for batches in ([], [ids[:0]]):
        with pytest.raises(DataError, match="no tokens"):
            run(name, opt, batches)
    with pytest.raises(DataError, match="shape"):
        run(name, opt, [ids[0]])
    with pytest.raises(DataError, match=r"1 token\(s\)"):
        run(name, opt, [ids[:, :1]])
    unit = find_units(opt).units[2].name
    options = {"prototypes": prototypes_of(opt)} if name == "prototypes" else {}
    with torch.no_grad():
        opt.get_submodule(unit).weight[0, 0] = math.nan
    with pytest.raises(DataError, match=f"unit {unit} has NaN"):
        run(name, opt, [ids], **options)


def test_a_model_that_overflows_is_refused_and_restored(name, opt, ids, values_of):
    with torch.no_grad():
        opt.model.decoder.final_layer_norm.weight.fill_(math.inf) if opt.model.decoder.final_layer_norm else None
        opt.model.decoder.layers[0].fc2.bias.fill_(math.inf)
    before = values_of(opt)
    with pytest.raises(DataError, match=r"finite|nan"):
        run(name, opt, [ids])
    assert all(torch.equal(v, before[k]) for k, v in values_of(opt).items())


def test_progress_goes_to_stderr(name, opt, ids, capsys):
    run(name, opt, [ids], show_progress=True)
    assert capsys.readouterr().out == ""

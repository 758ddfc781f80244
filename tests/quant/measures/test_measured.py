"""KL, loss and prototypes against a copy of the model that is changed for real, sequence by sequence."""

import copy
import math

import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures import allocation_loss, measure_kl, measure_loss, measure_prototypes
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec, parse_specs

SPECS = parse_specs(["1", "2", "4"])


def changed(model, weights):
    """A copy in evaluation mode whose named units hold these matrices."""
    result = copy.deepcopy(model).eval()
    matrices = unit_matrices(result, find_units(result))
    for name, weight in weights.items():
        matrices[name].copy_(weight)
    return result


def log_probs(model, row):
    with torch.no_grad():
        return model(input_ids=row[None, :-1]).logits[0].double().log_softmax(-1)


def nats(model, row):
    return -float(log_probs(model, row).gather(1, row[1:, None]).sum())


def divergence(full, model, row):
    own, other = log_probs(full, row), log_probs(model, row)
    return float((own.exp() * (own - other)).sum())


def mean_and_error(values, tokens):
    mean = sum(values) / sum(tokens)
    count = len(values)
    residual = sum((v - mean * t) ** 2 for v, t in zip(values, tokens, strict=True))
    return mean, math.sqrt(residual * count / (count - 1)) / sum(tokens)


def scores(kind, full, model, rows):
    return [nats(model, r) if kind == "loss" else divergence(full, model, r) for r in rows]


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("mixed_around", [False, True])
def test_one_unit_at_a_time_against_a_copy(kind, mixed_around, model, ids, mixed):
    inventory = find_units(model)
    around = mixed(inventory) if mixed_around else None
    measure = measure_loss if kind == "loss" else measure_kl
    found = measure(model, inventory, [ids, ids[:2, :5]], SPECS, seed=0, micro_batch_size=2, around=around)
    own = unit_matrices(model, inventory)
    rest = {n: fake_quantize(own[n], around.specs[n]) for n in own} if around else {}
    rows = [*ids, *ids[:2, :5]]
    tokens = [len(r) - 1 for r in rows]
    full = changed(model, {})
    for name in (inventory.units[0].name, inventory.units[-1].name):
        start = scores(kind, full, changed(model, {**rest, name: own[name]}), rows)
        for spec in SPECS:
            end = scores(kind, full, changed(model, {**rest, name: fake_quantize(own[name], spec)}), rows)
            mean, error = mean_and_error([b - a for a, b in zip(start, end, strict=True)], tokens)
            unit = found.units[name]
            assert unit.loss_increase[spec] == pytest.approx(mean, rel=1e-3, abs=1e-6)
            assert unit.stderr[spec] == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_kl_is_not_negative_and_zero_where_nothing_changes(opt, ids):
    inventory = find_units(opt)
    with torch.no_grad():
        for matrix in unit_matrices(opt, inventory).values():
            matrix.copy_(fake_quantize(matrix, QuantSpec(16)))
    found = measure_kl(opt, inventory, [ids], [*SPECS, QuantSpec(16)], seed=0)
    for unit in found.units.values():
        assert unit.loss_increase[QuantSpec(16)] == unit.stderr[QuantSpec(16)] == 0
        assert min(unit.loss_increase[s] for s in SPECS) > -1e-6  # float32 rounding


def test_loss_of_an_allocation(model, ids, mixed):
    inventory = find_units(model)
    allocation = mixed(inventory)
    own = unit_matrices(model, inventory)
    quantized = changed(model, {n: fake_quantize(own[n], allocation.specs[n]) for n in own})
    for wanted, reference in ((allocation, quantized), (None, changed(model, {}))):
        expected = mean_and_error([nats(reference, r) for r in ids], [8, 8, 8])
        assert allocation_loss(model, inventory, [ids], wanted, micro_batch_size=2) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(SpecError, match="misses unit"):
        allocation_loss(model, inventory, [ids], BitAllocation({}))


def prototypes_of(model, specs):
    generator = torch.Generator().manual_seed(9)
    own = unit_matrices(model, find_units(model))
    return {
        s: {n: fake_quantize(m + 0.02 * torch.randn(m.shape, generator=generator), s) for n, m in own.items()}
        for s in specs
    }


@pytest.mark.parametrize("mixed_around", [False, True])
def test_prototypes_against_a_copy(mixed_around, model, ids):
    inventory = find_units(model)
    trained = prototypes_of(model, SPECS)
    names = [u.name for u in inventory.units]
    around = BitAllocation({n: SPECS[i % 3] for i, n in enumerate(names)}) if mixed_around else None
    found = measure_prototypes(model, inventory, [ids], SPECS, seed=0, prototypes=trained, around=around)
    base = SPECS[2]
    assert found.provenance["base"] == str(base)
    rest = {n: trained[around.specs[n] if around else base][n] for n in names}
    for name in (names[0], names[-1]):
        start = [nats(changed(model, {**rest, name: trained[base][name]}), r) for r in ids]
        for spec in SPECS:
            end = [nats(changed(model, {**rest, name: trained[spec][name]}), r) for r in ids]
            mean, error = mean_and_error([b - a for a, b in zip(start, end, strict=True)], [8, 8, 8])
            assert found.units[name].loss_increase[spec] == pytest.approx(mean, rel=1e-3, abs=1e-6)
            assert found.units[name].stderr[spec] == pytest.approx(error, rel=1e-2, abs=1e-6)
        assert found.units[name].loss_increase[base] == found.units[name].perturbation[base] == 0


def test_a_unit_that_prototypes_keep_wider_is_rounded_from_the_base(opt, ids):
    inventory = find_units(opt)
    trained = prototypes_of(opt, SPECS)
    (name,) = [u.name for u in inventory.units if u.is_position_table]
    for spec in SPECS:  # as uniform models have it: 4 bits, whatever the spec
        trained[spec][name] = trained[SPECS[2]][name]
    for where in (None, BitAllocation.uniform(inventory, SPECS[2])):
        found = measure_prototypes(
            opt, inventory, [ids], SPECS, seed=0, prototypes=trained, untrained=[name], around=where
        )
        start = dict(trained[SPECS[2]])
        before = [nats(changed(opt, start), r) for r in ids]
        for spec in SPECS:
            after = [nats(changed(opt, {**start, name: fake_quantize(start[name], spec)}), r) for r in ids]
            mean, _ = mean_and_error([b - a for a, b in zip(before, after, strict=True)], [8, 8, 8])
            assert found.units[name].loss_increase[spec] == pytest.approx(mean, rel=1e-3, abs=2e-6)
        assert found.units[name].perturbation[SPECS[0]] > 0
        assert found.provenance["untrained"] == [name]


def test_bad_prototypes(opt, ids):
    inventory = find_units(opt)
    trained = prototypes_of(opt, SPECS)
    unit = inventory.units[1].name
    ask = {"seed": 0, "prototypes": trained}
    with pytest.raises(SpecError, match="no prototypes"):
        measure_prototypes(opt, inventory, [ids], SPECS, seed=0, prototypes={})
    with pytest.raises(SpecError, match="no prototype at 8-papers-row; there are 1-papers-row"):
        measure_prototypes(opt, inventory, [ids], [QuantSpec(8)], **ask)
    with pytest.raises(SpecError, match="no prototype at 8-papers-row"):
        measure_prototypes(opt, inventory, [ids], SPECS, base=QuantSpec(8), **ask)
    around = BitAllocation.uniform(inventory, QuantSpec(8))
    with pytest.raises(SpecError, match="no prototype at 8-papers-row"):
        measure_prototypes(opt, inventory, [ids], SPECS, around=around, **ask)
    trained[SPECS[0]][unit] = trained[SPECS[0]][unit][1:]
    with pytest.raises(SpecError, match=f"1-papers-row: unit {unit} is .*expected"):
        measure_prototypes(opt, inventory, [ids], SPECS, **ask)
    trained[SPECS[0]].pop(unit)
    with pytest.raises(SpecError, match=f"1-papers-row misses unit {unit}"):
        measure_prototypes(opt, inventory, [ids], SPECS, **ask)
    trained[SPECS[0]][unit] = torch.full_like(trained[SPECS[1]][unit], math.nan)
    with pytest.raises(DataError, match=f"unit {unit} has NaN"):
        measure_prototypes(opt, inventory, [ids], SPECS, **ask)

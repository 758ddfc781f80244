"""Fisher against the closed form of softmax regression, exact Hessians, and a per-sequence reference with autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from mixbits.errors import SpecError
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures.fisher import measure_fisher
from mixbits.quant.units import as_matrix, find_units, unit_matrices, unit_parameters
from mixbits.spec import BitAllocation, QuantSpec, parse_specs

SPECS = parse_specs(["1", "2", "4"])
STANDARD_ERRORS = 4.5  # a handful of comparisons with fixed seeds; a wrong factor is off by dozens


def head_increase(model, ids, spec):
    """1/2 sum_ij F_ij dw_ij^2 with the exact F of softmax regression: mean over tokens of p_v (1 - p_v) x_j^2."""
    x = model.embed(ids[:, :-1]).flatten(0, 1).detach().double()
    p = model.head(x.float()).softmax(-1).detach().double()
    fisher = (p * (1 - p)).T @ x.square() / len(x)
    weight = model.head.weight.detach()
    return 0.5 * float((fisher * (fake_quantize(weight, spec) - weight).double().square()).sum())


def test_drawn_labels_are_unbiased_for_softmax_regression(softmax, own_logits):
    ids = torch.randint(0, 6, (1500, 5), generator=torch.Generator().manual_seed(0))
    found = measure_fisher(softmax, find_units(softmax), [ids], SPECS, seed=1, logits=own_logits, labels="model")
    for spec in SPECS:
        got, error = found.units["head"].loss_increase[spec], found.units["head"].stderr[spec]
        assert abs(got - head_increase(softmax, ids, spec)) < STANDARD_ERRORS * error
        assert error < 0.05 * got


def test_it_is_the_diagonal_of_the_hessian_where_that_is_gauss_newton(softmax, own_logits):
    """For the head the loss is convex in the weight and its Hessian is Gauss-Newton's, whatever the labels."""
    ids = torch.randint(0, 6, (1500, 3), generator=torch.Generator().manual_seed(2))
    x = softmax.embed(ids[:, :-1]).flatten(0, 1).detach()

    def loss(weight):
        return F.cross_entropy(x @ weight.T, ids[:, 1:].reshape(-1))

    weight = softmax.head.weight.detach()
    hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), -1)
    change = (fake_quantize(weight, SPECS[1]) - weight).flatten()
    expected = 0.5 * float(hessian.diagonal() @ change.square())
    unit = measure_fisher(softmax, find_units(softmax), [ids], SPECS, seed=1, logits=own_logits).units["head"]
    assert abs(unit.loss_increase[SPECS[1]] - expected) < STANDARD_ERRORS * unit.stderr[SPECS[1]]


@pytest.mark.parametrize("quantized", [False, True])
def test_data_labels_against_a_loop_over_sequences(model, ids, quantized):
    """Summed nats of each sequence, its gradient by autograd, squared and weighed with the perturbation: the definition."""
    inventory = find_units(model)
    own = {n: m.clone() for n, m in unit_matrices(model, inventory).items()}
    around = BitAllocation({u.name: QuantSpec(2) for u in inventory.units}) if quantized else None
    batches = [ids, ids[:2, :5]]
    found = measure_fisher(model, inventory, batches, SPECS, seed=0, labels="data", around=around)
    if quantized:
        for matrix in unit_matrices(model, inventory).values():
            matrix.copy_(fake_quantize(matrix, QuantSpec(2)))
    sequences = [row for batch in batches for row in batch]
    parameters = unit_parameters(model, inventory)
    samples, tokens = [], [len(row) - 1 for row in sequences]
    for row in sequences:
        logits = model(input_ids=row[None, :-1]).logits[0]
        nats = sum(-logits[i].log_softmax(-1)[row[i + 1]] for i in range(len(row) - 1))
        samples.append(torch.autograd.grad(nats, list(parameters.values())))
    for index, unit in enumerate(inventory.units):
        for spec in SPECS:
            change = (fake_quantize(own[unit.name], spec) - own[unit.name]).square()
            values = [0.5 * float((as_matrix(g[index], unit.kind).square() * change).sum()) for g in samples]
            mean = sum(values) / sum(tokens)
            got = found.units[unit.name]
            assert got.loss_increase[spec] == pytest.approx(mean, rel=1e-3)
            residual = sum((v - mean * t) ** 2 for v, t in zip(values, tokens, strict=True))
            expected = math.sqrt(residual * 5 / 4) / sum(tokens)
            assert got.stderr[spec] == pytest.approx(expected, rel=1e-3)


def test_labels_are_recorded_and_matter(opt, ids):
    inventory = find_units(opt)
    first, second = (measure_fisher(opt, inventory, [ids], SPECS, seed=s, labels="model") for s in (0, 1))
    data = measure_fisher(opt, inventory, [ids], SPECS, seed=0, labels="data")
    assert first.provenance["labels"] == "model"
    assert first.units != second.units != data.units
    assert min(v for u in first.units.values() for v in u.loss_increase.values()) >= 0
    with pytest.raises(SpecError, match="labels is 'text'"):
        measure_fisher(opt, inventory, [ids], SPECS, seed=0, labels="text")


def test_units_that_the_loss_does_not_use_have_zero(softmax, own_logits, ids):
    softmax.unused = torch.nn.Linear(3, 2)
    found = measure_fisher(softmax, find_units(softmax), [ids % 6], SPECS, seed=0, logits=own_logits)
    assert set(found.units["unused"].loss_increase.values()) == {0.0}

"""Predicted loss increase against a loss whose increase is known."""

import copy
import math

import pytest
import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.curvature import TraceEstimate, double_backward_ready, hessian_traces
from mixbits.quant.grid import fake_quantize, perturbation
from mixbits.quant.measures.hessian import hessian_sensitivity, measure_hessian
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec, parse_specs

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
    found = measure_hessian(model, find_units(model), [IDS], SPECS, loss=loss, num_probes=3, seed=0)
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


def test_a_negative_trace_keeps_its_sign():
    model, loss = bowl(curvature=-3.0)
    found = measure_hessian(model, find_units(model), [IDS], SPECS, loss=loss, num_probes=2, seed=0)
    assert found.units["a"].loss_increase[SPECS[0]] < 0
    assert found.provenance["negative_traces"] == found.negative_units == ["a", "b"]


def test_around_takes_the_curvature_of_the_quantized_model(opt, ids, loss_of):
    inventory = find_units(opt)
    around = BitAllocation({u.name: QuantSpec(1.58) for u in inventory.units})
    found = measure_hessian(opt, inventory, [ids], SPECS, num_probes=2, seed=4, around=around)
    quantized = copy.deepcopy(opt)
    for matrix in unit_matrices(quantized, inventory).values():
        matrix.copy_(fake_quantize(matrix, QuantSpec(1.58)))
    with double_backward_ready(quantized):
        traces = hessian_traces(quantized, inventory, [ids], loss_of, num_probes=2, seed=4)
    for name, matrix in unit_matrices(opt, inventory).items():
        expected = 0.5 * traces[name].trace / matrix.numel() * perturbation(matrix, QuantSpec(2))
        assert found.units[name].loss_increase[QuantSpec(2)] == pytest.approx(expected, rel=1e-3)


def test_one_probe_and_one_micro_batch_are_warnings():
    model, loss = bowl()
    ask = {"loss": loss, "seed": 0}
    one = measure_hessian(model, find_units(model), [IDS], SPECS, num_probes=1, **ask)
    assert math.isinf(one.units["a"].stderr[SPECS[0]])
    assert [w.split(":")[0] for w in one.provenance["warnings"]] == ["one probe", "a single micro-batch"]
    enough = measure_hessian(model, find_units(model), [IDS, IDS], SPECS, num_probes=2, **ask)
    assert enough.provenance["warnings"] == []
    with pytest.raises(SpecError, match="num_probes is 0"):
        measure_hessian(model, find_units(model), [IDS], SPECS, num_probes=0, **ask)
    with pytest.raises(SpecError, match="micro_batch_size is 0"):
        measure_hessian(model, find_units(model), [IDS], SPECS, micro_batch_size=0, **ask)

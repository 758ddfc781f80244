"""Refinement: gradients of scales, codes that never change, scales that can be stored."""

import copy

import pytest
import torch
from torch.func import functional_call

from mixbits.quant.grid import codes_of, dequantize
from mixbits.quant.method import quantize_units, trained_units
from mixbits.quant.refine import Refine
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec

FORMATS = ["1-v8", "2-g5", "1.58-g4-s8", "2.67-v3-tensor", "4-row-s8", "8-g7"]


def formats(inventory):
    """Group scales, byte scales and codebooks in turn; the embedding has a codebook and row scales."""
    return BitAllocation({u.name: QuantSpec.parse(FORMATS[i % 6]) for i, u in enumerate(inventory.units)})


def method_for(model, mixed, **kwargs):
    inventory = find_units(model)
    allocation = mixed(inventory, **kwargs)
    weights = quantize_units(trained_units(model, inventory, allocation))
    return Refine(model, inventory, allocation, weights), weights


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_scale_gradients_are_those_of_scale_times_levels(model, mixed, ids, loss_of, granularity):
    method, _ = method_for(model, mixed, granularity=granularity)
    method.before_forward(model)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {u.name: method.scales[u.name].detach().clone().requires_grad_() for u in method.units}

    def weights():
        found = {}
        for unit in method.units:
            matrix = method.levels[unit.name] * scales[unit.name]
            found[names[id(unit.parameter)]] = matrix.T if unit.kind == "conv1d" else matrix
        return found

    logits = functional_call(model, weights(), (ids[:, :-1],), {"use_cache": False}).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1))
    expected = torch.autograd.grad(loss, list(scales.values()))

    others = [p for p in model.parameters() if id(p) not in {id(u.parameter) for u in method.units}]
    loss_of(model, ids).backward()
    method.after_backward(model)
    for unit, gradient in zip(method.units, expected, strict=True):
        torch.testing.assert_close(method.scales[unit.name].grad, gradient, rtol=1e-4, atol=1e-6)
        assert unit.parameter.grad is None
    assert all(p.grad is not None for p in others)


def test_gradients_of_group_scales_codebooks_and_row_scales(model, ids, loss_of):
    """Against automatic differentiation through ``codebook[codes] * scale`` and expanded group scales."""
    method, weights = method_for(model, formats)
    method.before_forward(model)
    names = {id(p): name for name, p in model.named_parameters()}
    leaves = {("scale", n): p for n, p in method.scales.items()} | {
        ("codebook", n): p for n, p in method.codebooks.items()
    }
    copies = {key: p.detach().clone().requires_grad_() for key, p in leaves.items()}
    assert {key[0] for key in copies} == {"scale", "codebook"}
    replaced = {}
    for unit in method.units:
        rows, cols = unit.matrix.shape
        if unit.spec.is_product:
            matrix = copies["codebook", unit.name][weights[unit.name].codes.long()].reshape(rows, -1)[:, :cols]
        else:
            matrix = torch.tensor(unit.spec.levels)[weights[unit.name].codes.long()]
        if unit.spec.has_scales:
            scale = copies["scale", unit.name]
            if unit.spec.group_size:
                scale = torch.repeat_interleave(scale, unit.spec.group_size, dim=1)[:, :cols]
            matrix = matrix * scale
        torch.testing.assert_close(matrix.detach(), unit.matrix)
        replaced[names[id(unit.parameter)]] = matrix.T if unit.kind == "conv1d" else matrix
    logits = functional_call(model, replaced, (ids[:, :-1],), {"use_cache": False}).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1))
    expected = torch.autograd.grad(loss, list(copies.values()))
    loss_of(model, ids).backward()
    method.after_backward(model)
    for (key, leaf), gradient in zip(leaves.items(), expected, strict=True):
        assert leaf.grad is not None, key
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_forward_pass_sees_what_is_delivered(opt, ids, loss_of):
    method, _ = method_for(opt, formats)
    losses = steps(opt, method, ids, loss_of, 8)
    assert losses[-1] < losses[0]
    method.before_forward(opt)
    seen = {unit.name: unit.matrix.clone() for unit in method.units}
    with method.delivered(opt):
        for unit in method.units:
            assert torch.equal(unit.matrix, seen[unit.name])
            assert torch.equal(unit.matrix, dequantize(method.quantized()[unit.name]))
    state = copy.deepcopy(method.state_dict())
    other, _ = method_for(opt, formats)
    other.load_state_dict(state)
    for name, weight in other.quantized().items():
        expected = method.quantized()[name]
        assert torch.equal(dequantize(weight), dequantize(expected))


def steps(model, method, ids, loss_of, number, rate=1e-2):
    optimizer = torch.optim.AdamW(method.parameters(model), lr=rate)
    losses = []
    for step in range(1, number + 1):
        method.before_forward(model)
        loss = loss_of(model, ids)
        loss.backward()
        method.after_backward(model)
        optimizer.step()
        model.zero_grad()
        assert method.after_step(model, step, number) == {}
        losses.append(float(loss.detach()))
    return losses


def test_codes_never_change_and_the_rest_learns(model, mixed, ids, loss_of, values_of):
    method, weights = method_for(model, mixed)
    codes = {name: w.codes.clone() for name, w in weights.items()}
    before = values_of(model)
    losses = steps(model, method, ids, loss_of, 12)
    assert losses[-1] < 0.9 * losses[0]
    delivered = method.quantized()
    for name, weight in delivered.items():
        assert torch.equal(weight.codes, codes[name])
        assert torch.equal(weight.scales.half().float(), weight.scales)
        assert not torch.equal(weight.scales, weights[name].scales)
    quantized = {id(u.parameter) for u in method.units}
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters() if id(p) not in quantized]
    assert all(moved)
    assert moved
    with method.delivered(model):
        for unit in method.units:
            expected = method.levels[unit.name] * delivered[unit.name].scales.reshape(-1, 1)
            assert torch.equal(unit.matrix, expected)


def test_only_scales_and_unquantized_parameters_are_trained(opt, mixed):
    method, _ = method_for(opt, mixed)
    (group,) = method.parameters(opt)
    trained = {id(p) for p in group["params"]}
    assert len(trained) == len(group["params"])
    assert group["weight_decay"] == 0
    assert {id(s) for s in method.scales.values()} <= trained
    quantized = {id(u.parameter) for u in method.units}
    assert trained == {id(s) for s in method.scales.values()} | {id(p) for p in opt.parameters()} - quantized


def test_scales_never_turn_negative(opt, mixed, ids, loss_of):
    method, _ = method_for(opt, mixed)
    steps(opt, method, ids, loss_of, 3, rate=5.0)
    assert all(bool((s >= 0).all()) for s in method.scales.values())
    assert any(bool((s == 0).any()) for s in method.scales.values())


def test_state_round_trip(opt, mixed, ids, loss_of):
    method, _ = method_for(opt, mixed)
    steps(opt, method, ids, loss_of, 3)
    state = copy.deepcopy(method.state_dict())
    expected = method.quantized()
    other, _ = method_for(opt, mixed)
    other.load_state_dict(state)
    for name, weight in other.quantized().items():
        assert torch.equal(weight.scales, expected[name].scales)
        assert torch.equal(weight.codes, expected[name].codes)


def test_starting_it_changes_nothing_that_is_delivered(opt, mixed):
    method, weights = method_for(opt, mixed)
    for unit in method.units:
        again = method.quantized()[unit.name]
        assert torch.equal(again.codes, weights[unit.name].codes)
        assert torch.equal(again.scales, weights[unit.name].scales)
        assert torch.equal(codes_of(method.levels[unit.name], unit.spec), again.codes)

"""Straight-through training: what the forward pass sees, what the gradient is, what is delivered."""

import copy

import pytest
import torch
from torch.func import functional_call

from mixbits.quant.grid import best_scale, dequantize, nearest_levels
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units, unit_parameters


def method_for(model, mixed, **kwargs):
    inventory = find_units(model)
    return StraightThrough(model, inventory, mixed(inventory, **kwargs))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_the_forward_pass_sees_weights_exactly_on_the_grid(model, mixed, values_of, granularity):
    method, before = method_for(model, mixed, granularity=granularity), values_of(model)
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    method.before_forward(model)
    quantized = {id(unit.parameter) for unit in method.units}
    for unit in method.units:
        scale = method.scales[unit.name]
        assert scale.shape == ((unit.matrix.shape[0], 1) if granularity == "row" else (1, 1))
        table = torch.tensor(unit.spec.levels)
        allowed = table * scale  # (groups, levels)
        matrix = unit.matrix if granularity == "row" else unit.matrix.reshape(1, -1)
        assert bool((matrix.unsqueeze(-1) == allowed.unsqueeze(1)).any(-1).all())
    for name, p in model.named_parameters():
        if id(p) not in quantized:
            assert torch.equal(p, before[name])
    method.after_backward(model)
    for name, p in model.named_parameters():
        assert p.data_ptr() == tensors[name]
        assert torch.equal(p, before[name])


def test_the_gradient_is_that_of_the_quantized_weights(model, mixed, ids, loss_of):
    method, twin = method_for(model, mixed), copy.deepcopy(model)
    method.before_forward(model)
    seen = {unit.name: unit.parameter.detach().clone() for unit in method.units}
    loss = loss_of(model, ids)
    loss.backward()
    method.after_backward(model)
    # The same by hand: a plain model that holds the quantized weights.
    plain = unit_parameters(twin, find_units(twin))
    for name, weight in seen.items():
        plain[name].data = weight
    expected = loss_of(twin, ids)
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_tied_embedding_gets_both_gradients(opt, mixed, ids):
    method = method_for(opt, mixed)
    assert opt.lm_head.weight is opt.model.decoder.embed_tokens.weight
    method.before_forward(opt)
    assert opt.lm_head.weight is opt.model.decoder.embed_tokens.weight
    shown = opt.lm_head.weight.detach().clone()

    def loss(table, head):  # the two uses of the shared weight, apart
        weights = {"model.decoder.embed_tokens.weight": table, "lm_head.weight": head}
        logits = functional_call(opt, weights, (ids[:, :-1],), {"use_cache": False}, tie_weights=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1))

    table, head = shown.clone().requires_grad_(), shown.clone().requires_grad_()
    parts = torch.autograd.grad(loss(table, head), [table, head])
    assert all(float(p.norm()) > 0 for p in parts)
    logits = opt(input_ids=ids[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1)).backward()
    method.after_backward(opt)
    torch.testing.assert_close(opt.lm_head.weight.grad, parts[0] + parts[1], rtol=1e-5, atol=1e-7)


def test_scales_follow_the_weights_by_one_alternating_step(opt, mixed):
    method = method_for(opt, mixed)
    unit = method.units[0]
    with torch.no_grad():
        unit.parameter.mul_(1.5)
    old, weight = method.scales[unit.name].clone(), unit.matrix.clone()
    method.before_forward(opt)
    levels = nearest_levels(weight, old, unit.spec)
    assert torch.equal(method.scales[unit.name], best_scale(weight, levels, unit.spec))
    assert bool((method.scales[unit.name] > old).all())
    method.after_backward(opt)
    for _ in range(50):
        method.before_forward(opt)
        method.after_backward(opt)
    scale = method.scales[unit.name]  # a fixed point: the best scale for its own nearest codes
    torch.testing.assert_close(best_scale(weight, nearest_levels(weight, scale, unit.spec), unit.spec), scale)


def test_delivered_is_quantized(model, mixed, values_of):
    method, before = method_for(model, mixed), values_of(model)
    weights = method.quantized()
    with method.delivered(model):
        for unit in method.units:
            levels = torch.tensor(unit.spec.levels)[weights[unit.name].codes.long()]
            expected = levels * weights[unit.name].scales.reshape(-1, 1)
            assert torch.equal(unit.matrix, expected)
            assert torch.equal(expected, dequantize(weights[unit.name]))
    with pytest.raises(ZeroDivisionError), method.delivered(model):
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_step_that_was_interrupted_loses_nothing(opt, mixed, values_of):
    method, before = method_for(opt, mixed), values_of(opt)
    method.before_forward(opt)  # then the forward pass fails
    method.before_forward(opt)
    method.after_backward(opt)
    method.after_backward(opt)
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())


def test_state_round_trip(opt, mixed):
    method = method_for(opt, mixed)
    state = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        for unit in method.units:
            unit.parameter.mul_(0.7)
    method.before_forward(opt)
    method.after_backward(opt)
    assert not torch.equal(state["scales"][method.units[0].name], method.scales[method.units[0].name])
    method.load_state_dict(state)
    for name, scale in state["scales"].items():
        assert torch.equal(method.scales[name], scale)


def test_a_row_of_zeros_is_no_trouble(opt, mixed, ids, loss_of):
    with torch.no_grad():
        opt.lm_head.weight[0] = 0
    method = method_for(opt, mixed)
    method.before_forward(opt)
    loss = loss_of(opt, ids)
    loss.backward()
    method.after_backward(opt)
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in opt.parameters())
    assert float(method.scales[method.units[0].name][0]) == 0

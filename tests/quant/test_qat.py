"""Straight-through training: what the forward pass sees, what the gradient is, what is delivered."""

import copy

import pytest
import torch
from torch.func import functional_call

from mixbits.errors import SpecError
from mixbits.quant.grid import best_scale, dequantize, nearest_levels
from mixbits.quant.qat import SCALE_SPEED, StraightThrough
from mixbits.quant.units import find_units, unit_parameters
from mixbits.scales import expand_scale, storable_scale
from mixbits.spec import BitAllocation, QuantSpec


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


@pytest.mark.parametrize("granularity", ["row", "tensor", "group"])
def test_learned_scales_have_the_gradient_of_the_quantizer_written_out_for_autograd(granularity):
    """LSQ as one differentiable formula: s * (V + [w/s - V] inside the grid with the value of zero)."""
    torch.manual_seed(0)
    for text in ("1", "1.58", "2", "3", "4"):
        spec = QuantSpec.parse(text + {"row": "", "tensor": "-tensor", "group": "-g4"}[granularity])
        net = torch.nn.Sequential(torch.nn.Linear(10, 6, bias=False))
        method = StraightThrough(net, find_units(net), BitAllocation({"0": spec}), scales="learned")
        method.log_scales["0"].data.sub_(0.3 / SCALE_SPEED)  # so that some weights lie beyond the ends
        x, target = torch.randn(7, 10), torch.randn(7, 6)
        method.before_forward(net)
        (net(x) - target).square().sum().backward()
        method.after_backward(net)

        weight = net[0].weight.detach().clone().requires_grad_()
        log_scale = (SCALE_SPEED * method.log_scales["0"].detach()).requires_grad_()
        scale = expand_scale(log_scale.exp(), 10, spec)
        levels = nearest_levels(weight.detach(), log_scale.detach().exp(), spec)
        top, step = spec.levels[-1], spec.levels[1] - spec.levels[0]
        end = top + step / 2 if spec.bit_width <= 2 else top
        ratio = weight / scale
        inside = (ratio.abs() <= end).float()
        assert 0 < float(inside.mean()) < 1
        projected = scale * (levels + (ratio - ratio.detach()) * inside)
        (x @ projected.T - target).square().sum().backward()
        torch.testing.assert_close(net[0].weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
        damped = log_scale.grad * (log_scale.numel() / weight.numel()) ** 0.5
        torch.testing.assert_close(method.log_scales["0"].grad, damped, rtol=1e-4, atol=1e-4)


def test_learned_scales_are_trained_and_delivered(opt, mixed, ids, loss_of):
    inventory = find_units(opt)
    method = StraightThrough(opt, inventory, mixed(inventory), scales="learned", scale_learning_rate=0.5)
    (group,) = method.extra_parameters(opt)
    assert (group["lr"] * SCALE_SPEED, group["weight_decay"], len(group["params"])) == (0.5, 0.0, len(method.units))
    optimizer = torch.optim.SGD([{k: v for k, v in group.items() if k != "weight_decay"}], lr=0.1)
    before = {name: scale.clone() for name, scale in method.scales.items()}
    method.before_forward(opt)
    first = loss_of(opt, ids)
    first.backward()
    method.after_backward(opt)
    optimizer.step()
    method.after_step(opt, 1, 10)
    assert any(not torch.equal(before[name], scale) for name, scale in method.scales.items())
    assert all(p.grad is None for p in method.log_scales.values())
    method.before_forward(opt)
    assert float(loss_of(opt, ids).detach()) < float(first.detach())  # the weights themselves were not touched
    method.after_backward(opt)
    weights = method.quantized()
    for unit in method.units:
        stored = storable_scale((SCALE_SPEED * method.log_scales[unit.name].detach()).exp(), unit.spec)
        assert torch.equal(weights[unit.name].scales, stored.flatten())
    other = StraightThrough(opt, inventory, mixed(inventory), scales="learned")
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert all(torch.equal(other.quantized()[n].codes, w.codes) for n, w in weights.items())
    assert all(torch.equal(other.log_scales[n], p) for n, p in method.log_scales.items())  # to the bit


def test_learned_scales_move_faster_than_weights(opt, mixed):
    """A step of Adam changes a scale by 32 times the learning rate, relative; a rate of its own is that of the logarithm."""
    inventory = find_units(opt)
    for rate, change in ((None, SCALE_SPEED * 1e-3), (0.05, 0.05)):
        method = StraightThrough(opt, inventory, mixed(inventory), scales="learned", scale_learning_rate=rate)
        optimizer = torch.optim.Adam(method.extra_parameters(opt), lr=1e-3)
        before = {name: scale.clone() for name, scale in method.scales.items()}
        for log_scale in method.log_scales.values():
            log_scale.grad = -torch.ones_like(log_scale)
        optimizer.step()
        method.after_step(opt, 1, 10)
        for name, scale in method.scales.items():
            torch.testing.assert_close(
                (scale / before[name]).log(), torch.full_like(scale, change), rtol=1e-4, atol=1e-6
            )


def test_fixed_scales_stay(opt, mixed):
    inventory = find_units(opt)
    method = StraightThrough(opt, inventory, mixed(inventory), scales="fixed")
    before = {name: scale.clone() for name, scale in method.scales.items()}
    with torch.no_grad():
        for unit in method.units:
            unit.parameter.mul_(1.7)
    method.before_forward(opt)
    method.after_backward(opt)
    assert all(torch.equal(before[name], scale) for name, scale in method.scales.items())
    assert method.extra_parameters(opt) == []


def test_an_unknown_rule_is_refused(opt, mixed):
    with pytest.raises(SpecError, match="expected 'follow', 'fixed' or 'learned'"):
        StraightThrough(opt, find_units(opt), mixed(find_units(opt)), scales="lsq")


def test_a_product_unit_follows_its_weights(opt, ids, loss_of):
    inventory = find_units(opt)
    specs = {
        u.name: QuantSpec.parse("0.5-product-v16" if u.kind == "embedding" and u.tied else "4") for u in inventory.units
    }
    method = StraightThrough(opt, inventory, BitAllocation(specs), scales="learned")
    (unit,) = [u for u in method.units if u.spec.is_product]
    before = unit.matrix.clone()
    with torch.no_grad():
        unit.parameter.mul_(1.5)
    method.before_forward(opt)
    shown = unit.matrix.clone()
    error = (shown - 1.5 * before).square().sum()
    method.after_backward(opt)
    assert torch.equal(unit.matrix, 1.5 * before)
    assert float(error) <= float((1.5 * before - before).square().sum())  # one step has followed the change
    weights = method.quantized()[unit.name]
    assert weights.codebook is not None
    state = copy.deepcopy(method.state_dict())
    other = StraightThrough(opt, inventory, BitAllocation(specs), scales="learned")
    other.codebooks[unit.name].zero_()
    other.load_state_dict(state)
    assert torch.equal(other.quantized()[unit.name].codes, weights.codes)
    with method.delivered(opt):
        assert torch.equal(unit.matrix, dequantize(weights))

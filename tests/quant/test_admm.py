"""ADMM: gradients of the written-out Lagrangian, a problem with a known answer, duals, residuals, final projection."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.lm.corpus import TokenStream
from mixbits.lm.train import TrainSettings, train_model
from mixbits.quant.admm import Admm
from mixbits.quant.admm_gamma import Residuals, balanced_gamma
from mixbits.quant.grid import best_scale, dequantize, nearest_levels, project
from mixbits.quant.method import copy_into
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.scales import expand_scale
from mixbits.spec import BitAllocation, QuantSpec

VOCABULARY = 53


def method_for(model, mixed, **kwargs):
    inventory = find_units(model)
    return Admm(model, inventory, mixed(inventory), **kwargs)


def test_the_gradient_is_that_of_the_augmented_lagrangian(model, mixed, ids, loss_of):
    method = method_for(model, mixed, solver="adamw", gamma=0.3, gamma_final=0.3)
    generator = torch.Generator().manual_seed(2)
    for dual in method.duals.values():
        dual.normal_(0, 0.01, generator=generator)
    twin = copy.deepcopy(model)
    method.before_forward(model)
    loss_of(model, ids).backward()
    method.after_backward(model)

    units = Admm(twin, find_units(twin), mixed(find_units(twin))).units
    lagrangian = loss_of(twin, ids)
    for unit in units:
        weight = unit.parameter.T if unit.kind == "conv1d" else unit.parameter
        dual = method.duals[unit.name]
        penalty = (weight - method.targets[unit.name] + dual).square().sum() - dual.square().sum()
        lagrangian = lagrangian + 0.5 * method.gamma * penalty
    lagrangian.backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-5, atol=1e-7, msg=name)


class Quadratic(nn.Module):
    """Minimise 1/2 ||W - A||^2: under W = alpha V the answer is the projection of A itself."""

    def __init__(self, rows=6, cols=40):
        super().__init__()
        self.layer = nn.Linear(cols, rows, bias=False)
        self.goal = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))

    def loss(self):
        return 0.5 * (self.layer.weight - self.goal).square().sum()


@pytest.mark.parametrize("width", [1, 1.58, 2, 4])
def test_a_convex_problem_reaches_its_known_solution(width):
    problem, spec = Quadratic(), QuantSpec(width)
    torch.nn.init.normal_(problem.layer.weight, 0, 0.3, generator=torch.Generator().manual_seed(4))
    inventory = find_units(problem)
    allocation = BitAllocation.uniform(inventory, spec)
    steps = 600
    method = Admm(problem, inventory, allocation, solver="adamw", gamma=0.05, gamma_final=20.0, num_updates=60)
    figures = []
    for step in range(1, steps + 1):
        problem.zero_grad()
        problem.loss().backward()
        method.after_backward(problem)
        with torch.no_grad():  # plain gradient descent; the Lagrangian's curvature is 1 + gamma
            problem.layer.weight.sub_(problem.layer.weight.grad / (1 + method.gamma))
        figures.append(method.after_step(problem, step, steps))
    logged = [f for f in figures if f]
    assert len(logged) == 60
    assert logged[-1]["admm_primal"] < 1e-3 < logged[0]["admm_primal"]
    assert all(set(f) == {"admm_primal", "admm_dual", "admm_gamma"} for f in logged)
    levels, scale = project(problem.goal, spec)
    best = float((levels * scale - problem.goal).square().sum())
    found = dequantize(method.quantized()["layer"])
    reached = float((found - problem.goal).square().sum())
    # At 1 bit the projection is unique; else ADMM may stop in a neighbouring local minimum of the same non-convex set.
    assert reached <= best * (1 + 1e-3) if width == 1 else reached <= best * 1.05


def test_updates_follow_the_three_steps(opt, mixed):
    method = method_for(opt, mixed, solver="adamw", gamma=1e-2, gamma_final=1.0, num_updates=4)
    with torch.no_grad():
        for unit in method.units:
            unit.parameter.add_(0.01 * torch.randn(unit.parameter.shape, generator=torch.Generator().manual_seed(5)))
            method.duals[unit.name].normal_(0, 0.001, generator=torch.Generator().manual_seed(6))
    duals = {n: d.clone() for n, d in method.duals.items()}
    old_targets = {n: t.clone() for n, t in method.targets.items()}
    assert method.after_step(opt, 1, 8) == {}
    figures = method.after_step(opt, 2, 8)
    gamma = 1e-2 * 100 ** (1 / 4)
    assert method.gamma == pytest.approx(gamma)
    primal = dual = norm = 0.0
    for unit in method.units:
        target = method.targets[unit.name]
        unscaled = duals[unit.name] + unit.matrix - target
        # the multiplier gamma * lambda does not jump when gamma does
        torch.testing.assert_close(method.gamma * method.duals[unit.name], 1e-2 * unscaled, rtol=1e-5, atol=1e-9)
        primal += float((unit.matrix - target).square().sum())
        dual += float((target - old_targets[unit.name]).square().sum())
        norm += float(unit.matrix.square().sum())
    assert figures["admm_primal"] == pytest.approx(math.sqrt(primal / norm), rel=1e-4)
    assert figures["admm_dual"] == pytest.approx(1e-2 * math.sqrt(dual / norm), rel=1e-4)
    assert figures["admm_gamma"] == 1e-2
    for step in range(3, 9):
        method.after_step(opt, step, 8)
    assert method.gamma == pytest.approx(1.0)


@pytest.mark.parametrize(("num_updates", "num_steps", "expected"), [(40, 7, 7), (5, 7, 5), (1, 3, 1), (40, 400, 40)])
def test_the_number_of_updates(opt, mixed, num_updates, num_steps, expected):
    method = method_for(opt, mixed, solver="adamw", num_updates=num_updates, gamma_final=2.0)
    assert sum(bool(method.after_step(opt, s, num_steps)) for s in range(1, num_steps + 1)) == expected
    assert method.gamma == pytest.approx(2.0)


def test_with_a_lagrangian_solver_the_forward_pass_sees_the_weights_themselves(opt, mixed, values_of):
    before = values_of(opt)
    method_for(opt, mixed, solver="adamw").before_forward(opt)
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())


@pytest.mark.parametrize("solver", ["projected", "adamw"])
def test_the_final_projection_is_exact(model, mixed, solver):
    method = method_for(model, mixed, solver=solver)
    for unit in method.units:
        weight = method.quantized()[unit.name]
        assert torch.equal(weight.scales.half().float(), weight.scales)
        levels = torch.tensor(unit.spec.levels)
        ratio = unit.matrix.unsqueeze(-1) - (levels * weight.scales.reshape(-1, 1)).unsqueeze(1)
        distance = (unit.matrix - dequantize(weight)).abs()
        torch.testing.assert_close(distance, ratio.abs().amin(-1), rtol=1e-5, atol=1e-7)
    with method.delivered(model):
        for unit in method.units:
            assert bool(torch.isfinite(unit.matrix).all())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0.0}, "0 < gamma"),
        ({"gamma": -1.0}, "0 < gamma"),
        ({"gamma": 2.0, "gamma_final": 1.0}, "0 < gamma <= gamma_final"),
        ({"num_updates": 0}, "num_updates >= 1"),
        ({"gamma": float("nan")}, "0 < gamma"),
        ({"gamma_final": float("nan")}, "gamma_final"),
        ({"gamma_final": float("inf")}, "gamma_final"),
        ({"lookahead_rate": 0.0}, "lookahead_rate and descent_rate above 0"),
        ({"descent_rate": float("nan")}, "lookahead_rate and descent_rate above 0"),
        ({"primal_tolerance": -1.0}, "tolerances >= 0"),
        ({"patience": 0}, "patience >= 1"),
        ({"finish_straight_through": 1.0}, r"finish_straight_through in \[0, 1\)"),
        ({"dual_step": -0.1}, r"dual_step in \[0, 2\]"),
        ({"solver": "sgd"}, "has the solvers projected, adamw, extragradient, extragradient-adamw"),
        ({"gamma_rule": "linear"}, "gamma rules constant, geometric, residual"),
    ],
)
def test_wrong_settings_are_rejected(opt, mixed, wrong, message):
    with pytest.raises(SpecError, match=message):
        method_for(opt, mixed, **wrong)


def test_product_units_are_rejected(opt):
    inventory = find_units(opt)
    with pytest.raises(SpecError, match="ADMM needs a grid of levels, and a product unit has none"):
        Admm(opt, inventory, BitAllocation.uniform(inventory, QuantSpec.parse("0.5")))


class Scalar(nn.Module):
    """1/2 ||W - A||^2 with a bias, small enough to follow by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.6]]))
            self.layer.bias.fill_(0.25)

    def loss(self):
        return 0.5 * (self.layer.weight - 1.0).square().sum() + 0.5 * self.layer.bias.square().sum()


def scalar_method(problem, solver, **options):
    inventory = find_units(problem)
    method = Admm(problem, inventory, BitAllocation.uniform(inventory, QuantSpec(1)), solver=solver, **options)
    method.duals["layer"].copy_(torch.tensor([[0.1, 0.0, -0.1], [0.2, 0.0, 0.0]]))
    return method


@pytest.mark.parametrize("solver", ["extragradient", "extragradient-adamw"])
def test_extragradient_against_a_computation_by_hand(solver):
    problem = Scalar()
    rates = {"lookahead_rate": 0.1, "descent_rate": 0.02}
    method = scalar_method(problem, solver, gamma=2.0, gamma_final=2.0, **rates)
    weight, bias = problem.layer.weight.detach().clone(), problem.layer.bias.detach().clone()
    # alpha is a row's mean absolute value: 0.8 / 3 and 1.3 / 3
    target = torch.tensor([[0.8, -0.8, 0.8], [-1.3, 1.3, 1.3]]) / 3
    torch.testing.assert_close(method.targets["layer"], target)

    def gradient(w):
        return (w - 1.0) + 2.0 * (w - target + method.duals["layer"])

    ahead, bias_ahead = weight - 0.1 * gradient(weight), bias - 0.1 * bias
    method.before_forward(problem)
    problem.loss().backward()
    method.after_backward(problem)
    assert method.second_gradient(problem)
    torch.testing.assert_close(problem.layer.weight.detach(), ahead)
    torch.testing.assert_close(problem.layer.bias.detach(), bias_ahead)
    assert problem.layer.weight.grad is None
    problem.loss().backward()
    method.after_backward(problem)
    if solver == "extragradient":
        torch.testing.assert_close(problem.layer.weight.detach(), weight - 0.02 * gradient(ahead))
        torch.testing.assert_close(problem.layer.bias.detach(), bias - 0.02 * bias_ahead)
        assert all(p.grad is None for p in problem.parameters())
    else:
        assert torch.equal(problem.layer.weight, weight)
        assert torch.equal(problem.layer.bias, bias)
        torch.testing.assert_close(problem.layer.weight.grad, gradient(ahead))
        torch.testing.assert_close(problem.layer.bias.grad, bias_ahead)


def test_an_interrupted_lookahead_is_put_back():
    problem = Scalar()
    method = scalar_method(problem, "extragradient")
    before = problem.layer.weight.detach().clone()
    problem.loss().backward()
    method.after_backward(problem)
    method.second_gradient(problem)
    assert not torch.equal(problem.layer.weight, before)
    method.before_forward(problem)
    assert torch.equal(problem.layer.weight, before)


@pytest.mark.parametrize("solver", ["projected", "adamw"])
def test_other_solvers_want_no_second_gradient(opt, mixed, solver):
    assert not method_for(opt, mixed, solver=solver).second_gradient(opt)


@pytest.mark.parametrize("width", [1, 1.58, 2])
def test_projected_reaches_the_projection_of_the_known_solution(width):
    """With gradient steps as long as the pull, a code is stationary exactly if it is A's own nearest one."""
    problem, spec = Quadratic(), QuantSpec(width)
    torch.nn.init.normal_(problem.layer.weight, 0, 0.3, generator=torch.Generator().manual_seed(4))
    inventory = find_units(problem)
    steps, gamma = 400, 20.0
    method = Admm(problem, inventory, BitAllocation.uniform(inventory, spec), gamma=gamma, gamma_final=gamma)
    share = 1 - math.exp(-gamma / steps)
    for step in range(1, steps + 1):
        problem.zero_grad()
        method.before_forward(problem)
        problem.loss().backward()
        method.after_backward(problem)
        with torch.no_grad():
            problem.layer.weight.sub_(share * problem.layer.weight.grad)
        method.after_step(problem, step, steps)
    levels, scale = project(problem.goal, spec)
    best = float((levels * scale - problem.goal).square().sum())
    reached = float((dequantize(method.quantized()["layer"]) - problem.goal).square().sum())
    # W + lambda settles a share of the way from A to its code, so codes of weights next to a cell's end may still differ.
    assert reached <= best * 1.02


def test_a_projected_step_by_hand(opt, mixed, loss_of, ids):
    method = method_for(opt, mixed, gamma=1.5, gamma_final=1.5)
    generator = torch.Generator().manual_seed(7)
    for dual in method.duals.values():
        dual.normal_(0, 0.01, generator=generator)
    before = {
        u.name: (u.matrix.clone(), method.targets[u.name].clone(), method.duals[u.name].clone()) for u in method.units
    }
    scales = {n: s.clone() for n, s in method.scales.items()}
    method.before_forward(opt)
    assert all(torch.equal(u.matrix, before[u.name][1]) for u in method.units)
    loss_of(opt, ids).backward()
    seen = {u.name: u.gradient().clone() for u in method.units}
    method.after_backward(opt)
    assert all(torch.equal(u.matrix, before[u.name][0]) for u in method.units)
    assert all(torch.equal(u.gradient(), seen[u.name]) for u in method.units)
    method.after_step(opt, 1, 100)
    share = 1 - math.exp(-1.5 / 100)
    for unit in method.units:
        weight, target, dual = before[unit.name]
        pulled = (1 - share) * weight + share * (target - dual)
        torch.testing.assert_close(unit.matrix, pulled, rtol=1e-5, atol=1e-7)
        point = unit.matrix + dual
        levels = nearest_levels(point, scales[unit.name], unit.spec)
        new = levels * best_scale(point, levels, unit.spec)
        torch.testing.assert_close(method.targets[unit.name], new, rtol=1e-5, atol=1e-7)
        expected = dual + share * (unit.matrix - new)
        torch.testing.assert_close(method.duals[unit.name], expected, rtol=1e-5, atol=1e-7)


def test_without_duals(opt, mixed, run_steps):
    method = method_for(opt, mixed, dual_step=0.0)
    run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=1, last=4, num_steps=8)
    assert all(not bool(dual.any()) for dual in method.duals.values())


@pytest.mark.parametrize("granularity", [{"granularity": "tensor"}, {"granularity": "group", "group_size": 5}])
@pytest.mark.parametrize("solver", ["projected", "adamw"])
def test_other_granularities(opt, run_steps, granularity, solver):
    inventory = find_units(opt)
    spec = QuantSpec(2, **granularity)
    method = Admm(opt, inventory, BitAllocation.uniform(inventory, spec), solver=solver)
    run_steps(opt, method, torch.optim.AdamW(opt.parameters(), lr=1e-2), first=1, last=10, num_steps=10)
    assert sum(unit.spec == spec for unit in method.units) >= 7
    for unit in method.units:
        assert method.scales[unit.name].shape == project(unit.matrix, unit.spec)[1].shape
        levels = method.targets[unit.name] / expand_scale(method.scales[unit.name], unit.matrix.shape[1], unit.spec)
        distance = (levels.unsqueeze(-1) - torch.tensor(unit.spec.levels)).abs().amin(-1)
        assert float(distance.max()) < 1e-4


def test_residual_balancing():
    near = pytest.approx
    assert balanced_gamma(0.5, Residuals(primal=1.1, dual=0.1), start=0.5) == near(1.0)
    assert balanced_gamma(0.5, Residuals(primal=0.1, dual=1.1), start=0.5) == near(0.25)
    assert balanced_gamma(0.5, Residuals(primal=0.9, dual=0.1), start=0.5) == near(0.5)
    assert balanced_gamma(512.0, Residuals(primal=1.0, dual=0.0), start=0.5) == near(512.0)
    assert balanced_gamma(0.5 / 1024, Residuals(primal=0.0, dual=1.0), start=0.5) == near(0.5 / 1024)
    residuals = Residuals.of(gap=4.0, change=9.0, norm=16.0, gamma=0.1)
    assert (residuals.primal, residuals.dual) == (near(0.5), near(0.075))


def test_balancing_keeps_the_multiplier(opt, mixed):
    method = method_for(opt, mixed, solver="adamw", gamma=0.25, gamma_rule="residual", num_updates=10)
    twin = method_for(opt, mixed, solver="adamw", gamma=0.25, gamma_rule="constant", num_updates=10)
    with torch.no_grad():
        for unit in method.units:
            unit.parameter.add_(0.001 * torch.randn(unit.parameter.shape, generator=torch.Generator().manual_seed(8)))
    figures, plain = method.after_step(opt, 1, 10), twin.after_step(opt, 1, 10)
    assert figures == plain
    assert figures["admm_primal"] > 10 * figures["admm_dual"]  # the targets hardly moved
    assert (method.gamma, twin.gamma) == (0.5, 0.25)
    for name, dual in method.duals.items():
        torch.testing.assert_close(method.gamma * dual, twin.gamma * twin.duals[name])


def test_it_asks_to_stop_after_patience_small_residuals(opt, mixed, run_steps):
    options = {"solver": "adamw", "num_updates": 8, "primal_tolerance": 10.0, "dual_tolerance": 10.0, "patience": 3}
    method, asked = method_for(opt, mixed, **options), []
    for step in range(1, 9):
        method.after_step(opt, step, 8)
        asked.append(method.should_stop())
    assert asked == [False, False, True, True, True, True, True, True]
    other = method_for(opt, mixed, **options)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert other.should_stop()
    with torch.no_grad():  # far off the grid again: the count starts anew
        for unit in method.units:
            unit.parameter.normal_(0, 1, generator=torch.Generator().manual_seed(9))
    method._tolerances = (1e-9, 1e-9)
    method.after_step(opt, 8, 8)
    assert not method.should_stop()


def test_without_tolerances_it_never_stops(opt, mixed):
    method = method_for(opt, mixed)
    for step in range(1, 9):
        method.after_step(opt, step, 8)
        assert not method.should_stop()


@pytest.mark.parametrize("solver", ["projected", "adamw", "extragradient-adamw"])
def test_finishing_is_straight_through(opt, mixed, values_of, run_steps, solver):
    inventory = find_units(opt)
    method = Admm(opt, inventory, mixed(inventory), solver=solver, finish_straight_through=0.5)
    run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=1, last=4, num_steps=8)
    assert method.finishing
    assert all(not bool(dual.any()) for dual in method.duals.values())
    start, scales = values_of(opt), {n: s.clone() for n, s in method.scales.items()}
    assert run_steps(opt, method, torch.optim.SGD(opt.parameters(), lr=0.1), first=5, last=8, num_steps=8) == [{}] * 4
    reached, weights = values_of(opt), method.quantized()
    with torch.no_grad():
        for name, p in opt.named_parameters():
            p.copy_(start[name])
    plain = StraightThrough(opt, inventory, mixed(inventory))
    copy_into(plain.scales, scales)
    run_steps(opt, plain, torch.optim.SGD(opt.parameters(), lr=0.1), first=5, last=8, num_steps=8)
    assert all(torch.equal(p, reached[name]) for name, p in opt.named_parameters())
    assert all(torch.equal(w.codes, weights[n].codes) for n, w in plain.quantized().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finish_straight_through": 0.4},
        {"solver": "adamw", "num_updates": 4, "finish_straight_through": 0.7},
        {"solver": "adamw", "gamma_rule": "residual", "num_updates": 6},
        {"solver": "extragradient"},
        {"solver": "extragradient-adamw", "primal_tolerance": 10.0, "dual_tolerance": 10.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_resuming_is_bit_identical(resumes, mixed, options):
    resumes(lambda model: method_for(model, mixed, **options))


@pytest.mark.parametrize("solver", ["extragradient-adamw", "adamw"])
def test_the_trainer_takes_the_second_gradient_and_stops_when_asked(opt, mixed, tmp_path, solver):
    class Counting(Admm):
        calls, seconds = 0, 0

        def after_backward(self, model):
            self.calls += 1
            super().after_backward(model)

        def second_gradient(self, model):
            asked = super().second_gradient(model)
            self.seconds += asked
            return asked

    inventory = find_units(opt)
    tolerances = {"primal_tolerance": 10.0, "dual_tolerance": 10.0, "patience": 2}
    method = Counting(opt, inventory, mixed(inventory), solver=solver, num_updates=10, **tolerances)
    ids = torch.randint(3, VOCABULARY, (16 * 40 + 1,), generator=torch.Generator().manual_seed(1)).int().numpy()
    stream = TokenStream(ids, np.zeros(len(ids) - 1, np.int32), len(ids) - 1, 0, "0")
    settings = TrainSettings(epochs=2, batch_size=4, context=16, precision="float32", learning_rate=1e-3)
    found = train_model(opt, stream, stream, settings, tmp_path, method=method, show_progress=False)
    assert found["steps"] == 4  # two updates, each of the ten every two of twenty steps
    extra = 4 if solver == "extragradient-adamw" else 0
    assert (method.calls, method.seconds) == (4 + extra, extra)
    again = train_model(opt, stream, stream, settings, tmp_path, method=method, show_progress=False, resume=True)
    assert again["steps"] == 4
    assert again["valid_nats"] == found["valid_nats"]


def test_before_it_has_converged_the_weights_themselves_are_delivered_with_their_best_scales(opt, mixed):
    method = method_for(opt, mixed, solver="adamw", gamma=1e-3, num_updates=30)
    for step in range(1, 31):  # the weights never move, so the duals run away and the scales with them
        method.after_step(opt, step, 30)
    for unit in method.units:
        levels, scale = project(unit.matrix, unit.spec)
        best = float((levels * expand_scale(scale, unit.matrix.shape[1], unit.spec) - unit.matrix).square().sum())
        reached = float((dequantize(method.quantized()[unit.name]) - unit.matrix).square().sum())
        assert reached <= best * 1.01  # scales are stored in float16

"""Search of precisions: gradients against autograd, the two modes against each other, budget, resuming, bad input."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.quant.allocate import allocate
from mixbits.quant.groups import group_units
from mixbits.quant.search import Preferences, one_best, to_sensitivities
from mixbits.quant.search_size import ExpectedSize, LagrangePenalty, PapersPenalty
from mixbits.quant.sensitivity import Sensitivities
from mixbits.quant.supernet import SuperNet
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import HEADER_MULTIPLE, BitAllocation, QuantSpec, parse_specs, predicted_bytes

CANDIDATES = parse_specs(["1", "1.58", "2", "4"])


def uniform_bytes(inventory, spec):
    return predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(spec)))


def supernet(model, *, candidates=CANDIDATES, **options):
    inventory = find_units(model)
    options.setdefault("max_bytes", uniform_bytes(inventory, 2))
    return SuperNet(model, inventory, candidates, **options)


def randomize(method, seed=5):
    generator = torch.Generator().manual_seed(seed)
    method.weights.data.copy_(torch.randn(method.weights.shape, generator=generator))


class Line(nn.Module):
    """Three linear maps, with something not linear between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(32, 6, generator=generator), torch.randint(0, 5, (32,), generator=generator)


def loss_of_line(model, data):
    return F.cross_entropy(model(data[0]), data[1])


def step(method, model, loss):
    """before_forward, loss, backward, after_backward; returns the loss."""
    model.zero_grad()
    method.before_forward(model)
    value = loss(model)
    value.backward()
    method.after_backward(model)
    return float(value.detach())


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
@pytest.mark.parametrize("mode", ["weights", "outputs"])
def test_gradients_are_those_of_autograd(line, data, mode, relaxation):
    method = supernet(line, mode=mode, relaxation=relaxation)
    randomize(method)
    value = step(method, line, lambda m: loss_of_line(m, data))
    names = [u.name for u in method.inventory.units]
    projected = {n: torch.stack([method.units[n].value(i) for i in range(4)]) for n in names}
    straight = {n: line.get_submodule(n).weight.detach().clone().requires_grad_() for n in names}
    a = method.weights.detach().clone().requires_grad_()
    p = torch.softmax((a + method._noise) / method.temperature, -1)
    weights = {}
    for k, n in enumerate(names):  # straight through: the projections move with the weight
        q = straight[n] + (projected[n] - straight[n]).detach()
        weights[f"{n}.weight"] = torch.einsum("n,nrc->rc", p[k], q)
    expected = F.cross_entropy(functional_call(line, weights, (data[0],)), data[1])
    gradients = torch.autograd.grad(expected, [a, *straight.values()])
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    for n, gradient in zip(names, gradients[1:], strict=True):
        torch.testing.assert_close(line.get_submodule(n).weight.grad, gradient, rtol=1e-4, atol=1e-6)
    chained = torch.autograd.grad((method.mixed_probabilities() * method._gradient).sum(), [method.weights])[0]
    torch.testing.assert_close(chained, gradients[0], rtol=1e-4, atol=1e-6)
    assert (float(method._noise.abs().sum()) > 0) == (relaxation == "gumbel")


def test_modes_agree_when_each_sublayer_is_one_matrix(model, ids, loss_of):
    """On every family: embedding and output layer included."""
    found = []
    for mode in ("weights", "outputs"):
        twin = copy.deepcopy(model)
        method = supernet(twin, mode=mode, max_bytes=uniform_bytes(find_units(twin), 2))
        randomize(method)
        loss = step(method, twin, lambda m: loss_of(m, ids))
        chained = (
            method.mixed_probabilities() * method._gradient
        ).sum()  # a bias adds the same to all candidates of d loss / d p
        chained = torch.autograd.grad(chained, [method.weights])[0]
        found.append((loss, chained, {n: p.grad for n, p in twin.named_parameters()}))
    (loss, by_weights, grads), (other_loss, by_outputs, other_grads) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    torch.testing.assert_close(by_weights, by_outputs, rtol=1e-3, atol=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(other_grads[name], gradient, rtol=1e-3, atol=1e-6)


def test_whole_sublayers_are_run_once_a_candidate_and_their_outputs_mixed(opt, ids, loss_of):
    """OPT: attention is a module, the feed-forward block is a chain of two matrices. Oracle: hooks, one plain copy a candidate."""
    inventory = find_units(opt)
    method = supernet(opt, mode="outputs", groups=group_units(inventory, "sublayer"))
    randomize(method)
    assert [len(group) for group in method.groups if "layers" in group[0]] == [4, 2]
    modules = dict(opt.named_modules())
    value = step(method, opt, lambda m: loss_of(m, ids))
    assert dict(opt.named_modules()) == modules
    p, matrices = method.probabilities().detach(), unit_matrices(opt, inventory)
    copies = []
    for i, _spec in enumerate(method.candidates):
        twin = copy.deepcopy(opt)
        for name in matrices:
            twin.get_submodule(name).weight.data = method.units[name].value(i).clone()
        copies.append(twin)
    index = {group: k for k, group in enumerate(method.groups)}
    share, oracle = {}, copy.deepcopy(opt)
    for group, k in index.items():
        share["attn" if "self_attn" in group[0] else "ff"] = p[k]
        if "layers" not in group[0]:  # embeddings
            parts = (w * c.get_submodule(group[0]).weight.data for w, c in zip(p[k], copies, strict=True))
            oracle.get_submodule(group[0]).weight.data = sum(parts)
    layer = oracle.model.decoder.layers[0]
    twins = [c.model.decoder.layers[0] for c in copies]

    def attention(module, args, kwargs, output):
        mixed = sum(w * t.self_attn(*args, **kwargs)[0] for w, t in zip(share["attn"], twins, strict=True))
        return (mixed, *output[1:])

    def feed_forward(module, args, output):
        inputs = seen.pop()
        parts = (t.fc2(t.activation_fn(t.fc1(inputs))) for t in twins)
        return sum(w * part for w, part in zip(share["ff"], parts, strict=True))

    seen = []
    layer.self_attn.register_forward_hook(attention, with_kwargs=True)
    layer.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.fc2.register_forward_hook(feed_forward)
    assert value == pytest.approx(float(loss_of(oracle, ids).detach()), rel=1e-5)


def test_probability_gradient_of_mixed_sublayers_by_finite_differences(opt, ids, loss_of):
    opt.double()
    method = supernet(opt, mode="outputs", groups=group_units(find_units(opt), "sublayer"))
    method.weights = nn.Parameter(torch.zeros(method.weights.shape, dtype=torch.float64))
    randomize(method)
    step(method, opt, lambda m: loss_of(m, ids))
    gradient = torch.autograd.grad((method.mixed_probabilities() * method._gradient).sum(), [method.weights])[0]

    def value(k, n, move):
        method.weights.data[k, n] += move
        method.before_forward(opt)
        with torch.no_grad():
            found = float(loss_of(opt, ids))
        method._put_back()
        method.weights.data[k, n] -= move
        return found

    for k, n in itertools.product(range(len(method.groups)), (0, 3)):
        slope = (value(k, n, 1e-4) - value(k, n, -1e-4)) / 2e-4
        assert float(gradient[k, n]) == pytest.approx(slope, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("mode", ["weights", "outputs"])
def test_weights_and_modules_are_put_back(opt, ids, loss_of, values_of, mode):
    before, modules = values_of(opt), list(opt.named_modules())
    method = supernet(opt, mode=mode, groups=group_units(find_units(opt), "sublayer"))
    method.before_forward(opt)  # the forward pass fails here
    step(method, opt, lambda m: loss_of(m, ids))
    assert list(opt.named_modules()) == modules
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())


def test_expected_bytes_are_those_of_the_files(model):
    """Certain choices have the very file sizes, up to the header's multiples; a mixture lies between."""
    inventory = find_units(model)
    groups = tuple((u.name,) for u in inventory.units)
    size = ExpectedSize.of(inventory, groups, CANDIDATES)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        choice = torch.randint(0, 4, (len(groups),), generator=generator)
        allocation = BitAllocation({g[0]: CANDIDATES[int(i)] for g, i in zip(groups, choice, strict=True)})
        over = size.expected(F.one_hot(choice, 4)) - predicted_bytes(inventory, allocation)
        assert 0 <= over <= 4 * HEADER_MULTIPLE
    drawn = torch.rand(len(groups), 4, generator=generator).softmax(-1)
    by_hand = sum(
        float(drawn[k, n]) * CANDIDATES[n].unit_bytes(u.rows, u.cols)
        for k, u in enumerate(inventory.units)
        for n in range(4)
    )
    assert size.expected(drawn) - size.fixed_bytes == pytest.approx(by_hand, rel=1e-6)


def test_the_penalty_is_the_gradient_of_the_augmented_lagrangian():
    inventory = find_units(Line())
    groups = tuple((u.name,) for u in inventory.units)
    size = ExpectedSize.of(inventory, groups, CANDIDATES)
    budget = uniform_bytes(inventory, 1.58)
    penalty = LagrangePenalty(size, budget, rate=0.1, damping=2.0)
    penalty.multiplier = 0.3
    p = torch.rand(3, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    violation = (size.fixed_bytes + (p * size.group_bytes).sum() - budget) / budget
    term = torch.relu(penalty.multiplier + 2.0 * violation).square() / (2 * 2.0)
    torch.testing.assert_close(penalty.gradient(p.detach()), torch.autograd.grad(term, p)[0])
    smallest = F.one_hot(torch.zeros(3, dtype=torch.long), 4).double()
    penalty.multiplier = 1e-4
    penalty.update(smallest)  # far below the budget: the multiplier stops at zero
    assert penalty.multiplier == 0.0
    assert float(penalty.gradient(smallest).abs().sum()) == 0.0
    papers = PapersPenalty(CANDIDATES, beta=0.5)
    torch.testing.assert_close(papers.gradient(p)[1], 0.5 * torch.tensor([1, 1.58, 2, 4], dtype=torch.float64).sqrt())


def test_the_multiplier_meets_the_budget_where_calculus_says():
    """One group, two candidates, squared error: p follows from the budget, the multiplier from the loss's slope there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False))
    inventory = find_units(model)
    two = parse_specs(["1", "4"])
    low, high = (uniform_bytes(inventory, s) for s in (1, 4))
    budget = round(low + 0.4 * (high - low))
    target = model[0].weight.detach().clone()

    def held_out(m, index):
        return 0.5 * (m[0].weight - target).square().sum()

    method = SuperNet(
        model,
        inventory,
        two,
        max_bytes=budget,
        held_out_loss=held_out,
        arch_every=1,
        arch_learning_rate=0.05,
        multiplier_rate=1.0,
    )
    for i in range(1, 501):
        method.after_step(model, i, 10**9)
    p = method.probabilities().detach().double()
    assert method.size.expected(p) == pytest.approx(budget, rel=1e-3)
    table = method.size.group_bytes[0]
    share = float((budget - method.size.fixed_bytes - table[0]) / (table[1] - table[0]))
    assert float(p[0, 1]) == pytest.approx(share, rel=1e-2)
    unit = method.units["0"]
    one, four = unit.value(0), unit.value(1)
    mixed = (1 - share) * one + share * four
    slope = float(((mixed - target) * (four - one)).sum())
    expected = -slope * budget / float(table[1] - table[0])
    assert method.penalty.multiplier == pytest.approx(expected, rel=2e-2)
    assert method.preferences().provenance["search_expected_bytes"] == method.history[-1]["search_expected_bytes"]


def needs(model, harm):
    """A held-out loss that is the unit's harm times its squared distance from where it began."""
    start = {n: m.clone() for n, m in unit_matrices(model, find_units(model)).items()}

    def loss(m, index):
        return sum(h * (m.get_submodule(n).weight - start[n]).square().sum() for n, h in harm.items())

    return loss


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
def test_bits_go_where_the_loss_is(line, relaxation):
    inventory = find_units(line)
    loss = needs(line, {"first": 0.01, "second": 30.0, "third": 0.01})
    low, high = (uniform_bytes(inventory, s) for s in (1, 4))
    budget = (low + high) // 2
    method = supernet(
        line, candidates=parse_specs(["1", "4"]), max_bytes=budget, held_out_loss=loss, arch_every=1,
        relaxation=relaxation, arch_learning_rate=0.1,
    )  # fmt: skip
    for i in range(1, 401):
        method.after_step(line, i, 400)
    found = method.preferences()
    chosen = one_best(found, max_bytes=budget)
    assert {n: s.bit_width for n, s in chosen.specs.items()}["second"] == 4
    assert predicted_bytes(inventory, chosen) <= budget
    solved = allocate(inventory, to_sensitivities(found), max_bytes=budget)
    assert solved.specs["second"].bit_width == 4
    if relaxation == "gumbel":
        assert method.temperature == pytest.approx(0.2)
        assert all(entry["search_temperature"] > 0.19 for entry in found.history)


def random_preferences(model, seed=0, *, groups=None):
    inventory = find_units(model)
    groups = groups or tuple((u.name,) for u in inventory.units)
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(len(groups), 4, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    marginals = torch.rand(len(groups), 4, generator=generator).tolist()
    perturbation = {u.name: dict.fromkeys(CANDIDATES, 0.5) for u in inventory.units}
    rows = tuple(map(tuple, p.tolist()))
    values = tuple(map(tuple, marginals))
    return Preferences(inventory, CANDIDATES, groups, rows, values, values, perturbation, {"seed": seed, "events": []})


def test_one_best_is_repaired_to_the_most_probable_choice_that_fits(line):
    """Against every one of the 64 choices."""
    for seed in range(6):
        found = random_preferences(line, seed)
        names = [u.name for u in found.inventory.units]
        sizes = {}
        for choice in itertools.product(range(4), repeat=3):
            allocation = BitAllocation({n: CANDIDATES[i] for n, i in zip(names, choice, strict=True)})
            likelihood = math.fsum(math.log(row[i]) for row, i in zip(found.probabilities, choice, strict=True))
            sizes[choice] = (predicted_bytes(found.inventory, allocation), likelihood)
        wanted = predicted_bytes(found.inventory, found.one_best())
        for budget in (wanted, wanted - 1, (wanted + min(s for s, _ in sizes.values())) // 2):
            if budget < min(s for s, _ in sizes.values()):
                continue
            chosen = one_best(found, max_bytes=budget)
            best = max(value for size, value in sizes.values() if size <= budget)
            picked = tuple(CANDIDATES.index(chosen.specs[n]) for n in names)
            assert sizes[picked][0] <= budget
            assert sizes[picked][1] == pytest.approx(best)
            assert chosen.provenance["repaired"] is (budget < wanted)


def test_groups_share_one_choice(opt):
    groups = group_units(find_units(opt), "sublayer")
    found = random_preferences(opt, groups=groups)
    budget = uniform_bytes(found.inventory, 1.58)
    for allocation in (
        one_best(found, max_bytes=budget),
        allocate(found.inventory, to_sensitivities(found), max_bytes=budget, groups=groups),
    ):
        assert all(len({allocation.specs[n] for n in group}) == 1 for group in groups)
    read = to_sensitivities(found)
    for k, group in enumerate(groups):  # the units' values add up to the group's
        for n, spec in enumerate(CANDIDATES):
            total = math.fsum(read.units[name].loss_increase[spec] for name in group)
            assert total == pytest.approx(found.marginals[k][n])


def test_files_round_trip(opt):
    found = random_preferences(opt)
    assert Preferences.from_json(json.loads(json.dumps(found.to_json()))) == found
    for basis in ("marginal", "probability"):
        sensitivities = to_sensitivities(found, basis=basis)
        assert sensitivities.measure == "search"
        assert (
            Sensitivities.from_json(json.loads(json.dumps(sensitivities.to_json()))).units.keys()
            == sensitivities.units.keys()
        )
    broken = found.to_json()
    broken["probabilities"][0]["4-papers-row"] = 7.0
    with pytest.raises(FormatError, match="are not probabilities"):
        Preferences.from_json(broken, where="p.json")
    with pytest.raises(FormatError, match=r"p.json: not a mixbits preferences file"):
        Preferences.from_json({}, where="p.json")


def train(method, model, ids, loss_of, first, last):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(first, last + 1):
        step(method, model, lambda m: loss_of(m, ids))
        optimizer.step()
        method.after_step(model, i, 12)


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
def test_a_search_that_is_resumed_ends_the_same(opt, ids, loss_of, tmp_path, relaxation):
    def fresh(model):
        return supernet(model, relaxation=relaxation, arch_every=2, held_out_loss=lambda m, i: loss_of(m, ids[i % 3 :]))

    whole, cut = copy.deepcopy(opt), copy.deepcopy(opt)
    method = fresh(whole)
    train(method, whole, ids, loss_of, 1, 12)
    first = fresh(cut)
    train(first, cut, ids, loss_of, 1, 6)
    torch.save(first.state_dict(), tmp_path / "method.pt")
    resumed = fresh(cut)
    resumed.load_state_dict(torch.load(tmp_path / "method.pt", weights_only=True))
    train(resumed, cut, ids, loss_of, 7, 12)
    assert torch.equal(resumed.weights, method.weights)
    assert resumed.preferences().to_json()["history"] == method.preferences().to_json()["history"]
    assert resumed.preferences().marginals == method.preferences().marginals
    assert len(method.history) == 6
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, cut.get_parameter(name))


def test_delivered_is_the_most_probable_candidate_as_stored(opt):
    method = supernet(opt)
    randomize(method)
    best = method.probabilities().argmax(1).tolist()
    with method.delivered(opt):
        for k, unit in enumerate(method.inventory.units):
            spec = method.candidates[best[k]]
            matrix = unit_matrices(opt, method.inventory)[unit.name]
            scale = method.units[unit.name].scales[spec].half().float()
            assert set(torch.unique((matrix / scale).round(decimals=3)).tolist()) <= set(spec.levels)
    assert len(method.quantized()) == len(best)


def test_a_16_bit_candidate_is_the_weight_itself(opt, ids, loss_of):
    method = supernet(opt, candidates=(*CANDIDATES, QuantSpec(16)))
    unit = next(iter(method.units.values()))
    assert torch.equal(unit.value(4), unit.weight)
    method.weights.data[:, 4] = 60.0
    plain = float(loss_of(opt, ids).detach())
    assert step(method, opt, lambda m: loss_of(m, ids)) == pytest.approx(plain, rel=1e-6)
    assert method.quantized() == {}


def test_a_search_that_collapses_is_seen_and_refused(line, data, caplog):
    method = supernet(
        line, arch_every=1, held_out_loss=lambda m, i: loss_of_line(m, data), multiplier_rate=1e-9, damping=0.0
    )
    method.weights.data[:, 3] = 40.0  # 4 bits everywhere: above the budget
    method.after_step(line, 1, 100)
    messages = [record.getMessage() for record in caplog.records]
    assert any("every group has settled on 4-papers-row" in m for m in messages)
    assert any("entropy is nearly 0 before half" in m for m in messages)
    method.after_step(line, 2, 100)
    assert len([r for r in caplog.records if "settled on" in r.getMessage()]) == 1  # said once
    with pytest.raises(
        SpecError, match=r"the search collapsed: every group settled on 4-papers-row, \d+ bytes, above the budget"
    ):
        method.preferences()
    method.weights.data[:] = 0
    method.weights.data[:, 0] = 40.0  # 1 bit everywhere fits: recorded, not refused
    found = method.preferences()
    assert {event["what"] for event in found.provenance["events"]} == {"one choice", "settled early"}
    assert found.one_best().specs["first"] == QuantSpec(1)


def test_a_unit_that_is_not_finite_is_named(line, data):
    method = supernet(line)
    with torch.no_grad():
        line.second.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="unit second: its mixed weight is not finite"):
        method.before_forward(line)
    method._put_back()
    with pytest.raises(DataError, match="unit second: weight has NaN"):
        supernet(line)


@pytest.mark.parametrize("mode", ["weights", "outputs"])
def test_an_architecture_gradient_that_is_not_finite_is_named(line, data, mode):
    def broken(model, index):  # the square root has an infinite slope at 0
        return (model.second(torch.ones(1, 8)) * 0).abs().sqrt().sum() + loss_of_line(model, data)

    method = supernet(line, mode=mode, arch_every=1, held_out_loss=broken)
    with pytest.raises(DataError, match="unit second: the architecture gradient is not finite"):
        method.after_step(line, 1, 10)
    method = supernet(line, mode=mode, arch_every=1, held_out_loss=lambda m, i: loss_of_line(m, data) + math.inf)
    with pytest.raises(DataError, match="held-out loss is inf at architecture step 1"):
        method.after_step(line, 1, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": parse_specs(["2"])}, "1 candidate.*at least two"),
        ({"candidates": parse_specs(["2", "2"])}, "1 candidate.*at least two"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"relaxation": "hard"}, "relaxation is 'hard'"),
        ({"temperatures": (1.0, 0.0)}, "two positive numbers"),
        ({"arch_every": 0}, "arch_every is 0"),
        ({"arch_learning_rate": 0.0}, "arch_learning_rate 0"),
        ({"beta": -1.0}, "beta is -1"),
        ({"multiplier_rate": 0.0}, "rate is 0"),
        ({"max_bytes": 100}, "budget of 100 bytes cannot be met: the smallest file"),
        ({"max_bytes": 10**6}, "leaves nothing to search: the largest file"),
        ({"groups": [["first", "second"], ["second"]]}, "named twice"),
        ({"groups": [["fourth"]]}, "unknown unit"),
    ],
)
def test_mistakes_are_refused_at_once(line, options, message):
    with pytest.raises(SpecError, match=message):
        supernet(line, **options)


def test_what_cannot_be_mixed_by_outputs_is_refused(opt, ids, loss_of):
    names = [u.name for u in find_units(opt).units]
    tied = next(n for n in names if "embed" in n)
    other = next(n for n in names if n.endswith("fc1"))
    with pytest.raises(SpecError, match=f"unit {tied} shares a group"):
        supernet(opt, mode="outputs", groups=[[tied, other]])
    with pytest.raises(SpecError, match="neither all of one module nor a chain within one"):
        supernet(opt, mode="outputs", groups=[[other, next(n for n in names if n.endswith("q_proj"))]])
    pair = [n for n in names if n.endswith(("q_proj", "k_proj"))]  # in one module, but side by side
    method = supernet(opt, mode="outputs", groups=[pair])
    method.before_forward(opt)
    with pytest.raises(SpecError, match="use mode 'weights'"):
        loss_of(opt, ids)
    method._put_back()


def test_nothing_learned_is_said(line):
    with pytest.raises(SpecError, match="no architecture step was taken"):
        supernet(line).preferences()
    with pytest.raises(SpecError, match="before after_backward"):
        supernet(line, arch_every=1).after_step(line, 1, 10)
    with pytest.raises(SpecError, match="basis is 'other'"):
        to_sensitivities(random_preferences(line), basis="other")

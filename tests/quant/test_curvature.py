"""Hessian traces against exact Hessians; random estimates are judged in their own standard errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixbits.errors import DataError, SpecError
from mixbits.quant.curvature import (
    TraceEstimate,
    double_backward_ready,
    hessian_traces,
    num_predictions,
    rademacher_like,
    sign_table,
)
from mixbits.quant.units import find_units

IDS = torch.zeros(1, 2, dtype=torch.long)
STANDARD_ERRORS = 4.5  # of ~100 comparisons with fixed seeds; a wrong formula is off by hundreds


class Quadratic(nn.Module):
    """``1/2 w' A w`` over the joined weights of two units, with a full random A."""

    def __init__(self, matrix=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(2, 5, bias=False)
        self.norm = nn.Parameter(torch.ones(7))
        raw = torch.randn(22, 22, generator=torch.Generator().manual_seed(3)) if matrix is None else matrix
        self.register_buffer("matrix", raw + raw.T)

    def value(self):
        w = torch.cat([self.a.weight.flatten(), self.b.weight.flatten()])
        return 0.5 * w @ self.matrix @ w + self.norm.square().sum()


def quadratic_loss(model, batch):
    return model.value()


def test_quadratic_traces_and_their_standard_errors():
    model = Quadratic()
    found = hessian_traces(model, find_units(model), [IDS], quadratic_loss, num_probes=2000, seed=0)
    h = model.matrix.double()
    off = h.square()
    off.fill_diagonal_(0)
    for name, rows in (("a", slice(0, 12)), ("b", slice(12, 22))):
        estimate = found[name]
        assert abs(estimate.trace - float(h.diagonal()[rows].sum())) < STANDARD_ERRORS * estimate.trace_stderr
        # Var[v_u . (H v)_u] = 2 * (off-diagonal squares within the block) + (squares to the other block).
        within = float(off[rows, rows].sum())
        variance = 2 * within + float(off[rows].sum()) - within
        assert estimate.trace_stderr == pytest.approx(math.sqrt(variance / 2000), rel=0.1)


def test_diagonal_hessian_is_exact_with_one_probe():
    model = Quadratic(torch.diag(torch.arange(22.0)))
    found = hessian_traces(model, find_units(model), [IDS], quadratic_loss, num_probes=1, seed=0)
    assert found["a"].trace == pytest.approx(2 * sum(range(12)), rel=1e-6)
    assert found["b"].trace == pytest.approx(2 * sum(range(12, 22)), rel=1e-6)
    assert (found["b"].trace_stderr, found["b"].num_probes) == (math.inf, 1)


def test_micro_batches_are_weighted_by_tokens():
    model = Quadratic(torch.diag(torch.ones(22)))

    def loss(model, batch):
        return batch.double().mean().float() * model.value()

    batches = [torch.full((3, 5), 1), torch.full((1, 9), 7), torch.empty(0, 4, dtype=torch.long)]
    found = hessian_traces(model, find_units(model), batches, loss, num_probes=2, seed=0, micro_batch_size=2)
    mean = (1 * 3 * 4 + 7 * 1 * 8) / (3 * 4 + 1 * 8)
    assert found["a"].trace == pytest.approx(2 * 12 * mean, rel=1e-5)
    assert found["a"].trace_stderr == pytest.approx(0, abs=1e-4)
    counted = hessian_traces(
        model, find_units(model), batches, loss, num_probes=1, seed=0, micro_batch_size=2, token_count=lambda b: len(b)
    )
    assert counted["a"].trace == pytest.approx(2 * 12 * (3 * 1 + 1 * 7) / 4, rel=1e-5)
    assert num_predictions(torch.zeros(3, 5)) == 12


def exact_traces(model, inventory, ids, loss_of):
    """The diagonal of the whole Hessian block, one product with a basis vector each."""
    result = {}
    for unit in inventory.units:
        weight = model.get_submodule(unit.name).weight
        (gradient,) = torch.autograd.grad(loss_of(model, ids), weight, create_graph=True)
        basis = torch.eye(weight.numel(), dtype=weight.dtype).view(-1, *weight.shape)
        (hessian,) = torch.autograd.grad(gradient, weight, basis, is_grads_batched=True)
        result[unit.name] = float(hessian.flatten(1).diagonal().sum())
    return result


def test_language_models_against_the_exact_hessian(model, ids, loss_of):
    model = model.double().eval()
    inventory = find_units(model)
    with double_backward_ready(model):
        exact = exact_traces(model, inventory, ids, loss_of)
        found = hessian_traces(model, inventory, [ids], loss_of, num_probes=60, seed=1, micro_batch_size=2)
    for name, estimate in found.items():
        assert abs(estimate.trace - exact[name]) < STANDARD_ERRORS * estimate.trace_stderr, name
        assert estimate.num_probes == 60


def test_same_seed_same_result_and_the_global_generator_is_left_alone(opt, ids, loss_of):
    inventory = find_units(opt)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with double_backward_ready(opt):
        first, again, other = (
            hessian_traces(opt, inventory, [ids], loss_of, num_probes=3, seed=s, micro_batch_size=2) for s in (0, 0, 1)
        )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_is_switched_exactly_and_all_is_restored(ids, loss_of, opt):
    opt = opt.to(torch.bfloat16).train()
    opt.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in opt.named_parameters()}
    flags = {n: m.training for n, m in opt.named_modules()}
    opt.set_attn_implementation("flex_attention")
    with double_backward_ready(opt):
        assert next(opt.parameters()).dtype == torch.float32
        assert not opt.training
        assert opt.config._attn_implementation == "sdpa"
        hessian_traces(opt, find_units(opt), [ids], loss_of, num_probes=1, seed=0)
    assert opt.config._attn_implementation == "flex_attention"
    assert {n: m.training for n, m in opt.named_modules()} == flags
    assert not opt.model.decoder.layers[0].fc1.weight.requires_grad
    for name, parameter in opt.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_unfused_attention_gives_the_fused_loss_with_every_kind_of_mask(opt, ids):
    """A boolean 4D mask is exact here; transformers' eager attention would add it as 0 and 1."""
    opt.eval()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, 9, 9)
    masks = {
        "none": None,
        "2D": torch.ones_like(ids),
        "boolean": causal,
        "float": torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min),
    }
    plain = opt(input_ids=ids).logits
    for name, mask in masks.items():
        with double_backward_ready(opt):
            positions = torch.arange(9).expand(3, 9)  # OPT cannot infer them from a 4D mask
            logits = opt(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(logits, plain, msg=f"mask {name}")
    opt.set_attn_implementation("eager")
    with double_backward_ready(opt):
        assert opt.config._attn_implementation == "eager"
        torch.testing.assert_close(opt(input_ids=ids).logits, plain)


def test_modules_of_ones_own_that_call_attention():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            q = self.proj(x)
            return F.scaled_dot_product_attention(q, q, x, is_causal=True).square().mean()

    model, x = Own(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with double_backward_ready(model):
        found = hessian_traces(model, find_units(model), [IDS], lambda m, b: m(x), num_probes=2, seed=0)
    assert found["proj"].trace != 0


def test_units_without_curvature_have_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "linear": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})

    def loss(model, batch):
        return model["used"].weight.square().sum() + model["linear"].weight.sum()

    found = hessian_traces(model, find_units(model), [IDS], loss, num_probes=2, seed=0)
    assert found["used"].trace == pytest.approx(8)
    assert found["linear"] == found["unused"] == TraceEstimate(0, 0, 2)
    flat = hessian_traces(model, find_units(model), [IDS], lambda m, b: m["linear"].weight.sum(), num_probes=2, seed=0)
    assert all(e.trace == 0 for e in flat.values())


def test_probes_are_fair_signs():
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(101, 31)
    v = rademacher_like(like, generator, sign_table(like))
    assert v.shape == like.shape
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(v.mean())) < 4 / math.sqrt(v.numel())
    assert abs(float((v[:, 1:] * v[:, :-1]).mean())) < 4 / math.sqrt(v.numel())


def test_bad_settings():
    model = Quadratic()
    inventory = find_units(model)
    with pytest.raises(SpecError, match="num_probes is 0"):
        hessian_traces(model, inventory, [IDS], quadratic_loss, num_probes=0, seed=0)
    with pytest.raises(SpecError, match="micro_batch_size"):
        hessian_traces(model, inventory, [IDS], quadratic_loss, seed=0, micro_batch_size=0)
    with pytest.raises(DataError, match="no tokens"):
        hessian_traces(model, inventory, [], quadratic_loss, seed=0)
    with pytest.raises(DataError, match="shape"):
        hessian_traces(model, inventory, [torch.zeros(4)], quadratic_loss, seed=0)


def test_numbers_that_are_not_finite_name_the_place():
    model = Quadratic()
    inventory = find_units(model)
    with pytest.raises(DataError, match="loss on micro-batch 0 is nan"):
        hessian_traces(model, inventory, [IDS], lambda m, b: m.value() * math.nan, seed=0)

    def kink(model, batch):  # finite value and gradient, infinite curvature
        return model.value() + (model.b.weight - model.b.weight.detach()).abs().pow(1.5).sum()

    with pytest.raises(DataError, match="unit b"):
        hessian_traces(model, inventory, [IDS], kink, seed=0)
    with torch.no_grad():
        model.b.weight[0, 0] = math.nan
    with pytest.raises(DataError, match="unit b has NaN"):
        hessian_traces(model, inventory, [IDS], quadratic_loss, seed=0)
    assert all(p.grad is None for p in model.parameters())


def test_progress_bar_goes_to_stderr(capsys):
    model = Quadratic()
    hessian_traces(model, find_units(model), [IDS], quadratic_loss, num_probes=2, seed=0, show_progress=True)
    assert capsys.readouterr().out == ""

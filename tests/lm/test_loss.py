"""Chunked losses against plain cross-entropy over full logits, on models of several families."""

import copy
import gc
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixbits.lm import loss as loss_module
from mixbits.lm.loss import evaluation_mode, has_plain_head, hidden_state_error, mean_loss, token_nll, training_loss

VOCABULARY = 37
# Largest difference from the reference, relative to the largest entry: (loss, gradients).
TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-6, 2e-5),  # sums in another order
    torch.bfloat16: (1e-2, 5e-2),  # 8 bits of mantissa in logits and probabilities
}


def make(kind: str, seed: int = 0, **changes):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shared = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    own = {
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.0},
        "llama": {"intermediate_size": 24, "num_key_value_heads": 2},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "qwen3": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
        "gemma2": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0},
        "cohere": {"intermediate_size": 24, "num_key_value_heads": 1, "logit_scale": 0.25},
        "granite": {"intermediate_size": 24, "num_key_value_heads": 1, "logits_scaling": 4.0},
    }  # fmt: skip
    config = CONFIG_MAPPING[kind](**{**shared, **own[kind], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # fresh weights are too small to tell a soft cap from none
            nn.init.normal_(parameter, std=0.3)
    return model


PLAIN = ("opt", "llama", "gpt2", "qwen3")
OTHER = ("gemma2", "cohere", "granite")


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 5)
    monkeypatch.setattr(loss_module, "_SCORE_CHUNK_ELEMENTS", 5 * VOCABULARY)


def reference_loss(model, ids, teacher=None, weight=0.0, temperature=1.0):
    logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1)
    result = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
    if teacher is None:
        return result
    p = (teacher(input_ids=ids[:, :-1]).logits.flatten(0, 1).detach() / temperature).softmax(-1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1).mean()
    return (1 - weight) * result + weight * temperature**2 * kl


def assert_same(model, got_loss, expected_loss, dtype):
    """Equal loss, and equal gradients of every parameter; attention's key biases have none but noise."""
    rtol, gradient_rtol = TOLERANCE[dtype]
    assert got_loss.item() == pytest.approx(expected_loss.item(), rel=rtol)
    named = [(n, p) for n, p in model.named_parameters() if "k_proj.bias" not in n]
    expected = torch.autograd.grad(expected_loss, [p for _, p in named], retain_graph=True)
    got = torch.autograd.grad(got_loss, [p for _, p in named])
    for (name, parameter), a, b in zip(named, got, expected, strict=True):
        assert a.dtype == parameter.dtype
        assert float((a - b).abs().max()) <= gradient_rtol * float(b.abs().max()) + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_loss_and_gradients(kind, dtype, ids, short_chunks):
    if dtype == torch.float64 and kind in OTHER:
        pytest.skip("the ordinary path computes the loss in float32")
    model = make(kind).to(dtype)
    assert has_plain_head(model) == (kind in PLAIN)
    assert_same(model, training_loss(model, ids), reference_loss(model, ids), dtype)


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("kind", "other"), [("opt", "llama"), ("opt", "gemma2"), ("cohere", "opt")])
def test_distillation(kind, other, weight, ids, short_chunks):
    dtype = torch.float32 if kind in OTHER else torch.float64
    model, teacher = make(kind).to(dtype), make(other, seed=3).to(dtype).eval()
    got = training_loss(model, ids, teacher=teacher, teacher_weight=weight)
    assert_same(model, got, reference_loss(model, ids, teacher, weight), dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("kind", "other"), [("opt", "llama"), ("llama", "gemma2"), ("cohere", "opt")])
def test_temperature_against_autograd(kind, other, weight, temperature, ids, short_chunks):
    dtype = torch.float32 if kind in OTHER else torch.float64
    model, teacher = make(kind).to(dtype), make(other, seed=3).to(dtype).eval()
    got = training_loss(model, ids, teacher=teacher, teacher_weight=weight, temperature=temperature)
    assert_same(model, got, reference_loss(model, ids, teacher, weight, temperature), dtype)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [31, 32, 33])
def test_vocabularies_around_whole_cache_lines(vocabulary, temperature, ids):
    """Buffers are padded past the vocabulary; the padding must get no probability and no gradient."""
    model, teacher = make("opt", vocab_size=vocabulary).double(), make("opt", 3, vocab_size=vocabulary).double().eval()
    ids = ids % vocabulary
    assert_same(model, training_loss(model, ids), reference_loss(model, ids), torch.float64)
    got = training_loss(model, ids, teacher=teacher, teacher_weight=0.5, temperature=temperature)
    assert_same(model, got, reference_loss(model, ids, teacher, 0.5, temperature), torch.float64)


def layer_states(model, ids):
    """Outputs of the two layers after the model's own last norm, by hooks."""
    seen, body = [], model.base_model
    layers = body.decoder.layers if hasattr(body, "decoder") else body.layers
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
        for layer in layers
    ]
    last = body(input_ids=ids[:, :-1]).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*seen[:-1], last]


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize(("kind", "other"), [("opt", "opt"), ("llama", "opt"), ("cohere", "llama"), ("opt", "gemma2")])
def test_hidden_states_join_the_loss(kind, other, layers, ids, short_chunks):
    dtype = torch.float64 if kind == "opt" and other == "opt" else torch.float32  # RMSNorm is float32 inside
    model, teacher = make(kind).to(dtype), make(other, seed=3).to(dtype).eval()
    options = {"teacher": teacher, "hidden_weight": 0.7, "hidden_layers": layers}
    mine, theirs = layer_states(model, ids), layer_states(teacher, ids)
    if layers == "last":
        mine, theirs = mine[-1:], theirs[-1:]
    expected = 0.0
    for a, b in zip(mine, theirs, strict=True):
        b = b.detach().reshape(-1, 16)
        expected = expected + ((a.reshape(-1, 16) - b) ** 2).mean() / b.var(0, unbiased=False).mean() / len(mine)
    got = training_loss(model, ids, teacher_weight=0.4, **options)
    assert_same(model, got, reference_loss(model, ids, teacher, 0.4) + 0.7 * expected, dtype)
    got = training_loss(model, ids, **options)  # hidden states alone, no teacher logits
    assert_same(model, got, reference_loss(model, ids) + 0.7 * expected, dtype)


def test_one_teacher_pass_serves_logits_and_hidden_states(ids):
    model, teacher, passes = make("opt"), make("llama", seed=3).eval(), []
    has_plain_head(teacher)
    teacher.base_model.register_forward_hook(lambda *_: passes.append(1))
    for layers in ("last", "all"):
        training_loss(model, ids, teacher=teacher, teacher_weight=0.5, hidden_weight=1.0, hidden_layers=layers)
    assert len(passes) == 2


def test_known_teacher_states_save_its_pass(ids):
    model, teacher = make("opt").double(), make("llama", seed=3).double().eval()
    known = teacher.base_model(input_ids=ids[:, :-1]).last_hidden_state.detach()
    options = {"teacher": teacher, "teacher_weight": 0.5, "hidden_weight": 0.5}
    expected = training_loss(model, ids, **options)
    teacher.base_model.register_forward_hook(lambda *_: pytest.fail("ran"))
    assert torch.equal(training_loss(model, ids, **options, teacher_hidden=known), expected)


def test_the_mean_state_has_a_hidden_error_of_one():
    states = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double() * 7
    mean = states.flatten(0, 1).mean(0).expand_as(states)
    assert hidden_state_error([mean], [states]).item() == pytest.approx(1.0)
    assert hidden_state_error([states, mean], [states, states]).item() == pytest.approx(0.5)
    assert hidden_state_error([states.float()], [states.float()]).dtype == torch.float32


def test_a_teacher_of_no_weight_is_not_asked(ids):
    model = make("opt")
    assert torch.equal(training_loss(model, ids, teacher=object()), training_loss(model, ids))


def test_own_teacher_gives_no_gradient_and_no_divergence(ids):
    model = make("opt").double()
    found = training_loss(model, ids, teacher=copy.deepcopy(model).eval(), teacher_weight=1.0)
    assert found.item() == pytest.approx(0.0, abs=1e-12)
    found.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-12


def test_output_layer_with_a_bias(ids, short_chunks):
    model = make("opt", tie_word_embeddings=False).double()
    model.lm_head = nn.Linear(16, VOCABULARY, bias=True, dtype=torch.float64)
    nn.init.normal_(model.lm_head.bias)
    assert_same(model, training_loss(model, ids), reference_loss(model, ids), torch.float64)
    teacher = copy.deepcopy(model).eval()
    nn.init.normal_(teacher.lm_head.bias)
    got = training_loss(model, ids, teacher=teacher, teacher_weight=0.5)
    assert_same(model, got, reference_loss(model, ids, teacher, 0.5), torch.float64)


def test_a_frozen_output_layer_gets_no_gradient(ids):
    model = make("opt", tie_word_embeddings=False).double()
    model.lm_head.weight.requires_grad_(False)
    training_loss(model, ids).backward()
    assert model.lm_head.weight.grad is None
    expected = torch.autograd.grad(reference_loss(model, ids), model.model.decoder.layers[0].fc1.weight)[0]
    torch.testing.assert_close(model.model.decoder.layers[0].fc1.weight.grad, expected)


@pytest.mark.parametrize("teacher_kind", [None, "llama"])
def test_bfloat16_autocast_is_close(teacher_kind, ids, short_chunks):
    model = make("opt")
    teacher = make(teacher_kind, seed=3).eval() if teacher_kind else None
    weight = 0.5 if teacher else 0.0
    with torch.autocast("cpu", torch.bfloat16):
        got = training_loss(model, ids, teacher=teacher, teacher_weight=weight)
        ordinary = reference_loss(model, ids, teacher, weight)
    assert got.dtype == torch.float32
    exact = reference_loss(model, ids, teacher, weight)
    assert got.item() == pytest.approx(exact.item(), rel=TOLERANCE[torch.bfloat16][0])
    parameters = [p for n, p in model.named_parameters() if "k_proj.bias" not in n]
    a, b, c = (torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters)]) for x in (got, exact, ordinary))
    assert float((a - b).norm() / b.norm()) <= 2 * float((c - b).norm() / b.norm()) + 1e-3


def test_a_gradient_scale_reaches_all_gradients(ids):
    model = make("opt").double()
    (7 * training_loss(model, ids)).backward()
    expected = torch.autograd.grad(reference_loss(model, ids), model.lm_head.weight)[0]
    torch.testing.assert_close(model.lm_head.weight.grad, 7 * expected)


def test_mean_loss_is_twice_differentiable_and_the_chunked_one_says_it_is_not(ids):
    model = make("opt").double()
    weight = model.lm_head.weight
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(mean_loss(model, ids), weight, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().sum() > 0
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(training_loss(model, ids), weight, create_graph=True)


def test_an_impossible_token_has_a_finite_loss_and_a_broken_model_does_not(ids):
    model = make("opt")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert torch.isfinite(training_loss(model, ids))
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert not torch.isfinite(training_loss(model, ids))


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_token_nll(kind, first, ids, short_chunks):
    model = make(kind).eval()
    log_probs = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
    expected = -log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, first:]
    got = token_nll(model, ids, first=first)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", OTHER)
def test_freshly_initialised_scaled_heads_are_seen(kind):
    """A soft cap hardly changes the small logits of a fresh model; taking it for plain would be wrong once it is trained."""
    from transformers import AutoModelForCausalLM

    softer = {"final_logit_softcapping": 30.0} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(make(kind, **softer).config)
    assert not has_plain_head(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not has_plain_head(model)


def test_what_is_known_of_a_head_is_not_part_of_the_model(tmp_path):
    model = make("opt")
    before = set(vars(model))
    assert has_plain_head(model)
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path)
    assert "mixbits" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert loss_module._PLAIN_HEADS[model]
    held = len(loss_module._PLAIN_HEADS)
    del model
    gc.collect()
    assert len(loss_module._PLAIN_HEADS) < held


def test_a_model_that_says_nothing_yet_is_asked_again():
    model = make("opt")
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not has_plain_head(model)
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    assert has_plain_head(model)


def test_asking_leaves_randomness_modes_and_hooks_alone():
    model = make("opt", dropout=0.5).train()
    model.model.decoder.layers[0].eval()
    state = torch.get_rng_state()
    assert has_plain_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.decoder.layers[0].training
    assert not model.lm_head._forward_hooks


def test_autocast_around_does_not_hide_a_plain_head():
    model = make("opt")
    with torch.autocast("cpu", torch.bfloat16):
        assert has_plain_head(model)


def test_evaluation_mode_restores_each_module():
    model = make("opt").train()
    frozen = model.model.decoder.layers[1].eval()

    def stopped() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert model.training
    assert not frozen.training

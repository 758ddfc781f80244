"""Tiny random models of four families, tied and untied, and one batch of tokens."""

import copy
from typing import Any

import pytest
import torch

VOCABULARY = 53
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}


def tiny_model(family: str, *, tied: bool = True, seed: int = 0) -> Any:
    """A random model in training mode, dropout off."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, **SPECIAL}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    rotary = {**sizes, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
    config = {
        "opt": lambda: OPTConfig(word_embed_proj_dim=16, ffn_dim=24, dropout=0.0, do_layer_norm_before=False, **sizes, **shared),
        "gpt2": lambda: GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared
        ),
        "llama": lambda: LlamaConfig(**rotary, **shared),
        "qwen3": lambda: Qwen3Config(**rotary, **shared),
    }[family]()  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():  # biases and norms away from their symmetric start, so that float16 rounding shows
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=["opt", "gpt2", "llama", "llama-untied", "qwen3"])
def model(request):
    family, _, untied = request.param.partition("-")
    return tiny_model(family, tied=not untied)


@pytest.fixture
def opt():
    return tiny_model("opt")


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def mixed_allocation(inventory, *, granularity: str = "row", float_unit: bool = True):
    """Every width in turn; the last unit at 16 bits."""
    from mixbits.spec import BitAllocation, QuantSpec

    widths = (2, 1.58, 1, 4, 3, 8)
    specs = {u.name: QuantSpec(widths[i % 6], granularity=granularity) for i, u in enumerate(inventory.units)}
    if float_unit:
        specs[inventory.units[-1].name] = QuantSpec(16)
    return BitAllocation(specs)


@pytest.fixture
def mixed():
    return mixed_allocation


def mean_loss(model, ids):
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1))


@pytest.fixture
def loss_of():
    return mean_loss


def snapshot(model):
    """A copy of every parameter's values."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def values_of():
    return snapshot


def protocol_steps(model, method, optimizer, *, first, last, num_steps):
    """Steps ``first`` to ``last`` of ``num_steps`` as the trainer takes them; a step's batch depends on its number only."""
    figures = []
    for step in range(first, last + 1):
        batch = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(step))
        method.before_forward(model)
        mean_loss(model, batch).backward()
        method.after_backward(model)
        if hasattr(method, "second_gradient") and method.second_gradient(model):
            mean_loss(model, batch).backward()
            method.after_backward(model)
        optimizer.step()
        model.zero_grad()
        figures.append(method.after_step(model, step, num_steps))
    return figures


@pytest.fixture
def run_steps():
    return protocol_steps


def check_resume(build, *, num_steps=12, middle=5):
    """A method that is interrupted after ``middle`` steps ends with the very bits of one that was not."""

    def start():
        model = tiny_model("opt")
        method = build(model)
        extra = method.extra_parameters(model) if hasattr(method, "extra_parameters") else []
        groups = [{"params": list(model.parameters())}, *extra]
        return model, method, groups

    def optimizer_of(groups):
        return torch.optim.AdamW(groups, lr=5e-3)

    model, method, groups = start()
    straight = optimizer_of(groups)
    protocol_steps(model, method, straight, first=1, last=num_steps, num_steps=num_steps)

    first, half, groups = start()
    optimizer = optimizer_of(groups)
    protocol_steps(first, half, optimizer, first=1, last=middle, num_steps=num_steps)
    saved = copy.deepcopy((first.state_dict(), half.state_dict(), optimizer.state_dict()))
    second, other, _ = start()
    second.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    extra = other.extra_parameters(second) if hasattr(other, "extra_parameters") else []
    optimizer = optimizer_of([{"params": list(second.parameters())}, *extra])
    optimizer.load_state_dict(saved[2])
    protocol_steps(second, other, optimizer, first=middle + 1, last=num_steps, num_steps=num_steps)

    for (name, p), q in zip(model.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, weight in method.quantized().items():
        again = other.quantized()[name]
        assert torch.equal(weight.codes, again.codes), name
        assert torch.equal(weight.scales, again.scales), name


@pytest.fixture
def resumes():
    return check_resume

"""The two presets: the configuration traps they avoid, ties, seeds, and sizes that cannot be."""

import pytest
import torch
from pydantic import ValidationError

from mixbits.errors import SpecError
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer

SMALL = {"num_layers": 2, "hidden_size": 16, "feed_forward_size": 24, "num_heads": 2, "context": 12}
PRESETS = ("paper", "llama")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["the cat sat on the mat"])


def gradient_of_loss(model, tokenizer):
    from mixbits.lm.loss import mean_loss

    ids = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    mean_loss(model, ids).backward()
    return model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("preset", PRESETS)
def test_embedding_and_softmax_are_one_parameter(preset, tokenizer):
    model = build_model(ModelSize(preset=preset, **SMALL), tokenizer, seed=0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer.eos_token_id


def test_paper_is_a_post_norm_opt_with_two_extra_position_rows(tokenizer):
    model = build_model(ModelSize(**SMALL), tokenizer, seed=0)
    assert type(model).__name__ == "OPTForCausalLM"
    assert not model.config.do_layer_norm_before
    assert model.model.decoder.final_layer_norm is None
    assert model.config.activation_function == "gelu"
    assert tuple(model.model.decoder.embed_positions.weight.shape) == (12 + 2, 16)
    assert model(torch.zeros(1, 12, dtype=torch.long)).logits.shape == (1, 12, len(tokenizer))
    assert model.config.dropout == 0.1
    assert build_model(ModelSize(**SMALL, dropout=0.3), tokenizer, seed=0).config.dropout == 0.3


def test_llama_has_no_position_table(tokenizer):
    model = build_model(ModelSize(preset="llama", **SMALL), tokenizer, seed=0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_act == "silu"
    shapes = {tuple(p.shape) for p in model.parameters()}
    assert shapes == {(len(tokenizer), 16), (16, 16), (24, 16), (16, 24), (16,)}
    assert model.config.max_position_embeddings == 12


def test_opt_pad_trap(tokenizer):
    """OPT's default pad id 1 starts that row at zero and keeps its input gradient away; here row 1 is <unk>, a real word."""
    model = build_model(ModelSize(**SMALL), tokenizer, seed=0)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    weight = model.get_input_embeddings().weight
    assert weight[0].abs().sum() == 0
    assert (weight[1:].abs().sum(1) > 0).all()
    assert model.get_input_embeddings().padding_idx == 0


def test_tokenizer_without_a_pad_of_its_own(byte_level, tmp_path):
    """pad = eos is usual for byte-level tokenizers; as padding_idx it would stop the boundary's input gradient."""
    import copy

    shared = copy.deepcopy(byte_level)
    shared.pad_token = shared.eos_token
    for tokenizer in (byte_level, shared):
        model = build_model(ModelSize(**SMALL), tokenizer, seed=0)
        assert model.config.pad_token_id is None
        assert model.get_input_embeddings().padding_idx is None
        assert (model.get_input_embeddings().weight.abs().sum(1) > 0).all()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_but_pad_is_trained(preset, tokenizer):
    model = build_model(ModelSize(preset=preset, **SMALL), tokenizer, seed=0)
    gradient = gradient_of_loss(model, tokenizer)
    assert (gradient[1:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_seed_decides_the_weights_and_the_global_generator_is_left_alone(preset, tokenizer):
    size = ModelSize(preset=preset, **SMALL)
    before = torch.get_rng_state()
    one, two, three = (build_model(size, tokenizer, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "llama", "dropout": 0.1}, "llama preset has no dropout"),
        ({"hidden_size": 10, "num_heads": 4}, "not a multiple of num_heads"),
        ({"preset": "llama", "hidden_size": 10, "num_heads": 2}, "even number"),
        ({"preset": "gpt"}, "paper"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"num_heads": 0}, "greater than or equal to 1"),
        ({"context": 1}, "greater than or equal to 2"),
        ({"dropout": 1.0}, "less than 1"),
        ({"dropout": float("nan")}, "dropout"),
        ({"hidden": 16}, "Extra inputs"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelSize(**{**SMALL, **changes})


def test_llama_dropout_zero_is_fine_and_a_tokenizer_needs_a_boundary():
    assert ModelSize(preset="llama", dropout=0.0, **SMALL).dropout == 0.0
    tokenizer = word_tokenizer(["a"])
    tokenizer.eos_token = None
    with pytest.raises(SpecError, match="eos"):
        build_model(ModelSize(**SMALL), tokenizer, seed=0)

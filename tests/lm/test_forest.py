"""Tries of hypotheses score as single hypotheses do, for four architectures; wrong masks and positions are noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixbits.asr.trie import TokenForest, build_forest
from mixbits.errors import DataError, SpecError
from mixbits.lm import forest as forest_module
from mixbits.lm.forest import (
    ForestScorer,
    SequenceScorer,
    additive_mask,
    forest_rows,
    max_sequence_length,
    score_sequences,
)

VOCABULARY = 29
NATS = 1e-4  # what the project promises per hypothesis in float32
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}


def make_model(name: str, attention: str = "sdpa", context: int = 24) -> torch.nn.Module:
    torch.manual_seed(3)
    shared = {"max_position_embeddings": context, "attn_implementation": attention, **SPECIAL}
    if name == "opt":
        own = {"init_std": 0.3, "ffn_dim": 20, "word_embed_proj_dim": 12, "do_layer_norm_before": False}
        return OPTForCausalLM(OPTConfig(**SIZES, **shared, **own)).eval()
    if name == "gpt2":
        own = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": context, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(attn_implementation=attention, **own, **SPECIAL)).eval()
    if name == "llama":
        own = {"intermediate_size": 20, "num_key_value_heads": 1}
        return LlamaForCausalLM(LlamaConfig(**SIZES, **shared, **own)).eval()
    own = {"intermediate_size": 20, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **shared, **own)).eval()


MODELS = ["opt", "gpt2", "llama", "qwen3"]


def random_trees(seed: int = 0, num_trees: int = 7) -> list[list[list[int]]]:
    """Lists of different sizes with shared prefixes, one that is a prefix of another, repeats, and an empty hypothesis."""
    rng = np.random.default_rng(seed)
    trees = []
    for size in rng.integers(1, 12, num_trees):
        base = rng.integers(3, VOCABULARY, rng.integers(1, 20))
        sequences = []
        for _ in range(size):
            changed = base.copy()
            changed[rng.integers(len(base))] = rng.integers(3, VOCABULARY)
            sequences.append([2, *changed.tolist(), 2])
        trees.append(sequences)
    trees[0] += [[2, 2], trees[0][0], trees[0][0][:-1]]
    return [*trees, [[2]]]


def naive_scores(model: torch.nn.Module, trees: list[list[list[int]]]) -> np.ndarray:
    """One sequence at a time, no padding, full log-softmax."""
    scores = []
    for ids in (ids for tree in trees for ids in tree):
        if len(ids) == 1:
            scores.append(0.0)
            continue
        row = torch.tensor([ids])
        with torch.no_grad():
            log_p = model(row[:, :-1]).logits[0].double().log_softmax(-1)
        scores.append(float(log_p.gather(-1, row[0, 1:, None]).sum()))
    return np.array(scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_trie_equals_one_by_one(name: str, attention: str) -> None:
    model, trees = make_model(name, attention), random_trees()
    forest = build_forest(trees)
    expected = naive_scores(model, trees)
    scores = ForestScorer(model)(forest)
    assert scores.dtype == np.float64
    assert scores.shape == (forest.num_nodes,)
    assert np.all(scores[forest.parents < 0] == 0)
    assert np.abs(forest.sequence_scores(scores) - expected).max() < NATS
    assert np.abs(score_sequences(model, [ids for tree in trees for ids in tree]) - expected).max() < NATS
    assert np.ptp(expected) > 1  # these models do say different things about different sequences


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str) -> None:
    model, trees = make_model(name).to(torch.bfloat16), random_trees()
    forest = build_forest(trees)
    expected = naive_scores(model, trees)
    got = forest.sequence_scores(ForestScorer(model)(forest))
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_packed_model(tmp_path) -> None:
    from mixbits import hf
    from mixbits.packing.checkpoint import save_packed
    from mixbits.quant.grid import quantize_weight
    from mixbits.quant.units import find_units, unit_matrices
    from mixbits.spec import BitAllocation, QuantSpec

    source = make_model("opt")
    inventory = find_units(source)
    allocation = BitAllocation.uniform(inventory, QuantSpec(2))
    matrices = unit_matrices(source, inventory)
    weights = {name: quantize_weight(matrices[name], spec) for name, spec in allocation.specs.items()}
    save_packed(source, inventory, allocation, weights, tmp_path / "packed")
    model, trees = hf.load(tmp_path / "packed"), random_trees()
    forest = build_forest(trees)
    got = forest.sequence_scores(ForestScorer(model)(forest))
    assert np.abs(got - naive_scores(model, trees)).max() < NATS


@pytest.mark.parametrize("name", MODELS)
def test_wrong_positions_and_wrong_masks_would_show(name: str, monkeypatch) -> None:
    model, trees = make_model(name), random_trees()
    forest = build_forest(trees)
    scorer = ForestScorer(model)
    right = forest.sequence_scores(scorer(forest))
    rows = forest_rows(forest)
    causal = np.tril(np.ones(rows.mask.shape[1:], dtype=bool))
    wrong = {
        "positions": {"positions": np.minimum(np.broadcast_to(np.arange(rows.tokens.shape[1]), rows.tokens.shape), 23)},
        "mask": {"mask": np.broadcast_to(causal, rows.mask.shape).copy()},
    }
    for part, change in wrong.items():
        spoilt = forest_module.ForestRows(**{**vars(rows), **change})
        with monkeypatch.context() as patch:
            patch.setattr(forest_module, "forest_rows", lambda _, spoilt=spoilt: spoilt)
            got = forest.sequence_scores(scorer(forest))
        assert np.abs(got - right).max() > 100 * NATS, part


def test_offset_of_opt_positions_is_applied_once() -> None:
    """Depth d must read row d + 2 of OPT's position table: spoiling any other row changes nothing."""
    model, forest = make_model("opt"), build_forest([[[2, 5, 6, 2]]])
    scorer = ForestScorer(model)
    before = scorer(forest)
    table = model.model.decoder.embed_positions.weight.data
    table[[0, 1, *range(5, len(table))]] = 1e3
    assert np.array_equal(scorer(forest), before)
    table[4] = 1e3
    assert not np.allclose(scorer(forest)[3], before[3])


def test_boolean_mask_in_eager_attention_is_refused(monkeypatch) -> None:
    def boolean(mask, dtype, device):
        return torch.from_numpy(mask)[:, None]

    monkeypatch.setattr(forest_module, "additive_mask", boolean)
    with pytest.raises(SpecError, match=r"differently from single sequences .*sdpa"):
        ForestScorer(make_model("opt", "eager"))
    trees = random_trees()
    forest, model = build_forest(trees), make_model("opt", "sdpa")
    assert np.abs(forest.sequence_scores(ForestScorer(model)(forest)) - naive_scores(model, trees)).max() < NATS


def test_models_that_cannot_be_scored_as_tries_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(SpecError, match=r"Bloom.*one by one"):
        ForestScorer(bloom)
    neo = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(SpecError, match="local"):
        ForestScorer(GPTNeoForCausalLM(neo))
    trees = random_trees()
    flat = [ids for tree in trees for ids in tree]
    assert SequenceScorer(bloom)(flat) == pytest.approx(naive_scores(bloom.eval(), trees), abs=NATS)


def test_head_that_is_not_plain(monkeypatch) -> None:
    """Full logits in parts of few trees; here a model whose logits are scaled after the output layer."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"intermediate_size": 20, "num_key_value_heads": 1, "max_position_embeddings": 24}
    model = CohereForCausalLM(CohereConfig(**SIZES, **SPECIAL, **sizes, logit_scale=0.3)).eval()
    assert not forest_module.has_plain_head(model)
    trees = random_trees()
    forest = build_forest(trees)
    for budget in (1, 4000, 8_000_000):
        monkeypatch.setattr(forest_module, "_LOGITS_AT_ONCE", budget)
        monkeypatch.setattr(forest_module, "_LEAST_ROWS_AT_ONCE", 1)
        got = forest.sequence_scores(ForestScorer(model)(forest))
        assert np.abs(got - naive_scores(model, trees)).max() < NATS


@pytest.mark.parametrize("budget", [1, 100, 1000])
def test_small_chunks_give_the_same(budget: int, monkeypatch) -> None:
    model, forest = make_model("llama"), build_forest(random_trees())
    expected = ForestScorer(model)(forest)
    monkeypatch.setattr(forest_module, "_LOGITS_AT_ONCE", budget)
    monkeypatch.setattr(forest_module, "_LEAST_ROWS_AT_ONCE", 1)
    monkeypatch.setattr(forest_module, "_NAIVE_LOGITS_AT_ONCE", budget)
    assert ForestScorer(model)(forest) == pytest.approx(expected, abs=1e-5)
    flat = [ids for tree in random_trees() for ids in tree]
    assert SequenceScorer(model)(flat) == pytest.approx(forest.sequence_scores(expected), abs=NATS)


def test_rows_agree_with_the_forest() -> None:
    trees = random_trees(seed=5)
    forest: TokenForest = build_forest(trees)
    rows = forest_rows(forest)
    has_child = np.isin(np.arange(forest.num_nodes), forest.parents)
    assert np.array_equal(rows.place >= 0, has_child)
    width = rows.tokens.shape[1]
    for tree in range(forest.num_trees):
        nodes = np.arange(forest.tree_offsets[tree], forest.tree_offsets[tree + 1])
        inner = has_child[nodes]
        count = int(inner.sum())
        assert rows.place[nodes[inner]].tolist() == [tree * width + column for column in range(count)]
        expected = np.eye(width, dtype=bool)
        expected[:count, :count] = forest.ancestor_mask(tree)[np.ix_(inner, inner)]
        assert np.array_equal(rows.mask[tree], expected)
        assert np.array_equal(rows.positions[tree, :count], forest.depths[nodes[inner]])
        assert np.array_equal(rows.tokens[tree, :count], forest.tokens[nodes[inner]])


def test_additive_mask() -> None:
    mask = additive_mask(np.array([[[True, False], [True, True]]]), torch.bfloat16, torch.device("cpu"))
    low = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16
    assert mask.tolist() == [[[[0, low], [0, 0]]]]


@pytest.mark.parametrize("name", MODELS)
def test_longest_sequence_fills_the_context(name: str) -> None:
    """``context`` ids can be read and one more predicted."""
    model = make_model(name, context=8)
    assert ForestScorer(model).max_length == 9
    trees = [[[2, 3, 4, 5, 6, 7, 8, 9, 2], [2, 3, 4, 9, 9, 9, 9, 9, 2]]]
    forest = build_forest(trees)
    assert np.abs(forest.sequence_scores(ForestScorer(model)(forest)) - naive_scores(model, trees)).max() < NATS
    assert ForestScorer(model, max_length=5).max_length == 5


def test_smallest_context_and_vocabulary() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.max_position_embeddings = 1
    model = LlamaForCausalLM(config).eval()
    assert max_sequence_length(model) == 2
    forest = build_forest([[[0, 1], [0, 0]]])
    assert np.exp(ForestScorer(model)(forest)[1:]).sum() == pytest.approx(1, abs=1e-5)


def test_sliding_window_bounds_the_length() -> None:
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 6
    assert max_sequence_length(model) == 7
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(SpecError, match="linear_attention"):
        ForestScorer(model)


def test_broken_models_and_foreign_ids() -> None:
    model = make_model("gpt2")
    scorer = ForestScorer(model)
    with pytest.raises(DataError, match=f"token id {VOCABULARY} is outside .* {VOCABULARY}"):
        scorer(build_forest([[[2, VOCABULARY, 2]]]))
    model.train()
    one = scorer(build_forest([[[2, 5, 2]]]))
    assert model.training
    assert np.array_equal(one, scorer(build_forest([[[2, 5, 2]]])))
    model.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(DataError, match="weights are broken"):
        ForestScorer(model)


def test_empty_input() -> None:
    model = make_model("opt")
    assert ForestScorer(model)(build_forest([[[2]]])).tolist() == [0.0]
    assert score_sequences(model, []).shape == (0,)
    assert score_sequences(model, [[2]]).tolist() == [0.0]
    assert SequenceScorer(model)([]).shape == (0,)

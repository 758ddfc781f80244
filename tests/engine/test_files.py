"""Directories the engine must refuse, and forests: clear errors, no crash, no allocation in proportion to a damaged number."""

import json
import re
import shutil

import numpy as np
import pytest

from mixbits.engine import Engine, unsupported
from mixbits.errors import DataError, FormatError, MixbitsError, SpecError


@pytest.fixture
def copy(zoo, tmp_path):
    """``copy(name)``: a directory of one's own."""

    def make(name="llama-grouped-tied"):
        return shutil.copytree(zoo(name).directory, tmp_path / "model", dirs_exist_ok=True)

    return make


def change(directory, **fields):
    """Overwrite fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in fields.items():
        config[key] = value
        if value is None:
            del config[key]
    path.write_text(json.dumps(config))


def change_units(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("opt-post-gelu", {"architectures": ["OPTModel"]}, "it is a OPTModel; the engine has OPTForCausalLM"),
        ("opt-post-gelu", {"architectures": "OPTForCausalLM"}, "it is a opt"),
        ("opt-post-gelu", {"architectures": None}, "it is a opt"),
        ("opt-post-gelu", {"model_type": "gpt2"}, "it is a OPTForCausalLM; the engine has"),
        ("opt-post-gelu", {"model_type": ["opt"]}, "the engine has OPTForCausalLM and LlamaForCausalLM"),
        ("opt-post-gelu", {"word_embed_proj_dim": 12}, "embeddings are projected"),
        ("opt-post-gelu", {"activation_function": "quick_gelu"}, "activation function 'quick_gelu'"),
        ("opt-post-gelu", {"activation_function": ["relu"]}, "activation function"),
        ("opt-post-gelu", {"layer_norm_elementwise_affine": False}, "norms have no weights"),
        ("llama-grouped-tied", {"hidden_act": "relu6"}, "activation function 'relu6'"),
        ("llama-grouped-tied", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary positions are 'dynamic'"),
        ("llama-grouped-tied", {"rope_parameters": {"rope_type": "longrope"}}, "rotary positions are 'longrope'"),
        ("llama-grouped-tied", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ("llama-grouped-tied", {"rope_parameters": "linear"}, "") ,
    ],
)  # fmt: skip
def test_models_it_does_not_have(copy, name, fields, reason):
    directory = copy(name)
    assert unsupported(directory) is None
    change(directory, **fields)
    if not reason:
        with pytest.raises(MixbitsError):
            Engine(directory)
        return
    assert reason in unsupported(directory)
    with pytest.raises(SpecError, match=re.escape(reason) + r".*mixbits\.load can"):
        Engine(directory)


def test_product_units(copy):
    directory = copy()
    change_units(directory, lambda q: next(iter(q["units"].values())).update(spec="1-product"))
    assert "is product-quantized (1-product-v8)" in unsupported(directory)
    with pytest.raises(SpecError, match="native engine cannot run this model"):
        Engine(directory)


def test_bad_settings(zoo, tmp_path):
    directory = zoo("opt-post-gelu").directory
    for settings, message in (
        ({"activations": "int4"}, "expected int8 or float32"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"max_rows": -5}, "max_rows is -5"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 10**9}, "1 to 1024"),
    ):
        with pytest.raises(SpecError, match=message):
            Engine(directory, **settings)
    with pytest.raises(DataError, match="no such directory"):
        Engine(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"config\.json"):
        Engine(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no quantization_config"):
        Engine(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama-grouped-tied", {"num_hidden_layers": 3}, "layers.2.*is missing"),
        ("llama-grouped-tied", {"num_hidden_layers": 1}, "layers.1.*is not part of the model"),
        ("llama-grouped-tied", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected 1 to"),
        ("llama-grouped-tied", {"hidden_size": 26}, "cannot read it .*26"),
        ("llama-grouped-tied", {"num_key_value_heads": 1}, "do not make up the model"),
        ("llama-grouped-tied", {"num_key_value_heads": 3}, "do not make up the model|multiple|divis"),
        ("llama-grouped-tied", {"head_dim": 8}, "do not make up the model"),
        ("llama-grouped-tied", {"head_dim": 5}, "cannot read it .*head_dim"),
        ("llama-grouped-tied", {"intermediate_size": 41}, "do not make up the model"),
        ("llama-grouped-tied", {"attention_bias": True}, r"q_proj\.bias' is missing"),
        ("llama-untied-biased", {"attention_bias": False}, r"_proj\.bias' is not part"),
        ("llama-untied-biased", {"mlp_bias": False}, r"_proj\.bias' is not part"),
        ("llama-untied-biased", {"tie_word_embeddings": True}, r"lm_head\.\w+' is not part"),
        ("llama-grouped-tied", {"max_position_embeddings": 10**9}, "rotary positions of 1000000000 places"),
        ("llama-grouped-tied", {"rope_parameters": {"rope_type": "linear"}}, "rotary|factor|cannot read"),
        ("llama-grouped-tied", {"rope_parameters": {"rope_type": "yarn", "factor": "x", "rope_theta": 1e4}}, "rotary|factor|cannot read"),
        ("opt-post-gelu", {"max_position_embeddings": 15}, "16 positions are stored; .* says 15"),
        ("opt-post-gelu", {"max_position_embeddings": 10**9}, "16 positions are stored"),
        ("opt-post-gelu", {"max_position_embeddings": 1}, "16 positions are stored"),
        ("opt-post-gelu", {"do_layer_norm_before": True}, r"decoder\.final_layer_norm\.weight' is missing"),
        ("opt-pre-relu-untied", {"do_layer_norm_before": False}, "final_layer_norm.* is not part"),
        ("opt-pre-relu-untied", {"_remove_final_layer_norm": True}, "final_layer_norm.* is not part"),
        ("opt-pre-gelu-tanh-no-bias", {"enable_bias": True}, r"\.bias' is missing"),
        ("opt-post-gelu", {"enable_bias": False}, r"\.bias' is not part"),
        ("opt-post-gelu", {"num_attention_heads": 7}, "heads"),
        ("opt-post-gelu", {"num_attention_heads": 0}, "num_attention_heads is 0|cannot read"),
        ("opt-post-gelu", {"hidden_size": 2**32 + 24, "word_embed_proj_dim": None}, "hidden_size is 4294967320"),
        ("opt-post-gelu", {"vocab_size": 40}, ""),  # the files decide
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit_the_files(copy, name, fields, message):
    directory = copy(name)
    change(directory, **fields)
    if not message:
        assert Engine(directory).vocabulary_size == 41
        return
    with pytest.raises((FormatError, SpecError), match=message):
        Engine(directory)


def test_a_tie_to_nothing(copy):
    directory = copy()

    def edit(quantization):
        unit = quantization["units"]["model.embed_tokens"]
        unit["tied"] = [*unit["tied"], "model.other"]

    change_units(directory, edit)
    with pytest.raises(FormatError, match=r"'model\.other', tied to 'model\.embed_tokens', is not part of the model"):
        Engine(directory)


def test_a_head_of_its_own_is_missing(copy):
    directory = copy()
    change_units(directory, lambda q: q["units"]["model.embed_tokens"].update(tied=[]))
    change(directory, tie_word_embeddings=False)
    with pytest.raises(FormatError, match=r"lm_head\.weight' is missing"):
        Engine(directory)


def test_damaged_weights(copy):
    directory = copy()
    path = directory / "model.safetensors"
    whole = bytearray(path.read_bytes())
    for place in (len(whole) // 2, len(whole) - 5):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            Engine(directory)
    path.write_bytes(whole[:-10])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        Engine(directory)
    path.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Engine(directory)


@pytest.mark.parametrize("name", ["opt-pre-relu-untied", "llama-untied-biased"])
def test_strange_values_in_every_field(copy, name):
    """Refused with one of our errors, or the model runs; never a crash, another exception or memory without bound."""
    directory = copy(name)
    original = (directory / "config.json").read_text()
    strange = (None, 0, -1, 1, 7, 2**31, 2**32 + 2, 2**62, 1.5, 1e308, "", "12", [], [3], {}, {"a": 1}, True, False)
    refused = ran = 0
    for key in json.loads(original):
        if key in ("quantization_config", "transformers_version"):
            continue
        for value in strange:
            config = json.loads(original)
            config[key] = value
            (directory / "config.json").write_text(json.dumps(config))
            try:
                engine = Engine(directory)
            except MixbitsError:
                refused += 1
                continue
            ran += 1
            assert engine.score([[1, 2]]).shape == (1,)
    assert refused > 50
    assert ran > 50


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 41], [-1, 0], "outside the vocabulary: ids from 1 to 41, vocabulary of 41"),
        ([1, -1], [-1, 0], "outside the vocabulary"),
        ([2**62, 1], [-1, 0], "outside the vocabulary"),
        ([1, 2], [0, 0], "not a forest"),  # no root
        ([1, 2], [-1, 1], "not a forest"),  # its own parent
        ([1, 2], [-1, 2], "not a forest"),
        ([1, 2], [-1, 2**62], "not a forest"),
        ([1, 2], [-1, -2], "not a forest"),
        ([1, 2], [-1, -(2**63)], "not a forest"),
        ([1, 2, 1, 2], [-1, 0, -1, 1], "not a forest"),  # parent in another tree
        ([1, 2, 3], [-1, 0], "tokens of shape"),
        ([[1], [2]], [[-1], [0]], "tokens of shape"),
        ([1.0, 2.0], [-1, 0], "tokens are float64"),
        ([1, 2], [-1.0, 0.0], "parents are float64"),
        ([1] * 17, range(-1, 16), "longer than the model's context of 14 positions"),
    ],
)
@pytest.mark.parametrize("name", ["opt-post-gelu", "llama-grouped-tied"])
def test_forests_that_are_none(zoo, name, tokens, parents, message):
    class Forest:
        pass

    forest = Forest()
    forest.tokens, forest.parents = np.array(tokens), np.array(list(parents))
    engine = zoo(name).engine()
    with pytest.raises(DataError, match=message):
        engine.score_forest(forest)
    assert engine.score([[1] * 15]).shape == (1,)


def test_sequences_that_are_none(zoo):
    engine = zoo("opt-post-gelu").engine()
    for bad, message in (([[1] * 16], "context of 14"), ([[1, 2.5]], "whole numbers"), ([["a", "b"]], "whole numbers"), ([[1, 99]], "vocabulary")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            engine.score(bad)


def test_size_at_rest(zoo):
    """Of a model with wide rows and row scales: the packed bytes, padding to 64 rows and 32 columns, float32 scales and vectors."""
    packed = zoo("llama-wide", ("4",))
    engine = packed.engine()
    config = packed.twin.config
    shapes = 2 * [(1100, 136)] + 2 * [(136, 136), (68, 136), (68, 136), (136, 136), (200, 136), (200, 136), (136, 200)]
    padded = [(-(-r // 64) * 64, -(-c // 32) * 32) for r, c in shapes]
    tables = 2 * config.max_position_embeddings * 34 * 4
    assert engine.num_bytes == sum(r * c // 2 + 4 * r for r, c in padded) + tables + 5 * 136 * 4


def test_random_forests_are_accepted_if_and_only_if_they_are_forests(zoo):
    """Parents drawn at random: what the library says is what the definition says, and refused calls do not disturb later ones."""

    class Forest:
        pass

    def is_forest(parents):
        root, depth = 0, {}
        for node, parent in enumerate(parents):
            if parent == -1:
                root, depth[node] = node, 0
            elif root <= parent < node and parents[0] == -1:
                depth[node] = depth[parent] + 1
            else:
                return False
        return True

    rng = np.random.default_rng(5)
    engine = zoo("llama-grouped-tied").engine()
    expected = engine.score([[1, 2, 3]])
    accepted = 0
    for _ in range(2000):
        size = int(rng.integers(1, 7))
        parents = [
            int(rng.integers(-2 if rng.random() < 0.1 else -1, max(node, 1) + (rng.random() < 0.1)))
            for node in range(size)
        ]
        forest = Forest()
        forest.tokens, forest.parents = rng.integers(0, 41, size), np.array(parents)
        if is_forest(parents):
            accepted += 1
            assert np.isfinite(engine.score_forest(forest)).all()
        else:
            with pytest.raises(DataError, match="not a forest"):
                engine.score_forest(forest)
    assert 500 < accepted < 1500
    assert np.array_equal(engine.score([[1, 2, 3]]), expected)

"""Evaluating model directories: alone, in pairs, packed, and of different contexts."""

import math

import pytest

from mixbits.errors import DataError, FormatError
from mixbits.lm.checkpoint import load_model, save_model
from mixbits.lm.corpus import encode_file
from mixbits.lm.perplexity import perplexity
from mixbits.lm.tokenizer import word_tokenizer
from mixbits.pipeline.evaluate import evaluate_models


def test_alone(trained, texts):
    found = evaluate_models(trained, texts / "test.txt", context=8, stride=3)
    model, tokenizer = load_model(trained)
    expected = perplexity(model, encode_file(tokenizer, texts / "test.txt"), context=8, stride=3)
    assert found["ppl"] == expected.ppl
    assert (found["context"], found["stride"]) == (8, 3)
    assert found["unknown_words"] == "predicted as one <unk> each"
    assert "reference" not in found


def test_pairs(trained, make_model, texts, tmp_path):
    other = make_model(tmp_path / "other", "llama")
    found = evaluate_models(other, texts / "test.txt", reference=trained)
    back = evaluate_models(trained, texts / "test.txt", reference=other)
    assert found["delta_nats"] == pytest.approx(found["nats"] - found["reference"]["nats"], abs=1e-6)
    assert found["delta_nats"] == -back["delta_nats"] > 3 * found["delta_nats_stderr"] > 0
    assert found["delta_ppl_relative"] == pytest.approx(found["ppl"] / found["reference"]["ppl"] - 1, rel=1e-4)
    same = evaluate_models(trained, texts / "test.txt", reference=trained)
    assert (same["delta_nats"], same["delta_nats_stderr"]) == (0.0, 0.0)


def test_a_packed_model_is_evaluated_like_the_weights_it_stands_for(trained, texts, tmp_path):
    from mixbits.pipeline.quantize import quantize_model
    from mixbits.pipeline.settings import QuantizeSettings

    quantize_model(trained, tmp_path / "packed", settings=QuantizeSettings(), spec="8", show_progress=False)
    found = evaluate_models(tmp_path / "packed", texts / "test.txt", reference=trained)
    assert abs(found["delta_nats"]) < 0.05
    assert math.isfinite(found["ppl"])


def test_the_shorter_context_decides_for_both(trained, tokenizer, texts, tmp_path):
    from mixbits.lm.presets import ModelSize, build_model

    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=16, num_heads=2, context=6)
    short = build_model(size, load_model(trained)[1], seed=0)
    save_model(short, load_model(trained)[1], tmp_path / "short")
    for pair in ((trained, tmp_path / "short"), (tmp_path / "short", trained)):
        found = evaluate_models(pair[0], texts / "test.txt", reference=pair[1])
        assert found["context"] == found["reference"]["context"] == 6


def test_different_vocabularies_are_refused(trained, texts, tmp_path):
    from mixbits.lm.presets import ModelSize, build_model

    tokenizer = word_tokenizer(["another language altogether"], max_length=16)
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=16, num_heads=2, context=16)
    save_model(build_model(size, tokenizer, seed=0), tokenizer, tmp_path / "m")
    with pytest.raises(DataError, match="different vocabularies"):
        evaluate_models(trained, texts / "test.txt", reference=tmp_path / "m")


def test_broken_input(trained, texts, tmp_path):
    with pytest.raises(DataError, match="no such text file"):
        evaluate_models(trained, tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"no config\.json"):
        evaluate_models(tmp_path, texts / "test.txt")
    model, tokenizer = load_model(trained)
    save_model(model, tokenizer, tmp_path / "cut")
    data = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(FormatError, match="cannot be loaded"):
        evaluate_models(tmp_path / "cut", texts / "test.txt")

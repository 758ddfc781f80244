"""Sliding windows against a token-by-token loop, standard errors against a bootstrap, pairs, and broken models."""

import math

import numpy as np
import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.lm import loss as loss_module
from mixbits.lm.corpus import encode
from mixbits.lm.perplexity import Perplexity, from_nll, paired_difference, perplexity
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer

WORDS = [f"w{i}" for i in range(20)]
NATS = 2e-5  # float32 sums in another order
CONTEXT = 12


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join(WORDS)])


def make(tokenizer, seed=0, preset="paper"):
    size = ModelSize(preset=preset, num_layers=2, hidden_size=16, feed_forward_size=24, num_heads=2, context=CONTEXT)
    model = build_model(size, tokenizer, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def text(num_tokens, tokenizer, seed=0):
    """A stream of exactly num_tokens predictions, in sentences of uneven length."""
    generator, lines, left = np.random.default_rng(seed), [], num_tokens
    while left:
        length = min(int(generator.integers(2, 9)), left)
        length = left if left - length == 1 else length
        lines.append(" ".join(generator.choice([*WORDS, "unseen"], length - 1)))
        left -= length
    stream = encode(tokenizer, lines)
    assert stream.num_tokens == num_tokens
    return stream


def brute_force(model, stream, context, stride):
    """Token t lies in the first window, or in the regular window or last one that scores it; one full forward each."""
    n, nll = stream.num_tokens, []
    for t in range(n):
        if t < context:
            start = 0
        else:
            start = ((t - context) // stride + 1) * stride  # windows end at context, context + stride, ...
            if start + context > n:
                start = n - context
        ids = torch.tensor(stream.ids[None, start : t + 1].astype(np.int64))
        with torch.no_grad():
            log_probs = model.eval()(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        nll.append(-float(log_probs[int(stream.ids[t + 1])]))
    return np.array(nll)


@pytest.mark.parametrize("preset", ["paper", "llama"])
@pytest.mark.parametrize(
    ("num_tokens", "context", "stride"),
    [
        (60, 12, 6),  # exact number of windows
        (61, 12, 6),  # one left over
        (65, 12, 6),  # all but one of a stride left over
        (60, 12, 12),  # no overlap
        (67, 12, 12),
        (50, 12, 1),  # a window a token
        (40, 7, 5),
        (12, 12, 6),  # exactly one window
        (11, 12, 6),  # shorter than the window
        (13, 12, 6),
        (2, 12, 6),
    ],
)
def test_windows_against_a_loop(tokenizer, preset, num_tokens, context, stride):
    model, stream = make(tokenizer, preset=preset), text(num_tokens, tokenizer)
    expected = brute_force(model, stream, context, stride)
    for batch_size in (1, 32):
        found = perplexity(model, stream, context=context, stride=stride, batch_size=batch_size)
        np.testing.assert_allclose(found.nll, expected, atol=NATS)
    assert found.nats_per_token == pytest.approx(expected.mean(), abs=NATS)
    assert found.ppl == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_defaults_are_the_models_context_and_half_of_it(tokenizer):
    found = perplexity(make(tokenizer), text(30, tokenizer))
    assert (found.context, found.stride) == (CONTEXT, CONTEXT // 2)


def test_full_logits_path_in_parts(tokenizer, monkeypatch):
    model, stream = make(tokenizer), text(60, tokenizer)
    expected = perplexity(model, stream).nll
    monkeypatch.setitem(loss_module._PLAIN_HEADS, model, False)
    monkeypatch.setattr(loss_module, "_SCORE_CHUNK_ELEMENTS", 1)
    np.testing.assert_allclose(perplexity(model, stream).nll, expected, atol=NATS)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tokenizer):
    model = make(tokenizer)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    stream = text(100, tokenizer)
    found = perplexity(model, stream)
    assert found.ppl == pytest.approx(len(tokenizer), rel=1e-6)
    assert found.nats_stderr == pytest.approx(0.0, abs=1e-6)
    assert found.num_unknown == int((stream.ids == tokenizer.unk_token_id).sum()) > 0


def test_standard_error_against_a_bootstrap_over_sentences(tokenizer):
    stream = text(2500, tokenizer)
    generator = np.random.default_rng(1)
    of_sentence = generator.normal(size=stream.sentence.max() + 1)  # tokens of a sentence move together
    nll = (5 + of_sentence[stream.sentence] + generator.normal(size=stream.num_tokens)).astype(np.float32)
    found = from_nll(nll, stream, context=8, stride=4)
    sums, lengths = np.bincount(stream.sentence, nll.astype(float)), np.bincount(stream.sentence)
    draws = generator.integers(0, len(sums), (4000, len(sums)))
    means = sums[draws].sum(1) / lengths[draws].sum(1)
    assert found.nats_per_token == pytest.approx(nll.mean(), rel=1e-5)
    assert found.nats_stderr == pytest.approx(means.std(), rel=0.06)  # 4000 draws: 1.1 %, finite sample: a few
    assert found.nats_stderr > 1.5 * nll.std() / math.sqrt(len(nll))  # what independent tokens would claim
    assert found.ppl_stderr == pytest.approx(found.ppl * found.nats_stderr)


def test_one_sentence_has_no_standard_error(tokenizer):
    found = perplexity(make(tokenizer), encode(tokenizer, ["w1 w2 w3"]))
    assert math.isinf(found.nats_stderr)


def test_paired_difference(tokenizer):
    stream = text(300, tokenizer)
    a, b = (perplexity(make(tokenizer, seed=seed), stream) for seed in (0, 1))
    delta, stderr = paired_difference(a, b, stream)
    back, same = paired_difference(b, a, stream)
    assert delta == pytest.approx(a.nats_per_token - b.nats_per_token, abs=1e-6)
    assert (back, same) == (-delta, stderr)
    assert stderr > 0
    assert paired_difference(a, a, stream) == (0.0, 0.0)
    with pytest.raises(DataError, match="different tokens"):
        paired_difference(a, perplexity(make(tokenizer), text(299, tokenizer)), stream)


def test_pairing_takes_out_what_sentences_have_in_common(tokenizer):
    stream = text(1000, tokenizer)
    hard = np.random.default_rng(0).normal(6, 2, stream.sentence.max() + 1)[stream.sentence].astype(np.float32)
    a, b = (from_nll(hard + shift, stream, context=8, stride=4) for shift in (np.float32(0.1), np.float32(0)))
    delta, stderr = paired_difference(a, b, stream)
    assert delta == pytest.approx(0.1, abs=1e-5)
    assert stderr < 1e-5 < a.nats_stderr


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_an_error(tokenizer, value):
    model = make(tokenizer)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = value
    with pytest.raises(DataError, match="non-finite log-probabilities"):
        perplexity(model, text(40, tokenizer))


def test_a_text_of_another_vocabulary_is_an_error(tokenizer):
    other = word_tokenizer([" ".join(f"v{i}" for i in range(100))])
    with pytest.raises(DataError, match="vocabulary 23"):
        perplexity(make(tokenizer), encode(other, ["v1 v99"]))


@pytest.mark.parametrize("window", [{"context": 13}, {"context": 0}, {"stride": 0}, {"stride": 13}, {"context": -4}])
def test_impossible_windows(tokenizer, window):
    with pytest.raises(SpecError, match="does not fit"):
        perplexity(make(tokenizer), text(40, tokenizer), **window)


def test_word_perplexity_of_a_subword_model(byte_level):
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=16, num_heads=2, context=CONTEXT)
    lines = ["the cat sat", "an unheard-of caf\u00e9"]
    stream = encode(byte_level, lines)
    found = perplexity(build_model(size, byte_level, seed=0), stream)
    assert found.num_words == 8  # with two ends of sentences
    assert found.num_tokens == sum(len(byte_level(line)["input_ids"]) + 1 for line in lines) > 8
    assert found.num_unknown == 0
    assert math.log(found.word_ppl) == pytest.approx(float(found.nll.sum()) / 8, rel=1e-5)


def test_word_and_token_perplexity_agree_for_words(tokenizer):
    found = perplexity(make(tokenizer), text(60, tokenizer))
    assert found.word_ppl == pytest.approx(found.ppl)
    plain = found.to_json()
    assert plain["ppl"] == found.ppl
    assert "nll" not in plain


def test_huge_losses_do_not_overflow():
    found = Perplexity(5000.0, 1.0, 10, 5, 0, 8, 4, np.zeros(10, np.float32))
    assert found.ppl == found.word_ppl == math.inf


def test_modes_are_left_as_they_were(tokenizer):
    model = make(tokenizer).train()
    frozen = model.model.decoder.layers[0].eval()
    perplexity(model, text(40, tokenizer))
    assert model.training
    assert not frozen.training

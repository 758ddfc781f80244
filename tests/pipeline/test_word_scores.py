"""Neural scores word by word add up to the scores of hypotheses; interpolation with an n-gram model at both ends."""

import numpy as np
import pytest

from mixbits.asr.kneser_ney import FALLBACK, estimate
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.ngram_counts import encode_text
from mixbits.asr.ngram_features import ngram_features
from mixbits.lm.checkpoint import load_model
from mixbits.lm.corpus import read_sentences
from mixbits.pipeline.lm_scores import neural_features
from mixbits.pipeline.word_scores import interpolated_lm_scores, neural_word_log_probs


@pytest.fixture(scope="module")
def lists(texts):
    lines = list(read_sentences(texts / "test.txt"))[:12]
    entries = []
    for number in range(0, 12, 3):
        alternatives = [
            lines[number],
            lines[number] + " zebra",
            lines[number + 1],
            " ".join(lines[number].split()[:-1]),
            "",
        ]
        entries.append(NBest(f"u{number}", tuple(Hypothesis(text, -1.0) for text in alternatives)))
    return entries


def test_words_add_up_to_hypotheses(trained, lists):
    words = neural_word_log_probs(trained, lists, max_tokens=40)
    whole = neural_features(trained, lists).neural_lm_score
    flat = [scores for some in words for scores in some]
    assert [len(scores) for scores in flat] == [len(h.words) + 1 for entry in lists for h in entry.hypotheses]
    assert np.array([scores.sum() for scores in flat]) == pytest.approx(whole, abs=1e-4)


def test_pieces_are_summed(trained, lists, tokenizer):
    """The same model with every letter a token of its own: scores of words are sums over letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, _ = load_model(trained)
    letters = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(10)}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    spelled = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", bos_token="</s>", pad_token="<pad>"
    )
    few = [NBest("u", (Hypothesis("abc de f", -1.0), Hypothesis("abc dz", -1.0)))]
    words = neural_word_log_probs((model, spelled), few, runtime="pytorch")
    assert [len(scores) for scores in words[0]] == [4, 3]
    whole = neural_features((model, spelled), few, runtime="pytorch").neural_lm_score
    assert [scores.sum() for scores in words[0]] == pytest.approx(whole, abs=1e-4)
    assert words[0][0][0] == pytest.approx(words[0][1][0], abs=1e-5)


def test_interpolated_scores(trained, lists, texts):
    ngram = estimate(encode_text(read_sentences(texts / "train.txt")), order=3, fallback=FALLBACK).model
    neural = neural_word_log_probs(trained, lists)
    alone = ngram_features(lists, ngram).ngram_score
    whole = np.array([scores.sum() for some in neural for scores in some])
    assert interpolated_lm_scores(neural, lists, ngram, weight=1.0) == pytest.approx(whole)
    assert interpolated_lm_scores(neural, lists, ngram, weight=0.0) == pytest.approx(alone)
    mixed = interpolated_lm_scores(neural, lists, ngram, weight=0.5)
    assert np.all(mixed >= 0.5 * (whole + alone) - 1e-9)  # ln is concave

"""n-gram features of lists, per-word interpolation, the best weight, and a neural model's scores word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from mixbits.asr.kneser_ney import FALLBACK, estimate
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.ngram_counts import encode_text
from mixbits.asr.ngram_features import (
    best_weight,
    interpolated_score,
    interpolated_words,
    neural_word_scores,
    ngram_features,
)
from mixbits.errors import DataError, SpecError

LISTS = [
    NBest("u1", (Hypothesis("a b c", -1.0), Hypothesis("a zebra", -2.0), Hypothesis("", -3.0))),
    NBest("u2", (Hypothesis("a b c", -1.0), Hypothesis("A B", -2.0))),
]


@pytest.fixture(scope="module")
def model():
    return estimate(encode_text(["a b c", "a c b", "b c", "c"]), order=3, fallback=FALLBACK).model


def test_features_of_lists(model):
    found = ngram_features(LISTS, model)
    texts = [hypothesis.text for entry in LISTS for hypothesis in entry.hypotheses]
    for number, text in enumerate(texts):
        alone = model.score([text.split()])
        assert found.words.of(number) == pytest.approx(alone.log_p)
        assert found.ngram_score[number] == pytest.approx(alone.log_p.sum())
    assert found.num_unknown.tolist() == [0, 1, 0, 0, 2]
    lower = ngram_features(LISTS, model, lower_case=True)
    assert lower.num_unknown.tolist() == [0, 1, 0, 0, 0]


def test_interpolation_in_closed_form():
    p, q = np.array([0.5, 0.1, 0.2]), np.array([0.25, 0.3, 0.0])
    with np.errstate(divide="ignore"):
        a, b = np.log(p), np.log(q)
    assert np.exp(interpolated_words(a, b, 0.25)) == pytest.approx(0.25 * p + 0.75 * q, rel=1e-14)
    assert interpolated_score(a, b, 0.25) == pytest.approx(math.log(np.prod(0.25 * p + 0.75 * q)))
    assert interpolated_words(a, b, 1.0) == pytest.approx(a)
    assert interpolated_words(a, b, 0.0)[:2] == pytest.approx(b[:2])
    assert interpolated_score(a, b, 0.0) == -np.inf
    assert interpolated_score([], [], 0.5) == 0.0
    tiny = interpolated_words([-1000.0], [-1001.0], 0.5)
    assert tiny == pytest.approx([-1000 + math.log(0.5 * (1 + math.exp(-1)))])
    with pytest.raises(SpecError, match="expected 0 to 1"):
        interpolated_score(a, b, 1.5)
    with pytest.raises(DataError, match="one each for every word"):
        interpolated_score(a, b[:2], 0.5)
    with pytest.raises(DataError, match="NaN"):
        interpolated_score([math.nan], [-1.0], 0.5)


def em_weight(a, b, steps):
    """The EM algorithm: the mean share of the first model."""
    weight = 0.5
    for _ in range(steps):
        weight = np.mean(weight * np.exp(a) / (weight * np.exp(a) + (1 - weight) * np.exp(b)))
    return weight


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.5])
def test_best_weight(shift):
    rng = np.random.default_rng(3)
    a, b = rng.normal(-4, 1, 500) + shift, rng.normal(-4, 1, 500)
    found = best_weight(a, b)
    searched = minimize_scalar(
        lambda w: -interpolated_score(a, b, w), bounds=(0, 1), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(searched.x, abs=1e-6)
    assert found == pytest.approx(em_weight(a, b, 3000), abs=1e-6)


def test_best_weight_at_the_ends():
    assert best_weight([-1.0, -2.0], [-3.0, -4.0]) == pytest.approx(1.0)
    assert best_weight([-3.0, -4.0], [-1.0, -2.0]) == pytest.approx(0.0)
    assert 0 < best_weight([-2.0, -2.0], [-0.5, -np.inf]) < 1


def test_scores_of_words_from_shared_prefixes():
    """A made-up scorer whose node scores tell token and depth."""
    lists = [[[0, 5, 6, 7, 0], [0, 5, 6, 0], [0, 0]], [[0, 8, 0]]]
    pieces = [[[2, 1], [1, 1], []], [[1]]]

    def score_forest(forest):
        return np.where(forest.parents < 0, 0.0, -(forest.tokens + 0.01 * forest.depths))

    for max_tokens in (4, 100):
        found = neural_word_scores(lists, pieces, score_forest=score_forest, max_tokens_per_forest=max_tokens)
        assert found[0][0] == pytest.approx([-11.03, -7.03, -0.04])
        assert found[0][1] == pytest.approx([-5.01, -6.02, -0.03])
        assert found[0][2] == pytest.approx([-0.01])
        assert found[1][0] == pytest.approx([-8.01, -0.02])
    with pytest.raises(DataError, match="list 1, hypothesis 0: 2 tokens"):
        neural_word_scores(lists, [pieces[0], [[2]]], score_forest=score_forest, max_tokens_per_forest=100)

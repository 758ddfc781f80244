"""Rescoring: shared prefixes give what scoring one by one gives, lists come out sorted, nothing is cut silently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.asr.formats.jsonl import read_nbest, write_nbest
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.rescore import apply_weights, features_of, lm_features, rescore
from mixbits.asr.trie import TokenForest
from mixbits.asr.tune import tune_on_lists
from mixbits.asr.weights import Weights
from mixbits.asr.wer import one_best_errors
from mixbits.errors import DataError, SpecError

VOCABULARY = {"a": 1, "b": 2, "c": 3}
LOG_P = np.log(np.random.default_rng(0).dirichlet(np.ones(5), size=5))
"""A bigram over <s>/</s> = 0, a, b, c and <unk> = 4."""


def encode(text: str) -> list[int]:
    return [0, *(VOCABULARY.get(word, 4) for word in text.split()), 0]


def count_unknown(text: str) -> int:
    return sum(word not in VOCABULARY for word in text.split())


def score_forest(forest: TokenForest) -> np.ndarray:
    scores = LOG_P[forest.tokens[forest.parents], forest.tokens]
    scores[forest.parents < 0] = 0
    return scores


def score_hypotheses(sequences: Sequence[Sequence[int]]) -> list[float]:
    return [sum(LOG_P[a, b] for a, b in pairwise(ids)) for ids in sequences]


texts = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=6).map(" ".join)
nbest_lists = st.lists(
    st.lists(st.builds(Hypothesis, texts, st.floats(-50, 0)), min_size=1, max_size=6), min_size=1, max_size=6
).map(lambda many: [NBest(f"u{i}", tuple(hypotheses), "a b") for i, hypotheses in enumerate(many)])


@settings(deadline=None)
@given(lists=nbest_lists, max_tokens=st.integers(2, 60))
def test_shared_equals_one_by_one(lists: list[NBest], max_tokens: int) -> None:
    shared = lm_features(
        lists,
        encode=encode,
        score_forest=score_forest,
        count_unknown=count_unknown,
        max_tokens_per_forest=max_tokens,
    )
    naive = lm_features(lists, encode=encode, score_hypotheses=score_hypotheses)
    flat = [hypothesis.text for entry in lists for hypothesis in entry.hypotheses]
    assert shared.neural_lm_score == pytest.approx(naive.neural_lm_score, abs=1e-9)
    assert naive.neural_lm_score == pytest.approx(score_hypotheses([encode(text) for text in flat]))
    assert shared.num_tokens.tolist() == [len(text.split()) + 1 for text in flat]
    assert shared.num_unknown.tolist() == [text.count("d") for text in flat]
    assert shared.num_nodes <= naive.num_nodes
    assert shared.shared <= naive.shared == 1.0


@settings(deadline=None)
@given(lists=nbest_lists)
def test_sorted_by_total(lists: list[NBest]) -> None:
    weights = Weights(neural_lm_scale=0.7, word_insertion_penalty=0.3, unknown_word_penalty=-2.0)
    result = rescore(lists, weights=weights, encode=encode, score_forest=score_forest, count_unknown=count_unknown)
    for old, new, pick in zip(lists, result.lists, result.picks, strict=True):
        totals = [hypothesis.extra["total_score"] for hypothesis in new.hypotheses]
        assert totals == sorted(totals, reverse=True)
        assert sorted(h.text for h in old.hypotheses) == sorted(h.text for h in new.hypotheses)
        assert new.one_best.text == old.hypotheses[pick].text
        for hypothesis in new.hypotheses:
            lm_score = score_hypotheses([encode(hypothesis.text)])[0]
            expected = hypothesis.acoustic_score + 0.7 * lm_score + 0.3 * len(hypothesis.words)
            expected -= 2.0 * count_unknown(hypothesis.text)
            assert hypothesis.extra["neural_lm_score"] == pytest.approx(lm_score)
            assert hypothesis.extra["total_score"] == pytest.approx(expected)


def test_scores_are_written_and_equals_keep_their_order(tmp_path: Path) -> None:
    lists = [NBest("u", (Hypothesis("b", -1.0, None, {"id": 1}), Hypothesis("b", -1.0, None, {"id": 2})))]
    result = rescore(lists, weights=Weights(neural_lm_scale=1.0), encode=encode, score_forest=score_forest)
    write_nbest(tmp_path / "out.jsonl", result.lists)
    written = read_nbest(tmp_path / "out.jsonl")
    assert written.lists == result.lists
    assert [hypothesis.extra["id"] for hypothesis in written[0].hypotheses] == [1, 2]
    assert set(written[0].one_best.extra) == {"id", "total_score", "neural_lm_score"}
    again = rescore(written, weights=Weights(neural_lm_scale=1.0), encode=encode, score_forest=score_forest)
    assert again.lists == result.lists


def test_tuned_weights_lower_errors_and_agree_with_the_rescored_lists() -> None:
    rng = np.random.default_rng(3)
    lists = []
    for number in range(80):
        words = [list(VOCABULARY)[i] for i in rng.integers(3, size=6)]
        hypotheses = []
        for _ in range(6):
            changed = [word if rng.random() < 0.8 else "d" for word in words]
            hypotheses.append(Hypothesis(" ".join(changed), float(rng.normal())))
        lists.append(NBest(f"u{number}", tuple(hypotheses), " ".join(words)))
    lm = lm_features(lists, encode=encode, score_forest=score_forest, count_unknown=count_unknown)
    tuned = tune_on_lists(lists, neural_lm_score=lm.neural_lm_score, num_unknown=lm.num_unknown)
    rescored = apply_weights(lists, lm, tuned.weights, allow_overlap=True)
    assert one_best_errors(rescored.lists).num_errors == tuned.num_errors == tuned.weights.dev_errors
    assert tuned.num_errors < 0.7 * one_best_errors(lists).num_errors
    assert rescored.one_best == [entry.one_best.text for entry in rescored.lists]
    with pytest.raises(DataError, match="tuned on"):
        rescore(lists, weights=tuned.weights, encode=encode, score_forest=score_forest)


class LimitedScorer:
    max_length = 4

    def __call__(self, forest: TokenForest) -> np.ndarray:
        return score_forest(forest)


def test_too_long_is_refused_by_name() -> None:
    lists = [
        NBest("short", (Hypothesis("a b", -1.0),)),
        NBest("long", (Hypothesis("a", -1.0), Hypothesis("a b c", -1.0))),
    ]
    lm_features(lists[:1], encode=encode, score_forest=LimitedScorer())
    with pytest.raises(DataError, match="'long', hypothesis 2: 5 tokens, but the model takes at most 4"):
        lm_features(lists, encode=encode, score_forest=LimitedScorer())


def test_refusals() -> None:
    lists = [NBest("u", (Hypothesis("a", -1.0), Hypothesis("b", -1.0)))]
    with pytest.raises(SpecError, match="exactly one"):
        lm_features(lists, encode=encode)
    with pytest.raises(SpecError, match="at least 2"):
        lm_features(lists, encode=encode, score_forest=score_forest, max_tokens_per_forest=1)
    with pytest.raises(DataError, match="no tokens"):
        lm_features(lists, encode=lambda text: [], score_forest=score_forest)
    with pytest.raises(DataError, match="finite"):
        lm_features(lists, encode=encode, score_forest=lambda forest: np.full(forest.num_nodes, np.nan))
    with pytest.raises(DataError, match="finite numbers"):
        lm_features(lists, encode=encode, score_hypotheses=lambda sequences: [0.0])
    with pytest.raises(DataError, match="first-pass lm_score"):
        apply_weights(lists, None, Weights(first_pass_lm_scale=1.0))
    with pytest.raises(DataError, match="none was computed"):
        apply_weights(lists, None, Weights(neural_lm_scale=1.0))


def test_without_a_language_model_and_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    lists = [NBest("u", (Hypothesis("a", -2.0), Hypothesis("b", -1.0)))]
    assert apply_weights(lists, None, Weights()).picks.tolist() == [1]
    assert features_of(lists, None).values[:, 2].tolist() == [0, 0]
    lm = lm_features(lists, encode=encode, score_forest=score_forest, progress=True)
    assert lm.num_nodes == 4
    assert capsys.readouterr().out == ""

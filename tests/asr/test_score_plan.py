"""Contexts, sliding windows and merged histories against scoring by hand with a model whose log-probabilities are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.rescore import lm_features
from mixbits.asr.trie import TokenForest, build_forest, plan_forests
from mixbits.errors import DataError, SpecError

texts = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)
lists_of_texts = st.lists(st.lists(texts, min_size=1, max_size=5), min_size=1, max_size=4)


def encode(text: str) -> list[int]:
    return [0, *("abc".index(word) + 1 for word in text.split()), 0]


def as_lists(many: list[list[str]]) -> list[NBest]:
    return [NBest(f"u{i}", tuple(Hypothesis(text, 0.0) for text in some)) for i, some in enumerate(many)]


def log_p(history: tuple[int, ...], token: int) -> float:
    """Depends on the whole history."""
    return -((hash((history, token, 7)) % 99_991) / 99_991) - 0.01


class Scorer:
    """Tries by walking over parents; ``order``: only so many last tokens of the history count."""

    def __init__(self, max_length: int | None = None, order: int | None = None) -> None:
        self.max_length, self.order, self.num_nodes = max_length, order, 0

    def seen(self, history: tuple[int, ...]) -> tuple[int, ...]:
        return history if self.order is None else history[-self.order :]

    def __call__(self, forest: TokenForest) -> np.ndarray:
        scores, histories = np.zeros(forest.num_nodes), []
        for node, (token, parent) in enumerate(zip(forest.tokens.tolist(), forest.parents.tolist(), strict=True)):
            before = () if parent < 0 else histories[parent]
            histories.append((*before, token))
            assert self.max_length is None or len(histories[-1]) <= self.max_length
            scores[node] = 0.0 if parent < 0 else log_p(self.seen(before), token)
        self.num_nodes += forest.num_nodes
        return scores


def total(ids: list[int], *, first: int = 1, begin=lambda place: 0, seen=lambda history: history) -> float:
    """Sum of log p(ids[place] | ids[begin(place):place]) over places from ``first``."""
    return sum(log_p(seen(tuple(ids[begin(place) : place])), ids[place]) for place in range(first, len(ids)))


@given(lists_of_texts, st.lists(texts, min_size=4, max_size=4))
def test_context_is_read_and_not_scored(many: list[list[str]], before: list[str]) -> None:
    contexts = [encode(text) for text in before[: len(many)]]
    for way in ({"score_forest": Scorer()}, {"score_hypotheses": lambda batch: [total(list(ids)) for ids in batch]}):
        found = lm_features(as_lists(many), encode=encode, contexts=contexts, **way)
        expected = [
            total([*context, *encode(text)[1:]], first=len(context))
            for context, some in zip(contexts, many, strict=True)
            for text in some
        ]
        assert found.neural_lm_score == pytest.approx(expected, abs=1e-9)
        assert found.num_tokens.tolist() == [len(encode(text)) - 1 for some in many for text in some]


def test_context_loses_its_earliest_ids_where_it_does_not_fit() -> None:
    context = [0, 1, 2, 0, 3, 3, 0]
    (entry,) = as_lists([["a b", "a"]])
    for max_length, kept in ((20, context), (10, context), (9, [0, 2, 0, 3, 3, 0]), (5, [0, 0]), (4, [0])):
        found = lm_features([entry], encode=encode, contexts=[context], score_forest=Scorer(max_length))
        expected = [total([*kept, 1, 2, 0], first=len(kept)), total([*kept, 1, 0], first=len(kept))]
        assert found.neural_lm_score == pytest.approx(expected, abs=1e-9), max_length
    with pytest.raises(DataError, match="'u0', hypothesis 1: 4 tokens, but the model takes at most 3"):
        lm_features([entry], encode=encode, contexts=[context], score_forest=Scorer(3))


@given(lists_of_texts, st.integers(2, 9))
def test_windows_score_every_token_once_with_at_least_half_the_history(many: list[list[str]], length: int) -> None:
    found = lm_features(as_lists(many), encode=encode, score_forest=Scorer(length), long_hypotheses="window")
    stride = max(1, length // 2)

    def expected(ids: list[int]) -> float:
        def begin(place: int) -> int:
            if place < length:
                return 0
            stop = min(length + (place - length) // stride * stride + stride, len(ids))
            assert place - (stop - length) >= length - stride
            return stop - length

        return total(ids, begin=begin)

    assert found.neural_lm_score == pytest.approx([expected(encode(t)) for some in many for t in some], abs=1e-9)
    assert found.num_windows == sum(len(encode(t)) > length for some in many for t in some)


def test_five_hundred_words() -> None:
    long = " ".join("abc"[i * i % 3] for i in range(500))
    found = lm_features(as_lists([[long, "a"]]), encode=encode, score_forest=Scorer(64), long_hypotheses="window")
    assert np.isfinite(found.neural_lm_score).all()
    assert found.num_windows == 1
    assert found.num_nodes < 2 * 502 + 32


@given(lists_of_texts, st.integers(1, 4))
def test_merging_is_exact_for_a_model_of_that_order(many: list[list[str]], order: int) -> None:
    exact, merged = Scorer(order=order), Scorer(order=order)
    right = lm_features(as_lists(many), encode=encode, score_forest=exact)
    found = lm_features(as_lists(many), encode=encode, score_forest=merged, merge_order=order)
    assert found.neural_lm_score == pytest.approx(right.neural_lm_score, abs=1e-9)
    assert found.num_tokens.tolist() == right.num_tokens.tolist()
    assert merged.num_nodes <= exact.num_nodes


@given(
    st.lists(st.lists(st.integers(1, 3), max_size=12).map(lambda ids: [0, *ids, 0]), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_merged_states(sequences: list[list[int]], order: int) -> None:
    forest = build_forest([sequences], merge_order=order)
    assert forest.visits is not None
    assert forest.visit_offsets is not None
    inner = {int(parent) for parent in forest.parents if parent >= 0}
    histories: dict[int, tuple[int, ...]] = {}
    for node in inner:
        path = [node]
        while forest.parents[path[0]] >= 0:
            path.insert(0, int(forest.parents[path[0]]))
        assert forest.depths[node] == len(path) - 1
        histories[node] = tuple(forest.tokens[path].tolist())
    full = [history[-order:] for history in histories.values() if len(history) > order]
    assert len(full) == len(set(full))  # no two states with the same last tokens
    for number, sequence in enumerate(sequences):
        visited = forest.visits[forest.visit_offsets[number] : forest.visit_offsets[number + 1]]
        assert forest.tokens[visited].tolist() == sequence[1:]
        for place, node in enumerate(visited, 1):  # what stands before a token ends as its own history does
            before = histories[int(forest.parents[node])]
            assert before[-order:] == tuple(sequence[:place])[-order:]


def test_merged_trees_keep_the_budget() -> None:
    rng = np.random.default_rng(0)
    lists = [[[0, *rng.integers(1, 4, 20).tolist(), 0] for _ in range(10)] for _ in range(6)]
    exact = [forest.num_nodes for forest, _ in plan_forests(lists, max_tokens=300)]
    planned = list(plan_forests(lists, max_tokens=300, merge_order=2))
    assert sorted(member for _, members in planned for member in members) == [
        (i, j) for i in range(6) for j in range(10)
    ]
    assert all(forest.num_trees * forest.max_tree_nodes <= 300 for forest, _ in planned)
    assert sum(forest.num_nodes for forest, _ in planned) < 0.5 * sum(exact)


def test_refusals() -> None:
    lists = as_lists([["a"]])
    with pytest.raises(SpecError, match="merge order is 0"):
        lm_features(lists, encode=encode, score_forest=Scorer(), merge_order=0)
    with pytest.raises(SpecError, match="no context"):
        lm_features(lists, encode=encode, score_forest=Scorer(), merge_order=2, contexts=[[0]])
    with pytest.raises(SpecError, match="need prefix tries"):
        lm_features(lists, encode=encode, score_hypotheses=lambda batch: [0.0], merge_order=2)

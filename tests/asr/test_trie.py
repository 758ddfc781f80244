"""Prefix sharing: exact structure on small cases, equality with one-by-one scoring on random ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.trie import TokenForest, build_forest, plan_forests, split_by_nodes
from mixbits.errors import DataError

sequences = st.lists(st.integers(1, 3), max_size=7).map(lambda ids: [0, *ids])
trees = st.lists(sequences, min_size=1, max_size=8)


def prefix_score(prefix: tuple[int, ...]) -> float:
    """A made-up but exact log p(last token | the ones before)."""
    return -((hash(prefix) % 1_000_003) / 1_000_003) - 0.01


def score_by_walking(forest: TokenForest) -> np.ndarray:
    """A scorer that reads nothing but tokens and parents."""
    scores = np.zeros(forest.num_nodes)
    prefixes: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(forest.tokens.tolist(), forest.parents.tolist(), strict=True)):
        prefixes.append((token,) if parent < 0 else (*prefixes[parent], token))
        scores[node] = 0.0 if parent < 0 else prefix_score(prefixes[node])
    return scores


def score_alone(sequence: list[int]) -> float:
    return sum(prefix_score(tuple(sequence[: stop + 1])) for stop in range(1, len(sequence)))


def test_structure() -> None:
    forest = build_forest([[[9, 1, 2, 9], [9, 1, 3, 9], [9, 1, 2, 9], [9, 1]], [[9, 1, 2]], [[9]]])
    assert forest.tokens.tolist() == [9, 1, 2, 9, 3, 9, 9, 1, 2, 9]
    assert forest.parents.tolist() == [-1, 0, 1, 2, 1, 4, -1, 6, 7, -1]
    assert forest.depths.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2, 0]
    assert forest.tree_offsets.tolist() == [0, 6, 9, 10]
    assert forest.ends.tolist() == [3, 5, 3, 1, 8, 9]
    assert (forest.num_tokens, forest.num_trees, forest.max_tree_nodes) == (12, 3, 6)
    assert forest.path(1).tolist() == [0, 1, 4, 5]
    assert forest.sequence_scores(np.arange(10.0)).tolist() == [6, 10, 6, 1, 21, 9]


@given(st.lists(trees, min_size=1, max_size=4))
def test_forest_properties(many: list[list[list[int]]]) -> None:
    forest = build_forest(many)
    flat = [sequence for tree in many for sequence in tree]
    prefixes = sum(len({tuple(s[:stop]) for s in tree for stop in range(1, len(s) + 1)}) for tree in many)
    assert forest.num_nodes == prefixes
    assert forest.num_tokens == sum(len(sequence) - 1 for sequence in flat)
    assert all(parent < node for node, parent in enumerate(forest.parents))
    for number, sequence in enumerate(flat):
        path = forest.path(number)
        assert forest.tokens[path].tolist() == sequence
        assert forest.depths[path].tolist() == list(range(len(sequence)))
    scores = forest.sequence_scores(score_by_walking(forest))
    assert scores == pytest.approx([score_alone(sequence) for sequence in flat], abs=1e-12)


@given(trees)
def test_ancestor_mask_is_the_path(tree: list[list[int]]) -> None:
    forest = build_forest([[[0, 5]], tree])
    mask = forest.ancestor_mask(1)
    start = int(forest.tree_offsets[1])
    for number in range(1, 1 + len(tree)):
        row = mask[forest.ends[number] - start]
        assert (np.flatnonzero(row) + start).tolist() == forest.path(number).tolist()


@given(trees, st.integers(2, 20))
def test_split_keeps_order_and_bound(tree: list[list[int]], max_nodes: int) -> None:
    parts = split_by_nodes(tree, max_nodes=max_nodes)
    assert [index for _, part in parts for index in part] == list(range(len(tree)))
    for size, part in parts:
        assert size == build_forest([[tree[index] for index in part]]).num_nodes
        assert size <= max_nodes or len(part) == 1


@given(st.lists(trees, min_size=1, max_size=6), st.integers(2, 40))
def test_plan_covers_everything_once_within_the_budget(many: list[list[list[int]]], max_tokens: int) -> None:
    seen = []
    for forest, members in plan_forests(many, max_tokens=max_tokens):
        seen.extend(members)
        assert len(members) == len(forest.ends)
        assert forest.num_trees * forest.max_tree_nodes <= max_tokens or len(members) == 1
        for sequence, (number, index) in enumerate(members):
            assert forest.tokens[forest.path(sequence)].tolist() == many[number][index]
    assert sorted(seen) == [(number, index) for number, tree in enumerate(many) for index in range(len(tree))]


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(2, 150))
def test_forests_are_cut_at_the_least_cost(sizes: list[int], max_tokens: int) -> None:
    """Against all ways to cut: padded positions and 64 more for each pass."""
    many = [[[0, *range(1, size + 1)]] for size in sizes]
    nodes = sorted(size + 1 for size in sizes)
    ways = [_cut(nodes, cuts) for cuts in itertools.product([False, True], repeat=max(0, len(nodes) - 1))]
    best = min(
        sum(max(part) * len(part) + 64 for part in parts)
        for parts in ways
        if all(max(part) * len(part) <= max_tokens or len(part) == 1 for part in parts)
    )
    planned = [forest for forest, _ in plan_forests(many, max_tokens=max_tokens)]
    assert sum(f.num_trees * f.max_tree_nodes + 64 for f in planned) == best


def _cut(nodes: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    parts: list[list[int]] = [nodes[:1]] if nodes else []
    for size, cut in zip(nodes[1:], cuts, strict=True):
        parts.append([size]) if cut else parts[-1].append(size)
    return parts


def test_refusals() -> None:
    with pytest.raises(DataError, match="boundary token 0; one starts \\[1\\]"):
        build_forest([[[0, 1], [1, 2]]])
    with pytest.raises(DataError, match="boundary"):
        build_forest([[[0, 1]], [[]]])
    with pytest.raises(DataError, match="no token sequences"):
        build_forest([[]])
    forest = build_forest([[[0, 1, 2]]])
    with pytest.raises(DataError, match="shape"):
        forest.sequence_scores([0.0, 1.0])
    with pytest.raises(DataError, match="nan for token id 2 at depth 2"):
        forest.sequence_scores([0.0, -1.0, float("nan")])
    empty = build_forest([])
    assert (empty.num_nodes, empty.num_trees, empty.max_tree_nodes) == (0, 0, 0)


def test_long_and_many_hypotheses() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(1, 50, size=500)
    tree = []
    for _ in range(200):
        changed = base.copy()
        changed[rng.integers(500)] = 50
        tree.append([0, *changed.tolist()])
    planned = list(plan_forests([tree], max_tokens=4000))
    assert sum(len(members) for _, members in planned) == 200
    assert all(forest.num_nodes <= 4000 for forest, _ in planned)


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: prefix shares not checked")
@pytest.mark.parametrize(
    ("file", "low", "high"),
    [
        ("librispeech_10best/dev_clean.jsonl.gz", 0.515, 0.535),
        ("librispeech_10best/test_clean.jsonl.gz", 0.515, 0.535),
        ("lattices/kaldi_weather/mono.100best.jsonl.gz", 0.405, 0.415),
        ("lattices/pocketsphinx_slf/nbest50.jsonl.gz", 0.30, 0.31),
    ],
)
def test_shares_of_real_lists(file: str, low: float, high: float) -> None:
    numbers: dict[str, int] = {}
    lists = [
        [
            [0, *(numbers.setdefault(word, len(numbers) + 1) for word in hypothesis.words)]
            for hypothesis in entry.hypotheses
        ]
        for entry in read_nbest(Path(os.environ["MIXBITS_DATA"]) / file)
    ]
    forest = build_forest(lists)
    assert low < (forest.num_nodes - forest.num_trees) / forest.num_tokens < high

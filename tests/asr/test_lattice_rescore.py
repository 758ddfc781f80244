"""Rescoring of lattices against scoring every path alone, with made-up language models whose memory is known."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.asr.lattice import Lattice, PathWeights, make_lattice
from mixbits.asr.lattice_paths import LatticeSearch, best_path
from mixbits.asr.lattice_rescore import LatticeSettings, RescoredLattice, rescore_lattice, split_states
from mixbits.asr.trie import TokenForest
from mixbits.errors import DataError, SpecError

_spec = importlib.util.spec_from_file_location("lattice_cases", Path(__file__).with_name("lattice_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

WEIGHTS = PathWeights(0.2, 1.5, -0.5)


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[0, *(1 + cases.WORDS.index(word) for word in text.split()), 0] for text in texts]


class MadeUpLM:
    """log p of the last token given the ``memory`` tokens before it (None: all)."""

    def __init__(self, memory: int | None, max_length: int | None = None) -> None:
        self.memory, self.max_length, self.calls = memory, max_length, 0

    def log_p(self, prefix: tuple[int, ...]) -> float:
        seen = prefix if self.memory is None else prefix[-self.memory - 1 :]
        return -(hash(seen) % 100_003) / 10_000 - 0.01

    def __call__(self, forest: TokenForest) -> np.ndarray:
        self.calls += 1
        scores, prefixes = np.zeros(forest.num_nodes), []
        for node, (token, parent) in enumerate(zip(forest.tokens.tolist(), forest.parents.tolist(), strict=True)):
            prefixes.append((token,) if parent < 0 else (*prefixes[parent], token))
            scores[node] = 0.0 if parent < 0 else self.log_p(prefixes[node])
        return scores

    def alone(self, words: tuple[str, ...]) -> float:
        ids = tuple(encode([" ".join(words)])[0])
        return sum(self.log_p(ids[: stop + 1]) for stop in range(1, len(ids)))


def rescored(lattice: Lattice, lm: Callable, **options: object) -> RescoredLattice:
    return rescore_lattice(lattice, encode=encode, score_forest=lm, settings=LatticeSettings(WEIGHTS, **options))  # type: ignore[arg-type]


def expected_table(lattice: Lattice, lm: MadeUpLM, old_scale: float, interpolate: float) -> list[tuple]:
    """Distinct (words, LM score, acoustic score) of all paths, every one scored alone."""
    table = cases.path_table(lattice, with_ids=False)
    return sorted(
        {
            (w, round(old_scale * old + interpolate * lm.alone(w), 6) + 0.0, round(ac, 6) + 0.0)
            for w, old, ac, _ in table
        }
    )


def table_of(lattice: Lattice) -> list[tuple]:
    return sorted({row[:3] for row in cases.path_table(lattice, digits=6, with_ids=False)})


def close(a: list[tuple], b: list[tuple]) -> bool:
    return [x[0] for x in a] == [x[0] for x in b] and np.allclose([x[1:] for x in a], [x[1:] for x in b], atol=1e-5)


@settings(max_examples=60)
@given(cases.lattices(with_ids=True), st.floats(0, 1))
def test_few_paths_are_all_exact(lattice: Lattice, interpolate: float) -> None:
    lm = MadeUpLM(None)
    done = rescored(lattice, lm, interpolate=interpolate, max_paths=10**6)
    assert close(table_of(done.lattice), expected_table(lattice, lm, 1 - interpolate, interpolate))
    certificate = done.certificate
    assert (certificate.is_exact, certificate.is_settled, certificate.best_changed) == (True, True, False)
    assert certificate.max_gap < 1e-9
    assert certificate.arcs_touched == lattice.num_arcs
    assert certificate.share_touched == 1
    assert lm.calls <= 3
    assert done.best.exact_total_score == pytest.approx(best_path(done.lattice, WEIGHTS).total_score, abs=1e-9)
    assert sorted({row[3] for row in cases.path_table(done.lattice)}) == sorted(
        {row[3] for row in cases.path_table(lattice)}
    )


@settings(max_examples=60)
@given(cases.lattices(), st.integers(1, 3))
def test_merging_by_the_memory_of_the_model_is_exact(lattice: Lattice, memory: int) -> None:
    lm = MadeUpLM(memory)
    done = rescored(lattice, lm, merge_order=memory + 1, max_paths=0, old_lm_scale=1.0, interpolate=0.5)
    assert not done.certificate.is_exact
    assert close(table_of(done.lattice), expected_table(lattice, lm, 1.0, 0.5))
    assert done.certificate.max_gap < 1e-9


@settings(max_examples=60)
@given(cases.lattices(), st.integers(1, 3))
def test_merged_lattices_keep_all_paths_and_an_exact_best_one(lattice: Lattice, order: int) -> None:
    lm = MadeUpLM(None)
    done = rescored(lattice, lm, merge_order=order, max_paths=0, max_rounds=20, num_checked=1000)
    # paths of the same words may get different scores, where their states have other representatives
    assert {row[0] for row in table_of(done.lattice)} == {row[0] for row in expected_table(lattice, lm, 0, 1)}
    assert done.certificate.is_settled
    assert abs(done.certificate.gaps[0]) < 1e-9, "the best path's own histories represent its states"
    best: dict[tuple[str, ...], float] = {}
    num_paths: Counter[tuple[str, ...]] = Counter()
    for arcs, row in cases.all_paths(lattice):
        words = cases.words(lattice, arcs)
        score = cases.total(lattice, arcs, row, PathWeights(WEIGHTS.acoustic_scale, 0, WEIGHTS.word_insertion_penalty))
        best[words] = max(best.get(words, -math.inf), score + WEIGHTS.lm_scale * lm.alone(words))
        num_paths[words] += 1
    for (
        one
    ) in done.hypotheses:  # of the path that the lattice prefers for these words, which need not be their best one
        assert one.exact_total_score <= best[one.path.words] + 1e-6
        if num_paths[one.path.words] == 1:
            assert one.exact_total_score == pytest.approx(best[one.path.words], abs=1e-6)
    highest = max(one.exact_total_score for one in done.hypotheses)
    assert done.best.exact_total_score == pytest.approx(highest, abs=1e-8)
    assert {one.path.words: one.model_score for one in done.hypotheses} == pytest.approx({w: lm.alone(w) for w in best})


@given(cases.lattices(with_ids=True), st.integers(0, 4))
def test_splitting_changes_no_path(lattice: Lattice, order: int) -> None:
    found = split_states(lattice, order, max_arcs=10**6)
    assert found is not None
    split, origin = found
    assert cases.path_table(split) == cases.path_table(lattice)
    assert split.lm_score.tolist() == lattice.lm_score[origin].tolist()
    if order == 1:
        assert (split.num_states, split.num_arcs) == (lattice.num_states, lattice.num_arcs)
    if order == 0:
        histories: dict[int, set] = {}
        for arcs, _ in cases.all_paths(split):
            for place, arc in enumerate(arcs):
                histories.setdefault(int(split.dst[arc]), set()).add(cases.words(split, arcs[: place + 1]))
        assert all(len(found) == 1 for found in histories.values())


def ladder(rungs: int) -> Lattice:
    """2^rungs paths, the scores of each rung a little different."""
    src = np.repeat(np.arange(rungs), 2)
    return make_lattice(
        utterance="u", src=src, dst=src + 1, word=np.tile([1, 2], rungs), labels=["", "a", "c"],
        lm_score=np.tile([-1.0, -1.5], rungs), acoustic_score=-0.1 * np.arange(2 * rungs), num_states=rungs + 1, start=0, finals=[rungs],
        other={"p": np.arange(2.0 * rungs)},
    )  # fmt: skip


def test_beam_and_bound_on_arcs() -> None:
    lattice = ladder(30)
    done = rescored(lattice, MadeUpLM(None), beam=0.0)
    assert (done.certificate.num_paths, done.certificate.arcs_touched, done.certificate.is_exact) == (1, 30, True)
    assert done.certificate.share_touched == 0.5
    wide = rescored(lattice, MadeUpLM(None), merge_order=6, max_arcs=10_000)
    assert wide.certificate.beam == math.inf
    assert wide.certificate.num_paths == 2**30
    assert wide.certificate.new_arcs > 1000
    narrow = rescored(lattice, MadeUpLM(None), merge_order=6, max_arcs=300)
    assert narrow.certificate.new_arcs <= 300
    assert 0 < narrow.certificate.beam < math.inf
    assert done.lattice.other.keys() == {"p"}
    with pytest.raises(DataError, match="more than 10 arcs; give a larger max_arcs"):
        rescored(lattice, MadeUpLM(None), max_arcs=10)


def test_certificate_shows_the_error_of_merging() -> None:
    done = rescored(ladder(12), MadeUpLM(None), merge_order=1, max_paths=0, num_checked=50)
    assert done.certificate.max_gap > 0.1
    assert done.certificate.mean_gap <= done.certificate.max_gap
    order = [one.exact_total_score for one in done.hypotheses]
    assert order == sorted(order, reverse=True)
    lm = MadeUpLM(None)
    for one in done.hypotheses:
        assert one.model_score == pytest.approx(lm.alone(one.path.words))
        assert one.gap == pytest.approx(one.path.lm_score - lm.alone(one.path.words))
    search = LatticeSearch(done.lattice, WEIGHTS)
    assert done.certificate.best_changed == (done.best.path.words != search.best_path().words)


def test_refusals() -> None:
    with pytest.raises(
        DataError, match=r"utterance 'u': a hypothesis has [0-9]+ tokens, but the model takes at most 9"
    ):
        rescored(ladder(12), MadeUpLM(None, max_length=9), merge_order=1)
    with pytest.raises(DataError, match="nan for token id"):
        rescored(ladder(2), lambda forest: np.full(forest.num_nodes, math.nan))
    for bad in (
        {"merge_order": -1},
        {"interpolate": math.nan},
        {"beam": -1.0},
        {"beam": math.nan},
        {"max_arcs": 0},
        {"num_checked": 0},
    ):
        with pytest.raises(SpecError, match=next(iter(bad))):
            LatticeSettings(WEIGHTS, **bad)  # type: ignore[arg-type]

"""Lattices: what is refused, and every algorithm against the list of all paths."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.lattice import Lattice, PathWeights, make_lattice
from mixbits.asr.lattice_paths import LatticeSearch, best_path, count_paths, nbest_paths, prune
from mixbits.errors import DataError, SpecError

_spec = importlib.util.spec_from_file_location("lattice_cases", Path(__file__).with_name("lattice_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

WEIGHTS = st.builds(PathWeights, st.floats(0, 2), st.floats(0, 2), st.floats(-3, 3))


def small(**changes: object) -> Lattice:
    fields = {
        "utterance": "u", "src": [0, 0, 1, 2], "dst": [1, 2, 3, 3], "word": [1, 2, 0, 1], "labels": ["", "x", "y"],
        "lm_score": [-1.0, -2.0, 0.0, -0.5], "acoustic_score": [-10.0, -5.0, -1.0, -2.0], "num_states": 4, "start": 0, "finals": [3],
    }  # fmt: skip
    return make_lattice(**(fields | changes))  # type: ignore[arg-type]


@given(cases.lattices(), WEIGHTS)
def test_paths_are_those_of_the_list_of_all(lattice: Lattice, weights: PathWeights) -> None:
    listed = [
        (cases.total(lattice, arcs, row, weights), cases.words(lattice, arcs)) for arcs, row in cases.all_paths(lattice)
    ]
    assert count_paths(lattice) == len(listed)
    assert count_paths(lattice, limit=3) == min(3, len(listed))
    best: dict[tuple[str, ...], float] = {}
    for score, words in listed:
        best[words] = max(score, best.get(words, -math.inf))
    expected = sorted(best.values(), reverse=True)
    found = nbest_paths(lattice, len(best) + 1, weights)
    assert [path.total_score for path in found] == pytest.approx(expected, abs=1e-9)
    assert {path.words: path.total_score for path in found} == pytest.approx(best, abs=1e-9)
    assert [p.words for p in nbest_paths(lattice, 2, weights)] == [p.words for p in found[:2]]
    one = best_path(lattice, weights)
    assert one.total_score == pytest.approx(expected[0], abs=1e-9)
    row = int(np.searchsorted(lattice.finals, lattice.dst[one.arcs[-1]] if len(one.arcs) else lattice.start))
    assert cases.total(lattice, one.arcs.tolist(), row, weights) == pytest.approx(one.total_score, abs=1e-9)


@given(cases.lattices(), WEIGHTS)
def test_posteriors_are_shares_of_the_sum_over_all_paths(lattice: Lattice, weights: PathWeights) -> None:
    search = LatticeSearch(lattice, weights)
    arcs, finals, log_total = search.log_posteriors()
    listed = [(*path, cases.total(lattice, *path, weights)) for path in cases.all_paths(lattice)]
    highest = max(score for *_, score in listed)
    mass = sum(math.exp(score - highest) for *_, score in listed)
    assert log_total == pytest.approx(highest + math.log(mass), abs=1e-9)
    expected = np.zeros(lattice.num_arcs)
    ends = np.zeros(len(lattice.finals))
    for path, row, score in listed:
        expected[path] += math.exp(score - highest) / mass
        ends[row] += math.exp(score - highest) / mass
    assert np.exp(arcs) == pytest.approx(expected, abs=1e-9)
    assert np.exp(finals) == pytest.approx(ends, abs=1e-9)


@given(cases.lattices(with_ids=True), WEIGHTS, st.floats(0, 100))
def test_pruning_keeps_exactly_the_paths_in_the_beam(lattice: Lattice, weights: PathWeights, beam: float) -> None:
    listed = [(cases.total(lattice, *path, weights), path) for path in cases.all_paths(lattice)]
    floor = max(score for score, _ in listed) - beam
    within = {arc for score, (arcs, _) in listed for arc in arcs if score >= floor + 1e-6}
    near = {arc for score, (arcs, _) in listed for arc in arcs if score >= floor - 1e-6}
    pruned = prune(lattice, beam, weights)
    assert len(within) <= pruned.num_arcs <= len(near)
    kept = {(score, ids) for score, *_, ids in cases.path_table(pruned)}
    assert kept <= {(score, ids) for score, *_, ids in cases.path_table(lattice)}
    assert best_path(pruned, weights).total_score == pytest.approx(max(score for score, _ in listed), abs=1e-9)


def test_scales_of_the_file_are_the_default_and_non_words_do_not_count() -> None:
    lattice = small(weights=PathWeights(0.5, 2.0, -3.0), labels=["", "<s>", "y"])
    assert best_path(lattice).words == ()
    assert best_path(lattice).total_score == 0.5 * -11 + 2 * -1.0
    one = best_path(lattice, PathWeights(0, 1, 3))
    assert (one.text, one.total_score) == ("y", -2.5 + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src": [0, 0, 1, 3]}, "cycle"),
        ({"dst": [1, 2, 3, 4]}, "an arc's target is state 4; expected 0 to 3"),
        ({"src": [0, -1, 1, 2]}, "an arc's source is state -1"),
        ({"finals": []}, "no final state"),
        ({"finals": [9]}, "a final state is state 9"),
        ({"finals": [3, 3]}, "final twice"),
        ({"start": 4}, "the start state is 4"),
        ({"num_states": 0}, "no states"),
        ({"num_states": 5}, "1 of 5 states are on no path"),
        ({"finals": [1]}, "2 of 4 states are on no path.*the first is 2"),
        ({"lm_score": [0, 0, math.nan, 0]}, "lm_score of arc 2 is nan"),
        ({"acoustic_score": [0, 0, 0, -math.inf]}, "acoustic_score of arc 3 is -inf"),
        ({"final_lm_score": [math.inf]}, "lm_score of final state 3 is inf"),
        ({"lm_score": [0, 0, 0]}, "lm_score has shape"),
        ({"word": [0, 0, 3, 0]}, "outside the 3 labels"),
        ({"labels": ["x", "y", "z"]}, "the first one"),
        ({"utterance": ""}, "empty utterance id"),
    ],
)
def test_what_is_not_sound_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(**changes)


def test_dead_ends_can_be_dropped() -> None:
    lattice = small(finals=[1], final_lm_score=[-7.0], dead_ends="drop")
    assert (lattice.num_states, lattice.num_arcs) == (2, 1)
    assert best_path(lattice).lm_score == -8.0
    with pytest.raises(DataError, match="no path leads"):
        small(src=[1, 1, 1, 2], dst=[2, 2, 3, 3], dead_ends="drop")


def test_bad_settings() -> None:
    with pytest.raises(SpecError, match="num_paths"):
        nbest_paths(small(), 0)
    with pytest.raises(SpecError, match="beam"):
        prune(small(), math.nan)
    with pytest.raises(DataError, match="lm_scale"):
        PathWeights(lm_scale=math.inf)
    with pytest.raises(DataError, match="not final"):
        LatticeSearch(small()).path(np.array([0]))


def test_long_chains_and_astronomic_numbers_of_paths() -> None:
    count = 800
    src = np.repeat(np.arange(count), 3)
    lattice = make_lattice(
        utterance="u", src=src, dst=src + 1, word=np.tile([1, 2, 0], count), labels=["", "x", "y"],
        lm_score=np.tile([-1.0, -2.0, -3.0], count), acoustic_score=np.zeros(3 * count), num_states=count + 1, start=0, finals=[count],
    )  # fmt: skip
    assert count_paths(lattice) == 10**18
    assert [path.total_score for path in nbest_paths(lattice, 2)] == [-count, -count - 1]

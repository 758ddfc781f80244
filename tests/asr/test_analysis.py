"""Tables, oracle curves, pair tests and WER by weight: closed forms, brute force, and other people's implementations."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import kaldialign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.analysis import (
    NO_GROUP,
    biggest_changes,
    compare_pair,
    count_changes,
    errors_by_weight,
    group_errors,
    group_names,
    list_sizes,
    oracle_curve,
    sclite_errors,
    share_recovered,
    sign_test,
)
from mixbits.asr.bootstrap import paired_bootstrap, score_upper_bound
from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.nbest import Hypothesis, NBest, one_best_texts, reference_texts
from mixbits.asr.significance import mapsswe
from mixbits.asr.wer import ErrorCounts, count_errors, error_table, sum_errors
from mixbits.errors import DataError

needs_data = pytest.mark.skipif(
    "MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: real lists not checked"
)
words = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)
some_words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join)


def _random_lists(seed: int, num_lists: int = 40, longest: int = 12) -> list[NBest]:
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(list("abcde"), size=rng.integers(0, 7)))

    return [
        NBest(
            f"u{number}",
            tuple(
                Hypothesis(text(), float(rng.normal()), float(rng.normal()))
                for _ in range(rng.integers(1, longest + 1))
            ),
            text() + " a",
            f"s{number % 5}",
        )
        for number in range(num_lists)
    ]


# ---- groups, changes, sclite's totals -----------------------------------------------------------------------------------


def test_groups_are_summed_and_add_up_to_the_whole() -> None:
    errors = [ErrorCounts(1, 0, 0, 4), ErrorCounts(0, 2, 0, 10), ErrorCounts(0, 0, 3, 6), ErrorCounts(1, 1, 1, 0)]
    found = group_errors(errors, ["b", "a", "b", None])
    assert found == {"b": ErrorCounts(1, 0, 3, 10), "a": ErrorCounts(0, 2, 0, 10), NO_GROUP: ErrorCounts(1, 1, 1, 0)}
    assert found["b"].wer == 40.0
    assert sum(found.values(), ErrorCounts()) == sum(errors, ErrorCounts())
    with pytest.raises(DataError, match="1 groups for 4 utterances"):
        group_errors(errors, ["a"])


def test_group_names_come_from_any_field() -> None:
    one = (Hypothesis("a", -1.0),)
    lists = [NBest("u", one, None, "s1", None, {"noise": 3}), NBest("v", one, None, None, None, {})]
    assert group_names(lists, "speaker") == ["s1", None]
    assert group_names(lists, "noise") == ["3", None]
    for field in ("conversation", "nothing"):
        with pytest.raises(DataError, match=rf"no utterance has a field '{field}'.*\['noise'\]"):
            group_names(lists, field)


def test_changes_by_hand() -> None:
    a, b = ["x", "a b", "a  b", "q"], ["a", "a", "a b", "r"]
    found = count_changes(a, b, [1, 0, 0, 1], [0, 1, 0, 1])
    assert (found.utterances, found.changed, found.better, found.worse, found.same_errors) == (4, 3, 1, 1, 1)
    assert biggest_changes([1, 0, 4, 0, 0], [0, 2, 0, 2, 0], 1) == {"best": [2], "worst": [1]}
    assert biggest_changes([1, 1], [1, 1], 5) == {"best": [], "worst": []}


def _cheapest_by_dynamic_program(reference: list[str], text: list[str]) -> int:
    """Cost 4/3/3 of the cheapest alignment."""
    row = [3 * j for j in range(len(text) + 1)]
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], 3 * i
        for j, other in enumerate(text, 1):
            previous, row[j] = row[j], min(row[j] + 3, row[j - 1] + 3, previous + 4 * (word != other))
    return row[-1]


@given(words, words)
def test_sclite_totals_have_the_cheapest_cost_and_no_fewer_errors(reference: str, text: str) -> None:
    found = sclite_errors([reference], [text])
    assert 4 * found.num_sub + 3 * (found.num_del + found.num_ins) == _cheapest_by_dynamic_program(
        reference.split(), text.split()
    )
    assert found.num_errors >= count_errors(reference, text).num_errors
    assert found.num_words == len(reference.split())


def test_sclite_totals_can_differ() -> None:
    """Two substitutions (cost 8) against a deletion and an insertion around a right word (cost 6)."""
    assert count_errors("a b", "b c").num_errors == 2
    assert sclite_errors(["a b"], ["b c"]) == ErrorCounts(0, 1, 1, 2)
    reference, text = "a b c d e f", "b q c r s d f"
    found = sclite_errors([reference], [text])
    assert found.num_errors >= count_errors(reference, text).num_errors


# ---- oracle -------------------------------------------------------------------------------------------------------------


def test_list_sizes() -> None:
    assert list_sizes(1) == (1,)
    assert list_sizes(2) == (1, 2)
    assert list_sizes(10) == (1, 2, 5, 10)
    assert list_sizes(100) == (1, 2, 5, 10, 20, 50, 100)
    assert list_sizes(134) == (1, 2, 5, 10, 20, 50, 100, 134)


@pytest.mark.parametrize("seed", range(5))
def test_oracle_curve_is_brute_force(seed: int) -> None:
    lists = _random_lists(seed)
    table = error_table(lists)
    points = oracle_curve(table)
    assert [p.num_hypotheses for p in points] == list(list_sizes(max(len(entry.hypotheses) for entry in lists)))
    for point in points:
        for kind, best in (("oracle", min), ("anti_oracle", max)):
            expected = sum(
                best(
                    count_errors(entry.reference or "", h.text).num_errors
                    for h in entry.hypotheses[: point.num_hypotheses]
                )
                for entry in lists
            )
            assert getattr(point, kind).num_errors == expected
    assert points[0].oracle == points[0].anti_oracle == table.total()
    assert points[-1].oracle == table.total(table.oracle_picks())
    assert points[-1].anti_oracle == table.total(table.anti_oracle_picks())


def test_share_recovered() -> None:
    first, oracle = ErrorCounts(100, 0, 0, 1000), ErrorCounts(50, 0, 0, 1000)
    assert share_recovered(first, ErrorCounts(80, 5, 5, 1000), oracle) == pytest.approx(0.2)
    assert share_recovered(first, first, oracle) == 0
    assert share_recovered(first, ErrorCounts(110, 0, 0, 1000), oracle) == pytest.approx(-0.2)
    assert share_recovered(first, oracle, oracle) == 1
    assert share_recovered(first, oracle, first) is None


# ---- a pair -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_sign_test_is_the_binomial_sum(segments: list[tuple[int, int]]) -> None:
    plus, minus = sum(a > b for a, b in segments), sum(a < b for a, b in segments)
    count = plus + minus
    if count == 0:
        assert sign_test(segments) is None
        return
    tail = sum(math.comb(count, k) for k in range(max(plus, minus), count + 1)) / 2**count
    assert sign_test(segments) == pytest.approx(min(1.0, 2 * tail))


def test_sign_test_stands_in_where_mapsswe_is_undetermined() -> None:
    references, worse, better = ["a"] * 12, ["x"] * 12, ["a"] * 12
    found = compare_pair(references, worse, better, [1] * 12, [0] * 12)
    assert found.mapsswe.p is None
    assert found.p == found.sign_test_p == pytest.approx(2 / 2**12)
    nothing = compare_pair(references, worse, worse, [1] * 12, [1] * 12)
    assert nothing.p is None
    assert nothing.changes.changed == 0
    assert nothing.bootstrap.delta_upper == 0
    assert nothing.delta_upper == nothing.score_upper == pytest.approx(100 * 1.6448536**2 / 12)


@given(st.lists(st.tuples(some_words, words, words), min_size=3, max_size=12))
def test_a_pair_holds_what_its_parts_say(rows: list[tuple[str, str, str]]) -> None:
    references, a, b = (list(column) for column in zip(*rows, strict=True))
    errors_a, errors_b = ([count_errors(r, t).num_errors for r, t in zip(references, x, strict=True)] for x in (a, b))
    found = compare_pair(references, a, b, errors_a, errors_b)
    num_words = [len(reference.split()) for reference in references]
    assert found.mapsswe == mapsswe(references, a, b)
    assert found.bootstrap == paired_bootstrap(errors_a, errors_b, num_words)
    assert found.score_upper == score_upper_bound(errors_a, errors_b, sum(num_words))
    assert found.delta_upper >= found.bootstrap.delta_upper
    assert found.bootstrap.delta == pytest.approx(sum_errors(references, b).wer - sum_errors(references, a).wer)
    changes = found.changes
    assert changes.changed == changes.better + changes.worse + changes.same_errors


def test_score_bound_of_single_changes_is_that_of_a_poisson_count() -> None:
    """No change: z² ≈ 2.71 errors. k errors more, none less: the larger root of (k − m)² = z² m."""
    z = 1.6448536269514722
    for more in (0, 1, 4, 9):
        bound = score_upper_bound([0] * 50, [1] * more + [0] * (50 - more), 100)
        assert (more - bound) ** 2 == pytest.approx(z * z * bound)
        assert bound >= more
    assert score_upper_bound([0] * 5, [10] * 2 + [0] * 3, 100, scale=10) == score_upper_bound(
        [0] * 5, [1] * 2 + [0] * 3, 100
    )


def test_bootstrap_against_kaldialign() -> None:
    """kaldialign's own bootstrap (after Kaldi's compute-wer-bootci): 95 % intervals and probability of improvement."""
    rng = np.random.default_rng(5)
    letters = list("abcdef")
    references = [" ".join(rng.choice(letters, size=12)) for _ in range(300)]

    def noisy(text: str, rate: float) -> str:
        return " ".join(str(rng.choice(letters)) if rng.random() < rate else word for word in text.split())

    a, b = [noisy(r, 0.2) for r in references], [noisy(r, 0.19) for r in references]
    errors_a, errors_b = ([count_errors(r, t).num_errors for r, t in zip(references, x, strict=True)] for x in (a, b))
    ours = paired_bootstrap(errors_a, errors_b, [12] * 300, num_draws=20_000)
    split = [[text.split() for text in texts] for texts in (references, a, b)]
    theirs = kaldialign.bootstrap_wer_ci(*split, replications=20_000, seed=1)
    for interval, name in ((ours.wer_a_interval, "system1"), (ours.wer_b_interval, "system2")):
        width = 100 * (theirs[name]["ci95max"] - theirs[name]["ci95min"])
        assert interval[0] == pytest.approx(100 * theirs[name]["ci95min"], abs=0.05 * width)
        assert interval[1] == pytest.approx(100 * theirs[name]["ci95max"], abs=0.05 * width)
    assert ours.share_b_better == pytest.approx(theirs["p_s2_improv_over_s1"], abs=0.02)


# ---- WER by weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_errors_by_weight_are_those_of_the_winners(seed: int) -> None:
    lists = _random_lists(seed)
    table = error_table(lists)
    base = np.array([h.acoustic_score for entry in lists for h in entry.hypotheses])
    score = np.array([h.lm_score for entry in lists for h in entry.hypotheses])
    found = errors_by_weight(base, score, table, high=50.0)
    assert found.edges[0] == 0
    assert found.edges[-1] == 50
    for left, right, value in zip(found.edges[:-1], found.edges[1:], found.values, strict=True):
        for share in (0.1, 0.5, 0.9):
            total = base + (left + share * (right - left)) * score
            spans = itertools.pairwise(table.offsets)
            winners = [start + int(np.argmax(total[start:stop])) for start, stop in spans]
            assert table.errors[winners].sum() == value
    with pytest.raises(DataError, match="finite numbers"):
        errors_by_weight(base[:-1], score, table)
    with pytest.raises(DataError, match="finite numbers"):
        errors_by_weight(base * np.nan, score, table)


# ---- real lists ---------------------------------------------------------------------------------------------------------


@needs_data
def test_kaldi_lists_by_weight_have_kaldis_own_error_counts() -> None:
    """Kaldi's counts at the weights near the one the lists were cut at; far from it its winners are not among the 100."""
    lists = read_nbest(Path(os.environ["MIXBITS_DATA"]) / "lattices" / "kaldi_weather" / "mono.100best.jsonl.gz")
    table = error_table(lists)
    acoustic = np.array([h.acoustic_score for entry in lists for h in entry.hypotheses])
    graph = np.array([h.lm_score for entry in lists for h in entry.hypotheses])
    steps = errors_by_weight(acoustic, graph, table)
    weights = [12, 13, 14, 15, 16, 17]
    assert [int(steps.values[np.searchsorted(steps.edges, w) - 1]) for w in weights] == [343, 342, 336, 336, 332, 345]
    points = oracle_curve(table)
    assert [p.num_hypotheses for p in points] == [1, 2, 5, 10, 20, 50, 100]
    assert all(x.oracle.num_errors >= y.oracle.num_errors for x, y in itertools.pairwise(points))
    assert all(x.anti_oracle.num_errors <= y.anti_oracle.num_errors for x, y in itertools.pairwise(points))


@needs_data
def test_librispeech_speakers_add_up_and_jiwer_agrees() -> None:
    lists = read_nbest(Path(os.environ["MIXBITS_DATA"]) / "librispeech_10best" / "test_clean.jsonl.gz")
    references, texts = reference_texts(lists), one_best_texts(lists)
    errors = [count_errors(*pair) for pair in zip(references, texts, strict=True)]
    speakers = group_errors(errors, group_names(lists, "speaker"))
    assert len(speakers) == 40
    whole = sum(speakers.values(), ErrorCounts())
    assert (whole.num_errors, whole.num_words) == (3376, 52576)
    assert whole.num_errors <= sclite_errors(references, texts).num_errors
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed: the total is not checked against it")
    theirs = jiwer.process_words(references, texts)
    assert theirs.substitutions + theirs.deletions + theirs.insertions == whole.num_errors

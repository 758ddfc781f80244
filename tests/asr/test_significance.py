"""MAPSSWE against SCTK's check value and a second implementation; the bootstrap; the rule for "no significant loss"."""

from __future__ import annotations

import math
import re

import kaldialign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mixbits.asr.bootstrap import bootstrap_blocks, paired_bootstrap
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.significance import error_segments, mapsswe, mapsswe_from_segments
from mixbits.errors import DataError, SpecError


def _segments_by_pattern(reference: str, text_a: str, text_b: str) -> list[tuple[int, int]]:
    """Second implementation: one symbol a position, segments found by a regular expression.

    G = reference word right in both, X = reference word wrong somewhere, I = insertions before a word.
    A segment is a maximal run of X, I and single Gs between them (two Gs in a row end it).
    """
    columns: list[tuple[str, int, int]] = []
    per_system = []
    for text in (text_a, text_b):
        slots: list[list[int]] = [[0, 0] for _ in range(len(reference.split()) + 1)]
        position = 0
        for expected, got in kaldialign.align(reference.split(), text.split(), "\0", sclite_mode=True):
            if expected == "\0":
                slots[position][0] += 1
            else:
                slots[position][1] += expected != got
                position += 1
        per_system.append(slots)
    for number, (a, b) in enumerate(zip(*per_system, strict=True)):
        if a[0] + b[0]:
            columns.append(("I", a[0], b[0]))
        if number < len(reference.split()):
            columns.append(("X" if a[1] + b[1] else "G", a[1], b[1]))
    symbols = "".join(symbol for symbol, _, _ in columns)
    found = []
    for match in re.finditer(r"[XI](?:G?[XI])*", symbols):
        run = columns[match.start() : match.end()]
        found.append((sum(a for _, a, _ in run), sum(b for _, _, b in run)))
    return found


def test_check_value_of_sctk() -> None:
    result = mapsswe_from_segments([(3, 2), (3, 2), (3, 3)])
    assert (result.num_segments, result.errors_a, result.errors_b) == (3, 9, 7)
    assert (round(result.mean, 3), round(result.sd, 3)) == (0.667, 0.577)
    assert result.z == pytest.approx(2.0)
    assert result.p == pytest.approx(2 * (1 - stats.norm.cdf(2.0)))
    assert result.verdict == "b is better"
    assert result.warning is not None


def test_check_value_from_texts() -> None:
    references = ["one two three four five six"] * 3
    worse = ["one x y z five six"] * 3
    better = ["one two y z five six"] * 2 + ["one u y z five six"]
    result = mapsswe(references, worse, better)
    assert result.z == pytest.approx(2.0)
    assert mapsswe(references, better, worse).verdict == "a is better"


@pytest.mark.parametrize(
    ("reference", "a", "b", "expected"),
    [
        ("a b c d e", "a b c d e", "a b c d e", []),
        ("a b c d e", "x b c d e", "a b c d x", [(1, 0), (0, 1)]),
        ("a b c d e", "x b c x e", "a b c d e", [(1, 0), (1, 0)]),
        ("a b c d e", "x b x d e", "a b c d e", [(2, 0)]),
        ("a b c d e", "a b c d e q", "q q a b c d e", [(0, 2), (1, 0)]),
        ("a b", "a q b", "a b", [(1, 0)]),
        ("", "q", "r s", [(1, 2)]),
        ("a b c", "", "a b c", [(3, 0)]),
    ],
)
def test_segments(reference: str, a: str, b: str, expected: list[tuple[int, int]]) -> None:
    assert error_segments(reference, a, b) == expected


texts = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


@given(texts, texts, texts)
def test_segments_match_second_implementation(reference: str, a: str, b: str) -> None:
    assert error_segments(reference, a, b) == _segments_by_pattern(reference, a, b)
    assert error_segments(reference, b, a) == [(y, x) for x, y in error_segments(reference, a, b)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2))
def test_statistic_is_a_paired_normal_test(pairs: list[tuple[int, int]]) -> None:
    result = mapsswe_from_segments(pairs)
    kept = np.array([pair for pair in pairs if pair != (0, 0)]).reshape(-1, 2)
    differences = kept[:, 0] - kept[:, 1]
    assert result.num_segments == len(kept)
    if len(kept) < 2 or len(set(differences.tolist())) == 1:
        assert result.verdict == "undetermined"
        assert result.p is None
    else:
        statistic = stats.ttest_rel(kept[:, 0], kept[:, 1]).statistic
        assert result.z == pytest.approx(statistic)
        assert result.p == pytest.approx(2 * stats.norm.sf(abs(statistic)))


def test_undetermined_and_never_zero() -> None:
    same = mapsswe(["a b c"], ["a b c"], ["a b c"])
    assert (same.verdict, same.num_segments, same.p_text) == ("undetermined", 0, "undetermined")
    always_one = mapsswe(["a"] * 60, ["x"] * 60, ["a"] * 60)
    assert (always_one.verdict, always_one.sd, always_one.warning) == ("undetermined", 0.0, None)
    huge = mapsswe_from_segments([(1, 0)] * 5000 + [(2, 0)] * 5000)
    assert huge.p is not None
    assert huge.p > 0
    assert huge.p_text == "p < 0.0001"
    with pytest.raises(DataError, match="same utterances"):
        mapsswe(["a"], ["a"], [])


def test_critical_value_is_that_of_the_five_percent_level() -> None:
    insignificant = mapsswe_from_segments([(1, 0)] * 50 + [(0, 1)] * 36)
    significant = mapsswe_from_segments([(1, 0)] * 60 + [(0, 1)] * 36)
    assert insignificant.verdict == "no significant difference"
    assert significant.verdict == "b is better"


def test_bootstrap_standard_error_has_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    errors_a, errors_b = rng.poisson(2, size=(2, 400))
    words = np.full(400, 20)
    result = paired_bootstrap(errors_a, errors_b, words, num_draws=20_000, seed=3)
    expected = 100 / 20 * np.std(errors_b - errors_a) / math.sqrt(400)
    assert result.delta_stderr == pytest.approx(expected, rel=0.03)
    assert result.delta == pytest.approx(100 * (errors_b.sum() - errors_a.sum()) / 8000)
    assert result.delta_upper == pytest.approx(result.delta + 1.645 * expected, abs=0.05 * expected)
    assert result.delta_interval[1] == pytest.approx(result.delta + 1.960 * expected, abs=0.08 * expected)
    assert result.wer_a_interval[0] < result.wer_a < result.wer_a_interval[1]
    assert result == paired_bootstrap(errors_a, errors_b, words, num_draws=20_000, seed=3)
    assert result != paired_bootstrap(errors_a, errors_b, words, num_draws=20_000, seed=4)


def test_blocks_widen_the_interval_and_few_blocks_are_not_used() -> None:
    rng = np.random.default_rng(2)
    speakers = np.repeat(np.arange(40), 20)
    difference = rng.normal(size=40)[speakers] * 2 + rng.normal(size=800)
    errors_a = np.full(800, 10)
    errors_b = np.maximum(0, np.round(10 + difference)).astype(int)
    words = np.full(800, 20)
    alone = paired_bootstrap(errors_a, errors_b, words)
    blocked = paired_bootstrap(errors_a, errors_b, words, blocks=[f"s{s}" for s in speakers])
    assert (blocked.blocked, blocked.num_blocks) == (True, 40)
    assert blocked.delta == alone.delta
    assert blocked.delta_stderr > 2 * alone.delta_stderr
    few = paired_bootstrap(errors_a, errors_b, words, blocks=[f"s{s % 3}" for s in speakers])
    assert (few.blocked, few.num_blocks) == (False, 800)


def test_bootstrap_refuses_nonsense() -> None:
    with pytest.raises(DataError, match="no words"):
        paired_bootstrap([0], [0], [0])
    with pytest.raises(DataError, match="one number an utterance"):
        paired_bootstrap([0, 1], [0], [1])
    with pytest.raises(DataError, match="block names"):
        paired_bootstrap([0], [0], [1], blocks=["a", "b"])
    with pytest.raises(SpecError, match="confidence"):
        paired_bootstrap([0], [0], [1], confidence=95)


def test_blocks_are_speakers_then_conversations() -> None:
    one = (Hypothesis("a", -1.0),)
    both = [NBest("u", one, None, "s", "c"), NBest("v", one, None, "t", "c")]
    assert bootstrap_blocks(both) == ["s", "t"]
    assert bootstrap_blocks([both[0], NBest("w", one, None, None, "d")]) == ["c", "d"]
    assert bootstrap_blocks([NBest("w", one)]) is None

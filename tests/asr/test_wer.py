"""Word errors against a plain dynamic program, and on the LibriSpeech lists."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.wer import ErrorCounts, count_errors, error_table, one_best_errors, oracle_errors
from mixbits.errors import DataError


def _distance(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def _lists() -> list[NBest]:
    return [
        NBest("u1", (Hypothesis("a x c", -1.0), Hypothesis("a b c", -2.0), Hypothesis("", -3.0)), "a b c"),
        NBest("u2", (Hypothesis("a a b", -1.0), Hypothesis("q", -2.0)), "a b"),
    ]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0, 3)),
        ("a b c", "a x c", (1, 0, 0, 3)),
        ("a b c", "a c", (0, 1, 0, 3)),
        ("a b c", "a b b c", (0, 0, 1, 3)),
        ("a b c", "", (0, 3, 0, 3)),
        ("", "a b", (0, 0, 2, 0)),
        ("", "", (0, 0, 0, 0)),
        ("a\tb  c", " a b c ", (0, 0, 0, 3)),
    ],
)
def test_closed_forms(reference: str, hypothesis: str, expected: tuple[int, int, int, int]) -> None:
    assert count_errors(reference, hypothesis) == ErrorCounts(*expected)


words = st.lists(st.sampled_from(["a", "b", "c", "<eps>", "*", "-1"]), max_size=9)


@given(words, words)
def test_total_is_the_edit_distance(reference: list[str], hypothesis: list[str]) -> None:
    counts = count_errors(" ".join(reference), " ".join(hypothesis))
    assert counts.num_errors == _distance(reference, hypothesis)
    assert counts.num_words == len(reference)
    assert counts.num_ins - counts.num_del == len(hypothesis) - len(reference)


def test_counts_are_summed_before_the_rate() -> None:
    total = ErrorCounts(1, 0, 0, 1) + ErrorCounts(0, 1, 2, 9)
    assert total == ErrorCounts(1, 1, 2, 10)
    assert total.wer == pytest.approx(40.0)
    with pytest.raises(DataError, match="no words"):
        _ = ErrorCounts().wer


def test_table_oracle_and_picks() -> None:
    lists = _lists()
    table = error_table(lists)
    assert table.errors.tolist() == [1, 0, 3, 1, 2]
    assert table.total() == one_best_errors(lists) == ErrorCounts(1, 0, 1, 5)
    assert table.oracle_picks().tolist() == [1, 0]
    assert table.anti_oracle_picks().tolist() == [2, 1]
    assert oracle_errors(lists) == ErrorCounts(0, 0, 1, 5)
    assert table.picked_errors([2, 1]).tolist() == [3, 2]
    for picks in ([0], [3, 0], [-1, 0]):
        with pytest.raises(DataError, match="existing rank"):
            table.total(picks)


def test_missing_reference_names_the_utterance() -> None:
    with pytest.raises(DataError, match="'u9' has no reference"):
        error_table([*_lists(), NBest("u9", (Hypothesis("a", -1.0),))])


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: real n-best lists not checked")
@pytest.mark.parametrize(
    ("name", "first", "oracle"), [("dev_clean", 6.12, 4.04), ("dev_other", 16.76, 13.02), ("test_clean", 6.42, 4.17)]
)
def test_librispeech_word_error_rates(name: str, first: float, oracle: float) -> None:
    table = error_table(read_nbest(Path(os.environ["MIXBITS_DATA"]) / "librispeech_10best" / f"{name}.jsonl.gz"))
    assert round(table.total().wer, 2) == first
    assert round(table.total(table.oracle_picks()).wer, 2) == oracle
    assert np.all(table.picked_errors(table.oracle_picks()) <= table.picked_errors())

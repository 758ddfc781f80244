"""Alignments against the edit distance, and side by side against both texts."""

from __future__ import annotations

import kaldialign
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.alignment import AlignedColumn, Costs, side_by_side, word_slots

words = st.lists(st.sampled_from(["a", "b", "c", "-1", "<eps>", "*"]), max_size=10)


@pytest.mark.parametrize("costs", ["plain", "sclite"])
@given(words, words)
def test_slots_hold_every_word_once_and_cost_the_edit_distance(
    costs: Costs, reference: list[str], text: list[str]
) -> None:
    slots = word_slots(reference, text, costs=costs)
    assert len(slots.words) == len(reference)
    assert len(slots.inserted) == len(reference) + 1
    again = list(slots.inserted[0])
    for word, following in zip(slots.words, slots.inserted[1:], strict=True):
        again += ([] if word is None else [word]) + list(following)
    assert again == text
    wrong = sum(word != expected for word, expected in zip(slots.words, reference, strict=True))
    num_errors = wrong + sum(map(len, slots.inserted))
    assert num_errors == kaldialign.edit_distance(reference, text, sclite_mode=costs == "sclite")["total"]


@given(words, words, words)
def test_columns_side_by_side_give_the_texts_back(reference: list[str], a: list[str], b: list[str]) -> None:
    columns = side_by_side(" ".join(reference), (" ".join(a), " ".join(b)))
    assert [column.reference for column in columns if column.reference is not None] == reference
    for number, text in enumerate((a, b)):
        assert [column.words[number] for column in columns if column.words[number] is not None] == text
        wrong = sum(column.words[number] != column.reference for column in columns)
        assert wrong == kaldialign.edit_distance(reference, text)["total"]
    assert all(column.reference is not None or any(word is not None for word in column.words) for column in columns)


def test_a_written_out_case() -> None:
    assert side_by_side("the cat sat", ("um the cat", "a cat sat down now")) == (
        AlignedColumn(None, ("um", None)),
        AlignedColumn("the", ("the", "a")),
        AlignedColumn("cat", ("cat", "cat")),
        AlignedColumn("sat", (None, "sat")),
        AlignedColumn(None, (None, "down")),
        AlignedColumn(None, (None, "now")),
    )
    assert side_by_side("", ("", "")) == ()
    assert side_by_side("", ("q", "")) == (AlignedColumn(None, ("q", None)),)

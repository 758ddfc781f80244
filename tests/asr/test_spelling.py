"""Spelling probabilities against the formula worked out by hand, and as a distribution."""

import itertools
import math

import pytest

from mixbits.asr.spelling import SpellingModel
from mixbits.errors import DataError


def test_by_hand() -> None:
    model = SpellingModel(["ab", "b"], order=2)
    # order 0: a, b and the end, one more never seen: 1/4. order 1 counts: a 1, b 2, end 2 of 5, 3 kinds
    a, b, end = ((n + 3 / 4) / 8 for n in (1, 2, 2))
    first_a, b_after_a, end_after_b = (1 + 2 * a) / 4, (1 + b) / 2, (2 + end) / 3
    assert model.log_prob("ab") == pytest.approx(math.log(first_a * b_after_a * end_after_b))
    assert model.log_prob("z") == pytest.approx(math.log(2 * (3 / 4 / 8) / 4 * end))  # nothing is known after z


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    model = SpellingModel(["ab", "b", "abba"], order=order)
    total = sum(
        math.exp(model.log_prob("".join(letters)))
        for length in range(9)
        for letters in itertools.product("abz", repeat=length)  # z stands for all that was never seen
    )
    assert 0.9 < total <= 1 + 1e-12
    history = "\x02" * (order - 1)
    assert sum(model._probability(history, c) for c in "ab\x03z") == pytest.approx(1)


def test_like_words_are_more_probable() -> None:
    model = SpellingModel(["walking", "talking", "walked", "talked", "baking"])
    assert model.log_prob("balking") > model.log_prob("kgnilab")


def test_no_words() -> None:
    with pytest.raises(DataError, match="no words to learn spellings from"):
        SpellingModel([])

"""How probable the spelling of a word is, so that a word-level model can tell one unknown word from another.

A character n-gram over the words of the model's vocabulary, each counted once, interpolated after Witten & Bell (1991):

    P(c | h) = (N(hc) + T(h) P(c | h')) / (N(h) + T(h)),

N counts, T(h) distinct characters seen after h, h' without its first character; below order one the characters are equally likely,
with room for one that was never seen. Limit: known words have probability too, so the unknown ones sum to less than 1.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from mixbits.errors import DataError

_START, _END = "\x02", "\x03"


class SpellingModel:
    """Character n-gram of order ``order`` over ``words``. Raises DataError without words."""

    def __init__(self, words: Iterable[str], *, order: int = 5) -> None:
        self.order = order
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        for word in words:
            spelled = _START * (order - 1) + word + _END
            for place in range(order - 1, len(spelled)):
                for length in range(order):
                    self._counts[spelled[place - length : place]][spelled[place]] += 1
        if not self._counts:
            raise DataError("no words to learn spellings from; expected the vocabulary of a word-level model")
        self._totals = {history: counts.total() for history, counts in self._counts.items()}
        self._num_characters = len(self._counts[""]) + 1

    def log_prob(self, word: str) -> float:
        """Natural-log probability of the spelling, its end included."""
        spelled = _START * (self.order - 1) + word + _END
        return sum(
            math.log(self._probability(spelled[place - self.order + 1 : place], spelled[place]))
            for place in range(self.order - 1, len(spelled))
        )

    def _probability(self, history: str, character: str) -> float:
        probability = 1.0 / self._num_characters
        for start in range(len(history), -1, -1):
            counts = self._counts.get(history[start:])
            if counts is None:
                break
            kinds = len(counts)
            probability = (counts[character] + kinds * probability) / (self._totals[history[start:]] + kinds)
        return probability

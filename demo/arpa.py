"""A small reader and scorer for ARPA n-gram files: the first-pass trigram's natural-log probability of a text.

Only what the demo needs: it separates the language-model part from the recognizer's combined score. ARPA files
hold base-10 logarithms; everything returned here is a natural log. The back-off rule is the usual one:
ln p(w | h) = the stored n-gram if there is one, else back-off(h) + ln p(w | h without its first word).
Reference: the SRILM page ngram-format(5).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mixbits.errors import FormatError

_LN10 = math.log(10.0)


@dataclass(frozen=True)
class ArpaModel:
    """`log_probability[ngram]` and `log_backoff[ngram]`, natural logs, keyed by tuples of words, oldest first."""

    order: int
    log_probability: dict[tuple[str, ...], float]
    log_backoff: dict[tuple[str, ...], float]

    def word_score(self, word: str, history: tuple[str, ...]) -> float:
        """ln p(word | history). Raises KeyError when the word is not in the model."""
        history = history[max(0, len(history) - self.order + 1) :]
        ngram = (*history, word)
        if ngram in self.log_probability:
            return self.log_probability[ngram]
        if not history:
            raise KeyError(word)
        return self.log_backoff.get(history, 0.0) + self.word_score(word, history[1:])

    def sentence_score(self, text: str) -> float:
        """ln p(text </s> | <s>), the sum over the words and the sentence end."""
        words = ["<s>", *text.split(), "</s>"]
        return sum(self.word_score(words[i], tuple(words[:i][-self.order :])) for i in range(1, len(words)))


def read_arpa(path: Path) -> ArpaModel:
    """Read an ARPA file; fields may be separated by spaces or tabs. Raises FormatError on a malformed one."""
    probabilities: dict[tuple[str, ...], float] = {}
    backoffs: dict[tuple[str, ...], float] = {}
    order = highest = 0
    ended = False
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields:
                continue
            if fields[0] == "\\end\\":
                ended = True
                break
            if fields[0].startswith("\\"):
                digits = fields[0][1:].partition("-")[0]
                order = int(digits) if fields[0].endswith("-grams:") and digits.isdigit() else 0
                highest = max(highest, order)
            elif order:
                try:
                    if len(fields) not in (order + 1, order + 2):
                        raise ValueError(f"{len(fields)} fields")
                    ngram = tuple(fields[1 : order + 1])
                    probabilities[ngram] = float(fields[0]) * _LN10
                    if len(fields) == order + 2:
                        backoffs[ngram] = float(fields[-1]) * _LN10
                except ValueError as error:
                    raise FormatError(f"{path}:{number}: not a {order}-gram line of an ARPA file: {error}") from error
    if not probabilities or not ended:
        raise FormatError(
            f"{path}: expected an ARPA n-gram file with an \\end\\ line, got one that is cut short or empty"
        )
    return ArpaModel(highest, probabilities, backoffs)

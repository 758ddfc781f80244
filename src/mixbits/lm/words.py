"""White-space words beside a tokenizer's tokens: which tokens make up which word, and which words a tokenizer knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixbits.errors import DataError
from mixbits.lm.corpus import boundary_id, encode_lines
from mixbits.lm.tokenizer import PAD


def vocabulary_words(tokenizer: Any) -> list[str] | None:
    """The words of a word-level tokenizer by id, special tokens aside; None for any other, which can spell every word."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel":
        return None
    special = {*tokenizer.all_special_tokens, PAD}
    return [word for word in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) if word not in special]


def tokens_per_word(tokenizer: Any, lines: list[str]) -> list[np.ndarray]:
    """For each line the number of tokens of each of its white-space words, (num_words,): they add up to ``encode_lines``' tokens.

    A token that is only white space counts for the word after it (the last one at the end of a line).

    Raises:
        DataError: a token that spans words, a word without tokens, or a tokenizer that does not tell where its tokens stand.
    """
    rows = encode_lines(tokenizer, lines)
    if (
        all(len(row) == len(line.split()) for row, line in zip(rows, lines, strict=True))
        and vocabulary_words(tokenizer) is not None
    ):
        return [np.ones(len(row), dtype=np.int64) for row in rows]
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer does not tell which characters its tokens stand for; words cannot be told apart in it"
        )
    spans = tokenizer(
        lines,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    boundary_id(tokenizer)
    return [_count(line, row, span) for line, row, span in zip(lines, rows, spans, strict=True)]


def _count(line: str, row: list[int], spans: list[tuple[int, int]]) -> np.ndarray:
    words = line.split()
    word_of = np.cumsum([not c.isspace() and (not i or line[i - 1].isspace()) for i, c in enumerate(line)]) - 1
    is_space = [c.isspace() for c in line]
    counts = np.zeros(len(words), dtype=np.int64)
    for start, stop in spans:
        touched = {int(word_of[i]) for i in range(start, stop) if not is_space[i]}
        if len(touched) > 1:
            raise DataError(
                f"a token stands for {line[start:stop]!r}, more than one word; scores per word cannot be told apart"
            )
        counts[
            touched.pop()
            if touched
            else min(int(word_of[start]) + 1 if start < len(line) else len(words), len(words) - 1)
        ] += 1
    if len(spans) != len(row) or counts.min(initial=1) < 1:
        raise DataError(
            f"the tokenizer gives a word no token of its own in {line[:60]!r}; scores per word cannot be told apart"
        )
    return counts

"""Counts of all n-grams of a text, lengths 1 to N, by sorting.

The text is one array of word ids, ``<s>`` before and ``</s>`` after every sentence. An n-gram is (index of its last n - 1 words among the n-grams of
that length, first word), one 64-bit integer whatever n is; the index of the n-gram that ends at each place of the text comes from sorting the
integers of the length before. So each length costs one sort of the text, and vocabularies and lengths have no limit of bits. n-grams never cross
``<s>``. Memory: about 45 bytes a word of text, and 28 bytes an n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixbits.asr.ngram import BEGIN, END, UNKNOWN, IntArray
from mixbits.errors import DataError

Int32Array = npt.NDArray[np.int32]

_WORDS_AT_ONCE = 1 << 20
_SPECIAL = (UNKNOWN, BEGIN, END)
UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2


@dataclass(frozen=True)
class EncodedText:
    """``ids`` (num_tokens,): all sentences with their ``<s>`` and ``</s>``. ``words``: a word's id is its place; first ``<unk>``, ``<s>``, ``</s>``.

    ``num_unknown``: running words that became ``<unk>``, or were written so.
    """

    ids: Int32Array
    words: tuple[str, ...]
    num_sentences: int
    num_unknown: int

    @property
    def num_words(self) -> int:
        """Running words, ends of sentences not counted."""
        return len(self.ids) - 2 * self.num_sentences


@dataclass(frozen=True)
class NgramCounts:
    """The distinct n-grams of one length; (num_ngrams,) each, sorted by (``suffix``, ``first``).

    ``suffix``, ``context``: index of the last and of the first n - 1 words among the shorter n-grams (0 for length 1); ``first``, ``last``: the
    words at the ends; ``count``: how often it occurs. The 1-grams are all words of the vocabulary by id, counted or not.
    """

    suffix: Int32Array
    context: Int32Array
    first: Int32Array
    last: Int32Array
    count: IntArray

    def __len__(self) -> int:
        return len(self.count)


def encode_text(sentences: Iterable[str], vocabulary: Iterable[str] | None = None) -> EncodedText:
    """Split sentences at white space and number their words.

    Args:
        vocabulary: the words to know; all others become ``<unk>``. None: every word of the text. A ``<unk>`` written in the text is the unknown
            word; ``<s>`` and ``</s>`` there are unknown words too, never boundaries.

    Raises:
        DataError: no sentences, or more words than 32 bits number.
    """
    ids = {word: number for number, word in enumerate(_SPECIAL)}
    closed = vocabulary is not None
    for word in vocabulary or ():
        ids.setdefault(word, len(ids))
    get = {**ids, BEGIN: UNKNOWN_ID, END: UNKNOWN_ID}
    parts: list[Int32Array] = []
    flat: list[int] = []
    num_sentences = num_unknown = 0

    def pack() -> int:
        part = np.array(flat, dtype=np.int32)
        parts.append(part)
        flat.clear()
        return int(np.count_nonzero(part == UNKNOWN_ID))

    for sentence in sentences:
        words = sentence.split()
        if not words:
            continue
        flat.append(BEGIN_ID)
        if closed:
            flat += [get.get(word, UNKNOWN_ID) for word in words]
        else:
            flat += [get.setdefault(word, len(get)) for word in words]
        flat.append(END_ID)
        num_sentences += 1
        if len(flat) >= _WORDS_AT_ONCE:
            num_unknown += pack()
    num_unknown += pack()
    if not num_sentences:
        raise DataError("the text has no words; an n-gram model needs some")
    if sum(map(len, parts)) >= 2**31:
        raise DataError("the text has more than two thousand million words; estimate from a part of it")
    return EncodedText(np.concatenate(parts), tuple(ids if closed else get), num_sentences, num_unknown)


def count_ngrams(text: EncodedText, order: int) -> list[NgramCounts]:
    """Counts of the n-grams of lengths 1 to ``order``, one entry a length."""
    ids, num_words = text.ids, len(text.words)
    place = np.arange(len(ids), dtype=np.int32)
    starts = np.where(ids == BEGIN_ID, place, 0)
    depth = place - np.maximum.accumulate(starts)
    words = np.arange(num_words, dtype=np.int32)
    none = np.zeros(num_words, dtype=np.int32)
    unigrams = np.bincount(ids, minlength=num_words)
    found = [NgramCounts(none, none, words, words, unigrams)]
    ending: Int32Array = ids  # index of the n-gram that ends at each place; anything where there is none
    for length in range(2, order + 1):
        where = np.flatnonzero(depth >= length - 1).astype(np.int32)
        keys = ending[where].astype(np.int64) * num_words + ids[where - (length - 1)]
        distinct, example, index, count = _distinct(keys)
        found.append(
            NgramCounts(
                suffix=(distinct // num_words).astype(np.int32),
                context=ending[where[example] - 1],
                first=(distinct % num_words).astype(np.int32),
                last=ids[where[example]],
                count=count,
            )
        )
        following = np.zeros(len(ids), dtype=np.int32)
        following[where] = index
        ending = following
    return found


def _distinct(keys: IntArray) -> tuple[IntArray, IntArray, Int32Array, IntArray]:
    """Sorted distinct keys, where one of each stands, the index of every key among them, how often each occurs."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    first = np.flatnonzero(is_new)
    index = np.empty(len(keys), dtype=np.int32)
    index[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return ordered[first], order[first], index, np.diff(np.append(first, len(keys)))

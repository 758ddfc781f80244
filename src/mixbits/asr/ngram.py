"""Back-off n-gram language models, scored for many words at once.

ln p(w | h) = the stored value of the n-gram h w, if there is one; else back-off(h) + ln p(w | h without its first word), where
back-off(h) is 0 for a history that is not stored (SRILM's ngram-format page; Katz 1987).

An n-gram is (index of its first n - 1 words among the n-grams of that length, last word), one integer, sorted. So the longest stored
n-gram that ends at each word of a whole text is found by one binary search a length for all words together: the match of length n at word i
continues the match of length n - 1 at word i - 1. Memory: 24 bytes an n-gram, and some 60 bytes a word for a million words at a time.

Unknown words are scored as ``<unk>``, also as history. A model without ``<unk>`` gives them :data:`MISSING_UNKNOWN_LOG10`, as KenLM does.
``<s>`` and ``</s>`` written in a text are data: unknown words, never boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mixbits.errors import DataError, FormatError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LN10 = math.log(10.0)
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MISSING_UNKNOWN_LOG10 = -100.0
_TOKENS_AT_ONCE = 1 << 20
_NOT_KNOWN = -2


@dataclass(frozen=True)
class NgramTable:
    """The n-grams of one length, (num_ngrams,) each: ``keys`` = context x number of words + last word, rising.

    ``log_p`` and ``log_backoff`` are natural logs; the longest n-grams have no ``log_backoff``.
    """

    keys: IntArray
    log_p: FloatArray
    log_backoff: FloatArray | None

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: IntArray) -> IntArray:
        """Index of each key, -1 where it is not stored."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        index = np.searchsorted(self.keys, keys)
        index[index == len(self.keys)] = 0
        index[self.keys[index] != keys] = -1
        return index


@dataclass(frozen=True)
class NgramScores:
    """Scores of sentences; sentence i owns the tokens ``offsets[i]:offsets[i + 1]``: its words, then the sentence end.

    (num_tokens,) each: ``log_p`` natural logs; ``is_unknown``; ``ngram_length`` the length of the n-gram found, history included.
    """

    log_p: FloatArray
    is_unknown: npt.NDArray[np.bool_]
    ngram_length: IntArray
    offsets: IntArray

    @cached_property
    def sentence(self) -> IntArray:
        """The sentence of each token, (num_tokens,)."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def sentence_scores(self) -> FloatArray:
        """ln p of each sentence, (num_sentences,)."""
        sums = np.bincount(self.sentence, weights=self.log_p, minlength=len(self.offsets) - 1)
        return np.asarray(sums, dtype=np.float64)

    def of(self, sentence: int) -> FloatArray:
        """ln p of the tokens of one sentence."""
        return self.log_p[self.offsets[sentence] : self.offsets[sentence + 1]]


class NgramModel(Protocol):
    """What :class:`BackoffModel` and :class:`mixbits.asr.kenlm_model.KenlmModel` have in common."""

    @property
    def order(self) -> int: ...
    @property
    def has_unknown(self) -> bool: ...
    def __contains__(self, word: object) -> bool: ...
    def score(
        self,
        sentences: Sequence[Sequence[str]],
        *,
        histories: Sequence[Sequence[str]] | None = None,
        sentence_end: bool = True,
    ) -> NgramScores: ...


@dataclass(frozen=True)
class BackoffModel:
    """A back-off model. ``words``: the vocabulary, a word's id is its place; ``tables``: n-grams of lengths 1, 2, …

    Raises:
        FormatError: no ``<s>`` or ``</s>``, a word twice, arrays that do not fit each other, values that are not finite.
    """

    words: tuple[str, ...]
    tables: tuple[NgramTable, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.words):
            raise FormatError("a word is twice in the vocabulary of an n-gram model; expected each once")
        for word in (BEGIN, END):
            if word not in self.ids:
                raise FormatError(f"the n-gram model has no {word}; expected it among the 1-grams")
        for order, table in enumerate(self.tables, 1):
            last = order == len(self.tables)
            values = [table.log_p, *([] if table.log_backoff is None else [table.log_backoff])]
            if any(len(array) != len(table) or not np.all(np.isfinite(array)) for array in values):
                raise FormatError(f"{order}-grams: expected a finite number for each of {len(table)}")
            if np.any(np.diff(table.keys) <= 0) or (table.log_backoff is None and not last):
                raise FormatError(f"{order}-grams: expected rising keys, each with its back-off weight")
        if not np.array_equal(self.tables[0].keys, np.arange(len(self.words))):
            raise FormatError("expected one 1-gram for each word of an n-gram model")

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.tables)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Word -> id."""
        return {word: number for number, word in enumerate(self.words)}

    @property
    def has_unknown(self) -> bool:
        """Whether the model has ``<unk>``."""
        return UNKNOWN in self.ids

    @property
    def unknown_id(self) -> int:
        """The id of ``<unk>``, -1 if there is none."""
        return self.ids.get(UNKNOWN, -1)

    def __contains__(self, word: object) -> bool:
        """Whether ``word`` can stand in a text and is known (``<unk>`` itself is not)."""
        return word in self.ids and word not in (BEGIN, END, UNKNOWN)

    @cached_property
    def _text_ids(self) -> dict[str, int]:
        return {word: number for word, number in self.ids.items() if word in self}

    def encode(self, words: Sequence[str]) -> IntArray:
        """Ids of the words of a text; unknown ones are ``unknown_id``."""
        get, unknown = self._text_ids.get, self.unknown_id
        return np.array([get(word, unknown) for word in words], dtype=np.int64)

    def score(
        self,
        sentences: Sequence[Sequence[str]],
        *,
        histories: Sequence[Sequence[str]] | None = None,
        sentence_end: bool = True,
    ) -> NgramScores:
        """Score sentences, each a sequence of words.

        Args:
            histories: the words before each sentence, in place of ``<s>`` (write it where a sentence begins).
            sentence_end: score ``</s>`` after the last word too.

        Raises:
            DataError: not as many histories as sentences.
        """
        if histories is not None and len(histories) != len(sentences):
            raise DataError(f"{len(histories)} histories for {len(sentences)} sentences; expected one each")
        offsets = np.zeros(len(sentences) + 1, dtype=np.int64)
        np.cumsum([len(words) + sentence_end for words in sentences], out=offsets[1:])
        log_p, length = np.empty(int(offsets[-1])), np.empty(int(offsets[-1]), dtype=np.int64)
        is_unknown = np.empty(int(offsets[-1]), dtype=bool)
        done = 0
        for ids, depth, scored, unknown in self._parts(sentences, histories, sentence_end):
            found, found_length = self._score(ids, depth)
            part = slice(done, done + int(scored.sum()))
            log_p[part], length[part], is_unknown[part] = found[scored], found_length[scored], unknown[scored]
            done = part.stop
        return NgramScores(log_p, is_unknown, length, offsets)

    def next_log_p(self, histories: npt.ArrayLike, words: npt.ArrayLike) -> FloatArray:
        """ln p of one word each after its history, all as ids.

        Args:
            histories: (num, length), oldest word first, -1 before a history that is shorter; -1 also for a word that the
                model does not know and cannot (no ``<unk>``). words: (num,).
        """
        last = np.asarray(words, dtype=np.int64)
        before = np.asarray(histories, dtype=np.int64).reshape(len(last), -1)
        before = before[:, max(0, before.shape[1] - self.order + 1) :]
        rows = np.concatenate([before, last[:, None]], axis=1)
        depth = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        return self._score(rows.ravel(), depth.ravel())[0].reshape(rows.shape)[:, -1]

    def _parts(
        self, sentences: Sequence[Sequence[str]], histories: Sequence[Sequence[str]] | None, sentence_end: bool
    ) -> Iterator[tuple[IntArray, IntArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
        """Sentences in parts of bounded size: ids, place in the sentence, whether it is scored, whether it is unknown."""
        get, keep = self._text_ids.get, self.order - 1
        get_history = {**self._text_ids, BEGIN: self.ids[BEGIN]}.get
        begin, end = [self.ids[BEGIN]][:keep], [self.ids[END]] if sentence_end else []
        ids: list[int] = []
        before: list[int] = []
        after: list[int] = []
        for number, words in enumerate(sentences):
            history = begin
            if histories is not None:
                given = histories[number]
                history = [get_history(word, _NOT_KNOWN) for word in given[max(0, len(given) - keep) :]]
            ids += history
            ids += [get(word, _NOT_KNOWN) for word in words]
            ids += end
            before.append(len(history))
            after.append(len(words) + len(end))
            if len(ids) >= _TOKENS_AT_ONCE or number + 1 == len(sentences):
                yield self._part(ids, before, after)
                ids, before, after = [], [], []

    def _part(
        self, ids: list[int], before: list[int], after: list[int]
    ) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        array = np.array(ids, dtype=np.int64)
        lengths = np.add(before, after)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        depth = np.arange(len(array)) - starts
        unknown = array == _NOT_KNOWN
        array[unknown] = self.unknown_id
        return array, depth, depth >= np.repeat(before, lengths), unknown

    def _score(self, ids: IntArray, depth: IntArray) -> tuple[FloatArray, IntArray]:
        """(ln p, length of the n-gram found) of each token after the ``depth`` tokens before it, (num_tokens,) each."""
        known = ids >= 0
        log_p = np.where(known, self.tables[0].log_p[np.maximum(ids, 0)], MISSING_UNKNOWN_LOG10 * LN10)
        length = known.astype(np.int64)
        match = np.where(known, ids, -1)
        for order, (shorter, table) in enumerate(zip(self.tables, self.tables[1:], strict=False), 2):
            context = np.full(len(ids), -1, dtype=np.int64)
            context[1:] = match[:-1]
            context[depth < order - 1] = -1
            stored = np.flatnonzero(context >= 0)
            assert shorter.log_backoff is not None
            log_p[stored] += shorter.log_backoff[context[stored]]
            asked = stored[known[stored]]
            index = table.find(context[asked] * len(self.words) + ids[asked])
            hit = index >= 0
            log_p[asked[hit]] = table.log_p[index[hit]]
            length[asked[hit]] = order
            match = np.full(len(ids), -1, dtype=np.int64)
            match[asked] = index
        return log_p, length

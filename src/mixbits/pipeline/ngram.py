"""An n-gram model from a text file: the vocabulary, the estimate, the ARPA file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mixbits.asr.formats.arpa import write_arpa
from mixbits.asr.kneser_ney import FALLBACK, estimate
from mixbits.asr.ngram import BackoffModel
from mixbits.asr.ngram_counts import encode_text
from mixbits.errors import DataError, FormatError
from mixbits.lm.corpus import read_sentences
from mixbits.lm.tokenizer import load_tokenizer
from mixbits.lm.words import vocabulary_words
from mixbits.pipeline.checks import check_file


def estimate_ngram(
    text: str | Path,
    output: str | Path,
    *,
    order: int = 4,
    vocabulary: str | Path | None = None,
    prune: Sequence[int] = (),
    discount_fallback: bool = False,
) -> dict[str, Any]:
    """Estimate a modified Kneser-Ney model (:mod:`mixbits.asr.kneser_ney`) and write it as an ARPA file.

    Args:
        text: one sentence a line, ``.gz`` and ``.xz`` too; blank lines are skipped.
        vocabulary: :func:`read_vocabulary`; None: the words of the text.
        prune: thresholds for each length. discount_fallback: take lmplz's fallback discounts where the counts give none.

    Returns what was counted: ``num_words``, ``num_sentences``, ``num_unknown``, ``vocabulary_size``, and for each length ``counted``, ``kept``,
    ``discounts``, ``is_fallback``.
    """
    check_file(Path(output))
    words = None if vocabulary is None else read_vocabulary(vocabulary)
    encoded = encode_text(read_sentences(text), words)
    found = estimate(encoded, order=order, prune=prune, fallback=FALLBACK if discount_fallback else None)
    write_arpa(output, found.model)
    return {
        "num_words": encoded.num_words,
        "num_sentences": encoded.num_sentences,
        "num_unknown": encoded.num_unknown,
        "vocabulary_size": len(encoded.words) - 3,
        "lengths": [
            {"counted": counted, "kept": len(table), "discounts": list(discounts), "is_fallback": is_fallback}
            for counted, table, discounts, is_fallback in zip(
                found.num_counted, found.model.tables, found.discounts, found.is_fallback, strict=True
            )
        ],
    }


def train_ngram(sentences: Iterable[str], tokenizer: Any, *, order: int = 4, prune: Sequence[int] = ()) -> BackoffModel:
    """A model of some sentences over the words of a word-level tokenizer, with any other one over all words; lmplz's fallback discounts."""
    encoded = encode_text(sentences, vocabulary_words(tokenizer))
    return estimate(encoded, order=order, prune=prune, fallback=FALLBACK).model


def read_vocabulary(path: str | Path) -> list[str]:
    """The words of a list (one a line, a number after it allowed, as in Kaldi's words.txt) or of a word-level model directory.

    Raises:
        FormatError: a line that holds more than a word. DataError: no such file, no words, a subword tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        known = vocabulary_words(load_tokenizer(path))
        if known is None:
            raise DataError(
                f"{path}: its tokenizer splits words into pieces; expected a word-level one, or a list of words"
            )
        return known
    words = []
    for number, line in enumerate(read_sentences(path), 1):
        fields = line.split()
        if len(fields) > 2 or (len(fields) == 2 and not fields[1].isdigit()):
            raise FormatError(
                f"{path}: entry {number} is {line[:60]!r}; expected one word a line (a number after it is allowed)"
            )
        words.append(fields[0])
    return words

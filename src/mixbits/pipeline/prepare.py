"""Text and vocabulary of an experiment: tokenizer, token streams, hashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mixbits.lm.corpus import TokenStream, encode, encode_file, limit_words, read_sentences
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer
from mixbits.pipeline.settings import ExperimentSettings, TextFiles


@dataclass(frozen=True)
class PreparedText:
    """A tokenizer and the three token streams."""

    tokenizer: Any
    train: TokenStream
    valid: TokenStream
    test: TokenStream

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's sentences."""
        return {"train": self.train.sha256, "valid": self.valid.sha256, "test": self.test.sha256}


def training_sentences(text: TextFiles) -> Iterator[str]:
    """The training files one after the other, cut at ``max_train_words``."""
    return limit_words(chain.from_iterable(read_sentences(path) for path in text.train), text.max_train_words)


def prepare_text(settings: ExperimentSettings) -> PreparedText:
    """Build or load the tokenizer and tokenize all three parts. Raises DataError for bad text."""
    vocabulary = settings.vocabulary
    if vocabulary.path is not None:
        tokenizer = load_tokenizer(Path(vocabulary.path))
    else:
        tokenizer = word_tokenizer(
            training_sentences(settings.text),
            max_words=vocabulary.max_words,
            min_count=vocabulary.min_count,
            max_length=settings.model.context,
        )
    return PreparedText(
        tokenizer,
        encode(tokenizer, training_sentences(settings.text)),
        encode_file(tokenizer, settings.text.valid),
        encode_file(tokenizer, settings.text.test),
    )

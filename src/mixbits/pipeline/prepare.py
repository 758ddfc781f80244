"""Text and vocabulary of an experiment: tokenizer, token streams, hashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.nbest import reference_texts
from mixbits.errors import DataError
from mixbits.lm.corpus import TokenStream, encode, limit_words, read_sentences
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer
from mixbits.pipeline.settings import ExperimentSettings, TextFiles

_HELD_OUT_SHARE = 20
_MAX_HELD_OUT_SENTENCES = 2000


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


def text_sentences(path: str | Path) -> Iterator[str]:
    """Sentences of a text file, or the references of an n-best list (``.jsonl``, ``.jsonl.gz``, ``.jsonl.xz``)."""
    if ".jsonl" in Path(path).suffixes[-2:]:
        return (reference for reference in reference_texts(read_nbest(path).lists) if reference.strip())
    return read_sentences(path)


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
        encode(tokenizer, text_sentences(settings.text.valid)),
        encode(tokenizer, text_sentences(settings.text.test)),
    )


def split_sentences(text: str | Path, valid: str | Path | None = None) -> tuple[list[str], list[str]]:
    """Training and validation sentences. Without ``valid`` every 20th sentence (2,000 at most) is held out.

    Held-out sentences are removed from training by text, wherever else they stand. Raises DataError when too few are left.
    """
    if valid is not None:
        held_out = list(read_sentences(valid))
        return list(read_sentences(text)), held_out
    sentences = list(read_sentences(text))
    step = max(_HELD_OUT_SHARE, -(-len(sentences) // _MAX_HELD_OUT_SENTENCES))
    if len(sentences) < 2 * step:
        raise DataError(f"{text}: {len(sentences)} sentences are too few to hold some out for validation; give --valid")
    held_out = sentences[step - 1 :: step]
    kept_out = set(held_out)
    kept = [sentence for sentence in sentences if sentence not in kept_out]
    if not kept:
        raise DataError(
            f"{text}: all sentences are repetitions of {len(kept_out)}; none is left to train on; give --valid"
        )
    return kept, held_out


def split_text(tokenizer: Any, text: str | Path, valid: str | Path | None = None) -> tuple[TokenStream, TokenStream]:
    """The token streams of :func:`split_sentences`."""
    train, held_out = split_sentences(text, valid)
    return encode(tokenizer, train), encode(tokenizer, held_out)


def training_context(model: Any, default: int = 256) -> int:
    """Block length for a model: its context, but not more than ``default``."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit or default, default)

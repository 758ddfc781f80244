"""The perplexity of a model interpolated with an n-gram model, per word: p = w · p_model + (1 - w) · p_ngram.

All three figures (model, n-gram, interpolated) are over the same events: white-space words and sentence ends. The model's tokens are summed to words.
The model reads on over sentence ends; the n-gram model begins each sentence at ``<s>``.

Unknown words, the same on both sides. A word-level model knows its vocabulary, and any other word is the event ``<unk>`` for both. Words that it knows
and the n-gram model does not share the n-gram's p(<unk>) with that event in equal parts. A subword model can spell every word: no share of p(<unk>)
belongs to one of them, so the n-gram's probability of an unknown word is 0, and likewise where the n-gram model has no ``<unk>``; such words are left
out of the n-gram's own perplexity, and their number is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbits.asr.ngram import UNKNOWN, NgramModel
from mixbits.asr.ngram_features import best_weight, interpolated_words
from mixbits.errors import DataError
from mixbits.lm.corpus import TokenStream, read_sentences
from mixbits.lm.perplexity import Perplexity, mean_and_stderr
from mixbits.lm.words import tokens_per_word, vocabulary_words

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NgramText:
    """A text as an n-gram model sees it; (num_words,) each, sentence ends counted: ``log_p`` nats, -inf for what it cannot say; ``sentence``.

    ``num_tokens``: the model's tokens of each word. ``unknown``: what was done about unknown words, as plain data.
    """

    log_p: FloatArray
    sentence: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    unknown: dict[str, Any]

    def word_log_p(self, result: Perplexity) -> FloatArray:
        """ln p of each word by the model whose tokens were evaluated."""
        starts = np.cumsum(self.num_tokens) - self.num_tokens
        return -np.add.reduceat(result.nll.astype(np.float64), starts)


def read_ngram_text(path: str | Path, tokenizer: Any, ngram: NgramModel, stream: TokenStream) -> NgramText:
    """Score a text with an n-gram model, word by word. Raises DataError when words and the model's tokens do not fit."""
    lines = list(read_sentences(path))
    counts = tokens_per_word(tokenizer, lines)
    num_tokens = np.concatenate([np.append(count, 1) for count in counts])
    if num_tokens.sum() != stream.num_tokens:
        raise DataError(f"{path}: has changed while it was read: {num_tokens.sum()} and {stream.num_tokens} tokens")
    words = vocabulary_words(tokenizer)
    known = None if words is None else set(words)
    sentences = [[word if known is None or word in known else UNKNOWN for word in line.split()] for line in lines]
    scores = ngram.score(sentences)
    log_p = scores.log_p.copy()
    shared = None if words is None or not ngram.has_unknown else 1 + sum(word not in ngram for word in words)
    log_p[scores.is_unknown] = -np.inf if shared is None else log_p[scores.is_unknown] - math.log(shared)
    unknown = {
        "num_unknown_to_ngram": int(scores.is_unknown.sum()),
        "num_unknown_to_both": sum(word == UNKNOWN for sentence in sentences for word in sentence),
        "shared_among": shared,
        "rule": "p(<unk>) of the n-gram model is shared in equal parts among the words of the vocabulary that it does not know"
        if shared is not None
        else "the n-gram model gives unknown words no probability; they are left out of its own perplexity",
    }
    return NgramText(log_p, scores.sentence, num_tokens, unknown)


def tuned_weight(text: NgramText, result: Perplexity) -> float:
    """The weight of the model with the highest likelihood of a held-out text; never quite 0, so that every word keeps a probability."""
    return max(1e-4, best_weight(text.word_log_p(result), text.log_p))


def interpolated_figures(text: NgramText, result: Perplexity, weight: float) -> dict[str, Any]:
    """Plain data: ``model``, ``alone`` (the n-gram model), ``interpolated``, each per word, and the paired difference that interpolating makes (``delta_nats``,
    negative: better)."""
    neural = text.word_log_p(result)
    both = interpolated_words(neural, text.log_p, weight)
    if not np.isfinite(both).all():
        raise DataError(
            "with a weight of 0 words that the n-gram model does not know have no probability; expected more than 0"
        )
    delta, stderr = mean_and_stderr(neural - both, text.sentence)
    possible = np.isfinite(text.log_p)
    return {
        "weight": weight,
        "model": _figures(neural, text.sentence),
        "alone": {**_figures(text.log_p[possible], text.sentence[possible]), "num_left_out": int((~possible).sum())},
        "interpolated": _figures(both, text.sentence),
        "delta_nats": delta,
        "delta_nats_stderr": stderr,
        "unknown_words": text.unknown,
    }


def paired_interpolated(
    text: NgramText, result: Perplexity, weight: float, base: Perplexity, base_weight: float
) -> tuple[float, float]:
    """Difference in nats per word of two interpolated models (positive: ``result`` is worse), and its standard error over sentences."""
    one = interpolated_words(text.word_log_p(result), text.log_p, weight)
    other = interpolated_words(text.word_log_p(base), text.log_p, base_weight)
    return mean_and_stderr(other - one, text.sentence)


def _figures(log_p: FloatArray, sentence: npt.NDArray[np.int64]) -> dict[str, Any]:
    if not len(log_p):
        return {"ppl": None, "ppl_stderr": None, "nats": None, "nats_stderr": None, "num_words": 0}
    _, index = np.unique(sentence, return_inverse=True)
    nats, stderr = mean_and_stderr(-log_p, index)
    ppl = math.exp(min(nats, 700.0))
    return {"ppl": ppl, "ppl_stderr": ppl * stderr, "nats": nats, "nats_stderr": stderr, "num_words": len(log_p)}

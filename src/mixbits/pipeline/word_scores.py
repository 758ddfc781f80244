"""A neural LM's scores of n-best lists word by word, for interpolation with an n-gram model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbits.asr.nbest import NBest
from mixbits.asr.ngram import NgramModel
from mixbits.asr.ngram_features import interpolated_score, neural_word_scores, ngram_features
from mixbits.asr.rescore import DEFAULT_MAX_TOKENS, LmFeatures
from mixbits.asr.trie import plan_forests
from mixbits.lm.words import tokens_per_word
from mixbits.pipeline.lm_scores import Runtime, SpeechModel, check_vocabulary, encode_texts, unknown_words

FloatArray = npt.NDArray[np.float64]


def neural_word_log_probs(
    model: SpeechModel | str | Path | tuple[Any, Any],
    lists: Sequence[NBest],
    *,
    lower_case: bool = False,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    runtime: Runtime = "auto",
) -> list[list[FloatArray]]:
    """For each list and hypothesis ln p of its words and its sentence end, (num_words + 1,); pieces are summed, shared prefixes computed once.

    They add up to :func:`mixbits.pipeline.lm_scores.neural_features`' scores (unknown words: the probability of ``<unk>``, no penalty).

    Raises:
        DataError: as there; also a tokenizer whose tokens do not make up words.
    """
    if not isinstance(model, SpeechModel):
        model = SpeechModel(model)
    texts = _texts(lists, lower_case)
    ids, _ = _encoded(model, texts, lower_case)
    return _word_log_probs(model, texts, ids, max_tokens=max_tokens, runtime=runtime)


def _texts(lists: Sequence[NBest], lower_case: bool) -> list[list[str]]:
    return [[h.text.lower() if lower_case else h.text for h in entry.hypotheses] for entry in lists]


def _encoded(
    model: SpeechModel, texts: Sequence[Sequence[str]], lower_case: bool
) -> tuple[dict[str, list[int]], frozenset[str]]:
    """Ids of each distinct text, and the unknown words. Raises DataError: most words are unknown."""
    flat = list(dict.fromkeys(text for some in texts for text in some))
    unknown = unknown_words(model.tokenizer, flat)
    check_vocabulary(model.tokenizer, flat, unknown, lower_case=lower_case)
    return encode_texts(model.tokenizer, flat), unknown


def _word_log_probs(
    model: SpeechModel,
    texts: Sequence[Sequence[str]],
    ids: dict[str, list[int]],
    *,
    max_tokens: int,
    runtime: Runtime,
) -> list[list[FloatArray]]:
    flat = list(ids)
    pieces = dict(zip(flat, tokens_per_word(model.tokenizer, flat), strict=True)) if flat else {}
    return neural_word_scores(
        [[ids[text] for text in some] for some in texts],
        [[pieces[text] for text in some] for some in texts],
        score_forest=model.score_forest(model.runtime(runtime, "trie")),
        max_tokens_per_forest=max_tokens,
    )


def interpolated_features(
    model: SpeechModel,
    lists: Sequence[NBest],
    ngram: NgramModel,
    *,
    weight: float,
    lower_case: bool = False,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    runtime: Runtime = "auto",
) -> LmFeatures:
    """LM scores interpolated with an n-gram model word by word (:func:`interpolated_lm_scores`), with the counts of the neural model's work."""
    started = time.perf_counter()
    texts = _texts(lists, lower_case)
    ids, unknown = _encoded(model, texts, lower_case)
    neural = _word_log_probs(model, texts, ids, max_tokens=max_tokens, runtime=runtime)
    scores = interpolated_lm_scores(neural, lists, ngram, weight=weight, lower_case=lower_case)
    trees = [[ids[text] for text in some] for some in texts]
    flat = [text for some in texts for text in some]
    return LmFeatures(
        neural_lm_score=scores,
        num_unknown=np.array([sum(word in unknown for word in text.split()) for text in flat], dtype=np.int64),
        num_tokens=np.array([len(ids[text]) - 1 for text in flat], dtype=np.int64),
        num_nodes=sum(f.num_nodes - f.num_trees for f, _ in plan_forests(trees, max_tokens=max_tokens)),
        seconds=time.perf_counter() - started,
    )


def interpolated_lm_scores(
    neural: Sequence[Sequence[FloatArray]],
    lists: Sequence[NBest],
    ngram: NgramModel,
    *,
    weight: float,
    lower_case: bool = False,
) -> FloatArray:
    """ln p of every hypothesis, lists in order, (num_hypotheses,): p = weight · p_neural + (1 - weight) · p_ngram, word by word.

    An unknown word has both models' p(<unk>), as in the neural score alone.
    """
    words = ngram_features(lists, ngram, lower_case=lower_case).words
    flat = [scores for some in neural for scores in some]
    return np.array([interpolated_score(scores, words.of(number), weight) for number, scores in enumerate(flat)])

"""n-gram scores beside a neural LM's: features of n-best lists, and per-word interpolation p = w · p_neural + (1 - w) · p_ngram.

Interpolation is of probabilities, word by word, and not of log-probabilities or of whole sentences: what the literature calls "+4-gram". The words of a
sentence are its white-space words and then the sentence end; a neural LM's pieces are summed to words first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixbits.asr.nbest import NBest
from mixbits.asr.ngram import FloatArray, IntArray, NgramModel, NgramScores
from mixbits.asr.trie import TokenForest, plan_forests
from mixbits.errors import DataError, SpecError

ScoreForest = Callable[[TokenForest], npt.ArrayLike]
_BISECTIONS = 60


@dataclass(frozen=True)
class NgramFeatures:
    """n-gram scores of all hypotheses, lists in order; (num_hypotheses,) each: ``ngram_score`` ln p, sentence end included, and ``num_unknown`` words.

    ``words``: the scores word by word, hypothesis i being sentence i.
    """

    ngram_score: FloatArray
    num_unknown: IntArray
    words: NgramScores


def ngram_features(lists: Sequence[NBest], model: NgramModel, *, lower_case: bool = False) -> NgramFeatures:
    """Score every hypothesis of every list; ``lower_case``: as lower-case text."""
    texts = [hypothesis.text for entry in lists for hypothesis in entry.hypotheses]
    distinct = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(distinct)}
    scores = model.score([(text.lower() if lower_case else text).split() for text in distinct])
    wanted = np.array([place[text] for text in texts], dtype=np.int64)
    lengths = np.diff(scores.offsets)[wanted]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - scores.offsets[wanted], lengths)
    words = NgramScores(scores.log_p[index], scores.is_unknown[index], scores.ngram_length[index], offsets)
    unknown = np.bincount(words.sentence, weights=words.is_unknown, minlength=len(texts)).astype(np.int64)
    return NgramFeatures(words.sentence_scores(), unknown, words)


def interpolated_words(
    nn_word_logprobs: npt.ArrayLike, ngram_word_logprobs: npt.ArrayLike, weight: float
) -> FloatArray:
    """ln(w · p_neural + (1 - w) · p_ngram) of each word, (num_words,); -inf stands for a probability of 0.

    Raises:
        SpecError: ``weight`` outside 0 to 1. DataError: not as many words on both sides, NaN.
    """
    neural = np.asarray(nn_word_logprobs, dtype=np.float64)
    ngram = np.asarray(ngram_word_logprobs, dtype=np.float64)
    if not 0 <= weight <= 1:
        raise SpecError(f"the neural model's interpolation weight is {weight}; expected 0 to 1")
    if neural.shape != ngram.shape:
        raise DataError(f"{neural.shape} neural and {ngram.shape} n-gram scores; expected one each for every word")
    if np.isnan(neural).any() or np.isnan(ngram).any():
        raise DataError("a word's log-probability is NaN; the model is broken")
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp(np.log(weight) + neural, np.log1p(-weight) + ngram), dtype=np.float64)


def interpolated_score(nn_word_logprobs: npt.ArrayLike, ngram_word_logprobs: npt.ArrayLike, weight: float) -> float:
    """ln p of a sentence from its words' scores by both models; see :func:`interpolated_words`."""
    return float(interpolated_words(nn_word_logprobs, ngram_word_logprobs, weight).sum())


def best_weight(nn_word_logprobs: npt.ArrayLike, ngram_word_logprobs: npt.ArrayLike) -> float:
    """The neural model's weight with the highest likelihood of a text, 0 to 1, to about 1e-15.

    The log-likelihood is concave in the weight, so its derivative is bisected: the fixed point of the EM algorithm without its slow tail.
    """
    neural = np.asarray(nn_word_logprobs, dtype=np.float64)
    ratio = np.exp(np.clip(np.asarray(ngram_word_logprobs, dtype=np.float64) - neural, -700.0, 700.0))
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if np.sum((1.0 - ratio) / (middle + (1.0 - middle) * ratio)) > 0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def neural_word_scores(
    lists: Sequence[Sequence[Sequence[int]]],
    num_tokens: Sequence[Sequence[npt.ArrayLike]],
    *,
    score_forest: ScoreForest,
    max_tokens_per_forest: int,
) -> list[list[FloatArray]]:
    """ln p of every word of every hypothesis by a neural LM, sentence ends included; every distinct prefix is computed once.

    Args:
        lists: for each list its hypotheses' token ids, the boundary token first and last.
        num_tokens: for each hypothesis the tokens of each word, (num_words,); the last token is the sentence end.

    Returns, for each hypothesis, (num_words + 1,).

    Raises:
        DataError: words and tokens do not add up; the scorer gives numbers that are not finite.
    """
    found: list[list[FloatArray]] = [[np.zeros(0)] * len(sequences) for sequences in lists]
    for forest, members in plan_forests(lists, max_tokens=max_tokens_per_forest):
        nodes = np.asarray(score_forest(forest), dtype=np.float64)
        forest.sequence_scores(nodes)  # refuses what is not one finite number a node
        for sequence, (number, index) in enumerate(members):
            tokens = nodes[forest.path(sequence)[1:]]
            lengths = np.append(np.asarray(num_tokens[number][index], dtype=np.int64), 1)
            if lengths.sum() != len(tokens) or lengths.min() < 1:
                raise DataError(
                    f"list {number}, hypothesis {index}: {len(tokens)} tokens do not make up {len(lengths)} words"
                )
            found[number][index] = np.add.reduceat(tokens, np.cumsum(lengths) - lengths)
    return found

"""How a language model scores the lists of one rescoring run, and how its weights are tuned on dev lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mixbits.asr.formats.jsonl import NBestFile
from mixbits.asr.nbest import NBest, reference_texts
from mixbits.asr.ngram import NgramModel
from mixbits.asr.ngram_features import ngram_features
from mixbits.asr.rescore import DEFAULT_MAX_TOKENS, LmFeatures, apply_weights
from mixbits.asr.score_plan import LongHypotheses
from mixbits.asr.tune import tune_on_lists
from mixbits.asr.weights import Weights
from mixbits.errors import DataError, SpecError
from mixbits.pipeline.history import History, score_with_history
from mixbits.pipeline.lm_scores import (
    DEFAULT_HISTORY_TOKENS,
    Runtime,
    Scoring,
    SpeechModel,
    check_words,
    neural_features,
)
from mixbits.pipeline.unknown import UnknownPolicy, check_unknown_policy
from mixbits.pipeline.word_scores import interpolated_features

NgramMode = Literal["interpolate", "log-linear"]


@dataclass(frozen=True)
class ScoreSettings:
    """How language models score lists; see :func:`mixbits.pipeline.lm_scores.neural_features`.

    ``interpolate``: "equal" puts the mean of the model's and the list's own LM score (natural logs, unscaled) in the place of
    both, with one weight; "tuned" gives each a weight of its own. ``history``: see :mod:`mixbits.pipeline.history`. ``ngram``: a model of one's
    own, "interpolate": its probability and the neural one's are mixed word by word, ``ngram_weight`` being its share; "log-linear":
    its score has a weight of its own.
    """

    lower_case: bool = False
    max_tokens: int = DEFAULT_MAX_TOKENS
    scoring: Scoring = "trie"
    cache: str | Path | None = None
    show_progress: bool = False
    interpolate: Literal["tuned", "equal"] = "tuned"
    runtime: Runtime = "auto"
    merge_order: int | None = None
    long_hypotheses: LongHypotheses = "refuse"
    unknown_policy: UnknownPolicy = "penalty"
    num_unknown_types: int | None = None
    history: History = "none"
    max_history_tokens: int = DEFAULT_HISTORY_TOKENS
    ngram: NgramModel | None = None
    ngram_mode: NgramMode = "interpolate"
    ngram_weight: float = 0.5

    def __post_init__(self) -> None:
        check_unknown_policy(self.unknown_policy, self.num_unknown_types)
        if self.max_history_tokens < 1:
            raise SpecError(f"history of {self.max_history_tokens} tokens; expected at least 1, or no history")
        if self.history != "none" and self.merge_order is not None:
            raise SpecError("merged histories and earlier utterances exclude each other; leave one of the two out")
        if self.history == "rescored" and self.interpolate == "equal":
            raise SpecError("history 'rescored' needs a weight for each score; use interpolate 'tuned'")
        if not 0 <= self.ngram_weight <= 1:
            raise SpecError(f"the n-gram model's share is {self.ngram_weight}; expected 0 to 1")
        if self.ngram is not None and self.ngram_mode == "interpolate":
            plain = (self.history, self.merge_order, self.long_hypotheses, self.unknown_policy, self.scoring)
            if plain != ("none", None, "refuse", "penalty", "trie"):
                raise SpecError(
                    "words are interpolated with an n-gram model by exact tries only, without history, merged histories, sliding windows or "
                    "policies for unknown words; use the log-linear mode for these"
                )

    def score(self, model: SpeechModel, lists: Sequence[NBest], *, weights: Weights | None = None) -> LmFeatures:
        """LM scores of all hypotheses; ``weights`` choose the earlier texts where history is "rescored"."""
        if self.ngram is not None and self.ngram_mode == "interpolate":
            return interpolated_features(
                model, lists, self.ngram, weight=1 - self.ngram_weight, lower_case=self.lower_case,
                max_tokens=self.max_tokens, runtime=self.runtime,
            )  # fmt: skip
        if self.history == "none":
            return self._score(model, lists)
        check_words(model.tokenizer, lists, lower_case=self.lower_case)
        return score_with_history(
            lists,
            self.history,
            lambda some, earlier: self._score(model, some, earlier=earlier),
            max_words=self.max_history_tokens,
            weights=weights,
        )

    def _score(
        self, model: SpeechModel, lists: Sequence[NBest], *, earlier: Sequence[Sequence[str]] | None = None
    ) -> LmFeatures:
        lm = neural_features(
            model, lists, lower_case=self.lower_case, max_tokens=self.max_tokens, scoring=self.scoring,
            runtime=self.runtime, merge_order=self.merge_order, long_hypotheses=self.long_hypotheses,
            unknown_policy=self.unknown_policy, num_unknown_types=self.num_unknown_types, earlier=earlier,
            max_history_tokens=self.max_history_tokens, cache=self.cache, progress=self.show_progress,
        )  # fmt: skip
        if self.ngram is None:
            return lm
        return replace(lm, ngram_score=ngram_features(lists, self.ngram, lower_case=self.lower_case).ngram_score)

    def apart(
        self, model: SpeechModel, lists: Sequence[NBest], *, weights: Weights | None = None
    ) -> tuple[Sequence[NBest], LmFeatures]:
        """Lists and LM scores with a weight each, as ``interpolate`` says. Raises DataError where a list has no LM score to mix."""
        lm = self.score(model, lists, weights=weights)
        if self.interpolate == "tuned":
            return lists, lm
        own = [h.lm_score for entry in lists for h in entry.hypotheses]
        if None in own:
            raise DataError(
                "interpolate is 'equal' and some hypotheses have no lm_score; expected the n-gram's for all"
            )
        mean = 0.5 * (lm.neural_lm_score + np.array(own, dtype=np.float64))
        bare = [replace(e, hypotheses=tuple(replace(h, lm_score=None) for h in e.hypotheses)) for e in lists]
        return bare, replace(lm, neural_lm_score=mean)


def tune_system(model: SpeechModel | None, dev: NBestFile, *, settings: ScoreSettings, seed: int = 0) -> Weights:
    """Weights of a system, tuned on dev lists with references; ``model`` None tunes the first pass alone.

    With history "rescored" twice: after the first pass' texts, then after those that the first weights choose.
    """
    reference_texts(dev)
    if model is None:
        return tune_on_lists(dev, data_hash=dev.data_hash, seed=seed).weights
    weights = None
    if settings.history == "rescored":
        weights = tune_system(model, dev, settings=replace(settings, history="first-pass"), seed=seed)
    lists, lm = settings.apart(model, dev, weights=weights)
    return tune_on_lists(
        lists,
        neural_lm_score=lm.neural_lm_score,
        num_unknown=lm.num_unknown,
        ngram_score=lm.ngram_score,
        model_hash=model.model_hash,
        data_hash=dev.data_hash,
        seed=seed,
    ).weights


def ngram_alone(ngram: NgramModel, lists: Sequence[NBest], *, lower_case: bool = False) -> LmFeatures:
    """The scores of an n-gram model with no neural one beside it (its score is 0)."""
    found = ngram_features(lists, ngram, lower_case=lower_case)
    nothing = np.zeros(len(found.ngram_score), dtype=np.int64)
    return LmFeatures(nothing.astype(np.float64), found.num_unknown, nothing, 0, 0.0, ngram_score=found.ngram_score)


def tune_ngram(ngram: NgramModel, dev: NBestFile, *, lower_case: bool = False, seed: int = 0) -> Weights:
    """Weights for an n-gram model alone, tuned on dev lists with references."""
    lm = ngram_alone(ngram, dev, lower_case=lower_case)
    return tune_on_lists(
        dev, num_unknown=lm.num_unknown, ngram_score=lm.ngram_score, data_hash=dev.data_hash, seed=seed
    ).weights


_MERGE_SAMPLE = 100


def merging_error(
    model: SpeechModel, lists: Sequence[NBest], lm: LmFeatures, weights: Weights, settings: ScoreSettings
) -> dict[str, float]:
    """What merged histories changed on at most 100 lists, evenly spaced, that are scored exactly as well.

    ``lists``, ``hypotheses``: how many; ``mean_nats``, ``max_nats``: of the absolute difference of a hypothesis' score;
    ``changed``: one-bests that are other words than with exact scores; ``share_left``: merged model positions over exact ones.
    """
    chosen = np.unique(np.linspace(0, len(lists) - 1, min(_MERGE_SAMPLE, len(lists))).astype(np.int64)).tolist()
    sample = [lists[number] for number in chosen]
    exact = replace(settings, merge_order=None, cache=None).score(model, sample)
    part = lm.part(lists, chosen)
    again = settings.score(model, sample)
    error = np.abs(part.neural_lm_score - exact.neural_lm_score)
    texts = [apply_weights(sample, scores, weights, allow_overlap=True).one_best for scores in (exact, part)]
    return {
        "lists": len(sample),
        "hypotheses": len(error),
        "mean_nats": float(error.mean()),
        "max_nats": float(error.max()),
        "changed": sum(a.split() != b.split() for a, b in zip(*texts, strict=True)),
        "share_left": again.num_nodes / max(1, exact.num_nodes),
    }

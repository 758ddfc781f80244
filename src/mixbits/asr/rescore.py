"""Rescore n-best lists with any language model that is given as a callable.

Two steps that can be run apart: :func:`lm_features` scores every hypothesis (slow, needs the model) and
:func:`apply_weights` combines the features and sorts (fast, needs only weights). :func:`rescore` does both.

The model side gives ``encode`` (text → token ids, from the sentence boundary to the sentence end) and either
``score_forest`` (:class:`mixbits.asr.trie.TokenForest` → log p(token | ancestors) per node, 0 at roots) or
``score_hypotheses`` (token sequences → summed log-probability of each), the slow twin. A ``max_length`` attribute of
the scorer is the longest sequence (all ids counted) it takes; a longer hypothesis is refused by name or scored by sliding window
(:mod:`mixbits.asr.score_plan`), never cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mixbits.asr.features import FeatureTable, feature_table, has_lm_score
from mixbits.asr.nbest import NBest, list_offsets
from mixbits.asr.score_plan import LongHypotheses, ScorePlan, plan_scores
from mixbits.asr.trie import TokenForest, plan_forests
from mixbits.asr.weights import Weights, check_no_overlap
from mixbits.errors import DataError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

Encode = Callable[[str], Sequence[int]]
ScoreForest = Callable[[TokenForest], npt.ArrayLike]
ScoreHypotheses = Callable[[Sequence[Sequence[int]]], npt.ArrayLike]
CountUnknown = Callable[[str], int]

DEFAULT_MAX_TOKENS = 4096
_NAIVE_BATCH = 64


@dataclass(frozen=True)
class LmFeatures:
    """LM scores of all hypotheses, lists in order; arrays have shape (num_hypotheses,).

    ``num_tokens`` counts scored tokens (sentence ends included), ``num_nodes`` what was computed for them in all, contexts and the
    overlap of windows included; ``num_windows`` hypotheses were longer than the model takes and scored by sliding window.
    ``ngram_score``: an n-gram model's, where it has a weight of its own.
    """

    neural_lm_score: npt.NDArray[np.float64]
    num_unknown: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    num_nodes: int
    seconds: float
    num_windows: int = 0
    ngram_score: npt.NDArray[np.float64] | None = None

    @property
    def shared(self) -> float:
        """Distinct prefixes over tokens: the share of the work that prefix sharing leaves."""
        total = int(self.num_tokens.sum())
        return self.num_nodes / total if total else 1.0

    def part(self, lists: Sequence[NBest], numbers: Sequence[int]) -> LmFeatures:
        """The scores of some of the lists that these are for; counts of work stay those of all."""
        offsets = list_offsets(lists)
        rows = np.concatenate([np.arange(offsets[number], offsets[number + 1]) for number in numbers])
        return replace(
            self,
            neural_lm_score=self.neural_lm_score[rows],
            num_unknown=self.num_unknown[rows],
            num_tokens=self.num_tokens[rows],
            ngram_score=None if self.ngram_score is None else self.ngram_score[rows],
        )


@dataclass(frozen=True)
class Rescored:
    """``lists`` sorted by total score; ``picks`` (num_lists,) is the old rank (from 0) of each new one-best."""

    lists: tuple[NBest, ...]
    picks: npt.NDArray[np.int64]

    @property
    def one_best(self) -> list[str]:
        """The text of each new one-best."""
        return [entry.one_best.text for entry in self.lists]


def lm_features(
    lists: Sequence[NBest],
    *,
    encode: Encode,
    score_forest: ScoreForest | None = None,
    score_hypotheses: ScoreHypotheses | None = None,
    count_unknown: CountUnknown | None = None,
    max_tokens_per_forest: int = DEFAULT_MAX_TOKENS,
    contexts: Sequence[Sequence[int]] | None = None,
    long_hypotheses: LongHypotheses = "refuse",
    merge_order: int | None = None,
    progress: bool = False,
) -> LmFeatures:
    """Score every hypothesis with the language model.

    Args:
        encode: text → ids, first the boundary token; must not be empty.
        score_forest, score_hypotheses: exactly one of the two.
        count_unknown: text → number of words outside the LM's vocabulary; None counts zero.
        max_tokens_per_forest: bound on trees × nodes of the largest tree given to ``score_forest`` at once.
        contexts: for each list the ids that come before its hypotheses, first and last of them the boundary token.
        long_hypotheses: what is done with those longer than the scorer takes.
        merge_order: histories equal in this many last tokens share a state (:func:`mixbits.asr.trie.build_forest`); None: exact.
        progress: show a bar with rate and time left on stderr.

    Raises:
        DataError: a hypothesis longer than the scorer takes (named), scores of wrong shape or not finite.
        SpecError: merged histories with contexts, or without tries.
    """
    if (score_forest is None) == (score_hypotheses is None):
        raise SpecError("give exactly one of score_forest and score_hypotheses")
    if max_tokens_per_forest < 2:
        raise SpecError(f"max_tokens_per_forest must be at least 2, got {max_tokens_per_forest}")
    if merge_order is not None and (score_forest is None or contexts is not None):
        raise SpecError("merged histories need prefix tries and no context; leave one of the two out")
    started = time.perf_counter()
    sequences = [[encode(hypothesis.text) for hypothesis in entry.hypotheses] for entry in lists]
    plan = plan_scores(
        lists,
        sequences,
        max_length=getattr(score_forest or score_hypotheses, "max_length", None),
        contexts=contexts,
        long_hypotheses=long_hypotheses,
    )
    num_tokens = np.array([len(ids) - 1 for entry in sequences for ids in entry], dtype=np.int64)
    scores = np.zeros(len(num_tokens))
    with _progress_bar(len(scores), enabled=progress) as advance:
        if score_forest is not None:
            num_nodes = _score_forests(plan, score_forest, max_tokens_per_forest, merge_order, scores, advance)
        else:
            assert score_hypotheses is not None
            num_nodes = _score_naively(plan, score_hypotheses, scores, advance)
    num_unknown = np.zeros(len(scores), dtype=np.int64)
    if count_unknown is not None:
        num_unknown[:] = [count_unknown(hypothesis.text) for entry in lists for hypothesis in entry.hypotheses]
    return LmFeatures(scores, num_unknown, num_tokens, num_nodes, time.perf_counter() - started, plan.num_windows)


def features_of(lists: Sequence[NBest], lm: LmFeatures | None) -> FeatureTable:
    """The feature table of lists with their LM scores (None: first-pass features only)."""
    if lm is None:
        return feature_table(lists)
    return feature_table(
        lists, neural_lm_score=lm.neural_lm_score, num_unknown=lm.num_unknown, ngram_score=lm.ngram_score
    )


def apply_weights(
    lists: Sequence[NBest], lm: LmFeatures | None, weights: Weights, *, allow_overlap: bool = False
) -> Rescored:
    """Sort every list by total score, highest first (equals keep their order).

    ``total_score`` and, with ``lm``, ``neural_lm_score`` are stored in each hypothesis' ``extra`` and so written out.

    Raises:
        DataError: lists that the weights were tuned on, or weights for a score that the lists do not have.
    """
    check_no_overlap(weights, lists, allow_overlap=allow_overlap)
    if weights.first_pass_lm_scale != 0 and not has_lm_score(lists):
        raise DataError("the weights use a first-pass lm_score, which these lists do not have; tune without it")
    if weights.neural_lm_scale != 0 and lm is None:
        raise DataError("the weights use a language model's score, and none was computed; give the model")
    if weights.ngram_scale != 0 and (lm is None or lm.ngram_score is None):
        raise DataError("the weights use an n-gram model's score, and none was computed; give the n-gram model")
    table = features_of(lists, lm)
    total = table.total_scores(weights.as_array())
    rescored, picks = [], []
    for entry, start, stop in zip(lists, table.offsets[:-1], table.offsets[1:], strict=True):
        order = np.argsort(-total[start:stop], kind="stable")
        hypotheses = []
        for rank in order:
            row = start + rank
            extra = {**entry.hypotheses[rank].extra, "total_score": float(total[row])}
            if lm is not None:
                extra["neural_lm_score"] = float(lm.neural_lm_score[row])
                if lm.ngram_score is not None:
                    extra["ngram_score"] = float(lm.ngram_score[row])
            hypotheses.append(replace(entry.hypotheses[rank], extra=extra))
        rescored.append(replace(entry, hypotheses=tuple(hypotheses)))
        picks.append(int(order[0]))
    return Rescored(tuple(rescored), np.asarray(picks, dtype=np.int64))


def rescore(
    lists: Sequence[NBest],
    *,
    weights: Weights,
    encode: Encode,
    score_forest: ScoreForest | None = None,
    score_hypotheses: ScoreHypotheses | None = None,
    count_unknown: CountUnknown | None = None,
    max_tokens_per_forest: int = DEFAULT_MAX_TOKENS,
    allow_overlap: bool = False,
    progress: bool = False,
) -> Rescored:
    """:func:`lm_features`, then :func:`apply_weights`; overlap with the dev lists is refused before any scoring."""
    check_no_overlap(weights, lists, allow_overlap=allow_overlap)
    lm = lm_features(
        lists,
        encode=encode,
        score_forest=score_forest,
        score_hypotheses=score_hypotheses,
        count_unknown=count_unknown,
        max_tokens_per_forest=max_tokens_per_forest,
        progress=progress,
    )
    return apply_weights(lists, lm, weights, allow_overlap=allow_overlap)


def _score_forests(
    plan: ScorePlan,
    score_forest: ScoreForest,
    max_tokens: int,
    merge_order: int | None,
    scores: npt.NDArray[np.float64],
    advance: Callable[[int], None],
) -> int:
    """Fill ``scores``; returns the number of scored nodes, roots not counted."""
    num_nodes = 0
    for forest, members in plan_forests(plan.groups, max_tokens=max_tokens, merge_order=merge_order):
        found = forest.sequence_scores(score_forest(forest))
        num_nodes += forest.num_nodes - forest.num_trees
        advance(_add_up(plan, members, found, scores))
    return num_nodes


def _score_naively(
    plan: ScorePlan,
    score_hypotheses: ScoreHypotheses,
    scores: npt.NDArray[np.float64],
    advance: Callable[[int], None],
) -> int:
    flat = [(number, index) for number, group in enumerate(plan.groups) for index in range(len(group))]
    num_nodes = 0
    for start in range(0, len(flat), _NAIVE_BATCH):
        members = flat[start : start + _NAIVE_BATCH]
        batch = [plan.groups[number][index] for number, index in members]
        found = np.asarray(score_hypotheses(batch), dtype=np.float64)
        if found.shape != (len(batch),) or not np.all(np.isfinite(found)):
            raise DataError(f"score_hypotheses must give {len(batch)} finite numbers, got {found!r:.80}")
        num_nodes += sum(len(ids) - 1 for ids in batch)
        advance(_add_up(plan, members, found, scores))
    return num_nodes


def _add_up(
    plan: ScorePlan, members: Sequence[tuple[int, int]], found: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]
) -> int:
    """Add the sequences' scores to their hypotheses; returns how many were scored."""
    num_scored = 0
    for (number, index), score in zip(members, found, strict=True):
        sign = plan.signs[number][index]
        scores[plan.rows[number][index]] += sign * score
        num_scored += sign > 0
    return num_scored


@contextmanager
def _progress_bar(total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Calls the block with a function that advances a bar of ``total`` hypotheses (or does nothing)."""
    if not enabled:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.0f}/s")

    columns = (TextColumn("rescoring"), BarColumn(), MofNCompleteColumn(), TextColumn("hypotheses"), Rate(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rescoring", total=total)
        yield lambda count: bar.advance(task, count)

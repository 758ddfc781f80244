"""Rescore a lattice with any language model given as a callable on token forests.

A neural LM's score of a word depends on the whole history, so a lattice state would have to be split for every history that
leads to it. Where there are few paths that is done: every path gets its exact score. Otherwise histories that are equal in their
last n − 1 words share a state (``merge_order`` n), and the best-scoring history represents it. Steps:

1. Prune to a beam around the best path, under the lattice's own scores.
2. Split states by (the last n − 1 words of the) history, without the LM.
3. A history for every split state: that of the best way to it, first by the old scores. These histories and their continuations are
   one trie, so the LM scores all arcs in one pass of prefix-trie scoring, one model position a distinct prefix.
4. With the new scores other histories may be best: those not yet scored are scored, until nothing changes (or ``max_rounds``). Then
   the representatives are what a search from left to right would choose, and the best path's score is exact.
5. Certificate: the best distinct hypotheses of the new lattice are scored exactly, alone, and compared; where several paths have the same
   words, that of the path which the new lattice prefers.

The new LM score of a path is old_lm_scale · old + interpolate · model; where the n-gram model that is in the old scores is given (``old_lm``),
old + interpolate · (model − n-gram), so that what else is in them (Kaldi: transitions, pronunciations) stays. Source of the merging: Liu et al., "Two efficient lattice rescoring methods using
recurrent neural network language models", 2016 (n-gram based history clustering); the rounds of batched scoring are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mixbits.asr.lattice import FloatArray, IntArray, Lattice, PathWeights, make_lattice
from mixbits.asr.lattice_ngram import ngram_scores
from mixbits.asr.lattice_paths import LatticePath, LatticeSearch, count_paths, prune
from mixbits.asr.ngram import NgramModel
from mixbits.asr.trie import TokenForest, plan_forests
from mixbits.errors import DataError, SpecError

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts → token ids, from the sentence boundary to the sentence end."""
ScoreForest = Callable[[TokenForest], npt.ArrayLike]
_ORIGIN = "arc before pruning"


@dataclass(frozen=True)
class LatticeSettings:
    """How to rescore.

    ``weights``: what paths are ranked by, before and after. ``interpolate``: weight of the model's score; ``old_lm_scale``: of the old LM
    score (default: 1 − interpolate; 1 for lattices whose old LM was taken out). ``old_lm``: the n-gram model in the old scores, in the place of
    ``old_lm_scale``; ``merge_order`` must be 0 or at least its order. ``merge_order``: histories equal in the last n − 1 words
    share a state; 0 never merges. ``beam``: prune before, in units of the total score. ``max_paths``: up to so many paths are all scored
    exactly. ``max_arcs``: bound on the split lattice; the beam is made narrower where it is passed. ``num_checked``: hypotheses in
    the certificate. ``max_tokens``: model positions at once.
    """

    weights: PathWeights
    interpolate: float = 1.0
    old_lm_scale: float | None = None
    old_lm: NgramModel | None = None
    merge_order: int = 4
    beam: float = math.inf
    max_paths: int = 500
    max_arcs: int = 50_000
    num_checked: int = 10
    max_rounds: int = 3
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("interpolate", "old_scale"):
            if not abs(getattr(self, name)) <= 1e6:
                raise SpecError(f"{name} is {getattr(self, name)}; expected a finite number")
        least = {"merge_order": 0, "max_paths": 0, "max_arcs": 1, "num_checked": 1, "max_rounds": 1, "max_tokens": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SpecError(f"{name} is {getattr(self, name)}; expected at least {bound}")
        if not self.beam >= 0:
            raise SpecError(f"beam is {self.beam}; expected a number not below 0")
        if self.old_lm is not None:
            if self.old_lm_scale is not None:
                raise SpecError(
                    "both old_lm and old_lm_scale are given; with old_lm the rest of the old score has weight 1"
                )
            if 0 < self.merge_order < self.old_lm.order:
                raise SpecError(
                    f"merge_order is {self.merge_order}, but old_lm is a {self.old_lm.order}-gram model; expected a merge_order of at least "
                    f"{self.old_lm.order}, or 0"
                )

    @property
    def old_scale(self) -> float:
        """Weight of the old LM score; with ``old_lm``, of what is left of it."""
        if self.old_lm is not None:
            return 1.0
        return 1.0 - self.interpolate if self.old_lm_scale is None else self.old_lm_scale


@dataclass(frozen=True)
class CheckedPath:
    """A hypothesis of the new lattice and its exact scores (the path's own are those of the lattice)."""

    path: LatticePath
    model_score: float
    exact_lm_score: float
    exact_total_score: float

    @property
    def gap(self) -> float:
        """LM score in the lattice less the exact one, nats."""
        return self.path.lm_score - self.exact_lm_score


@dataclass(frozen=True)
class Certificate:
    """How far the new lattice is from exact.

    ``is_exact``: no histories were merged, so every path has its exact score. ``num_paths``: paths after pruning (at most 10^18 is counted).
    ``num_arcs``: of the lattice given; ``arcs_touched``: of those, scored; ``new_arcs``: of the new lattice. ``beam``: that was used.
    ``num_nodes``: model positions. ``is_settled``: no other history would be chosen by the new scores. ``gaps``: LM score in the lattice less the
    exact one of the checked hypotheses, best first, in nats. ``best_changed``: by exact scores another one of them is best.
    """

    is_exact: bool
    num_paths: int
    num_arcs: int
    arcs_touched: int
    new_arcs: int
    beam: float
    num_nodes: int
    rounds: int
    is_settled: bool
    gaps: tuple[float, ...]
    best_changed: bool

    @property
    def max_gap(self) -> float:
        """Largest absolute gap, nats."""
        return max(map(abs, self.gaps))

    @property
    def mean_gap(self) -> float:
        """Mean absolute gap, nats."""
        return math.fsum(map(abs, self.gaps)) / len(self.gaps)

    @property
    def share_touched(self) -> float:
        """Arcs scored over arcs of the lattice."""
        return self.arcs_touched / self.num_arcs if self.num_arcs else 1.0


@dataclass(frozen=True)
class RescoredLattice:
    """The new lattice, the checked hypotheses by their exact total scores, best first, and the certificate."""

    lattice: Lattice
    hypotheses: tuple[CheckedPath, ...]
    certificate: Certificate

    @property
    def best(self) -> CheckedPath:
        """The best of the checked hypotheses by exact scores."""
        return self.hypotheses[0]


def rescore_lattice(
    lattice: Lattice, *, encode: Encode, score_forest: ScoreForest, settings: LatticeSettings
) -> RescoredLattice:
    """Give a lattice the LM scores of a model.

    Raises:
        DataError: a hypothesis longer than the scorer's ``max_length`` (named; nothing is cut), scores that are not finite, a lattice whose best
            path alone has more than ``max_arcs`` arcs.
    """
    split, origin, is_exact, num_paths, beam = _split(lattice, settings)
    scorer = HistoryScorer(lattice.utterance, encode, score_forest, settings.max_tokens)
    histories = _representatives(LatticeSearch(split, settings.weights), scorer)
    if settings.old_lm is not None:
        split = _without(split, settings.old_lm, settings.interpolate)
    old_arcs, old_finals = split.lm_score, split.final_lm_score
    new, rounds, is_settled = split, 0, False
    while rounds < settings.max_rounds and not is_settled:
        rounds += 1
        arc_scores, final_scores = _model_scores(split, histories, scorer)
        new = replace(
            split,
            lm_score=settings.old_scale * old_arcs + settings.interpolate * arc_scores,
            final_lm_score=settings.old_scale * old_finals + settings.interpolate * final_scores,
        )
        following = _representatives(LatticeSearch(new, settings.weights), scorer)
        is_settled, histories = following == histories, following
    checked = _check(new, split, scorer, settings)
    ranked = sorted(checked, key=lambda one: -round(one.exact_total_score, 9))  # equals keep the lattice's order
    certificate = Certificate(
        is_exact=is_exact,
        num_paths=num_paths,
        num_arcs=lattice.num_arcs,
        arcs_touched=len(np.unique(origin)),
        new_arcs=new.num_arcs,
        beam=beam,
        num_nodes=scorer.num_nodes,
        rounds=rounds,
        is_settled=is_settled,
        gaps=tuple(one.gap for one in checked),
        best_changed=ranked[0].path.words != checked[0].path.words,
    )
    return RescoredLattice(new, tuple(ranked), certificate)


class HistoryScorer:
    """Log-probabilities of word histories, each scored once. History 0 is empty; others are (an earlier history, a word)."""

    def __init__(self, utterance: str, encode: Encode, score_forest: ScoreForest, max_tokens: int) -> None:
        self.num_nodes = 0
        self._utterance = utterance
        self._encode = encode
        self._score_forest = score_forest
        self._max_tokens = max_tokens
        self._max_length = getattr(score_forest, "max_length", None)
        self._numbers: dict[tuple[int, str], int] = {}
        self._texts = [""]
        self._known: dict[tuple[int, bool], float] = {}

    def extend(self, history: int, word: str) -> int:
        """The history that has ``word`` at its end."""
        number = self._numbers.setdefault((history, word), len(self._texts))
        if number == len(self._texts):
            before = self._texts[history]
            self._texts.append(f"{before} {word}" if before else word)
        return number

    def history_of(self, words: Sequence[str]) -> int:
        """The history of these words."""
        history = 0
        for word in words:
            history = self.extend(history, word)
        return history

    def score(self, open_histories: set[int], whole: set[int]) -> None:
        """Score histories that are not known yet, those in ``whole`` with the sentence end."""
        wanted = [(history, False) for history in open_histories] + [(history, True) for history in whole]
        wanted = [query for query in wanted if query not in self._known]
        numbers = sorted({history for history, _ in wanted})
        ids = dict(zip(numbers, self._encode([self._texts[history] for history in numbers]), strict=True))
        sequences = sorted(
            ((self._ids(ids[history], is_whole), (history, is_whole)) for history, is_whole in wanted),
            key=lambda s: s[0],
        )
        for forest, members in plan_forests(
            [[sequence for sequence, _ in sequences]] if sequences else [], max_tokens=self._max_tokens
        ):
            scores = forest.sequence_scores(self._score_forest(forest))
            self.num_nodes += forest.num_nodes - forest.num_trees
            for (_, index), score in zip(members, scores.tolist(), strict=True):
                self._known[sequences[index][1]] = score

    def __getitem__(self, query: tuple[int, bool]) -> float:
        """log p of a history, with the sentence end if the second is true. It must have been scored."""
        return self._known[query]

    def _ids(self, ids: Sequence[int], is_whole: bool) -> list[int]:
        if len(ids) < 2:
            raise DataError(
                f"utterance {self._utterance!r}: a text is encoded to {len(ids)} tokens; expected boundaries at both ends"
            )
        if self._max_length is not None and len(ids) > self._max_length:
            raise DataError(
                f"utterance {self._utterance!r}: a hypothesis has {len(ids)} tokens, but the model takes at most {self._max_length}; use a model "
                "with a longer context or leave this utterance out (nothing is cut silently)"
            )
        return list(ids) if is_whole else list(ids[:-1])


def _representatives(search: LatticeSearch, scorer: HistoryScorer) -> list[int]:
    """For each state, the history of the best way to it."""
    lattice, came_by = search.lattice, search.forward[1].tolist()
    src, word, is_word = lattice.src.tolist(), lattice.word.tolist(), lattice.label_is_word.tolist()
    histories = [0] * lattice.num_states
    for state in lattice.topological_order.tolist():
        if (arc := came_by[state]) >= 0:
            before = histories[src[arc]]
            histories[state] = scorer.extend(before, lattice.labels[word[arc]]) if is_word[word[arc]] else before
    return histories


def _model_scores(lattice: Lattice, histories: list[int], scorer: HistoryScorer) -> tuple[FloatArray, FloatArray]:
    """log p of each arc's word, and of the sentence end at each final state, after the history of the state."""
    src, word, is_word = lattice.src.tolist(), lattice.word.tolist(), lattice.is_word.tolist()
    after = [
        scorer.extend(histories[state], lattice.labels[label]) if spoken else histories[state]
        for state, label, spoken in zip(src, word, is_word, strict=True)
    ]
    ends = [histories[state] for state in lattice.finals.tolist()]
    scorer.score({*histories, *after}, set(ends))
    arcs = np.array([scorer[to, False] - scorer[histories[state], False] for state, to in zip(src, after, strict=True)])
    finals = np.array([scorer[history, True] - scorer[history, False] for history in ends])
    return arcs.astype(np.float64), finals.astype(np.float64)


def _without(split: Lattice, model: NgramModel, scale: float) -> Lattice:
    """The lattice less ``scale`` times the n-gram scores."""
    arcs, finals = ngram_scores(split, model)
    return replace(split, lm_score=split.lm_score - scale * arcs, final_lm_score=split.final_lm_score - scale * finals)


def _check(new: Lattice, old: Lattice, scorer: HistoryScorer, settings: LatticeSettings) -> list[CheckedPath]:
    """The best distinct hypotheses of the new lattice with exact scores, best by the lattice first."""
    paths = LatticeSearch(new, settings.weights).nbest(settings.num_checked)
    histories = [scorer.history_of(path.words) for path in paths]
    scorer.score(set(), set(histories))
    old_search, checked = LatticeSearch(old, settings.weights), []
    for path, history in zip(paths, histories, strict=True):
        model = scorer[history, True]
        exact = settings.old_scale * old_search.path(path.arcs).lm_score + settings.interpolate * model
        total = path.total_score + settings.weights.lm_scale * (exact - path.lm_score)
        checked.append(CheckedPath(path, model, exact, total))
    return checked


def _split(lattice: Lattice, settings: LatticeSettings) -> tuple[Lattice, IntArray, bool, int, float]:
    """(split lattice, old arc of each new one, whether no histories were merged, paths, beam): as wide as ``max_arcs`` allows."""
    beam = settings.beam
    number = np.arange(lattice.num_arcs, dtype=np.float64)
    while True:
        marked = replace(lattice, other={**lattice.other, _ORIGIN: number})
        pruned = prune(marked, beam, settings.weights) if math.isfinite(beam) else marked
        num_paths = count_paths(pruned)
        orders = [0, settings.merge_order] if num_paths <= settings.max_paths else [settings.merge_order]
        for order in orders:
            arcs = split_states(pruned, order, max_arcs=settings.max_arcs)
            if arcs is not None:
                split, places = arcs
                others = {name: values for name, values in split.other.items() if name != _ORIGIN}
                origin = pruned.other[_ORIGIN][places].astype(np.int64)
                return replace(split, other=others), origin, order == 0, num_paths, beam
        through = LatticeSearch(pruned, settings.weights).best_through()[0]
        margins = through.max() - through
        narrower = float(np.median(margins))
        if narrower >= min(beam, float(margins.max())):
            narrower /= 2
        if narrower <= 1e-9 and beam == 0:
            raise DataError(
                f"utterance {lattice.utterance!r}: the best paths alone have more than {settings.max_arcs} arcs; give a larger max_arcs"
            )
        beam = narrower if narrower > 1e-9 else 0.0


def split_states(lattice: Lattice, order: int, *, max_arcs: int) -> tuple[Lattice, IntArray] | None:
    """Split states so that each has one history of words, or, for ``order`` n > 0, one history in its last n − 1 words.

    Returns (the lattice, the old arc of each of its arcs), or None if it would have more than ``max_arcs`` arcs. Same paths, same scores.
    """
    arcs, bounds = lattice.out_arcs
    out, offsets = arcs.tolist(), bounds.tolist()
    dst, word, is_word = lattice.dst.tolist(), lattice.word.tolist(), lattice.is_word.tolist()
    numbers: dict[tuple[int, int], int] = {}
    keep = order - 1

    def extended(key: tuple, label: int) -> tuple:
        if order:
            return (*key, label)[-keep:] if keep else ()
        return (numbers.setdefault((key[0] if key else 0, label), len(numbers) + 1),)

    copies: list[dict[tuple, int]] = [{} for _ in range(lattice.num_states)]
    copies[lattice.start][()] = 0
    old_state, src, to, origin = [lattice.start], [], [], []
    for state in lattice.topological_order.tolist():
        for key, copy in copies[state].items():
            for arc in out[offsets[state] : offsets[state + 1]]:
                new_key = extended(key, word[arc]) if is_word[arc] else key
                target = copies[dst[arc]].setdefault(new_key, len(old_state))
                if target == len(old_state):
                    old_state.append(dst[arc])
                src.append(copy)
                to.append(target)
                origin.append(arc)
            if len(origin) > max_arcs:
                return None
    places, states = np.array(origin, dtype=np.int64), np.array(old_state, dtype=np.int64)
    row = np.full(lattice.num_states, -1)
    row[lattice.finals] = np.arange(len(lattice.finals))
    finals = np.flatnonzero(row[states] >= 0)
    rows = row[states[finals]]
    ids = lattice.transition_ids
    split = make_lattice(
        utterance=lattice.utterance,
        src=src,
        dst=to,
        word=lattice.word[places],
        labels=lattice.labels,
        lm_score=lattice.lm_score[places],
        acoustic_score=lattice.acoustic_score[places],
        num_states=len(states),
        start=0,
        finals=finals,
        final_lm_score=lattice.final_lm_score[rows],
        final_acoustic_score=lattice.final_acoustic_score[rows],
        state_times=None if lattice.state_times is None else lattice.state_times[states],
        other={name: values[places] for name, values in lattice.other.items()},
        transition_ids=None if ids is None else ids.take(np.concatenate([places, lattice.num_arcs + rows])),
        weights=lattice.weights,
        non_words=lattice.non_words,
    )
    return split, places

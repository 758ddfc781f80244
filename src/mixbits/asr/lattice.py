"""Word lattices as plain frozen data: acyclic graphs whose paths are hypotheses.

An arc carries a word (or none), an LM score and an acoustic score: natural logs, higher is better, unscaled. What the LM
score covers is the recognizer's business (Kaldi's graph score holds transition and pronunciation scores too). A path runs from
``start`` to a final state, and its scores are sums over its arcs and the final state. Scores mean something only summed along a
whole path: recognizers push them about.

Every :class:`Lattice` is sound: at least one path, no cycle, no state off all paths, no number that is not finite.
:func:`make_lattice` builds one from arrays that may not be, and says what is wrong. Algorithms on paths are in
:mod:`mixbits.asr.lattice_paths`; costs exist only in the readers and writers of :mod:`mixbits.asr.formats`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from mixbits.errors import DataError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NON_WORDS = frozenset(
    {"", "<eps>", "!NULL", "<s>", "</s>", "<sil>", "!SENT_START", "!SENT_END", "!ENTER", "!EXIT", "!SIL"}
)
"""Labels that are no words: not scored by an LM, not counted, not in a hypothesis' text."""
MAX_SCORE = 1e30
"""No recognizer's score is larger; sums of such stay finite."""


@dataclass(frozen=True)
class PathWeights:
    """total = acoustic_scale · acoustic + lm_scale · lm + word_insertion_penalty · words (added: positive favours words)."""

    acoustic_scale: float = 1.0
    lm_scale: float = 1.0
    word_insertion_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("acoustic_scale", "lm_scale", "word_insertion_penalty"):
            if not (math.isfinite(value := getattr(self, name)) and abs(value) <= 1e6):
                raise DataError(f"{name} is {value}; expected a number between −1e6 and 1e6")


@dataclass(frozen=True, eq=False)
class TransitionIds:
    """Kaldi's transition ids: row i is ``ids[offsets[i]:offsets[i + 1]]``; first a row an arc, then a row a final state."""

    offsets: IntArray
    ids: npt.NDArray[np.int32]

    def row(self, number: int) -> npt.NDArray[np.int32]:
        """The ids of one arc or final state."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    def take(self, rows: IntArray) -> TransitionIds:
        """The ids of some rows, in the order given."""
        counts = np.diff(self.offsets)[rows]
        return TransitionIds(offsets_of(counts), self.ids[ranges(self.offsets[rows], counts)])


@dataclass(frozen=True, eq=False)
class Lattice:
    """A lattice of one utterance; arrays of arcs have shape (num_arcs,), of final states (num_finals,).

    ``src``, ``dst``: state numbers. ``word``: index into ``labels``, of which the first is "" (no word). ``finals``: final
    states, ascending, with ``final_lm_score`` and ``final_acoustic_score``. ``state_times`` (num_states,): seconds, NaN where
    unknown, or None. ``other``: further scores of the arcs by name. ``transition_ids``: the alignment, Kaldi only.
    ``weights``: the scales the file recommends. ``non_words``: labels that are no words.

    Raises:
        DataError: not sound, see the module; :func:`make_lattice` can leave dead ends out.
    """

    utterance: str
    src: IntArray
    dst: IntArray
    word: IntArray
    labels: tuple[str, ...]
    lm_score: FloatArray
    acoustic_score: FloatArray
    num_states: int
    start: int
    finals: IntArray
    final_lm_score: FloatArray
    final_acoustic_score: FloatArray
    state_times: FloatArray | None = None
    other: Mapping[str, FloatArray] = field(default_factory=dict)
    transition_ids: TransitionIds | None = None
    weights: PathWeights | None = None
    non_words: frozenset[str] = NON_WORDS

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_scores(self)
        dead = np.flatnonzero(~live_states(self))
        if len(dead):
            raise DataError(
                f"{len(dead)} of {self.num_states} states are on no path from the start to a final state "
                f"(the first is {dead[0]}); drop such dead ends or repair the lattice"
            )

    @property
    def num_arcs(self) -> int:
        """Number of arcs."""
        return len(self.src)

    @cached_property
    def levels(self) -> IntArray:
        """(num_states,): arcs on the longest way from the start; every arc leads to a higher level."""
        return _levels(self.num_states, self.src, self.dst)

    @cached_property
    def topological_order(self) -> IntArray:
        """(num_states,): all states, each before those its arcs lead to; the start first."""
        return np.argsort(self.levels, kind="stable")

    @cached_property
    def sorted_arcs(self) -> IntArray:
        """(num_arcs,): all arcs, each after those that lead to where it begins."""
        return np.argsort(self.levels[self.src], kind="stable")

    @cached_property
    def label_is_word(self) -> BoolArray:
        """(num_labels,): whether a label is a word."""
        return np.array([label not in self.non_words for label in self.labels], dtype=bool)

    @cached_property
    def is_word(self) -> BoolArray:
        """(num_arcs,): whether an arc carries a word."""
        return self.label_is_word[self.word]

    @cached_property
    def out_arcs(self) -> tuple[IntArray, IntArray]:
        """(arcs sorted by source, offsets): those of state s are ``arcs[offsets[s]:offsets[s + 1]]``."""
        return _grouped(self.src, self.num_states)

    def select_arcs(self, keep: BoolArray, *, keep_final: BoolArray | None = None) -> Lattice:
        """The lattice of some arcs (and finals), dead ends left out, states numbered anew. Raises DataError if no path is left."""
        kept = np.flatnonzero(keep)
        finals = np.arange(len(self.finals)) if keep_final is None else np.flatnonzero(keep_final)
        rows = np.concatenate([kept, self.num_arcs + finals])
        return make_lattice(
            utterance=self.utterance,
            src=self.src[kept],
            dst=self.dst[kept],
            word=self.word[kept],
            labels=self.labels,
            lm_score=self.lm_score[kept],
            acoustic_score=self.acoustic_score[kept],
            num_states=self.num_states,
            start=self.start,
            finals=self.finals[finals],
            final_lm_score=self.final_lm_score[finals],
            final_acoustic_score=self.final_acoustic_score[finals],
            state_times=self.state_times,
            other={name: values[kept] for name, values in self.other.items()},
            transition_ids=None if self.transition_ids is None else self.transition_ids.take(rows),
            weights=self.weights,
            non_words=self.non_words,
            dead_ends="drop",
        )


def make_lattice(
    *,
    utterance: str,
    src: npt.ArrayLike,
    dst: npt.ArrayLike,
    word: npt.ArrayLike,
    labels: Iterable[str],
    lm_score: npt.ArrayLike,
    acoustic_score: npt.ArrayLike,
    num_states: int,
    start: int,
    finals: npt.ArrayLike,
    final_lm_score: npt.ArrayLike | None = None,
    final_acoustic_score: npt.ArrayLike | None = None,
    state_times: FloatArray | None = None,
    other: Mapping[str, FloatArray] | None = None,
    transition_ids: TransitionIds | None = None,
    weights: PathWeights | None = None,
    non_words: frozenset[str] = NON_WORDS,
    dead_ends: Literal["error", "drop"] = "error",
) -> Lattice:
    """A lattice from arrays of arcs; final states in any order, each once; their scores are 0 if not given.

    Args:
        dead_ends: ``drop`` leaves out states on no path from the start to a final state (others are numbered anew).

    Raises:
        DataError: not sound (what, where).
    """
    finals = np.asarray(finals, dtype=np.int64)
    order = np.argsort(finals, kind="stable")

    def final_scores(values: npt.ArrayLike | None) -> FloatArray:
        return np.zeros(len(finals)) if values is None else np.asarray(values, dtype=np.float64)[order]

    src, dst = np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64)
    if transition_ids is not None and np.any(order[1:] < order[:-1]):
        transition_ids = transition_ids.take(np.concatenate([np.arange(len(src)), len(src) + order]))
    fields = {
        "utterance": utterance,
        "src": src,
        "dst": dst,
        "word": np.asarray(word, dtype=np.int64),
        "labels": tuple(labels),
        "lm_score": np.asarray(lm_score, dtype=np.float64),
        "acoustic_score": np.asarray(acoustic_score, dtype=np.float64),
        "num_states": num_states,
        "start": start,
        "finals": finals[order],
        "final_lm_score": final_scores(final_lm_score),
        "final_acoustic_score": final_scores(final_acoustic_score),
        "state_times": state_times,
        "other": dict(other or {}),
        "transition_ids": transition_ids,
        "weights": weights,
        "non_words": non_words,
    }
    if dead_ends == "drop":
        _drop_dead_ends(fields)
    return Lattice(**fields)  # type: ignore[arg-type]


def words_of(lattice: Lattice, arcs: npt.ArrayLike) -> tuple[str, ...]:
    """The words on some arcs, in their order."""
    found = np.asarray(arcs, dtype=np.int64)
    return tuple(lattice.labels[label] for label in lattice.word[found[lattice.is_word[found]]])


def rename(lattice: Lattice, utterance: str) -> Lattice:
    """The same lattice for another utterance id."""
    return replace(lattice, utterance=utterance)


def ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """start, start + 1, … (count of them) for each start, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def offsets_of(counts: npt.ArrayLike) -> IntArray:
    """0 and the running sums of ``counts``."""
    counts = np.asarray(counts, dtype=np.int64)
    found = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=found[1:])
    return found


def live_states(lattice: Lattice) -> BoolArray:
    """(num_states,): whether a state is on a path from the start to a final state."""
    return _live(lattice.num_states, lattice.src, lattice.dst, lattice.start, lattice.finals, lattice.levels)


def _live(num_states: int, src: IntArray, dst: IntArray, start: int, finals: IntArray, levels: IntArray) -> BoolArray:
    order = np.argsort(levels[src], kind="stable")
    pairs = list(zip(src[order].tolist(), dst[order].tolist(), strict=True))
    reached, reaching = bytearray(num_states), bytearray(num_states)
    reached[start] = 1
    for state in finals.tolist():
        reaching[state] = 1
    for source, target in pairs:
        reached[target] |= reached[source]
    for source, target in reversed(pairs):
        reaching[source] |= reaching[target]
    return (np.frombuffer(reached, dtype=np.uint8) & np.frombuffer(reaching, dtype=np.uint8)) == 1


def _grouped(keys: IntArray, num_groups: int) -> tuple[IntArray, IntArray]:
    return np.argsort(keys, kind="stable"), offsets_of(np.bincount(keys, minlength=num_groups))


def _levels(num_states: int, src: IntArray, dst: IntArray) -> IntArray:
    """Longest distance from the states without entering arcs. Raises DataError naming a state on a cycle."""
    arcs, offsets = _grouped(src, num_states)
    targets, bounds = dst[arcs].tolist(), offsets.tolist()
    waiting = np.bincount(dst, minlength=num_states).tolist()
    levels = [0] * num_states
    ready = [state for state, number in enumerate(waiting) if not number]
    num_done = 0
    while ready:
        state = ready.pop()
        num_done += 1
        level = levels[state] + 1
        for target in targets[bounds[state] : bounds[state + 1]]:
            if levels[target] < level:
                levels[target] = level
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if num_done < num_states:
        state = next(state for state, number in enumerate(waiting) if number)
        raise DataError(f"the lattice has a cycle (it leads to state {state}); expected an acyclic one")
    return np.array(levels, dtype=np.int64)


def _drop_dead_ends(fields: dict) -> None:
    """Leave out dead states in the fields of a lattice, in place. Raises DataError if nothing is left."""
    num_states, start, finals = fields["num_states"], fields["start"], fields["finals"]
    _check_states(num_states, start, finals, fields["src"], fields["dst"])
    levels = _levels(num_states, fields["src"], fields["dst"])
    live = _live(num_states, fields["src"], fields["dst"], start, finals, levels)
    if not live[start]:
        raise DataError("no path leads from the start to a final state")
    if np.all(live):
        return
    number = np.cumsum(live) - 1
    kept = np.flatnonzero(live[fields["src"]] & live[fields["dst"]])
    kept_finals = np.flatnonzero(live[finals])
    if fields["transition_ids"] is not None:
        rows = np.concatenate([kept, len(fields["src"]) + kept_finals])
        fields["transition_ids"] = fields["transition_ids"].take(rows)
    for name in ("src", "dst"):
        fields[name] = number[fields[name][kept]]
    for name in ("word", "lm_score", "acoustic_score"):
        fields[name] = fields[name][kept]
    fields["finals"] = number[finals[kept_finals]]
    for name in ("final_lm_score", "final_acoustic_score"):
        fields[name] = fields[name][kept_finals]
    fields["other"] = {name: values[kept] for name, values in fields["other"].items()}
    if fields["state_times"] is not None:
        fields["state_times"] = fields["state_times"][live]
    fields["num_states"], fields["start"] = int(live.sum()), int(number[start])


def _check_states(num_states: int, start: int, finals: IntArray, src: IntArray, dst: IntArray) -> None:
    if num_states < 1:
        raise DataError("the lattice has no states (the recognizer found nothing?); leave the utterance out")
    if not 0 <= start < num_states:
        raise DataError(f"the start state is {start}; expected 0 to {num_states - 1}")
    if not len(finals):
        raise DataError("the lattice has no final state, so no path ends")
    for name, states in (("an arc's source", src), ("an arc's target", dst), ("a final state", finals)):
        wrong = states[(states < 0) | (states >= num_states)]
        if len(wrong):
            raise DataError(f"{name} is state {wrong[0]}; expected 0 to {num_states - 1}")


def _check_shapes(lattice: Lattice) -> None:
    if not lattice.utterance:
        raise DataError("a lattice has an empty utterance id; every lattice needs a name")
    _check_states(lattice.num_states, lattice.start, lattice.finals, lattice.src, lattice.dst)
    num_arcs, num_finals = len(lattice.src), len(lattice.finals)
    per_arc = {"dst": lattice.dst, "word": lattice.word, "lm_score": lattice.lm_score}
    per_arc |= {"acoustic_score": lattice.acoustic_score, **lattice.other}
    per_final = {"final_lm_score": lattice.final_lm_score, "final_acoustic_score": lattice.final_acoustic_score}
    for fields, number in ((per_arc, num_arcs), (per_final, num_finals)):
        for name, values in fields.items():
            if values.shape != (number,):
                raise DataError(f"{name} has shape {values.shape}; expected ({number},)")
    if not lattice.labels or lattice.labels[0] != "" or len(set(lattice.labels)) != len(lattice.labels):
        raise DataError('labels must be distinct and the first one "" (no word)')
    if num_arcs and not 0 <= lattice.word.min() <= lattice.word.max() < len(lattice.labels):
        raise DataError(f"an arc's word is outside the {len(lattice.labels)} labels")
    twice = lattice.finals[1:][np.diff(lattice.finals) <= 0]
    if len(twice):
        raise DataError(f"state {twice[0]} is final twice; expected ascending final states")
    if lattice.state_times is not None and lattice.state_times.shape != (lattice.num_states,):
        raise DataError(f"state_times has shape {lattice.state_times.shape}; expected ({lattice.num_states},)")
    ids = lattice.transition_ids
    if ids is not None and (len(ids.offsets) != num_arcs + num_finals + 1 or int(ids.offsets[-1]) != len(ids.ids)):
        raise DataError("transition_ids must have a row for each arc and then for each final state")


def _check_scores(lattice: Lattice) -> None:
    for name in ("lm_score", "acoustic_score", "final_lm_score", "final_acoustic_score"):
        values = getattr(lattice, name)
        bad = np.flatnonzero(~(np.abs(values) <= MAX_SCORE))
        if len(bad):
            where = f"final state {lattice.finals[bad[0]]}" if name.startswith("final") else f"arc {bad[0]}"
            raise DataError(f"{name.removeprefix('final_')} of {where} is {values[bad[0]]}; expected a finite number")
    for name, values in lattice.other.items():
        if not np.all(np.isfinite(values)):
            raise DataError(
                f"score {name!r} of arc {np.flatnonzero(~np.isfinite(values))[0]} is not finite; expected a number"
            )
    _ = lattice.levels

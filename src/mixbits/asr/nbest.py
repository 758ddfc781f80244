"""Ranked hypotheses of an utterance as plain frozen data.

Every score is a natural-log probability (higher is better) or, where a recognizer gives something else, a number
of which higher is better. The order of ``NBest.hypotheses`` is the ranking: the first one is the one-best. What a
file says beyond the known fields is kept in ``extra`` and written out again.

An empty hypothesis text is legal: recognizers do return silence, and its errors are deletions. Words are
``text.split()``: pieces between white space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbits.errors import DataError

HYPOTHESIS_FIELDS = ("text", "acoustic_score", "lm_score")
NBEST_FIELDS = ("utterance", "reference", "speaker", "conversation", "hypotheses")


@dataclass(frozen=True)
class Hypothesis:
    """One possible transcript. ``lm_score`` is the *first-pass* LM's score, where the recognizer gives one apart."""

    text: str
    acoustic_score: float
    lm_score: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("acoustic_score", self.acoustic_score), ("lm_score", self.lm_score)):
            if value is not None and not math.isfinite(value):
                raise DataError(f"{name} of hypothesis {self.text[:60]!r} is {value}; expected a finite number")
        _refuse_known_names(self.extra, HYPOTHESIS_FIELDS)

    @property
    def words(self) -> list[str]:
        """The text, split at white space."""
        return self.text.split()


@dataclass(frozen=True)
class NBest:
    """The hypotheses of one utterance, best first, at least one."""

    utterance: str
    hypotheses: tuple[Hypothesis, ...]
    reference: str | None = None
    speaker: str | None = None
    conversation: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.utterance:
            raise DataError("an n-best list has an empty utterance id; every list needs a name")
        if not self.hypotheses:
            raise DataError(f"utterance {self.utterance!r} has no hypotheses; expected at least one")
        object.__setattr__(self, "hypotheses", tuple(self.hypotheses))
        _refuse_known_names(self.extra, NBEST_FIELDS)

    @property
    def one_best(self) -> Hypothesis:
        """The first hypothesis."""
        return self.hypotheses[0]


def _refuse_known_names(extra: Mapping[str, Any], known: Sequence[str]) -> None:
    clash = [name for name in known if name in extra]
    if clash:
        raise DataError(f"extra fields may not be named {clash}: these are fields of their own")


def list_offsets(lists: Sequence[NBest]) -> npt.NDArray[np.int64]:
    """Where each list starts in an array over all hypotheses of all lists, shape (num_lists + 1,)."""
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(entry.hypotheses) for entry in lists], out=offsets[1:])
    return offsets


def one_best_texts(lists: Iterable[NBest]) -> list[str]:
    """The text of every list's first hypothesis."""
    return [entry.one_best.text for entry in lists]


def reference_texts(lists: Iterable[NBest]) -> list[str]:
    """The reference of every list.

    Raises:
        DataError: naming the first utterance that has none.
    """
    texts = []
    for entry in lists:
        if entry.reference is None:
            raise DataError(
                f"utterance {entry.utterance!r} has no reference; error counts, tuning and significance need one "
                "(mixbits convert IN OUT --references FILE adds them)"
            )
        texts.append(entry.reference)
    return texts


def check_unique_utterances(lists: Iterable[NBest]) -> None:
    """Raise DataError when two lists have the same utterance id."""
    seen: set[str] = set()
    for entry in lists:
        if entry.utterance in seen:
            raise DataError(f"utterance {entry.utterance!r} occurs twice; utterance ids must be unique")
        seen.add(entry.utterance)

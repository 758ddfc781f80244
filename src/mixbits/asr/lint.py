"""What is suspicious in n-best lists: counts and first places of each kind of finding.

Entries that a reader had to leave out come in as its errors (:mod:`mixbits.asr.formats.problems`); the rest is looked for here:

* ``order``: no scale s ≥ 0 of the acoustic scores makes acoustic · s + LM (or, without LM scores, the acoustic score; with ``total_score``, that)
  fall from first to last: the list is not sorted by its scores;
* ``cost sign``: in most lists the scores *rise* from first to last, or most LM scores are above 0: perhaps they are costs;
* ``ragged``: a list shorter than the longest; ``empty``: a hypothesis without words; ``no reference``: where others have one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mixbits.asr.formats.problems import DuplicateError, MissingError, NotFiniteError
from mixbits.asr.nbest import NBest
from mixbits.errors import MixbitsError

KINDS = ("unreadable", "duplicate", "missing", "not finite", "order", "cost sign", "empty", "ragged", "no reference")
_PLACES = 5
_TOLERANCE = 1e-3  # scores in files are rounded


@dataclass
class Findings:
    """Counts and the first places by kind, in the order of :data:`KINDS`."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    places: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: str, place: str) -> None:
        """Count one finding; the first five places are kept."""
        self.counts[kind] += 1
        if len(self.places[kind]) < _PLACES:
            self.places[kind].append(place)

    def report(self, error: MixbitsError) -> None:
        """Count an entry that a reader leaves out."""
        kinds = {DuplicateError: "duplicate", MissingError: "missing", NotFiniteError: "not finite"}
        self.add(next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "unreadable"), str(error))

    @property
    def total(self) -> int:
        """All findings."""
        return sum(self.counts.values())


def lint_lists(lists: Sequence[NBest], findings: Findings, *, expect_references: bool = False) -> None:
    """Add what is suspicious in these lists; ``expect_references``: even if no list has one."""
    longest = max((len(entry.hypotheses) for entry in lists), default=0)
    expect_references = expect_references or any(entry.reference is not None for entry in lists)
    rising, ranked = [], 0
    for entry in lists:
        name = f"utterance {entry.utterance!r}"
        falls, rises = _falls(entry), _falls(entry, sign=-1.0)
        ranked += len({(h.acoustic_score, h.lm_score) for h in entry.hypotheses}) > 1
        if rises and not falls:
            rising.append(name)
        elif not falls:
            findings.add("order", f"{name}: not sorted by its scores")
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            if not hypothesis.words:
                findings.add("empty", f"{name}, hypothesis {rank}")
        if len(entry.hypotheses) < longest:
            findings.add("ragged", f"{name}: {len(entry.hypotheses)} hypotheses; the longest list has {longest}")
        if expect_references and entry.reference is None:
            findings.add("no reference", name)
    most = 2 * len(rising) > ranked
    for name in rising:
        if most:
            findings.add("cost sign", f"{name}: scores rise from first to last; are they costs? (score = -cost)")
        else:
            findings.add("order", f"{name}: sorted from worst to best")
    _lm_signs(lists, findings)


def _lm_signs(lists: Sequence[NBest], findings: Findings) -> None:
    """Natural-log probabilities are at most 0."""
    scores = [(entry.utterance, h.lm_score) for entry in lists for h in entry.hypotheses if h.lm_score is not None]
    above = [(utterance, score) for utterance, score in scores if score > 0.0]
    if 2 * len(above) > len(scores):
        for utterance, score in above:
            findings.add("cost sign", f"utterance {utterance!r}: lm_score {score:g} is above 0; is it a cost?")


def _falls(entry: NBest, *, sign: float = 1.0) -> bool:
    """Whether some scale s >= 0 makes sign · (s · acoustic + LM) fall from first to last (an interval of s is left)."""
    totals = [h.extra["total_score"] for h in entry.hypotheses if isinstance(h.extra.get("total_score"), float)]
    if len(totals) == len(entry.hypotheses):
        return all(sign * (a - b) >= -_slack(a) for a, b in pairwise(totals))
    if any(hypothesis.lm_score is None for hypothesis in entry.hypotheses):
        acoustic = [hypothesis.acoustic_score for hypothesis in entry.hypotheses]
        return all(sign * (a - b) >= -_slack(a) for a, b in pairwise(acoustic))
    low, high = 0.0, math.inf
    for first, second in pairwise(entry.hypotheses):
        assert first.lm_score is not None
        assert second.lm_score is not None
        acoustic_step = sign * (first.acoustic_score - second.acoustic_score)
        lm_step = sign * (first.lm_score - second.lm_score) + _slack(first.lm_score)
        if acoustic_step > 0.0:
            low = max(low, -lm_step / acoustic_step)
        elif acoustic_step < 0.0:
            high = min(high, -lm_step / acoustic_step)
        elif lm_step < 0.0:
            return False
    return low <= high


def _slack(score: float) -> float:
    return _TOLERANCE + 1e-6 * abs(score)

"""Is the difference between two recognizers real? MAPSSWE.

MAPSSWE (Gillick & Cox, ICASSP 1989, as NIST's SCTK computes it): both outputs are aligned to the same reference with
costs 0/3/3/4; errors are grouped into segments bounded by two words that both systems have right (or the utterance's
ends); the paired error differences of the segments get a normal test. This alignment serves the
segments only; word error rates come from the plain edit distance (:mod:`mixbits.asr.wer`), and the two totals can
differ by a word. Limit: between equally cheap alignments the choice is kaldialign's, not sclite's.

"No significant increase" is not equivalence: a claim of no loss also bounds the loss from above, by at most
``MAX_SHARE_OF_GAIN`` of what was gained (:mod:`mixbits.asr.bootstrap`; the rule is the caller's).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mixbits.asr.alignment import word_slots
from mixbits.errors import DataError

CRITICAL_Z = 1.960
FEW_SEGMENTS = 50
MAX_SHARE_OF_GAIN = 0.20
_GOOD_TO_CLOSE = 2


@dataclass(frozen=True)
class MapssweResult:
    """``mean`` and ``sd`` of (errors of a − errors of b) per segment; ``z`` and ``p`` are None when undetermined.

    ``errors_a`` and ``errors_b`` are summed over the segments (the 0/3/3/4 alignment).
    """

    mean: float
    sd: float
    z: float | None
    p: float | None
    num_segments: int
    errors_a: int
    errors_b: int

    @property
    def verdict(self) -> Literal["a is better", "b is better", "no significant difference", "undetermined"]:
        """At the 5 % level; undetermined when there is no segment or no spread between segments."""
        if self.z is None:
            return "undetermined"
        if abs(self.z) <= CRITICAL_Z:
            return "no significant difference"
        return "b is better" if self.z > 0 else "a is better"

    @property
    def warning(self) -> str | None:
        """Said when the normal approximation stands on few segments."""
        if self.num_segments >= FEW_SEGMENTS:
            return None
        return f"only {self.num_segments} segments (below {FEW_SEGMENTS} the normal approximation is rough)"

    @property
    def p_text(self) -> str:
        """The p-value for a table; never 0."""
        if self.p is None:
            return "undetermined"
        return "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.4f}"

    def __str__(self) -> str:
        z = "" if self.z is None else f", Z {self.z:.3f}"
        text = f"{self.verdict}: {self.p_text}{z}, {self.num_segments} segments"
        return text if self.warning is None else f"{text}; {self.warning}"


def mapsswe(references: Sequence[str], hypotheses_a: Sequence[str], hypotheses_b: Sequence[str]) -> MapssweResult:
    """Matched-pairs sentence-segment word error test of two systems on the same references.

    Raises:
        DataError: the three sequences differ in length.
    """
    if not len(references) == len(hypotheses_a) == len(hypotheses_b):
        sizes = (len(references), len(hypotheses_a), len(hypotheses_b))
        raise DataError(f"MAPSSWE compares the same utterances; got {sizes} references and texts of a and b")
    pairs = [
        pair for texts in zip(references, hypotheses_a, hypotheses_b, strict=True) for pair in error_segments(*texts)
    ]
    return mapsswe_from_segments(pairs)


def mapsswe_from_segments(segments: Sequence[tuple[int, int]]) -> MapssweResult:
    """The test on (errors of a, errors of b) pairs; (0, 0) pairs are dropped."""
    pairs = [pair for pair in segments if pair != (0, 0)]
    count = len(pairs)
    differences = [a - b for a, b in pairs]
    mean = sum(differences) / count if count else 0.0
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1)) if count > 1 else 0.0
    z = p = None
    if sd > 0:
        z = mean / (sd / math.sqrt(count))
        p = max(math.erfc(abs(z) / math.sqrt(2)), sys.float_info.min)
    return MapssweResult(mean, sd, z, p, count, sum(a for a, _ in pairs), sum(b for _, b in pairs))


def error_segments(reference: str, hypothesis_a: str, hypothesis_b: str) -> list[tuple[int, int]]:
    """(errors of a, errors of b) of each segment of one utterance."""
    words = reference.split()
    wrong_a, inserted_a = _position_errors(words, hypothesis_a.split())
    wrong_b, inserted_b = _position_errors(words, hypothesis_b.split())
    segments: list[tuple[int, int]] = []
    is_open, good, errors_a, errors_b = False, 0, 0, 0
    for position in range(len(words) + 1):
        if inserted_a[position] or inserted_b[position]:
            errors_a += inserted_a[position]
            errors_b += inserted_b[position]
            is_open, good = True, 0
        if position == len(words):
            break
        if wrong_a[position] or wrong_b[position]:
            errors_a += wrong_a[position]
            errors_b += wrong_b[position]
            is_open, good = True, 0
        elif is_open:
            good += 1
            if good == _GOOD_TO_CLOSE:
                segments.append((errors_a, errors_b))
                is_open, good, errors_a, errors_b = False, 0, 0, 0
    if is_open:
        segments.append((errors_a, errors_b))
    return segments


def _position_errors(reference: list[str], hypothesis: list[str]) -> tuple[list[int], list[int]]:
    """Per reference word: 1 if deleted or substituted; and the insertions before each word and after the last."""
    slots = word_slots(reference, hypothesis, costs="sclite")
    wrong = [int(expected != got) for expected, got in zip(reference, slots.words, strict=True)]
    return wrong, [len(words) for words in slots.inserted]

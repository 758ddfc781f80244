"""Lossless, lossy, or unresolved: how a certificate gets from the evidence of its parts to one verdict.

"Lossless" is a claim that the data must prove, so a small test proves nothing and says "unresolved". Each part of a certificate
(perplexity, each n-best list; :mod:`mixbits.pipeline.evidence`) gives a p-value for "packed is not worse" and claims that must all
hold for "lossless". :func:`judge` then says, part by part,

* ``lossy``: worse, significant after Holm's correction over all parts;
* ``lossless``: not worse at ``alpha`` *before* any correction, and every claim holds;
* ``unresolved``: anything else;

and the certificate's verdict is the worst of its parts.

Why the correction works one way only: "lossy" is said if any part says so, which needs Holm's step-down correction (Scand. J.
Stat. 1979) to be wrong with probability at most ``alpha``. "Lossless" is said only if every part says so: an intersection-union
test (Berger, Technometrics 1982), of level ``alpha`` as it stands; corrected p-values would make it easier to get by adding lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixbits.errors import SpecError

Verdict = Literal["lossless", "unresolved", "lossy"]
_WORST_FIRST: tuple[Verdict, ...] = ("lossy", "unresolved", "lossless")
RULE = (
    "Lossless: no part is significantly worse than full precision (each tested at alpha, without correction), and every part proves that "
    "what may be lost is small. For perplexity: the upper bound of the increase is below the margin. For a list: full precision beats the "
    "first pass, as it stands in the file and tuned without a language model (MAPSSWE), the bootstrap interval of the loss is not above 0, "
    "and the upper bounds of the loss and of the loss less 20 % of that gain allow at most 20 % of it; or packed is significantly better than full precision. Lossy: some part is "
    "significantly worse after Holm's correction. Unresolved: these data cannot tell. The verdict is the worst of the parts."
)


@dataclass(frozen=True)
class Claim:
    """Something that must hold for "lossless": whether it does, and words for it with its figures (empty: nothing worth saying)."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Evidence:
    """One part of a certificate: ``p_worse`` is a p-value of the hypothesis that packed is not worse (None: no test is possible)."""

    p_worse: float | None
    finding: str
    claims: tuple[Claim, ...]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Judgement:
    """Verdict of one part, Holm's adjusted p-value, and the reason in words."""

    verdict: Verdict
    p_holm: float | None
    reason: str


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(parts: Mapping[str, Evidence], *, alpha: float) -> dict[str, Judgement]:
    """A verdict for every part; a part without a test counts as one more hypothesis in Holm's correction (p = 1)."""
    check_alpha(alpha)
    adjusted = holm([1.0 if e.p_worse is None else e.p_worse for e in parts.values()])
    pairs = zip(parts.items(), adjusted, strict=True)
    return {name: _judge_one(evidence, p_holm, alpha) for (name, evidence), p_holm in pairs}


def _judge_one(evidence: Evidence, p_holm: float, alpha: float) -> Judgement:
    p, finding = evidence.p_worse, evidence.finding
    if p is None:
        return Judgement("unresolved", None, f"{finding}: no test is possible")
    if p_holm < alpha:
        return Judgement("lossy", p_holm, f"{finding}: significantly worse ({p_words(p)})")
    if p < alpha:
        alone = f"worse by its own test ({p_words(p)}), not after Holm's correction ({p_words(p_holm)})"
        return Judgement("unresolved", p_holm, f"{finding}: {alone}")
    missing = [claim.text for claim in evidence.claims if not claim.holds]
    if missing:
        return Judgement("unresolved", p_holm, f"{finding}: not significantly worse, but {'; '.join(missing)}")
    proofs = [claim.text for claim in evidence.claims if claim.text]
    return Judgement("lossless", p_holm, f"{finding}: {'; '.join(proofs)}")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of at least one verdict."""
    return min(verdicts, key=_WORST_FIRST.index)


def p_words(p: float | None) -> str:
    """A p-value in a sentence; never 0."""
    return "p unknown" if p is None else "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"


def check_alpha(alpha: float) -> None:
    """Raise SpecError unless alpha is a level a test can have."""
    if not 0 < alpha < 0.5:
        raise SpecError(f"alpha is {alpha}; expected a significance level between 0 and 0.5, usually 0.05")

"""Evidence for a certificate: what a perplexity difference, or the word errors on one list, prove about a packed model.

Upper bounds decide, so they must not be too small where data are few. Perplexity uses t quantiles with sentences as draws. For word
errors the bootstrap alone is too sure when few one-bests changed, so the larger of two bounds counts, the bootstrap's and the score
bound of :mod:`mixbits.asr.bootstrap`. The allowed loss is a share of the *estimated* gain; the bound of "loss − share × gain" takes
the estimate's own error in: in a normal model the first bound alone calls a loss right at the margin lossless in up to 17 % of tests
with a small gain, both together in at most 5 %.

Limits: sentences (or speakers) count as independent; t quantiles and MAPSSWE's normal ones are approximations on few of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mixbits.asr.bootstrap import paired_bootstrap, score_upper_bound
from mixbits.asr.significance import MAX_SHARE_OF_GAIN, MapssweResult, mapsswe
from mixbits.asr.wer import count_errors
from mixbits.errors import SpecError
from mixbits.pipeline.verdicts import Claim, Evidence, check_alpha

DEFAULT_MARGIN_NATS = math.log(1.01)
"""Largest increase that still counts as none: 1 % of perplexity."""
NUM_DRAWS = 10_000


def perplexity_evidence(
    delta_nats: float,
    stderr: float,
    num_sentences: int,
    *,
    margin_nats: float = DEFAULT_MARGIN_NATS,
    alpha: float = 0.05,
) -> Evidence:
    """Evidence of a paired difference in nats per token (packed − full) with its standard error over sentences.

    One-sided t test against 0 and one-sided upper bound at ``1 − alpha``, with ``num_sentences − 1`` degrees of freedom; the
    interval is two-sided. Figures: ``delta_nats``, ``delta_nats_stderr``, ``delta_nats_interval``, ``delta_nats_upper``, and
    relative (0.01 = 1 %) ``ppl_change``, ``ppl_change_interval``, ``ppl_change_upper``. Raises SpecError for a margin that is not positive.
    """
    from scipy.stats import t as student

    check_alpha(alpha)
    if not (margin_nats > 0 and math.isfinite(margin_nats)):
        raise SpecError(
            f"margin is {margin_nats} nats per token; expected a positive number, e.g. 0.00995 (1 % of perplexity)"
        )
    degrees = num_sentences - 1
    p: float | None = None
    one_sided = two_sided = math.inf
    if degrees >= 1 and math.isfinite(stderr):
        one_sided, two_sided = (float(student.ppf(1 - tail, degrees)) * stderr for tail in (alpha, alpha / 2))
        if stderr > 0:
            p = max(float(student.sf(delta_nats / stderr, degrees)), sys.float_info.min)
        else:  # the same difference in every sentence
            p = sys.float_info.min if delta_nats > 0 else 1.0
    upper, interval = delta_nats + one_sided, (delta_nats - two_sided, delta_nats + two_sided)
    figures = {
        "delta_nats": delta_nats,
        "delta_nats_stderr": stderr,
        "delta_nats_interval": list(interval),
        "delta_nats_upper": upper,
        "ppl_change": relative(delta_nats),
        "ppl_change_interval": [relative(bound) for bound in interval],
        "ppl_change_upper": relative(upper),
        "num_sentences": num_sentences,
    }
    is_small = upper < margin_nats
    bounds = f"{percent(relative(upper))} ({_level(alpha)}), allowed {percent(relative(margin_nats))}"
    claim = Claim(is_small, f"{'at most' if is_small else 'it may be up to'} {bounds}")
    return Evidence(p, f"{percent(relative(delta_nats))} perplexity", (claim,), figures)


def list_evidence(
    references: Sequence[str],
    *,
    first_pass: Sequence[str],
    first_pass_tuned: Sequence[str],
    full: Sequence[str],
    packed: Sequence[str],
    blocks: Sequence[str] | None = None,
    alpha: float = 0.05,
    max_share_of_gain: float = MAX_SHARE_OF_GAIN,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Evidence:
    """Evidence of one n-best list: one text an utterance of each system, in the same order.

    The rule for "no significant loss", at level ``alpha``, of certificates and of rescoring: full precision beats the first pass, as it
    stands in the file and tuned (MAPSSWE); the bootstrap interval of the loss is not above 0; and the two bounds above of the loss and of
    the loss less ``max_share_of_gain`` of the gain allow no more than that share; or packed is significantly better. ``p_worse`` is
    MAPSSWE's two-sided p where packed has more errors, else 1.
    """
    check_alpha(alpha)
    loss_test = mapsswe(references, full, packed)
    gain_tests = [mapsswe(references, first, full) for first in (first_pass, first_pass_tuned)]
    num_words = [len(reference.split()) for reference in references]
    errors_first, errors_full, errors_packed = (
        [count_errors(*pair).num_errors for pair in zip(references, texts, strict=True)]
        for texts in (first_pass, full, packed)
    )
    # packed − full − share × (first − full), in whole multiples of it because the bootstrap counts whole errors
    share = Fraction(max_share_of_gain).limit_denominator(1000)
    kept = share.denominator - share.numerator
    allowed = [kept * f + share.numerator * first for first, f in zip(errors_first, errors_full, strict=True)]
    needed = [share.denominator * count for count in errors_packed]
    options: dict[str, Any] = {"blocks": blocks, "num_draws": num_draws, "confidence": 1 - alpha, "seed": seed}
    loss = paired_bootstrap(errors_full, errors_packed, num_words, **options)
    excess = paired_bootstrap(allowed, needed, num_words, **options).delta_upper / share.denominator
    total, level = sum(num_words), 1 - alpha
    score = score_upper_bound(errors_full, errors_packed, total, confidence=level)
    upper = max(loss.delta_upper, score)
    excess_score = score_upper_bound(allowed, needed, total, confidence=level, scale=share.denominator)
    excess_upper = max(excess, excess_score)
    gain = 100.0 * (sum(errors_first) - sum(errors_full)) / total
    is_better = _significant(loss_test, alpha) and loss_test.mean > 0 and upper <= 0
    figures = {
        "gain": gain,
        "gain_p_value": gain_tests[0].p,
        "gain_over_tuned_p_value": gain_tests[1].p,
        "delta_wer": loss.delta,
        "delta_wer_interval": list(loss.delta_interval),
        "delta_wer_stderr": loss.delta_stderr,
        "delta_wer_upper_bootstrap": loss.delta_upper,
        "delta_wer_upper_score": score,
        "delta_wer_upper": upper,
        "allowed_loss": max_share_of_gain * gain,
        "loss_over_allowed_upper": excess_upper,
        "mapsswe_p_value": loss_test.p,
        "mapsswe_z": loss_test.z,
        "mapsswe_segments": loss_test.num_segments,
        "bootstrap_blocks": loss.num_blocks,
        "bootstrap_blocked": loss.blocked,
        "significantly_better": is_better,
    }
    if is_better:
        claims: tuple[Claim, ...] = (Claim(True, f"significantly better than full precision ({loss_test.p_text})"),)
    else:
        claims = _list_claims(figures, gain_tests, max_share_of_gain, alpha)
    return Evidence(_p_worse(loss_test, loss.delta), f"WER {loss.delta:+.2f} points", claims, figures)


def _list_claims(
    figures: dict[str, Any], gain_tests: Sequence[MapssweResult], share: float, alpha: float
) -> tuple[Claim, ...]:
    """What must hold unless packed is significantly better."""
    gain, upper, excess = figures["gain"], figures["delta_wer_upper"], figures["loss_over_allowed_upper"]
    tests = (
        f"{gain:+.2f} points, {gain_tests[0].p_text}; against it tuned without a language model, {gain_tests[1].p_text}"
    )
    if not (gain > 0 and all(_significant(test, alpha) and test.mean > 0 for test in gain_tests)):
        return (Claim(False, f"full precision does not significantly beat the first pass ({tests})"),)
    low, allowed = figures["delta_wer_interval"][0], share * gain
    is_small, is_sure = upper <= allowed, excess <= 0
    bound = f"{upper:+.2f} ({_level(alpha)}), allowed {allowed:.2f} = {100 * share:g} % of the gain over the first pass ({tests})"
    not_sure = f"the loss less {100 * share:g} % of the gain may be up to {excess:+.2f} ({_level(alpha)}), allowed 0"
    return (
        Claim(low <= 0, "" if low <= 0 else f"the bootstrap interval of the loss starts above 0, at {low:+.2f}"),
        Claim(is_small, f"{'at most' if is_small else 'it may be up to'} {bound}"),
        Claim(is_sure, "" if is_sure else not_sure),
    )


def _p_worse(test: MapssweResult, delta: float) -> float | None:
    """MAPSSWE's p where packed is worse; without spread between segments 1 if packed is no worse, else unknown."""
    if test.p is None:
        return 1.0 if test.mean >= 0 and delta <= 0 else None
    return test.p if test.mean < 0 else 1.0


def _significant(test: MapssweResult, alpha: float) -> bool:
    return test.p is not None and test.p < alpha


def relative(nats: float) -> float:
    """Relative change of perplexity for a difference in nats per token; infinite where a float ends."""
    return math.expm1(nats) if nats < 700 else math.inf


def percent(share: float) -> str:
    """A signed share in percent: two digits, one significant one where they would show nothing."""
    if not math.isfinite(share):
        return "unknown %"
    return f"{100 * share:+.2f} %" if abs(share) >= 5e-5 or share == 0 else f"{100 * share:+.1g} %"


def _level(alpha: float) -> str:
    return f"{100 * (1 - alpha):g} % bound"

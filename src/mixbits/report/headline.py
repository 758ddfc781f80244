"""What the numbers say, in sentences: size, perplexity against the baseline, uniform bits at equal bytes, words.

The rules, so that the sentences stay honest:

* "lossless" is said of perplexity only if the whole 95 % interval of the paired difference is at or below zero;
* "better than uniform" only if the difference at equal bytes is negative by more than 1.96 standard errors;
* both errors are those over sentences and, with several seeds, over seeds, in quadrature;
* "no significant WER loss" only if full precision significantly beats the first pass, the upper 95 % bound of the
  loss is at most 20 % of that gain, and the run's own, stricter rule does not deny it; otherwise it is said that this test cannot tell.

Limits: 1.96 is the normal quantile; an error over two or three seeds is rough itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixbits.report.cells import both_errors, megabytes, number, p_text, percent_over_baseline, ppl_digits, with_error
from mixbits.report.kinds import row_kind
from mixbits.summary import WITH_NGRAM, Summary, SummaryRow

Z_95 = 1.96
MAX_SHARE_OF_GAIN = 0.2
SIGNIFICANT_P = 0.05


def headline(summary: Summary, *, max_rows: int = 3) -> list[str]:
    """One paragraph per learned row (at most ``max_rows``), or one that says what is missing."""
    learned = [row for row in summary.rows if row_kind(row) == "learned" and not row.name.endswith(WITH_NGRAM)]
    if not learned:
        names = ", ".join(row.name for row in summary.rows[:8]) or "none"
        return [f"No learned bits in these results; systems: {names}."]
    paragraphs = []
    for row in learned[:max_rows]:
        parts = [_size(row), _perplexity(row, summary), _equal_bytes(row, summary), *_words(row, summary)]
        text = " ".join(part for part in parts if part)
        paragraphs.append(text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0"))
    if len(learned) > max_rows:
        paragraphs.append(f"{len(learned) - max_rows} more learned system(s) stand in the table.")
    return paragraphs


def _size(row: SummaryRow) -> str:
    parts = []
    if row.ratio is not None:
        parts.append(f"{number(row.ratio)} times smaller than full precision")
    if row.bytes is not None:
        parts.append(f"{megabytes(row.bytes)}")
    if row.bits_per_weight is not None:
        parts.append(f"{number(row.bits_per_weight)} bits per weight")
    return f"{row.name}: {', '.join(parts)}." if parts else f"{row.name}: size unknown."


def _perplexity(row: SummaryRow, summary: Summary) -> str:
    if row.ppl is None:
        return "Its perplexity is unknown."
    text = f"Perplexity {with_error(row.ppl, row.ppl_stderr, ppl_digits(row.ppl))}"
    base = summary.row(summary.baseline)
    share = percent_over_baseline(row, summary)
    if base is None or share is None:
        return f"{text}; no full-precision baseline to compare with."
    text += f" against {number(base.ppl, ppl_digits(base.ppl))} of {base.name}: {number(share, 1, sign=True)} %"
    delta, stderr = row.delta_nats, both_errors(row.delta_nats_stderr, row.extra)
    if delta is None:
        return f"{text} (no paired test of the difference)."
    text += f", {with_error(delta, stderr, 4, sign=True)} nats per token"
    if stderr is None:
        return f"{text} (no standard error, so no claim)."
    if delta + Z_95 * stderr <= 0:
        return f"{text}: lossless in perplexity."
    if delta - Z_95 * stderr <= 0:
        return f"{text}: the difference is within its error, which is not proof that nothing was lost."
    return f"{text}: not lossless."


def _equal_bytes(row: SummaryRow, summary: Summary) -> str:
    entry: Mapping[str, Any] = next((e for e in summary.equal_bytes if e.get("name") == row.name), {})
    delta, stderr = entry.get("delta_nats"), both_errors(entry.get("delta_nats_stderr"), entry)
    if delta is None:
        verdict = entry.get("verdict")
        return (
            f"Against uniform bits at equal bytes: {verdict}."
            if verdict
            else "Not compared with uniform at equal bytes."
        )
    text = f"{with_error(abs(delta), stderr, 4)} nats per token"
    if stderr is None:
        word = "lower" if delta < 0 else "higher"
        return f"At equal bytes its loss is {text} {word} than uniform bits' (no standard error, so no claim)."
    if delta + Z_95 * stderr < 0:
        return f"At equal bytes it is better than uniform bits by {text}."
    if delta - Z_95 * stderr > 0:
        return f"At equal bytes it is NOT better than uniform bits: worse by {text}."
    word = "lower" if delta < 0 else "higher"
    return f"At equal bytes it is not measurably better than uniform bits: {text} {word}, within the error."


def first_pass_wer(summary: Summary) -> float | None:
    """WER of the first pass in percent: its row, or the test list's."""
    row = summary.row("first-pass")
    if row is not None and row.wer is not None:
        return row.wer
    return list_fact(summary, "first_pass_wer")


def list_fact(summary: Summary, key: str) -> Any:
    """A fact such as ``oracle_wer`` of the list that WERs are reported on (``test``, else the only list)."""
    lists = summary.asr.get("lists") or {}
    named = str(summary.asr.get("headline") or "test")
    entry = lists.get(named) or (next(iter(lists.values())) if len(lists) == 1 else None) or {}
    return entry.get(key)


def _words(row: SummaryRow, summary: Summary) -> list[str]:
    if row.wer is None:
        return []
    name = str(summary.asr.get("reference_system") or "full")  # what p and the bound of the loss are against
    full, first = summary.row(name), first_pass_wer(summary)
    full_wer = None if full is None else full.wer
    others = [f"{number(v)} % {what}" for v, what in ((full_wer, name), (first, "first pass")) if v is not None]
    p = row.p_value_vs_full
    text = f"WER {number(row.wer)} %"
    text += f" ({', '.join(others)})" if others else ""
    if full_wer is None:
        return [f"{text}."]
    text += "" if p is None else f", p {'' if p < 0.001 else '= '}{p_text(p)} against {name}"
    return [f"{text}.", _loss_of_words(row, summary, full_wer=full_wer, first_wer=first)]


def _loss_of_words(row: SummaryRow, summary: Summary, *, full_wer: float, first_wer: float | None) -> str:
    p, upper, wer = row.p_value_vs_full, row.delta_wer_upper_95, row.wer
    assert wer is not None
    if p is not None and p < SIGNIFICANT_P and wer > full_wer:
        return "That is a significant loss of words."
    gain_is_significant = summary.asr.get("gain_significant")
    if gain_is_significant is False:
        return "Full precision does not significantly beat the first pass here, so this test cannot show that nothing was lost."
    if gain_is_significant is not True or upper is None or first_wer is None or first_wer <= full_wer:
        return "These results do not say whether words were lost."
    gain = first_wer - full_wer
    bound = f"the loss is at most {number(upper, 2)} points (95 %) of a gain of {number(gain, 2)}"
    if upper > MAX_SHARE_OF_GAIN * gain:
        return f"This test cannot rule out a loss of words: {bound}, more than a fifth."
    if row.extra.get("no_significant_loss") is False:
        return f"This test cannot rule out a loss of words: {bound}, but the run's rule asks for more ({row.significance})."
    return f"No significant WER loss: {bound}."

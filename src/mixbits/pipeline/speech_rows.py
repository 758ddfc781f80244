"""Results of rescoring as rows: word errors of each system on one list, tests against the others, the rule for "no loss".

An entry is plain data for a results file. ``p_value_vs_full`` is MAPSSWE against the reference system, whatever its name; the verdict is
that of a certificate on the list (:mod:`mixbits.pipeline.evidence`), without a correction for other systems or lists. Bootstrap blocks
are speakers or conversations where the lists name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixbits.asr.bootstrap import bootstrap_blocks
from mixbits.asr.nbest import NBest, reference_texts
from mixbits.asr.significance import MapssweResult, mapsswe
from mixbits.asr.wer import ErrorCounts, error_table, sum_errors
from mixbits.pipeline.evidence import list_evidence
from mixbits.pipeline.verdicts import Verdict, judge

FIRST_PASS, FIRST_PASS_TUNED = "first-pass", "first-pass-tuned"
_OUTCOMES: Mapping[Verdict, str] = {"lossless": "no significant loss", "lossy": "loss", "unresolved": "unresolved"}
NO_LOSS_RULE = (
    "'No significant loss' is what a certificate calls lossless: packed is not significantly worse (MAPSSWE, p < .05), full precision beats the "
    "first pass, as it stands in the file and tuned without a language model, the bootstrap interval of the loss is not above 0, and the "
    "upper 95 % bounds of the loss and of the loss less 20 % of the gain over the file's order (the larger of bootstrap and score bound) allow "
    "at most 20 % of that gain; or packed is significantly better. Otherwise it is a loss, or the test cannot tell."
)


def compare(
    lists: Sequence[NBest], outputs: Mapping[str, Sequence[str]], reference_system: str | None, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Word errors of each system's texts, and tests against the first pass and ``reference_system``.

    Args:
        outputs: system → one text an utterance; must hold ``first-pass`` and ``reference_system`` (None: there is none).

    An entry has ``wer`` (percent), ``errors`` (sub, del, ins, words), ``p_value_vs_full`` and ``p_value_vs_first_pass`` (None for itself or
    undetermined); a system with a language model has ``significance``, a verdict in words, and beside a reference system
    ``delta_wer``, ``delta_wer_interval_95``, ``delta_wer_upper_95`` (points) and ``no_significant_loss``, the claim by ``NO_LOSS_RULE``.
    """
    references, first = reference_texts(lists), outputs[FIRST_PASS]
    blocks = bootstrap_blocks(lists)
    entries = {}
    for name, texts in outputs.items():
        errors = sum_errors(references, texts)
        entry: dict[str, Any] = {"wer": errors.wer, "errors": error_counts(errors), "p_value_vs_full": None}
        against_first = mapsswe(references, first, texts)
        entry["p_value_vs_first_pass"] = None if name == FIRST_PASS else against_first.p
        if reference_system not in (None, name):
            entry["p_value_vs_full"] = mapsswe(references, outputs[reference_system], texts).p
        if name in (FIRST_PASS, FIRST_PASS_TUNED):
            pass
        elif reference_system is None or name == reference_system:
            entry["significance"] = f"against the first pass: {_gain_text(against_first)}"
        else:
            evidence = list_evidence(
                references, first_pass=first, first_pass_tuned=outputs.get(FIRST_PASS_TUNED, first),
                full=outputs[reference_system], packed=texts, blocks=blocks, seed=seed,
            )  # fmt: skip
            judgement = judge({name: evidence}, alpha=0.05)[name]
            entry["delta_wer"] = evidence.figures["delta_wer"]
            entry["delta_wer_interval_95"] = evidence.figures["delta_wer_interval"]
            entry["delta_wer_upper_95"] = evidence.figures["delta_wer_upper"]
            entry["no_significant_loss"] = judgement.verdict == "lossless"
            entry["significance"] = f"{_OUTCOMES[judgement.verdict]}: {judgement.reason}"
        entries[name] = entry
    return entries


def beats_first_pass(references: Sequence[str], outputs: Mapping[str, Sequence[str]], system: str) -> bool:
    """True if ``system`` is significantly better than the file's order and, where it is there, the tuned first pass.

    Tuning alone can beat the file's order, even with a language model that knows nothing; hence both.
    """
    others = [name for name in (FIRST_PASS, FIRST_PASS_TUNED) if name in outputs]
    return all(mapsswe(references, outputs[name], outputs[system]).verdict == "b is better" for name in others)


def list_facts(lists: Sequence[NBest]) -> dict[str, Any]:
    """Counts, and the two WERs that need no model. Raises DataError when a reference is missing."""
    table = error_table(lists)
    first, oracle = table.total(), table.total(table.oracle_picks())
    return {
        "utterances": len(lists),
        "hypotheses": len(table.errors),
        "words": first.num_words,
        "oracle_wer": oracle.wer,
        "oracle_errors": error_counts(oracle),
        "first_pass_wer": first.wer,
    }


def error_counts(errors: ErrorCounts) -> dict[str, int]:
    """Counts under the names of results files."""
    return {"sub": errors.num_sub, "del": errors.num_del, "ins": errors.num_ins, "words": errors.num_words}


def gain_over_tuning(lists: Sequence[NBest], outputs: Mapping[str, Sequence[str]], system: str) -> str:
    """One sentence: does ``system`` beat the first pass tuned without a language model?"""
    references = reference_texts(lists)
    test = mapsswe(references, outputs[FIRST_PASS_TUNED], outputs[system])
    tuned, wer = (sum_errors(references, outputs[name]).wer for name in (FIRST_PASS_TUNED, system))
    if test.verdict == "b is better":
        claim = "significantly better than that"
    else:
        claim = "NOT significantly better than that, so the language model itself is not shown to help"
    return (
        f"The first pass with its own scores and the word insertion penalty tuned, without a language model, has {tuned:.2f} % WER; "
        f"{system} has {wer:.2f} % ({test.p_text}): {claim}."
    )


def _gain_text(test: MapssweResult) -> str:
    word = {"a is better": "worse", "b is better": "better"}.get(test.verdict, test.verdict)
    return f"{word}, {test.p_text}, {test.num_segments} segments"

"""A comparison of recognizers' outputs as one record: word errors, tests of pairs, groups, oracle curves, WER by weight, examples.

Everything is computed here, and the record is plain data for a JSON file and a page (:mod:`mixbits.report.compare_page`). What the
numbers mean is told in docs/proof.md. p-values are corrected by Holm over all pairs of the comparison; intervals and bounds are not:
each holds for its own pair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from mixbits.asr.alignment import side_by_side
from mixbits.asr.analysis import (
    PairComparison,
    biggest_changes,
    compare_pair,
    group_errors,
    group_names,
    oracle_curve,
    sclite_errors,
    share_recovered,
)
from mixbits.asr.bootstrap import bootstrap_blocks
from mixbits.asr.nbest import NBest, reference_texts
from mixbits.asr.wer import ErrorCounts, ErrorTable, error_table
from mixbits.errors import SpecError
from mixbits.jsonfile import plain
from mixbits.pipeline.compare_inputs import MatchedSystems, System
from mixbits.pipeline.speech_rows import error_counts
from mixbits.pipeline.verdicts import check_alpha, holm
from mixbits.pipeline.weight_curve import weight_curves
from mixbits.runs import versions

FORMAT, FORMAT_VERSION = "mixbits-comparison", 1
FEW_UTTERANCES = 50
Outcome = Literal["better", "worse", "no significant difference", "same errors", "same output"]


def compare_systems(
    matched: MatchedSystems,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    groups: Sequence[str] | None = None,
    alpha: float = 0.05,
    margin: float | None = None,
    num_examples: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """The record of a comparison.

    Args:
        pairs: (a, b) by name, b is tested against a; default: every other system against the first.
        groups: fields to make tables by (speaker, conversation or an extra field); default: speaker and conversation, where they are.
        margin: percentage points of WER that a loss must stay below to count as none; None makes no such claim.
        num_examples: how many of the most improved and of the most worsened utterances to keep for each pair.

    Raises:
        SpecError: alpha, margin, or a pair that does not make sense. DataError: a field that no utterance has.
    """
    systems = {system.name: system for system in matched.systems}
    first = matched.systems[0].name
    pairs = [(first, name) for name in systems if name != first] if pairs is None else list(pairs)
    _check_settings(systems, pairs, alpha, margin)
    utterances = matched.utterances
    known: dict[tuple[str, str], ErrorCounts] = {}
    tables = {name: error_table(system.lists, known=known) for name, system in systems.items()}
    oracle = oracle_curve(tables[first])[-1].oracle
    tests = _tests(matched, tables, pairs, alpha=alpha, margin=margin, seed=seed)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "utterances": len(utterances),
        "words": int(tables[first].num_words.sum()),
        "systems": {name: _system(system, tables[name], tables[first].total(), oracle) for name, system in systems.items()},
        "tests": tests,
        "groups": _groups(utterances, tables, groups),
        "oracle": {name: _curve(table) for name, table in tables.items() if systems[name].longest > 1},
        "weights": weight_curves(matched.systems, list(tables.values())),
        "examples": [
            _examples(systems[a], systems[b], tables[a], tables[b], num_examples) for a, b in pairs
        ],
        "settings": {"alpha": alpha, "margin": margin, "seed": seed},
        "notes": list(matched.notes),
        "versions": versions(),
    }  # fmt: skip
    result = plain(record)
    assert isinstance(result, dict)
    return result


def _check_settings(
    systems: Mapping[str, System], pairs: Sequence[tuple[str, str]], alpha: float, margin: float | None
) -> None:
    check_alpha(alpha)
    if margin is not None and not 0 < margin < 100:
        raise SpecError(f"margin is {margin} points of WER; expected a positive number such as 0.1")
    for a, b in pairs:
        if a not in systems or b not in systems or a == b:
            raise SpecError(f"cannot compare {b!r} with {a!r}; the systems are {', '.join(systems)}")


def _system(system: System, table: ErrorTable, first: ErrorCounts, oracle: ErrorCounts) -> dict[str, Any]:
    """Word errors of one system, by plain edit distance; sclite's totals beside them. ``oracle``: of the first system's lists."""
    errors = table.total()
    sclite = sclite_errors(reference_texts(system.lists), system.texts)
    return {
        "wer": errors.wer,
        "errors": error_counts(errors),
        "sclite_errors": error_counts(sclite),
        "sclite_differs": sclite.num_errors != errors.num_errors,
        "wrong_utterances": int((table.picked_errors() > 0).sum()),
        "hypotheses": len(table.errors),
        "longest_list": system.longest,
        "share_of_gap": share_recovered(first, errors, oracle),
        "bytes": system.num_bytes,
        "source": system.source,
        "data_hash": system.data_hash,
    }


def _tests(
    matched: MatchedSystems,
    tables: Mapping[str, ErrorTable],
    pairs: Sequence[tuple[str, str]],
    *,
    alpha: float,
    margin: float | None,
    seed: int,
) -> list[dict[str, Any]]:
    references, blocks = reference_texts(matched.utterances), bootstrap_blocks(matched.utterances)
    texts = {system.name: system.texts for system in matched.systems}
    found = [
        compare_pair(
            references, texts[a], texts[b], tables[a].picked_errors(), tables[b].picked_errors(),
            blocks=blocks, confidence=1 - alpha, seed=seed,
        )
        for a, b in pairs
    ]  # fmt: skip
    adjusted = holm([1.0 if pair.p is None else pair.p for pair in found])
    return [_test(a, b, pair, p, alpha, margin) for (a, b), pair, p in zip(pairs, found, adjusted, strict=True)]


def _test(a: str, b: str, pair: PairComparison, p_holm: float, alpha: float, margin: float | None) -> dict[str, Any]:
    test, drawn = pair.mapsswe, pair.bootstrap
    return {
        "a": a,
        "b": b,
        "outcome": _outcome(pair, p_holm, alpha),
        "p": pair.p,
        "p_holm": None if pair.p is None else p_holm,
        "test": "sign test" if test.p is None else "MAPSSWE",
        "sign_test_p": pair.sign_test_p,
        "segments": test.num_segments,
        "segment_mean": test.mean,
        "segment_sd": test.sd,
        "z": test.z,
        "segment_errors": [test.errors_a, test.errors_b],
        "warning": _warning(pair),
        "delta_wer": drawn.delta,
        "delta_wer_interval": list(drawn.delta_interval),
        "delta_wer_stderr": drawn.delta_stderr,
        "delta_wer_upper_bootstrap": drawn.delta_upper,
        "delta_wer_upper_score": pair.score_upper,
        "delta_wer_upper": pair.delta_upper,
        "within_margin": None if margin is None else pair.delta_upper < margin,
        "share_b_better": drawn.share_b_better,
        "wer_intervals": [list(drawn.wer_a_interval), list(drawn.wer_b_interval)],
        "bootstrap_blocks": drawn.num_blocks,
        "bootstrap_blocked": drawn.blocked,
        "bootstrap_draws": drawn.num_draws,
        "changed": asdict(pair.changes),
    }


def _warning(pair: PairComparison) -> str | None:
    """Where approximations stand on little: few segments for the test, few utterances for the bootstrap."""
    drawn = pair.bootstrap
    few = not drawn.blocked and drawn.num_blocks < FEW_UTTERANCES
    drawn_text = f"only {drawn.num_blocks} utterances to draw from (intervals and bounds are rough)" if few else None
    return "; ".join(text for text in (pair.mapsswe.warning, drawn_text) if text) or None


def _outcome(pair: PairComparison, p_holm: float, alpha: float) -> Outcome:
    """b against a, at level alpha after Holm's correction."""
    if pair.p is None:
        return "same output" if pair.changes.changed == 0 else "same errors"
    if p_holm >= alpha:
        return "no significant difference"
    return "better" if pair.mapsswe.mean > 0 else "worse"


def _groups(
    utterances: Sequence[NBest], tables: Mapping[str, ErrorTable], fields: Sequence[str] | None
) -> dict[str, list[dict[str, Any]]]:
    """Field → groups (in order of names) with the summed errors of every system."""
    if fields is None:
        fields = [f for f in ("speaker", "conversation") if any(getattr(u, f) is not None for u in utterances)]
    errors = {name: _utterance_errors(table) for name, table in tables.items()}
    found = {}
    for field in fields:
        names = group_names(utterances, field)
        summed = {system: group_errors(counts, names) for system, counts in errors.items()}
        sizes = group_errors([ErrorCounts(num_words=1)] * len(names), names)
        found[field] = [
            {
                "name": group,
                "utterances": sizes[group].num_words,
                "systems": {
                    system: {"wer": total[group].wer if total[group].num_words else None, **error_counts(total[group])}
                    for system, total in summed.items()
                },
            }
            for group in sorted(sizes, key=_natural)
        ]
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts 2 before 10 and names by their parts."""
    parts = re.split(r"([0-9]+)", name)
    return [(1, 0, part) if place % 2 == 0 else (0, int(part), "") for place, part in enumerate(parts)]


def _utterance_errors(table: ErrorTable) -> list[ErrorCounts]:
    rows = table.counts[table.offsets[:-1]].tolist()
    words = table.num_words.tolist()
    return [ErrorCounts(s, d, i, count) for (s, d, i), count in zip(rows, words, strict=True)]


def _curve(table: ErrorTable) -> list[dict[str, Any]]:
    return [
        {"hypotheses": point.num_hypotheses, "oracle_wer": point.oracle.wer, "oracle_errors": error_counts(point.oracle),
         "anti_oracle_wer": point.anti_oracle.wer, "anti_oracle_errors": error_counts(point.anti_oracle)}
        for point in oracle_curve(table)
    ]  # fmt: skip


def _examples(a: System, b: System, table_a: ErrorTable, table_b: ErrorTable, num: int) -> dict[str, Any]:
    """The utterances that b improves and worsens most, word by word: columns of [reference, a, b], null where there is no word."""
    errors_a, errors_b = table_a.picked_errors(), table_b.picked_errors()
    found: dict[str, Any] = {"a": a.name, "b": b.name}
    for kind, positions in biggest_changes(errors_a, errors_b, num).items():
        found[kind] = [
            {
                "utterance": a.lists[i].utterance,
                "speaker": a.lists[i].speaker,
                "errors": [int(errors_a[i]), int(errors_b[i])],
                "words": int(table_a.num_words[i]),
                "columns": [
                    [column.reference, *column.words]
                    for column in side_by_side(
                        a.lists[i].reference or "", (a.lists[i].one_best.text, b.lists[i].one_best.text)
                    )
                ],
            }
            for i in positions
        ]
    return found

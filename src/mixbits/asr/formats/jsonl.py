"""mixbits JSONL: one utterance a line, in and out without loss.

``{"utterance", "reference"?, "speaker"?, "conversation"?, "hypotheses": [{"text", "acoustic_score", "lm_score"?}]}``;
unknown fields are kept. Plain, gzip and xz are told apart by their first bytes, not by the name; writing goes by the
name (``.gz``, ``.xz``).

Policies: an empty hypothesis text is legal and survives; a blank line is ignored; ``null`` in an optional field
means absent; JSON's duplicate keys, NaN and infinities are errors. A line longer than ``max_line_bytes`` is refused
without being read whole, so memory is bounded by the sound lines. With ``on_bad="skip"`` bad lines are counted and
reported in the result; what makes the whole file doubtful (truncated compression, no sound line) is always an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

from mixbits.asr.formats.lines import MAX_LINE_BYTES, decode_line, new_digest, packed_file, raw_lines
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import DuplicateError, MissingError, Report
from mixbits.asr.formats.strictjson import (
    dump_json,
    kind,
    other_fields,
    parse_json,
    required,
    score_field,
    string_field,
)
from mixbits.asr.nbest import HYPOTHESIS_FIELDS, NBEST_FIELDS, Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError

__all__ = ["NBestFile", "read_nbest", "write_nbest"]

_MAX_REPORTED = 20


def read_nbest(
    path: str | os.PathLike[str],
    *,
    on_bad: Literal["error", "skip"] = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
    report: Report | None = None,
) -> NBestFile:
    """Read n-best lists from plain, gzip or xz JSONL.

    Args:
        on_bad: ``error`` stops at the first bad line; ``skip`` leaves bad lines out and counts them.
        report: called with the error of each bad line that is skipped.

    Raises:
        FormatError: a line that is not the promised JSON (file and line number are named), or a truncated file.
        DataError: no such file, an empty one, another encoding than UTF-8, a duplicate utterance id.
    """
    name = os.fspath(path)
    digest = new_digest()
    lists: dict[str, NBest] = {}
    first_line: dict[str, int] = {}
    skipped: list[str] = []
    num_skipped = 0
    for number, line in raw_lines(name, digest, max_line_bytes, expected="n-best lists as JSONL"):
        try:
            entry = _parse_line(line, where=f"{name}:{number}", max_line_bytes=max_line_bytes, first=number == 1)
            if entry is None:
                continue
            if entry.utterance in lists:
                raise DuplicateError(
                    f"{name}:{number}: utterance {entry.utterance!r} was on line {first_line[entry.utterance]} already; "
                    "utterance ids must be unique"
                )
        except MixbitsError as error:
            if on_bad == "error":
                raise
            if report is not None:
                report(error)
            num_skipped += 1
            if len(skipped) < _MAX_REPORTED:
                skipped.append(str(error))
            continue
        lists[entry.utterance] = entry
        first_line[entry.utterance] = number
    if not lists:
        if num_skipped:
            raise FormatError(f"{name}: all {num_skipped} lines are bad; the first: {skipped[0]}")
        raise DataError(f"{name}: the file is empty; expected one JSON object a line")
    return NBestFile(name, tuple(lists.values()), digest.hexdigest(), num_skipped, tuple(skipped))


def write_nbest(path: str | os.PathLike[str], lists: Iterable[NBest]) -> None:
    """Write lists as JSONL, compressed if the name ends in ``.gz`` or ``.xz``; the file appears only when complete.

    Raises:
        DataError: duplicate utterance ids, or an extra field that JSON cannot hold.
    """
    entries = list(lists)
    check_unique_utterances(entries)
    with packed_file(path) as file:
        file.writelines(_dump(entry) for entry in entries)


def _dump(entry: NBest) -> bytes:
    record: dict[str, Any] = {"utterance": entry.utterance}
    for name in ("reference", "speaker", "conversation"):
        if getattr(entry, name) is not None:
            record[name] = getattr(entry, name)
    record.update(entry.extra)
    record["hypotheses"] = [_hypothesis_record(hypothesis) for hypothesis in entry.hypotheses]
    return dump_json(record, what=f"utterance {entry.utterance!r}") + b"\n"


def _hypothesis_record(hypothesis: Hypothesis) -> dict[str, Any]:
    record: dict[str, Any] = {"text": hypothesis.text, "acoustic_score": hypothesis.acoustic_score}
    if hypothesis.lm_score is not None:
        record["lm_score"] = hypothesis.lm_score
    record.update(hypothesis.extra)
    return record


def _parse_line(line: bytes, *, where: str, max_line_bytes: int, first: bool) -> NBest | None:
    text = decode_line(line, where=where, first=first, max_line_bytes=max_line_bytes)
    return _nbest(parse_json(text, where=where), where) if text.strip() else None


def _nbest(record: Any, where: str) -> NBest:
    if not isinstance(record, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(record).__name__}")
    utterance = string_field(record, "utterance", where)
    if not utterance:
        raise FormatError(f"{where}: missing or empty field 'utterance'")
    here = f"{where}: utterance {utterance[:80]!r}"
    hypotheses = record.get("hypotheses")
    if not isinstance(hypotheses, list):
        raise FormatError(f"{here}: field 'hypotheses' must be a list, got {kind(record, 'hypotheses')}")
    if not hypotheses:
        raise MissingError(f"{here}: no hypotheses; expected at least one")
    return NBest(
        utterance,
        tuple(_hypothesis(item, f"{here}, hypothesis {rank}") for rank, item in enumerate(hypotheses, 1)),
        string_field(record, "reference", here),
        string_field(record, "speaker", here),
        string_field(record, "conversation", here),
        other_fields(record, NBEST_FIELDS, here),
    )


def _hypothesis(item: Any, where: str) -> Hypothesis:
    if not isinstance(item, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(item).__name__}")
    text = required(string_field(item, "text", where), "text", where)
    acoustic_score = required(score_field(item, "acoustic_score", where), "acoustic_score", where)
    return Hypothesis(
        text, acoustic_score, score_field(item, "lm_score", where), other_fields(item, HYPOTHESIS_FIELDS, where)
    )

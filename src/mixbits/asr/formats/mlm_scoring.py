"""mlm-scoring JSON (Shin et al.): ``{utterance: {"ref": text, "hyp_1": {"score": ln p, "text": text}, "hyp_2": …}}``.

Ranks count from 1 and tell the order, whatever the file's (mlm-scoring itself sorts keys as text). ``score`` is our ``acoustic_score``. ``speaker``,
``conversation``, ``lm_score`` and unknown fields are written under these names, which mlm-scoring ignores. Texts are kept to the character.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from mixbits.asr.formats.jsonobject import members, write_members
from mixbits.asr.formats.lines import new_digest, packed_file
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import DuplicateError, MissingError, Report, stop
from mixbits.asr.formats.strictjson import other_fields, required, score_field, string_field
from mixbits.asr.nbest import HYPOTHESIS_FIELDS, NBEST_FIELDS, Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError

FORMAT = "mlm-scoring JSON"
_KEY = re.compile(r"hyp_([1-9][0-9]{0,8})", re.ASCII)
_HYPOTHESIS_FIELDS = ("text", "score", "lm_score")
_UTTERANCE_FIELDS = ("ref", "speaker", "conversation")


def read(path: str | os.PathLike[str], *, report: Report = stop) -> NBestFile:
    """Read a file, one utterance after the other.

    Raises:
        FormatError: not this JSON, cut short, a missing rank or field. DataError: no such file, another encoding, no utterances, a duplicate one.
    """
    name, digest = os.fspath(path), new_digest()
    lists: dict[str, NBest] = {}
    for where, utterance, record in members(name, digest, expected='{"utterance": {"ref": …, "hyp_1": …}}'):
        try:
            if utterance in lists:
                raise DuplicateError(f"{where}: utterance {utterance!r} occurs twice; utterance ids must be unique")
            lists[utterance] = _nbest(utterance, record, f"{where}: utterance {utterance[:80]!r}")
        except MixbitsError as error:
            report(error)
    if not lists:
        raise DataError(f"{name}: no utterances")
    return NBestFile(name, tuple(lists.values()), digest.hexdigest())


def _nbest(utterance: str, record: dict[str, Any], where: str) -> NBest:
    ranked: dict[int, Hypothesis] = {}
    rest = {}
    for key, value in record.items():
        if not key.startswith("hyp_"):
            rest[key] = value
            continue
        match, here = _KEY.fullmatch(key), f"{where}, {key[:20]}"
        if match is None:
            raise FormatError(f"{here}: expected a key 'hyp_1', 'hyp_2', …")
        if not isinstance(value, dict):
            raise FormatError(f"{here}: expected an object with 'score' and 'text', got {type(value).__name__}")
        text = required(string_field(value, "text", here), "text", here)
        score = required(score_field(value, "score", here), "score", here)
        extra = other_fields(value, _HYPOTHESIS_FIELDS, here, taken=HYPOTHESIS_FIELDS)
        ranked[int(match[1])] = Hypothesis(text, score, score_field(value, "lm_score", here), extra)
    for rank in range(1, max(ranked, default=1) + 1):
        if rank not in ranked:
            raise MissingError(f"{where}: no 'hyp_{rank}'; expected ranks from 1 without a gap")
    return NBest(
        utterance,
        tuple(ranked[rank] for rank in sorted(ranked)),
        string_field(rest, "ref", where),
        string_field(rest, "speaker", where),
        string_field(rest, "conversation", where),
        other_fields(rest, _UTTERANCE_FIELDS, where, taken=NBEST_FIELDS),
    )


def check(lists: Sequence[NBest]) -> None:
    """Raise DataError if :func:`write` cannot keep these lists whole."""
    check_unique_utterances(lists)
    for entry in lists:
        taken = [name for name in entry.extra if name == "ref" or name.startswith("hyp_")]
        taken += ["score" for hypothesis in entry.hypotheses if "score" in hypothesis.extra]
        if taken:
            raise DataError(
                f"utterance {entry.utterance!r}: {FORMAT} has its own field {taken[0]!r}; leave ours out (--drop {taken[0]})"
            )


def write(path: str | os.PathLike[str], lists: Sequence[NBest]) -> None:
    """Write a file, compressed by its name. Raises DataError: see :func:`check`, or a field that JSON cannot hold."""
    check(lists)
    with packed_file(path) as file:
        file.write(b"{")
        write_members(file, lists, _record)
        file.write(b"\n}\n")


def _record(entry: NBest) -> dict[str, Any]:
    record: dict[str, Any] = dict(entry.extra)
    for name, value in (("ref", entry.reference), ("speaker", entry.speaker), ("conversation", entry.conversation)):
        if value is not None:
            record[name] = value
    for rank, hypothesis in enumerate(entry.hypotheses, 1):
        item: dict[str, Any] = {**hypothesis.extra, "score": hypothesis.acoustic_score, "text": hypothesis.text}
        if hypothesis.lm_score is not None:
            item["lm_score"] = hypothesis.lm_score
        record[f"hyp_{rank}"] = item
    return record

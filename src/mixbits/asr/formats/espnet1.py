"""ESPnet v1 JSON: ``{"utts": {utterance: {"utt2spk", "output": [{"name", "text", "rec_text", "rec_token", "rec_tokenid", "score"}, …]}}}``.

One entry of ``output`` a hypothesis, best first. ``rec_text`` is the hypothesis: one ``<eos>`` at its end is taken off, and where it
holds subword marks (``▁``, U+2581) they become the spaces between words. ``text`` is the reference, ``utt2spk`` the speaker, ``score`` a natural
log that ESPnet ranks by (it may contain an LM): our ``acoustic_score``. All other fields are kept; ``lm_score`` and ``conversation``
are written under these names, which ESPnet ignores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mixbits.asr.formats.jsonobject import members, write_members
from mixbits.asr.formats.lines import new_digest, packed_file
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import DuplicateError, MissingError, Report, stop
from mixbits.asr.formats.strictjson import other_fields, required, score_field, string_field
from mixbits.asr.nbest import HYPOTHESIS_FIELDS, NBEST_FIELDS, Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError

FORMAT = "ESPnet v1 JSON"
_UTTERANCE_FIELDS = ("output", "utt2spk", "conversation")
_OUTPUT_FIELDS = ("text", "rec_text", "score", "lm_score")
_END, _SUBWORD = "<eos>", "\u2581"


def read(path: str | os.PathLike[str], *, report: Report = stop) -> NBestFile:
    """Read a file, one utterance after the other.

    Raises:
        FormatError: not this JSON, cut short, a missing field. DataError: no such file, another encoding, no utterances, a duplicate one.
    """
    name, digest = os.fspath(path), new_digest()
    lists: dict[str, NBest] = {}
    for where, utterance, record in members(name, digest, inside="utts", expected='{"utts": {…}}'):
        try:
            if utterance in lists:
                raise DuplicateError(f"{where}: utterance {utterance!r} occurs twice; utterance ids must be unique")
            lists[utterance] = _nbest(utterance, record, f"{where}: utterance {utterance[:80]!r}")
        except MixbitsError as error:
            report(error)
    if not lists:
        raise DataError(f"{name}: no utterances under 'utts'")
    return NBestFile(name, tuple(lists.values()), digest.hexdigest())


def _nbest(utterance: str, record: dict[str, Any], where: str) -> NBest:
    outputs = record.get("output")
    if not isinstance(outputs, list):
        raise FormatError(f"{where}: field 'output' must be a list of hypotheses")
    if not outputs:
        raise MissingError(f"{where}: no hypotheses in 'output'; expected at least one")
    hypotheses, references = [], []
    for rank, item in enumerate(outputs, 1):
        here = f"{where}, output {rank}"
        if not isinstance(item, dict):
            raise FormatError(f"{here}: expected a JSON object, got {type(item).__name__}")
        references.append(string_field(item, "text", here))
        text = _plain(required(string_field(item, "rec_text", here), "rec_text", here))
        score = required(score_field(item, "score", here), "score", here)
        extra = other_fields(item, _OUTPUT_FIELDS, here, taken=HYPOTHESIS_FIELDS)
        hypotheses.append(Hypothesis(text, score, score_field(item, "lm_score", here), extra))
    if len(set(references)) > 1:
        raise FormatError(f"{where}: the references ('text') of its outputs differ; expected one and the same")
    return NBest(
        utterance,
        tuple(hypotheses),
        references[0],
        string_field(record, "utt2spk", where),
        string_field(record, "conversation", where),
        other_fields(record, _UTTERANCE_FIELDS, where, taken=NBEST_FIELDS),
    )


def _plain(text: str) -> str:
    text = text.removesuffix(_END)
    return text.replace(_SUBWORD, " ").strip(" ") if _SUBWORD in text else text


def check(lists: Sequence[NBest]) -> None:
    """Raise DataError if :func:`write` cannot keep these lists whole."""
    check_unique_utterances(lists)
    for entry in lists:
        _refuse_names(entry.extra, ("output", "utt2spk"), entry.utterance)
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            _refuse_names(hypothesis.extra, ("rec_text", "score"), entry.utterance)
            if _SUBWORD in hypothesis.text:
                raise DataError(
                    f"hypothesis {rank} of utterance {entry.utterance!r} holds the subword mark {_SUBWORD!r} (U+2581), "
                    f"which {FORMAT} reads as a space"
                )


def _refuse_names(extra: Any, names: Sequence[str], utterance: str) -> None:
    for name in names:
        if name in extra:
            raise DataError(
                f"utterance {utterance!r}: {FORMAT} has its own field {name!r}; leave ours out (--drop {name})"
            )


def write(path: str | os.PathLike[str], lists: Sequence[NBest]) -> None:
    """Write a file, compressed by its name. Raises DataError: see :func:`check`, or a field that JSON cannot hold."""
    check(lists)
    with packed_file(path) as file:
        file.write(b'{"utts": {')
        write_members(file, lists, _record)
        file.write(b"\n}}\n")


def _record(entry: NBest) -> dict[str, Any]:
    record: dict[str, Any] = dict(entry.extra)
    if entry.conversation is not None:
        record["conversation"] = entry.conversation
    if entry.speaker is not None:
        record["utt2spk"] = entry.speaker
    outputs = []
    for hypothesis in entry.hypotheses:
        item: dict[str, Any] = {**hypothesis.extra, "rec_text": _marked(hypothesis.text)}
        if entry.reference is not None:
            item["text"] = entry.reference
        if hypothesis.lm_score is not None:
            item["lm_score"] = hypothesis.lm_score
        outputs.append({**item, "score": hypothesis.acoustic_score})
    return {**record, "output": outputs}


def _marked(text: str) -> str:
    """A text that ends in the end mark by itself gets another one, so that reading gives it back."""
    return text + _END if text.endswith(_END) else text

"""NeMo: a TSV file of beams, ``text<TAB>score`` a line without a header, and its manifest.

The lists of all utterances stand one after the other, each with exactly ``beam_size`` lines, in the manifest's order; nothing in
the TSV says which utterance a line belongs to. So the beam size is the number of lines over the number of manifest entries, and it
is checked: it must divide; and where scores fall along the file except at a few places, these places must be the borders of the lists
(dumps of transducers hold shorter lists, which would shift all that follows). An explicit ``beam_size`` is believed. Texts are not parsed:
``null``, ``n/a``, nothing at all and quotes are hypotheses like others.

The manifest is JSON lines. ``text`` is the reference. The utterance id is the field ``utterance``, which our writer adds, else ``audio_filepath``
without folder and suffix; where that is not unique the whole path, and then the path with ``@offset``. All other fields are kept. Our writer
also adds ``num_hypotheses``, so that its files need no guess. The score is our ``acoustic_score``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from mixbits.asr.formats.lines import check_line, encode_line, new_digest, number, packed_file, raw_lines, text_lines
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import DuplicateError, MissingError, Report, stop
from mixbits.asr.formats.strictjson import dump_json, other_fields, parse_json, score_field, string_field
from mixbits.asr.nbest import NBEST_FIELDS, Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError, SpecError

FORMAT = "a NeMo TSV file with its manifest"
_OWN_FIELDS = ("utterance", "text", "speaker", "conversation", "num_hypotheses")


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where a TSV file's manifest is expected: ``beams.manifest.json`` beside ``beams.tsv`` or ``beams.tsv.gz``."""
    path = Path(path)
    name = path.name
    for suffix in (".gz", ".xz", ".tsv"):
        name = name.removesuffix(suffix)
    return path.with_name(f"{name}.manifest.json")


def read(
    path: str | os.PathLike[str],
    *,
    manifest: str | os.PathLike[str] | None = None,
    beam_size: int | None = None,
    report: Report = stop,
) -> NBestFile:
    """Read a TSV file and its manifest (default: :func:`manifest_path`).

    Raises:
        FormatError: a line that is not ``text<TAB>score``, a manifest that does not fit. DataError: no such file, another encoding.
    """
    name, digest = os.fspath(path), new_digest()
    manifest = Path(manifest) if manifest is not None else manifest_path(path)
    if not manifest.is_file():
        raise DataError(f"{manifest}: no such file; the manifest says which utterances {name} holds (--manifest FILE)")
    records = read_manifest(manifest, digest, report)
    lines: list[Hypothesis | None] = []
    for where, line in text_lines(name, digest, expected="lines 'text<TAB>score'", report=report):
        try:
            lines.append(_hypothesis(line, where))
        except MixbitsError as error:
            report(error)
            lines.append(None)  # keeps the lines that follow in their lists
    size = _beam_size(name, manifest, lines, records, beam_size)
    lists = []
    for position, (where, utterance, record) in enumerate(records):
        hypotheses = tuple(line for line in lines[position * size : (position + 1) * size] if line is not None)
        try:
            if not hypotheses:
                raise MissingError(f"{where}: no sound line of {name} is left for utterance {utterance!r}")
            lists.append(_nbest(utterance, hypotheses, record, where))
        except MixbitsError as error:
            report(error)
    if not lists:
        raise DataError(f"{name}: no hypotheses; expected lines 'text<TAB>score'")
    return NBestFile(name, tuple(lists), digest.hexdigest())


def _hypothesis(line: str, where: str) -> Hypothesis:
    columns = line.split("\t")
    if len(columns) != 2:
        raise FormatError(f"{where}: expected 'text<TAB>score', two columns, got {len(columns)}: {line[:60]!r}")
    return Hypothesis(columns[0], number(columns[1], where=where, what="a score"))


def _nbest(utterance: str, hypotheses: tuple[Hypothesis, ...], record: dict[str, Any], where: str) -> NBest:
    return NBest(
        utterance,
        hypotheses,
        string_field(record, "text", where),
        string_field(record, "speaker", where),
        string_field(record, "conversation", where),
        other_fields(record, _OWN_FIELDS, where, taken=NBEST_FIELDS),
    )


def read_manifest(
    path: str | os.PathLike[str], digest: Any, report: Report = stop
) -> list[tuple[str, str, dict[str, Any]]]:
    """(``file:line``, utterance id, fields) of each line. An id that was there before is handed to ``report`` and kept."""
    name = os.fspath(path)
    records: list[tuple[str, dict[str, Any]]] = []
    for where, line in text_lines(name, digest, expected="a NeMo manifest, one JSON object a line"):
        record = parse_json(line, where=where)
        if not isinstance(record, dict):
            raise FormatError(f"{where}: expected a JSON object, got {type(record).__name__}")
        if not record.get("utterance") and not record.get("audio_filepath"):
            raise FormatError(f"{where}: expected a field 'audio_filepath' (or 'utterance'), got {sorted(record)[:6]}")
        records.append((where, record))
    if not records:
        raise DataError(f"{name}: the manifest is empty")
    ids = _utterance_ids(records)
    first: dict[str, str] = {}
    for (where, _), utterance in zip(records, ids, strict=True):
        if utterance in first:
            report(DuplicateError(f"{where}: utterance {utterance!r} was in {first[utterance]} already"))
        first.setdefault(utterance, where)
    return [(where, utterance, record) for (where, record), utterance in zip(records, ids, strict=True)]


def _utterance_ids(records: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    paths = [string_field(record, "audio_filepath", where) or "" for where, record in records]
    offsets = [score_field(record, "offset", where) or 0.0 for where, record in records]
    named = [string_field(record, "utterance", where) for where, record in records]
    ways: tuple[Callable[[str, float], str], ...] = (
        lambda path, offset: PurePosixPath(path).stem or path,
        lambda path, offset: path,
        lambda path, offset: f"{path}@{offset:g}",
    )
    ids: list[str] = []
    for way in ways:
        ids = [name or way(path, offset) for name, path, offset in zip(named, paths, offsets, strict=True)]
        if max(Counter(ids).values()) == 1:
            break
    return ids


def _beam_size(
    name: str, manifest: Path, lines: Sequence[Hypothesis | None], records: Sequence[Any], given: int | None
) -> int:
    """Lines a list, checked. Raises FormatError if the file and its manifest do not fit."""
    if given is not None and given < 1:
        raise SpecError(f"beam size is {given}; expected 1 or more")
    sizes = {record.get("num_hypotheses") for _, _, record in records}
    size, rest = divmod(len(lines), len(records))
    fits = f"{len(lines)} lines for {len(records)} manifest entries in {manifest}"
    advice = (
        "lists of different length (transducers make them) cannot be told apart; use another format, or --beam-size N"
    )
    if given is None and len(sizes) == 1 and isinstance(declared := next(iter(sizes)), int):
        given = declared
    if given is not None and given * len(records) != len(lines):
        raise FormatError(
            f"{name}: {fits}; expected {given} for each, {given * len(records)} in all; is one of them cut short?"
        )
    if rest or not size:
        raise FormatError(f"{name}: {fits}, which is no whole number for each; {advice}")
    if given is None:
        _check_borders(name, lines, size, len(records), advice)
    return size


def _check_borders(name: str, lines: Sequence[Hypothesis | None], size: int, num_lists: int, advice: str) -> None:
    """Refuse a file that is sorted within lists of other lengths than ``size``: few rises, and some not at a border."""
    scores = [line.acoustic_score if line is not None else None for line in lines]
    pairs = enumerate(pairwise(scores), 1)
    rises = [at for at, (a, b) in pairs if a is not None and b is not None and b > a]
    inside = [at for at in rises if at % size]
    if inside and len(rises) < num_lists and len(scores) > 2 * num_lists:
        raise FormatError(
            f"{name}: line {inside[0] + 1}: the scores rise here, inside list {inside[0] // size + 1} of {size} lines, and fall almost "
            f"everywhere else; {advice} where they are just not sorted"
        )


def check(lists: Sequence[NBest]) -> None:
    """Raise DataError if :func:`write` cannot keep these lists whole."""
    check_unique_utterances(lists)
    sizes = Counter(len(entry.hypotheses) for entry in lists)
    if len(sizes) > 1:
        shortest = min(lists, key=lambda entry: len(entry.hypotheses))
        raise DataError(
            f"lists of {min(sizes)} to {max(sizes)} hypotheses, e.g. {len(shortest.hypotheses)} of utterance {shortest.utterance!r}; "
            f"{FORMAT} holds lists of one length: keep the first {min(sizes)} of each (--top {min(sizes)})"
        )
    for entry in lists:
        for name in _OWN_FIELDS:
            if name in entry.extra:
                raise DataError(
                    f"utterance {entry.utterance!r}: {FORMAT} has its own field {name!r}; leave ours out (--drop {name})"
                )
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            what = f"hypothesis {rank} of utterance {entry.utterance!r}"
            check_line(hypothesis.text, what=what, format_name=FORMAT, forbidden="\t\n\r\0")


def write(path: str | os.PathLike[str], lists: Sequence[NBest]) -> None:
    """Write the TSV file (compressed by its name) and its manifest (:func:`manifest_path`); the scores are the acoustic scores.

    Raises:
        DataError: see :func:`check`, or a field that JSON cannot hold.
    """
    check(lists)
    check_target(path)
    with packed_file(manifest_path(path)) as manifest, packed_file(path) as file:
        for entry in lists:
            manifest.write(dump_json(_record(entry), what=f"utterance {entry.utterance!r}") + b"\n")
            for hypothesis in entry.hypotheses:
                line = f"{hypothesis.text}\t{float(hypothesis.acoustic_score)!r}"
                file.write(encode_line(line, what=f"a hypothesis of utterance {entry.utterance!r}"))


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise DataError if a manifest that we did not write is in the way: it may be the only one of its data."""
    manifest = manifest_path(path)
    if manifest.exists() and b'"num_hypotheses"' not in next((line for _, line in _head(manifest)), b""):
        raise DataError(
            f"{manifest}: is there already, and is not ours to write over; choose another name for the TSV file"
        )


def _head(path: Path) -> Iterator[tuple[int, bytes]]:
    return raw_lines(os.fspath(path), new_digest(), 1 << 20, expected="a manifest")


def _record(entry: NBest) -> dict[str, Any]:
    record: dict[str, Any] = {**entry.extra, "utterance": entry.utterance, "num_hypotheses": len(entry.hypotheses)}
    fields = {"text": entry.reference, "speaker": entry.speaker, "conversation": entry.conversation}
    return record | {name: value for name, value in fields.items() if value is not None}

"""References given apart from the lists, joined by utterance id: sclite trn, Kaldi ``text``, a NeMo manifest.

Which of them a file is, it says itself: the first line with anything in it starts with ``{"`` (a manifest), or all lines end in ``(id)`` (trn; so does
every file named ``.trn``); all else is Kaldi ``text``, ``utterance words``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixbits.asr.formats import trn
from mixbits.asr.formats.lines import new_digest, read_archive, text_lines
from mixbits.asr.formats.nemo import read_manifest
from mixbits.asr.formats.problems import Report, stop
from mixbits.asr.formats.strictjson import string_field
from mixbits.asr.nbest import NBest
from mixbits.errors import DataError

ReferenceFormat = Literal["trn", "kaldi-text", "nemo-manifest"]
_TRN_LINE = re.compile(r"(?:;;.*|.*\([^()]+\)\s*)")


@dataclass(frozen=True)
class References:
    """Texts by utterance id; ``data_hash`` is the SHA-256 of the uncompressed bytes."""

    path: str
    texts: dict[str, str]
    data_hash: str


def detect_references(path: str | os.PathLike[str]) -> ReferenceFormat:
    """What the file looks like. Raises DataError: no such file, empty, another encoding."""
    name = os.fspath(path)
    if any(suffix == ".trn" for suffix in Path(name).suffixes[-2:]):
        return "trn"
    is_trn = None
    for _, line in text_lines(name, new_digest(), expected="references"):
        if is_trn is None and line.lstrip().startswith('{"'):
            return "nemo-manifest"
        is_trn = _TRN_LINE.fullmatch(line) is not None
        if not is_trn:
            return "kaldi-text"
    if is_trn is None:
        raise DataError(f"{name}: the file is empty; expected references (trn, Kaldi text or a NeMo manifest)")
    return "trn"


def read_references(
    path: str | os.PathLike[str], *, alternations: trn.Alternations = "refuse", report: Report = stop
) -> References:
    """Read references from any of the three formats.

    Raises:
        FormatError: a line that is not what the format promises. DataError: no such file, empty, a duplicate utterance.
    """
    name, digest = os.fspath(path), new_digest()
    found = detect_references(path)
    if found == "trn":
        texts = trn.read(path, digest, alternations=alternations, report=report)
    elif found == "nemo-manifest":
        entries = [(u, string_field(record, "text", where)) for where, u, record in read_manifest(path, digest, report)]
        texts = {utterance: text for utterance, text in entries if text is not None}
    else:
        archive = read_archive(name, digest, expected="'utterance words'", report=report)
        texts = {utterance: text for utterance, (_, text) in archive.items()}
    return References(name, texts, digest.hexdigest())


def join_references(lists: Sequence[NBest], references: References) -> tuple[NBest, ...]:
    """The lists with these references in the place of their own; a list without one keeps its own.

    Raises:
        DataError: no list has a reference here: the ids are of another kind.
    """
    if not any(entry.utterance in references.texts for entry in lists):
        of_these = next(iter(references.texts), None)
        raise DataError(
            f"{references.path}: holds no reference for any of the {len(lists)} utterances; "
            f"its ids are like {of_these!r}, theirs like {lists[0].utterance if lists else None!r}"
        )
    return tuple(replace(entry, reference=references.texts.get(entry.utterance, entry.reference)) for entry in lists)

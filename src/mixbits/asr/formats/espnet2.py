"""ESPnet v2 n-best folders: ``1best_recog/`` … ``Nbest_recog/`` with ``text``, ``score`` and, where they are, ``token`` and ``token_int``.

Lines are ``utterance value``; a score is ``-3.2`` or ``tensor(-3.2)``, a natural log that ESPnet ranks by (it may contain an LM): it is our
``acoustic_score``. Lists may be shorter than N. A folder may instead hold ``output.1``, ``output.2``, …, as decoding leaves them. Texts
are kept to the character. References and speakers: :mod:`mixbits.asr.formats.folders`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixbits.asr.atomic import atomic_folder
from mixbits.asr.formats.folders import (
    check_side_fields,
    numbered_folders,
    read_side_files,
    write_archive,
    write_side_files,
)
from mixbits.asr.formats.lines import WHITE, check_line, new_digest, number, read_archive
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import DuplicateError, MissingError, Report, stop
from mixbits.asr.nbest import Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError

FORMAT = "an ESPnet v2 folder"
EXTRA_TEXTS = ("token", "token_int")
_TENSOR = re.compile(r"tensor\(([^,()]*)(?:,[^()]*)?\)")


def rank_folders(path: Path) -> list[Path]:
    """``1best_recog`` … ``Nbest_recog`` in ``path``."""
    return numbered_folders(path, r"([1-9][0-9]*)best_recog")


def output_folders(path: Path) -> list[Path]:
    """``output.1``, … in ``path``, or ``path`` itself."""
    return [path] if rank_folders(path) else numbered_folders(path, r"output\.([1-9][0-9]*)")


def is_espnet2(path: Path) -> bool:
    """Whether the folder holds ``1best_recog``."""
    folders = output_folders(path)
    return bool(folders) and bool(rank_folders(folders[0]))


def read(path: str | os.PathLike[str], *, report: Report = stop) -> NBestFile:
    """Read a folder.

    Raises:
        FormatError: a file or folder is missing, an entry is missing (``MissingError``), a score is no number.
        DataError: no such folder, no hypotheses, a duplicate utterance.
    """
    top, digest = Path(path), new_digest()
    side = read_side_files(top, digest, report)
    found: dict[str, NBest] = {}
    for folder in output_folders(top):
        lists: dict[str, list[Hypothesis]] = {}
        for rank, ranked in enumerate(rank_folders(folder), 1):
            _read_rank(ranked, rank, lists, digest, report)
        for utterance, hypotheses in lists.items():
            if utterance in found:
                report(DuplicateError(f"{folder}: utterance {utterance!r} is in another folder of {top} already"))
            else:
                found[utterance] = NBest(utterance, tuple(hypotheses), **side(utterance))
    if not found:
        raise DataError(f"{top}: no hypotheses; expected folders 1best_recog … Nbest_recog with text and score")
    return NBestFile(str(top), tuple(found.values()), digest.hexdigest())


def _read_rank(folder: Path, rank: int, lists: dict[str, list[Hypothesis]], digest: Any, report: Report) -> None:
    """Add the hypotheses of one rank."""
    archives = {}
    for name in ("text", "score", *EXTRA_TEXTS):
        path = folder / name
        if path.is_file():
            archives[name] = read_archive(str(path), digest, expected=f"'utterance {name}'", report=report)
        elif name not in EXTRA_TEXTS:
            raise FormatError(f"{path}: no such file; expected {name!r} in each folder of {FORMAT}")
    for utterance in [key for key in archives["score"] if key not in archives["text"]]:
        report(MissingError(f"{archives['score'][utterance][0]}: {utterance!r} has a score here and no text"))
    for utterance, (where, text) in archives["text"].items():
        try:
            if len(lists.get(utterance, ())) != rank - 1:
                raise MissingError(
                    f"{where}: {utterance!r} has no sound hypothesis {rank - 1}, and one here of rank {rank}"
                )
            if utterance not in archives["score"]:
                raise MissingError(f"{folder / 'score'}: no score of {utterance!r}, whose text is in {where}")
            place, value = archives["score"][utterance]
            tensor = _TENSOR.fullmatch(value.strip(WHITE))
            score = number(tensor[1] if tensor else value, where=place, what="a score")
        except MixbitsError as error:
            report(error)
            continue
        extra = {name: archives[name][utterance][1] for name in EXTRA_TEXTS if utterance in archives.get(name, ())}
        lists.setdefault(utterance, []).append(Hypothesis(text, score, None, extra))


def check(lists: Sequence[NBest]) -> None:
    """Raise DataError if :func:`write` cannot keep these lists whole."""
    check_unique_utterances(lists)
    for entry in lists:
        check_side_fields(entry, format_name=FORMAT)
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            what = f"hypothesis {rank} of utterance {entry.utterance!r}"
            check_line(hypothesis.text, what=what, format_name=FORMAT)
            for name in EXTRA_TEXTS:
                value = hypothesis.extra.get(name, "")
                if not isinstance(value, str):
                    raise DataError(f"{name} of {what} is not a text, as {FORMAT} holds it (--drop {name})")
                check_line(value, what=f"{name} of {what}", format_name=FORMAT)


def write(path: str | os.PathLike[str], lists: Sequence[NBest]) -> None:
    """Write a new folder; the scores are the acoustic scores. Raises DataError: see :func:`check`; or it is not empty."""
    check(lists)
    longest = max((len(entry.hypotheses) for entry in lists), default=0)
    with atomic_folder(path) as folder:
        for rank in range(longest):
            ranked = folder / f"{rank + 1}best_recog"
            here = [(e.utterance, e.hypotheses[rank]) for e in lists if len(e.hypotheses) > rank]
            write_archive(ranked / "text", [(utterance, hypothesis.text) for utterance, hypothesis in here])
            write_archive(ranked / "score", [(u, repr(float(hypothesis.acoustic_score))) for u, hypothesis in here])
            for name in EXTRA_TEXTS:
                write_archive(ranked / name, [(u, h.extra[name]) for u, h in here if name in h.extra])
        write_side_files(folder, lists)

"""Kaldi n-best folders, as ``lattice-to-nbest | nbest-to-linear ark,t:`` and Kaldi's rescoring recipes leave them.

Text archives keyed ``utterance-1``, ``utterance-2``, … (split at the *last* ``-``), plain or gzipped:

* ``words_text``, or ``words`` with integers and a symbol table (``words.txt`` there or one given);
* ``acwt``: acoustic cost, unscaled; also named ``acoustic_costs``, ``acoustic-costs``, ``ac_cost``;
* ``lmwt.withlm``: LM cost, which is Kaldi's graph cost: LM, transitions and pronunciations; also ``lmwt``, ``lm_costs``, ``lm-costs``, ``lm_cost``;
* ``lmwt.nolm``: graph cost less the old LM; ``lmwt.nn``: cost of a neural LM (several numbers a line are summed, as in Kaldi's recipe).

A cost is a negative natural log, so score = −cost: ``acoustic_score``, ``lm_score``, and in ``extra`` ``graph_score`` (nolm) and
``neural_lm_score`` (nn). Kaldi's own mixture is then graph_score + w · neural_lm_score + (1 − w) · (lm_score − graph_score). A folder may
instead hold ``archives.1``, ``archives.2``, … as the recipes do. References and speakers: :mod:`mixbits.asr.formats.folders`.

The number in the key is the rank: lists are written in their order and numbered from 1, costs with all their digits. Texts are kept to the
character, though Kaldi's own tools see words only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mixbits.asr.atomic import atomic_folder
from mixbits.asr.formats.folders import (
    check_side_fields,
    existing,
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

FORMAT = "a Kaldi n-best folder"
_TEXTS = ("words_text", "words")
_COSTS = {
    "acoustic_score": ("acwt", "acoustic_costs", "acoustic-costs", "ac_cost"),
    "lm_score": ("lmwt.withlm", "lmwt", "lm_costs", "lm-costs", "lm_cost"),
    "graph_score": ("lmwt.nolm",),
    "neural_lm_score": ("lmwt.nn",),
}
EXTRA_SCORES = ("graph_score", "neural_lm_score")


def archive_folders(path: Path) -> list[Path]:
    """The folders with archives: ``archives.1``, … in ``path``, or ``path`` itself."""
    return numbered_folders(path, r"archives\.([1-9][0-9]*)") or [path]


def is_kaldi_nbest(path: Path) -> bool:
    """Whether the folder holds words and acoustic costs."""
    folder = archive_folders(path)[0]
    return existing(folder, _TEXTS) is not None and existing(folder, _COSTS["acoustic_score"]) is not None


def read(
    path: str | os.PathLike[str], *, symbols: str | os.PathLike[str] | None = None, report: Report = stop
) -> NBestFile:
    """Read a folder.

    Args:
        symbols: symbol table ``word integer`` for ``words``; default: ``words.txt`` in the folder.

    Raises:
        FormatError: an archive is missing, binary or damaged; an entry is missing in one archive (``MissingError``).
        DataError: no such folder, no hypotheses, a duplicate key.
    """
    top, digest = Path(path), new_digest()
    found: dict[str, NBest] = {}
    side = read_side_files(top, digest, report)
    for folder in archive_folders(top):
        for utterance, hypotheses in _read_folder(folder, top, symbols, digest, report).items():
            if utterance in found:
                report(DuplicateError(f"{folder}: utterance {utterance!r} is in another folder of {top} already"))
            else:
                found[utterance] = NBest(utterance, tuple(hypotheses), **side(utterance))
    if not found:
        raise DataError(f"{top}: no hypotheses; expected lines 'utterance-1 words' in words_text")
    return NBestFile(str(top), tuple(found.values()), digest.hexdigest())


def _read_folder(
    folder: Path, top: Path, symbols: str | os.PathLike[str] | None, digest: Any, report: Report
) -> dict[str, list[Hypothesis]]:
    """Hypotheses by utterance, both in the order of the text archive's keys and their numbers."""
    path = existing(folder, _TEXTS)
    if path is None:
        raise FormatError(f"{folder}: no 'words_text' and no 'words'; expected {FORMAT} (docs/formats/nbest.md)")
    texts = read_archive(str(path), digest, expected="'utterance-1 words'", report=report)
    words = None
    if path.name.startswith("words") and not path.name.startswith("words_text"):
        words = _symbol_table(symbols, (folder, top), digest)
    costs = {}
    for name, files in _COSTS.items():
        file = existing(folder, files)
        if file is not None:
            costs[name] = (file, read_archive(str(file), digest, expected="'utterance-1 cost'", report=report))
    if "acoustic_score" not in costs:
        raise FormatError(f"{folder}: no acoustic costs; expected a file {' or '.join(_COSTS['acoustic_score'])}")
    ranked: dict[str, dict[int, Hypothesis]] = {}
    for key, (where, value) in texts.items():
        try:
            utterance, rank = _split_key(key, where)
            ranked.setdefault(utterance, {})
            text = _text(value, words, where)
            scores = {name: _score(file, entries, key, where, name) for name, (file, entries) in costs.items()}
            extra = {name: scores.pop(name) for name in EXTRA_SCORES if name in scores}
            if rank in ranked[utterance]:
                raise DuplicateError(f"{where}: hypothesis {rank} of utterance {utterance!r} was there already")
            ranked[utterance][rank] = Hypothesis(text, scores["acoustic_score"], scores.get("lm_score"), extra)
        except MixbitsError as error:
            report(error)
    for _, entries in costs.values():
        for key in [key for key in entries if key not in texts]:
            report(MissingError(f"{entries[key][0]}: {key!r} has a cost here and no words in {path}"))
    for utterance, hypotheses in ranked.items():
        missing = next(rank for rank in count(1) if rank not in hypotheses)
        if missing <= max(hypotheses, default=1):
            report(MissingError(f"{path}: utterance {utterance!r} has no sound hypothesis {missing}"))
    return {
        utterance: [hypotheses[rank] for rank in sorted(hypotheses)]
        for utterance, hypotheses in ranked.items()
        if hypotheses
    }


def _split_key(key: str, where: str) -> tuple[str, int]:
    utterance, _, rank = key.rpartition("-")
    if not utterance or not (rank.isascii() and rank.isdigit()) or not 1 <= len(rank) <= 9 or rank.startswith("0"):
        raise FormatError(f"{where}: expected a key 'utterance-rank', e.g. 'utt7-1', got {key[:60]!r}")
    return utterance, int(rank)


def _text(value: str, table: dict[str, str] | None, where: str) -> str:
    """The words as they stand, or those of integers."""
    if table is None:
        return value
    words = value.split()
    for word in words:
        if word not in table:
            raise FormatError(f"{where}: {word[:40]!r} is not in the symbol table; expected its integers (words.txt)")
    return " ".join(table[word] for word in words)


def _symbol_table(given: str | os.PathLike[str] | None, folders: Sequence[Path], digest: Any) -> dict[str, str]:
    paths = [Path(given)] if given is not None else [folder / "words.txt" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{paths[0]}: no such file; 'words' holds integers and needs a symbol table (--symbols FILE)")
    entries = read_archive(str(path), digest, expected="'word integer'")
    return {value.strip(WHITE): word for word, (_, value) in entries.items()}


def _score(file: Path, entries: dict[str, tuple[str, str]], key: str, where: str, name: str) -> float:
    if key not in entries:
        raise MissingError(f"{file}: no cost of {key!r}, whose words are in {where}; is the file cut short?")
    place, value = entries[key]
    parts = value.split() if name == "neural_lm_score" else [value]
    if not parts:
        raise FormatError(f"{place}: expected a cost, got nothing")
    return 0.0 - sum(number(part, where=place, what="a cost") for part in parts)


def check(lists: Sequence[NBest]) -> None:
    """Raise DataError if :func:`write` cannot keep these lists whole."""
    check_unique_utterances(lists)
    for entry in lists:
        check_side_fields(entry, format_name=FORMAT)
        for rank, hypothesis in enumerate(entry.hypotheses, 1):
            what = f"hypothesis {rank} of utterance {entry.utterance!r}"
            check_line(hypothesis.text, what=what, format_name=FORMAT)
    hypotheses = [hypothesis for entry in lists for hypothesis in entry.hypotheses]
    for name in _COSTS:
        values = [_value(hypothesis, name) for hypothesis in hypotheses]
        if any(value is None for value in values) and any(value is not None for value in values):
            raise DataError(f"some hypotheses have no {name}; {FORMAT} holds it for all or none (--drop {name})")
        if not all(value is None or _is_cost(value) for value in values):
            raise DataError(f"{name} is not a finite number everywhere; {FORMAT} holds it as a cost (--drop {name})")


def _is_cost(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and float(value) == value
    except OverflowError:
        return False


def _value(hypothesis: Hypothesis, name: str) -> Any:
    return hypothesis.extra.get(name) if name in EXTRA_SCORES else getattr(hypothesis, name)


def write(path: str | os.PathLike[str], lists: Sequence[NBest], *, compress: bool = False) -> None:
    """Write a new folder: ``words_text``, ``acwt``, the LM costs that there are, side files; ``.gz`` with ``compress``.

    Raises:
        DataError: see :func:`check`; or the folder is not empty.
    """
    check(lists)
    suffix = ".gz" if compress else ""
    ranked = [
        (f"{entry.utterance}-{rank}", hypothesis)
        for entry in lists
        for rank, hypothesis in enumerate(entry.hypotheses, 1)
    ]
    with atomic_folder(path) as folder:
        write_archive(folder / f"words_text{suffix}", [(key, hypothesis.text) for key, hypothesis in ranked])
        for name, files in _COSTS.items():
            pairs = [(key, _value(hypothesis, name)) for key, hypothesis in ranked]
            costs = [(key, repr(0.0 - float(score))) for key, score in pairs if score is not None]
            write_archive(folder / f"{files[0]}{suffix}", costs)
        write_side_files(folder, lists)

"""All n-best formats by name: find out which one a file is, read it, write it, refuse to lose anything silently.

What each format holds is in :data:`HOLDS` and, with signs and units, in docs/formats/nbest.md. Fields that a format cannot hold are an error
that names them; ``drop`` says that they may go.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mixbits.asr.formats import espnet1, espnet2, jsonl, kaldi_nbest, mlm_scoring, nemo, trn
from mixbits.asr.formats.lines import open_unpacked
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.problems import Report, stop
from mixbits.asr.formats.references import join_references, read_references
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.errors import DataError, FormatError, SpecError

InputFormat = Literal["jsonl", "kaldi", "espnet1", "espnet2", "nemo", "mlm-scoring"]
OutputFormat = Literal["jsonl", "kaldi", "espnet1", "espnet2", "nemo", "mlm-scoring", "trn"]
Transcript = Literal["one-best", "reference"]

_PLAIN_FIELDS = ("reference", "speaker", "conversation")
_HEAD_BYTES = 1 << 16
_ESPNET1 = re.compile(r'\s*\{\s*"utts"\s*:\s*\{')
_MLM_SCORING = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')
_NEMO = re.compile(r"[^\t\n]*\t\s*[-+0-9.eEinfaINFA]+\s*(?:\n|$)")


@dataclass(frozen=True)
class Holds:
    """Fields that a format can keep. None stands for all extra fields."""

    lm_score: bool = True
    list_extra: Collection[str] | None = None
    hypothesis_extra: Collection[str] | None = None


HOLDS: dict[str, Holds] = {
    "jsonl": Holds(),
    "espnet1": Holds(),
    "mlm-scoring": Holds(),
    "kaldi": Holds(list_extra=(), hypothesis_extra=kaldi_nbest.EXTRA_SCORES),
    "espnet2": Holds(lm_score=False, list_extra=(), hypothesis_extra=espnet2.EXTRA_TEXTS),
    "nemo": Holds(lm_score=False, hypothesis_extra=()),
}


@dataclass(frozen=True)
class ReadOptions:
    """What a file does not say itself.

    ``references``: a file of references (:mod:`mixbits.asr.formats.references`) and ``alternations`` what to do with sclite's.
    ``manifest``, ``beam_size``: NeMo. ``symbols``: Kaldi's ``words.txt``.
    """

    references: str | os.PathLike[str] | None = None
    alternations: trn.Alternations = "refuse"
    manifest: str | os.PathLike[str] | None = None
    beam_size: int | None = None
    symbols: str | os.PathLike[str] | None = None


def detect_format(path: str | os.PathLike[str]) -> InputFormat:
    """The format of lists, from the name (``.jsonl``, ``.tsv``) or else from what is inside.

    Raises:
        FormatError: none of the formats. DataError: no such file or folder, or it cannot be read.
    """
    name, path = os.fspath(path), Path(path)
    if path.is_dir():
        if espnet2.is_espnet2(path):
            return "espnet2"
        if kaldi_nbest.is_kaldi_nbest(path):
            return "kaldi"
        raise FormatError(f"{name}: neither a Kaldi n-best folder (words_text, acwt) nor an ESPnet one (1best_recog)")
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return "jsonl"
    if suffix == ".tsv":
        return "nemo"
    head = _head(name)
    if suffix == ".trn":
        raise FormatError(f"{name}: trn holds no scores and no lists; give it as --references")
    if _ESPNET1.match(head):
        return "espnet1"
    if _MLM_SCORING.match(head):
        return "mlm-scoring"
    if _NEMO.match(head):
        return "nemo"
    if head.lstrip().startswith("{") or not head.strip():
        return "jsonl"
    raise FormatError(f"{name}: not n-best lists of a known format; expected one of {', '.join(get_args(InputFormat))}")


def read_any(
    path: str | os.PathLike[str],
    *,
    format: InputFormat | None = None,
    options: ReadOptions | None = None,
    report: Report | None = None,
) -> NBestFile:
    """Read n-best lists of any format.

    Args:
        format: default :func:`detect_format`. report: gets the errors of entries that are then left out; default: raise them.

    Raises:
        FormatError, DataError: see the format's own reader. SpecError: an option that the format does not have.
    """
    options = options or ReadOptions()
    format = format or detect_format(path)
    _check_options(format, options)
    if format == "jsonl":
        file = jsonl.read_nbest(path, on_bad="error" if report is None else "skip", report=report)
    elif format == "nemo":
        file = nemo.read(path, manifest=options.manifest, beam_size=options.beam_size, report=report or stop)
    elif format == "kaldi":
        file = kaldi_nbest.read(path, symbols=options.symbols, report=report or stop)
    else:
        reader = {"espnet1": espnet1, "espnet2": espnet2, "mlm-scoring": mlm_scoring}[format]
        file = cast(Any, reader).read(path, report=report or stop)
    if options.references is None:
        return file
    references = read_references(options.references, alternations=options.alternations, report=report or stop)
    both = hashlib.sha256(f"{file.data_hash} {references.data_hash}".encode()).hexdigest()
    return replace(file, lists=join_references(file.lists, references), data_hash=both)


def output_format(path: str | os.PathLike[str], given: OutputFormat | None = None) -> OutputFormat:
    """The format to write: ``given``, else by the name (``.jsonl``, ``.tsv``, ``.trn``, also with ``.gz`` or ``.xz``).

    Raises:
        SpecError: the name does not tell.
    """
    if given is not None:
        return given
    by_suffix: dict[str, OutputFormat] = {".jsonl": "jsonl", ".tsv": "nemo", ".trn": "trn"}
    found = by_suffix.get(_suffix(Path(path)))
    if found is None:
        raise SpecError(
            f"{os.fspath(path)}: the name does not tell the format (.jsonl, .tsv and .trn do); "
            f"give --output-format: {', '.join(get_args(OutputFormat))}"
        )
    return found


def lost_fields(lists: Sequence[NBest], format: OutputFormat) -> dict[str, tuple[int, str]]:
    """Fields of these lists that the format cannot hold: name → (how often, first utterance). None for trn, which holds one text by name."""
    if format == "trn":
        return {}
    holds, lost = HOLDS[format], dict[str, tuple[int, str]]()

    def count(name: str, utterance: str) -> None:
        number, first = lost.get(name, (0, utterance))
        lost[name] = (number + 1, first)

    for entry in lists:
        for name in entry.extra:
            if holds.list_extra is not None and name not in holds.list_extra:
                count(name, entry.utterance)
        for hypothesis in entry.hypotheses:
            if hypothesis.lm_score is not None and not holds.lm_score:
                count("lm_score", entry.utterance)
            for name in hypothesis.extra:
                if holds.hypothesis_extra is not None and name not in holds.hypothesis_extra:
                    count(name, entry.utterance)
    return lost


def drop_fields(lists: Sequence[NBest], names: Collection[str]) -> list[NBest]:
    """The lists without the fields of these names: reference, speaker, conversation, lm_score, extra fields.

    Raises:
        SpecError: a name that is no field of any list.
    """
    if not names:
        return list(lists)
    known = {*_PLAIN_FIELDS, "lm_score"}
    for entry in lists:
        known.update(entry.extra, *(hypothesis.extra for hypothesis in entry.hypotheses))
    unknown = sorted(set(names) - known)
    if unknown:
        raise SpecError(f"cannot drop {unknown[0]!r}: no list has such a field; there are {', '.join(sorted(known))}")
    gone: dict[str, Any] = {name: None for name in _PLAIN_FIELDS if name in names}
    lm_gone: dict[str, Any] = {"lm_score": None} if "lm_score" in names else {}
    return [
        replace(
            entry,
            extra=_without(entry.extra, names),
            hypotheses=tuple(replace(h, extra=_without(h.extra, names), **lm_gone) for h in entry.hypotheses),
            **gone,
        )
        for entry in lists
    ]


def _without(extra: Any, names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name not in names}


def check_output(
    lists: Sequence[NBest],
    format: OutputFormat,
    *,
    path: str | os.PathLike[str] | None = None,
    transcript: Transcript = "one-best",
) -> None:
    """Raise DataError if these lists cannot be written without loss, the message names what would be lost; or not to ``path``."""
    if path is not None and format == "nemo":
        nemo.check_target(path)
    lost = lost_fields(lists, format)
    if lost:
        facts = ", ".join(f"{name} ({number:,} times, first in {first!r})" for name, (number, first) in lost.items())
        raise DataError(
            f"{format} cannot hold {facts}; choose another format, or leave them out: --drop {','.join(lost)} (or --drop all)"
        )
    if format == "trn":
        trn.check(_transcripts(lists, transcript))
    elif format != "jsonl":
        _WRITERS[format].check(lists)


def write_any(
    path: str | os.PathLike[str],
    lists: Sequence[NBest],
    *,
    format: OutputFormat | None = None,
    drop: Collection[str] = (),
    compress: bool = False,
    transcript: Transcript = "one-best",
) -> OutputFormat:
    """Write lists in any format; files and folders appear only when complete. Returns the format.

    Args:
        format: default :func:`output_format`. drop: fields to leave out; "all": those that the format cannot hold.
        compress: gzip the archives of a Kaldi folder (files are compressed by their names).
        transcript: what a trn file gets.

    Raises:
        DataError: something would be lost, a text or id that the format cannot hold. SpecError: format or fields unknown.
    """
    format = output_format(path, format)
    if compress and format != "kaldi":
        raise SpecError(
            f"only the archives of Kaldi folders are gzipped on demand; for {format} give a name that ends in .gz"
        )
    names = set(drop) - {"all"}
    kept = drop_fields(lists, names)
    if "all" in drop:
        kept = drop_fields(kept, lost_fields(kept, format))
    check_output(kept, format, transcript=transcript)
    if format == "jsonl":
        jsonl.write_nbest(path, kept)
    elif format == "trn":
        trn.write(path, _transcripts(kept, transcript))
    elif format == "kaldi":
        kaldi_nbest.write(path, kept, compress=compress)
    else:
        _WRITERS[format].write(path, kept)
    return format


_WRITERS: dict[str, Any] = {
    "kaldi": kaldi_nbest,
    "espnet1": espnet1,
    "espnet2": espnet2,
    "nemo": nemo,
    "mlm-scoring": mlm_scoring,
}


def rescored_view(lists: Sequence[NBest], format: OutputFormat) -> tuple[list[NBest], list[str]]:
    """Rescored lists as ``format`` can hold them, and the names of the fields that are left out.

    Where a format has one score only (nemo, espnet2), it is the ``total_score``, which the lists are sorted by.
    """
    lost = lost_fields(lists, format)
    if format != "trn" and not HOLDS[format].lm_score:
        lists = [replace(entry, hypotheses=tuple(_with_total(h) for h in entry.hypotheses)) for entry in lists]
    return drop_fields(lists, lost), sorted(lost)


def _with_total(hypothesis: Hypothesis) -> Hypothesis:
    return replace(hypothesis, acoustic_score=hypothesis.extra.get("total_score", hypothesis.acoustic_score))


def write_rescored(
    path: str | os.PathLike[str], lists: Sequence[NBest], *, format: OutputFormat | None = None
) -> list[str]:
    """Write :func:`rescored_view`; returns the names of the fields that were left out. Raises as :func:`write_any`."""
    format = output_format(path, format)
    kept, left_out = rescored_view(lists, format)
    write_any(path, kept, format=format)
    return left_out


def _transcripts(lists: Sequence[NBest], transcript: Transcript) -> list[tuple[str, str]]:
    if transcript == "one-best":
        return [(entry.utterance, entry.one_best.text) for entry in lists]
    missing = next((entry.utterance for entry in lists if entry.reference is None), None)
    if missing is not None:
        raise DataError(f"utterance {missing!r} has no reference to write")
    return [(entry.utterance, entry.reference or "") for entry in lists]


def _check_options(format: str, options: ReadOptions) -> None:
    for name, owner in (("manifest", "nemo"), ("beam_size", "nemo"), ("symbols", "kaldi")):
        if getattr(options, name) is not None and format != owner:
            raise SpecError(f"--{name.replace('_', '-')} belongs to the format {owner}, and these lists are {format}")


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix in (".gz", ".xz") else path).suffix


def _head(name: str) -> str:
    with open_unpacked(name, expected="n-best lists", place=lambda: (f"{name}:1", "its start")) as stream:
        return stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace")

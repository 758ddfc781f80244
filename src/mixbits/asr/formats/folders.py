"""What Kaldi's and ESPnet's n-best folders share: numbered folders, and Kaldi data files beside them.

``references`` (Kaldi's data folders say ``text``, but ESPnet's decoding folders have hypotheses under that name), ``utt2spk`` with the speakers,
``utt2reco`` with the recordings (our conversations); each ``utterance value``. Recognizers need none of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixbits.asr.formats.lines import check_key, check_line, encode_line, packed, read_archive
from mixbits.asr.formats.problems import Report
from mixbits.asr.nbest import NBest
from mixbits.errors import DataError, FormatError

SIDE_FILES = {"reference": "references", "speaker": "utt2spk", "conversation": "utt2reco"}


def numbered_folders(path: Path, pattern: str) -> list[Path]:
    """The folders in ``path`` whose whole name matches ``pattern``, which has one group, a number; in its order.

    Raises:
        DataError: ``path`` is no folder. FormatError: a number is missing between 1 and the last.
    """
    try:
        names = os.listdir(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such folder") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a folder: {error.strerror or error}") from error
    found = {}
    for name in names:
        match = re.fullmatch(pattern, name, re.ASCII)
        if match and (path / name).is_dir():
            found[int(match[1])] = path / name
    for rank in range(1, max(found, default=0) + 1):
        if rank not in found:
            last = found[max(found)].name
            raise FormatError(f"{path}: number {rank} is missing of the folders up to {last}; copy the folder again")
    return [found[number] for number in sorted(found)]


def existing(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that is a file in ``folder``, plain or with ``.gz``."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_side_files(folder: Path, digest: Any, report: Report) -> Callable[[str], dict[str, Any]]:
    """Function that gives the fields (reference, speaker, conversation) of an utterance that the folder's side files tell."""
    archives = {}
    for field, name in SIDE_FILES.items():
        path = existing(folder, [name])
        if path is not None:
            archives[field] = read_archive(str(path), digest, expected=f"'utterance {field}'", report=report)
    return lambda utterance: {f: entries[utterance][1] for f, entries in archives.items() if utterance in entries}


def check_side_fields(entry: NBest, *, format_name: str) -> None:
    """Raise DataError if ids, references, speakers or conversations do not fit lines ``utterance value``."""
    check_key(entry.utterance, format_name=format_name)
    for field in SIDE_FILES:
        value = getattr(entry, field)
        if value is not None:
            check_line(value, what=f"the {field} of utterance {entry.utterance!r}", format_name=format_name)


def write_side_files(folder: Path, lists: Sequence[NBest]) -> None:
    """Write the side files that have anything to say."""
    for field, name in SIDE_FILES.items():
        pairs = [(entry.utterance, getattr(entry, field)) for entry in lists]
        write_archive(folder / name, [(key, value) for key, value in pairs if value is not None])


def write_archive(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Write lines ``key value`` into a folder that is not there yet, gzipped if the name says so; no file if there are none."""
    if pairs:
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as raw, packed(raw, path.suffix) as file:
            file.writelines(encode_line(f"{key} {value}", what=f"the entry of {key!r}") for key, value in pairs)

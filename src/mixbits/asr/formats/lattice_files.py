"""Lattices wherever they are: a Kaldi archive, an SLF file, or a folder of either; told apart by their first bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from mixbits.asr.formats.bytesource import open_source
from mixbits.asr.formats.kaldi_binary import MAGIC
from mixbits.asr.formats.kaldi_lattice import KaldiKind, WordSymbols, read_kaldi_stream, write_kaldi_lattices
from mixbits.asr.formats.slf import read_slf
from mixbits.asr.formats.slf_write import write_slf
from mixbits.asr.lattice import Lattice
from mixbits.errors import DataError, FormatError

LatticeFormat = Literal["kaldi", "slf"]
_SNIFFED_BYTES = 1 << 16
_SLF_LINE = re.compile(rb"(VERSION|V|UTTERANCE|U|N|NODES|base|start|lmname|lmscale|wdpenalty|acscale)=")
_FST_LINE = re.compile(rb"\d+([ \t]+\S+){0,4}[ \t]*\r?$")


@dataclass(frozen=True)
class LatticeFiles:
    """What was found: ``files`` in their order (numbers in names by value), their common format, whether ``path`` is a folder."""

    path: Path
    files: tuple[Path, ...]
    format: LatticeFormat
    is_folder: bool


def detect_lattice(path: str | os.PathLike[str]) -> LatticeFormat | None:
    """The format of a lattice file by its first bytes (plain, gzip or xz); None if it is none. Raises DataError: no such file."""
    try:
        with open_source(path) as source:
            head = source.peek(_SNIFFED_BYTES)
    except FormatError:
        return None
    lines = head.split(b"\n", 200)
    first = lines[0]
    if re.match(rb"[^\n]{1,4096}? " + re.escape(MAGIC), head):
        return "kaldi"
    content = [line for line in lines[:200] if line.strip() and not line.lstrip().startswith(b"#")]
    if content and _SLF_LINE.match(content[0].lstrip()):
        return "slf"
    if first.strip() and len(lines) > 1 and b"\0" not in head and _FST_LINE.match(lines[1]):
        return "kaldi"
    return None


def find_lattices(path: str | os.PathLike[str]) -> LatticeFiles:
    """The lattice files at ``path``; files of a folder that are no lattices are passed over.

    Raises:
        DataError: nothing there, or both formats in a folder. FormatError: a file that is no lattice.
    """
    path = Path(path)
    candidates = sorted((p for p in path.iterdir() if p.is_file()), key=_natural) if path.is_dir() else [path]
    found = {file: kind for file in candidates if (kind := detect_lattice(file)) is not None}
    if not found and path.is_dir():
        raise DataError(f"{path}: no lattices in this folder; expected Kaldi archives or SLF files")
    if not found:
        raise FormatError(f"{path}: no lattice; expected a Kaldi archive (text or binary) or an HTK lattice (SLF)")
    if len(set(found.values())) > 1:
        raise DataError(f"{path}: Kaldi archives and SLF files in one folder; expected one format")
    return LatticeFiles(path, tuple(found), next(iter(found.values())), path.is_dir())


def read_lattices(
    files: LatticeFiles, *, symbols: WordSymbols | None = None, dead_ends: Literal["error", "drop"] = "error"
) -> Iterator[tuple[Path, Lattice, KaldiKind | None]]:
    """(file, lattice, how Kaldi stored it) one by one. Raises FormatError as the readers do, and for an id in two files."""
    seen: dict[str, Path] = {}
    for file in files.files:
        if files.format == "slf":
            lattices: Iterable[tuple[Lattice, KaldiKind | None]] = [(read_slf(file, dead_ends=dead_ends), None)]
        else:
            lattices = _kaldi(file, symbols, dead_ends)
        for lattice, kind in lattices:
            if (other := seen.setdefault(lattice.utterance, file)) != file:
                raise FormatError(
                    f"{file}: utterance {lattice.utterance[:80]!r} is in {other} too; utterance ids must be unique"
                )
            yield file, lattice, kind


def write_like(
    files: LatticeFiles,
    output: str | os.PathLike[str],
    change: Callable[[Lattice], Lattice],
    *,
    symbols: WordSymbols | None = None,
    dead_ends: Literal["error", "drop"] = "error",
    check: Callable[[], None] | None = None,
) -> int:
    """Read, change and write lattices one at a time, to files of the same format: a file for a file, a folder for a folder.

    ``output`` appears when all is done and ``check``, called then, raises nothing. Returns the number of lattices.

    Raises:
        DataError: a folder is asked for where something is already. FormatError, DataError: as reader and writer.
    """
    output = Path(output)
    if not files.is_folder:
        (file,) = files.files
        return _write_file(files, file, output, change, symbols, dead_ends, check)
    if output.exists():
        raise DataError(f"{output}: is there already; choose the name of a new folder")
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        number = sum(_write_file(files, file, part / file.name, change, symbols, dead_ends) for file in files.files)
        if check is not None:
            check()
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return number


def _write_file(
    files: LatticeFiles,
    file: Path,
    to: Path,
    change: Callable[[Lattice], Lattice],
    symbols: WordSymbols | None,
    dead_ends: Literal["error", "drop"],
    check: Callable[[], None] | None = None,
) -> int:
    lattices = read_lattices(LatticeFiles(file, (file,), files.format, False), symbols=symbols, dead_ends=dead_ends)
    first = next(lattices)

    def changed() -> Iterator[Lattice]:
        for _, lattice, _ in chain([first], lattices):
            yield change(lattice)
        if check is not None:
            check()

    if files.format == "kaldi":
        return write_kaldi_lattices(to, changed(), kind=first[2], symbols=symbols)
    (lattice,) = changed()
    write_slf(to, lattice)
    return 1


def _kaldi(
    file: Path, symbols: WordSymbols | None, dead_ends: Literal["error", "drop"]
) -> Iterator[tuple[Lattice, KaldiKind]]:
    with open_source(file) as source:
        yield from read_kaldi_stream(source, symbols=symbols, dead_ends=dead_ends)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]

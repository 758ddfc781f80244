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

import gzip
import hashlib
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from mixbits.asr.atomic import atomic_binary_file
from mixbits.asr.nbest import HYPOTHESIS_FIELDS, NBEST_FIELDS, Hypothesis, NBest, check_unique_utterances
from mixbits.errors import DataError, FormatError, MixbitsError

MAX_LINE_BYTES = 64 * 2**20
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_MAX_REPORTED = 20


@dataclass(frozen=True)
class NBestFile(Sequence[NBest]):
    """The lists of a file. ``data_hash`` is the SHA-256 of the uncompressed bytes, ``skipped`` the first messages
    about skipped lines (at most 20) and ``num_skipped`` how many lines were skipped in all."""

    path: str
    lists: tuple[NBest, ...]
    data_hash: str
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.lists[index]

    def __len__(self) -> int:
        return len(self.lists)


def read_nbest(
    path: str | os.PathLike[str], *, on_bad: Literal["error", "skip"] = "error", max_line_bytes: int = MAX_LINE_BYTES
) -> NBestFile:
    """Read n-best lists from plain, gzip or xz JSONL.

    Args:
        on_bad: ``error`` stops at the first bad line; ``skip`` leaves bad lines out and counts them.

    Raises:
        FormatError: a line that is not the promised JSON (file and line number are named), or a truncated file.
        DataError: no such file, an empty one, another encoding than UTF-8, a duplicate utterance id.
    """
    name = os.fspath(path)
    digest = hashlib.sha256()
    lists: dict[str, NBest] = {}
    first_line: dict[str, int] = {}
    skipped: list[str] = []
    num_skipped = 0
    for number, line in _raw_lines(name, digest, max_line_bytes):
        try:
            entry = _parse_line(line, where=f"{name}:{number}", max_line_bytes=max_line_bytes, first=number == 1)
            if entry is None:
                continue
            if entry.utterance in lists:
                raise DataError(
                    f"{name}:{number}: utterance {entry.utterance!r} was on line {first_line[entry.utterance]} already; "
                    "utterance ids must be unique"
                )
        except MixbitsError as error:
            if on_bad == "error":
                raise
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
    with atomic_binary_file(path) as raw:
        suffix = Path(path).suffix
        if suffix == ".gz":
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
                packed.writelines(_dump(entry) for entry in entries)
        elif suffix == ".xz":
            with lzma.LZMAFile(raw, "wb") as packed_xz:
                packed_xz.writelines(_dump(entry) for entry in entries)
        else:
            raw.writelines(_dump(entry) for entry in entries)


def _dump(entry: NBest) -> bytes:
    record: dict[str, Any] = {"utterance": entry.utterance}
    for name in ("reference", "speaker", "conversation"):
        if getattr(entry, name) is not None:
            record[name] = getattr(entry, name)
    record.update(entry.extra)
    record["hypotheses"] = [_hypothesis_record(hypothesis) for hypothesis in entry.hypotheses]
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"utterance {entry.utterance!r} cannot be written as JSON: {error}") from error


def _hypothesis_record(hypothesis: Hypothesis) -> dict[str, Any]:
    record: dict[str, Any] = {"text": hypothesis.text, "acoustic_score": hypothesis.acoustic_score}
    if hypothesis.lm_score is not None:
        record["lm_score"] = hypothesis.lm_score
    record.update(hypothesis.extra)
    return record


def _raw_lines(name: str, digest: Any, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of a line that is too long only its first ``max_line_bytes + 1`` bytes."""
    number = 0
    try:
        with open(name, "rb") as raw:
            head = raw.peek(6)[:6]
            stream: IO[bytes] = raw
            if head.startswith(_GZIP):
                stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
            elif head.startswith(_XZ):
                stream = lzma.LZMAFile(raw)  # noqa: SIM115 (owns nothing: `raw` is closed above)
            while line := stream.readline(max_line_bytes + 1):
                number += 1
                digest.update(line)
                rest = line
                while len(line) > max_line_bytes and rest and not rest.endswith(b"\n"):
                    rest = stream.readline(1 << 20)
                    digest.update(rest)
                yield number, line
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; expected n-best lists as JSONL") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise FormatError(
            f"{name}:{number + 1}: the compressed file is truncated or damaged after line {number} ({error}); "
            "copy or write it again"
        ) from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _parse_line(line: bytes, *, where: str, max_line_bytes: int, first: bool) -> NBest | None:
    if len(line) > max_line_bytes:
        raise FormatError(f"{where}: the line is longer than {max_line_bytes} bytes; expected one utterance a line")
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); convert the file to UTF-8"
        ) from error
    if not text.strip():
        return None
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        return _nbest(record, where)
    except MixbitsError:
        raise
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: a lone surrogate escape (\\ud800-\\udfff) is not text") from error
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: {error}; got {text[:40]!r}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} occurs twice in one object")
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number, and scores must be finite")


def _nbest(record: Any, where: str) -> NBest:
    if not isinstance(record, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(record).__name__}")
    utterance = _string(record, "utterance", where)
    if not utterance:
        raise FormatError(f"{where}: missing or empty field 'utterance'")
    here = f"{where}: utterance {utterance[:80]!r}"
    hypotheses = record.get("hypotheses")
    if not isinstance(hypotheses, list):
        raise FormatError(f"{here}: field 'hypotheses' must be a list, got {_kind(record, 'hypotheses')}")
    if not hypotheses:
        raise FormatError(f"{here}: no hypotheses; expected at least one")
    return NBest(
        utterance,
        tuple(_hypothesis(item, f"{here}, hypothesis {rank}") for rank, item in enumerate(hypotheses, 1)),
        _string(record, "reference", here),
        _string(record, "speaker", here),
        _string(record, "conversation", here),
        _extra(record, NBEST_FIELDS, here),
    )


def _hypothesis(item: Any, where: str) -> Hypothesis:
    if not isinstance(item, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(item).__name__}")
    text = _string(item, "text", where)
    if text is None:
        raise FormatError(f"{where}: missing field 'text'")
    acoustic_score = _score(item, "acoustic_score", where)
    if acoustic_score is None:
        raise FormatError(f"{where}: missing field 'acoustic_score'")
    return Hypothesis(text, acoustic_score, _score(item, "lm_score", where), _extra(item, HYPOTHESIS_FIELDS, where))


def _kind(record: Mapping[str, Any], name: str) -> str:
    return type(record[name]).__name__ if name in record else "nothing"


def _string(record: Mapping[str, Any], name: str, where: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where}: field {name!r} must be a string, got {_kind(record, name)}")
    return value


def _score(record: Mapping[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{where}: field {name!r} must be a number, got {_kind(record, name)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(f"{where}: {name} is not finite; expected a natural-log score")
    return number


def _extra(record: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    extra = {name: value for name, value in record.items() if name not in known}
    if extra and not _all_finite(extra):
        raise FormatError(f"{where}: an unknown field holds an infinite number, which JSON cannot write back")
    return extra


def _all_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_all_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(_all_finite(item) for item in value)
    return True

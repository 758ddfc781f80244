"""JSON without its traps: no duplicate keys, no NaN, no infinities, no lone surrogates; fields with a known type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mixbits.asr.formats.problems import MissingError, NotFiniteError
from mixbits.errors import DataError, FormatError


class _ConstantError(ValueError):
    """NaN or an infinity in the text."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} occurs twice in one object")
    return record


def _refuse_constant(name: str) -> float:
    raise _ConstantError(f"{name} is not a JSON number, and scores must be finite")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def json_error(error: Exception, *, where: str, text: str) -> FormatError:
    """The FormatError for what :data:`DECODER` raised (ValueError or RecursionError) on ``text``."""
    if isinstance(error, RecursionError):
        return FormatError(f"{where}: JSON nested too deeply")
    kind = NotFiniteError if isinstance(error, _ConstantError) else FormatError
    return kind(f"{where}: not JSON: {error}; got {text[:40]!r}")


def parse_json(text: str, *, where: str) -> Any:
    """The value of a JSON text. Raises FormatError."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise json_error(error, where=where, text=text) from error
    refuse_surrogates(value, text, where=where)
    return value


def refuse_surrogates(value: Any, text: str, *, where: str) -> None:
    """Raise FormatError if the value of a JSON text holds half a surrogate pair."""
    if "\\u" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: a lone surrogate escape (\\ud800-\\udfff) is not text") from error
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None


def dump_json(value: Any, *, what: str) -> bytes:
    """One line of JSON, without its end. Raises DataError naming ``what``."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{what} cannot be written as JSON: {error}") from error


def kind(record: Mapping[str, Any], name: str) -> str:
    """The type of a field, for messages."""
    return type(record[name]).__name__ if name in record else "nothing"


def string_field(record: Mapping[str, Any], name: str, where: str) -> str | None:
    """A text, or None where the field is absent or null."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where}: field {name!r} must be a string, got {kind(record, name)}")
    return value


def score_field(record: Mapping[str, Any], name: str, where: str) -> float | None:
    """A finite number, or None where the field is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{where}: field {name!r} must be a number, got {kind(record, name)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NotFiniteError(f"{where}: {name} is not finite; expected a natural-log score")
    return number


def required(value: Any, name: str, where: str) -> Any:
    """``value``, or MissingError if it is None."""
    if value is None:
        raise MissingError(f"{where}: missing field {name!r}")
    return value


def other_fields(
    record: Mapping[str, Any], known: Sequence[str], where: str, *, taken: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields that are not ``known``.

    Raises:
        NotFiniteError: an infinite number, which JSON cannot write back. FormatError: a name that is ``taken`` by ours.
    """
    others = {name: value for name, value in record.items() if name not in known}
    clash = next((name for name in taken if name in others), None)
    if clash is not None:
        raise FormatError(f"{where}: unknown field {clash!r}, a name that mixbits needs itself; rename or remove it")
    if others and not _all_finite(others):
        raise NotFiniteError(f"{where}: an unknown field holds an infinite number, which JSON cannot write back")
    return others


def _all_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_all_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(_all_finite(item) for item in value)
    return True

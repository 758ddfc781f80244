"""The summary that every experiment writes: the data behind ``summary.json``, which the report shows.

One row per system (``first-pass``, ``full``, ``full-continued``, ``uniform-…``, ``learned-…``), and beside the rows what
the plots need: allocations, unit sizes, sensitivities, facts about the speech lists.

Why this way: every value is checked once, here, so that nothing downstream meets a negative size or a probability of 7.
Keys this version does not know are kept, so that an older mixbits can read and rewrite a newer summary without losing
anything.

Limits: values are checked one by one, not against each other (ratio and bytes may disagree).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mixbits.errors import FormatError
from mixbits.jsonfile import plain, read_json, write_json

SUMMARY_FORMAT = "mixbits-summary"
SUMMARY_VERSION = 1
WITH_NGRAM = "+ngram"
"""After the name of a system that is mixed with an n-gram model."""
_MAX_INTEGER = 2**63
_NOT_NEGATIVE = ("bytes", "ratio", "bits_per_weight", "ppl", "ppl_stderr", "wer", "valid_ppl", "delta_nats_stderr")


def _number(value: Any, *, name: str, where: str) -> float | int | None:
    """A finite number or None; None for NaN and infinities. Raises FormatError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{where}: {name!r} is {value!r:.60}; expected a number or null")
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise FormatError(f"{where}: {name!r} is an integer beyond 2^63; expected a sensible number")
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class SummaryRow:
    """One system. Units: bytes; ppl per token; wer and delta_wer_upper_95 in percent (points); nats per token; seconds.

    ``delta_nats``: paired mean difference of the negative log-likelihood to the baseline row, positive = worse.
    ``p_value_vs_full``: MAPSSWE, two-sided. ``errors``: counts ``sub``, ``del``, ``ins``, ``words``. None = unknown (a NaN
    becomes None). ``extra`` keeps keys this version does not know. Raises FormatError for values that cannot be.
    """

    name: str
    bytes: int | None = None
    ratio: float | None = None
    bits_per_weight: float | None = None
    ppl: float | None = None
    ppl_stderr: float | None = None
    wer: float | None = None
    p_value_vs_full: float | None = None
    valid_ppl: float | None = None
    nats: float | None = None
    delta_nats: float | None = None
    delta_nats_stderr: float | None = None
    method: str | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    errors: Mapping[str, int] | None = None
    delta_wer_upper_95: float | None = None
    significance: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise FormatError(f"summary row: 'name' is {self.name!r:.60}; expected text such as 'uniform-2'")
        where = f"summary row {self.name!r:.80}"
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "errors", "extra") or value is None:
                continue
            if item.name in ("method", "significance"):
                if not isinstance(value, str):
                    raise FormatError(f"{where}: {item.name!r} is {value!r:.60}; expected text or null")
                continue
            number = _number(value, name=item.name, where=where)
            if number is not None and number < 0 and item.name in _NOT_NEGATIVE:
                raise FormatError(f"{where}: {item.name!r} is {number:g}; expected a number of at least 0")
            object.__setattr__(self, item.name, number)
        if self.bytes is not None and self.bytes != int(self.bytes):
            raise FormatError(f"{where}: 'bytes' is {self.bytes!r}; expected a whole number")
        if self.p_value_vs_full is not None and not 0 <= self.p_value_vs_full <= 1:
            raise FormatError(f"{where}: 'p_value_vs_full' is {self.p_value_vs_full:g}; expected a probability")
        for name, count in _mapping(self.errors, name="errors", where=where).items():
            _number(count, name=f"errors.{name}", where=where)

    @classmethod
    def from_json(cls, data: Any, *, where: str = "summary") -> SummaryRow:
        """Read one row. Raises FormatError naming ``where``."""
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: a row is {data!r:.60}; expected an object with at least 'name'")
        known = {item.name for item in fields(cls)} - {"extra"}
        values = {name: data[name] for name in known if name in data}
        try:
            return cls(**{"name": None, **values}, extra={k: v for k, v in data.items() if k not in known})
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The eight columns every row has, the optional ones that are known, then the unknown keys."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        always = list(values)[:8]
        return {k: v for k, v in values.items() if k in always or v is not None} | dict(self.extra)


def _mapping(value: Any, *, name: str, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FormatError(f"{where}: {name!r} is {value!r:.60}; expected an object")
    return value


@dataclass(frozen=True)
class Summary:
    """Everything one experiment found out: what :mod:`mixbits.report` shows. Checked; see the field names in the docs.

    ``baseline``: the row that differences are to. ``equal_bytes``: learned rows against uniform ones at equal bytes.
    ``allocations``: row name -> unit name -> spec text. ``unit_weights``: number of weights per unit, in model order.
    ``sensitivity``: ``{"measure", "units": {unit: {"trace", "trace_stderr", "sensitivity": {spec: nats}}}}``.
    """

    title: str
    rows: tuple[SummaryRow, ...]
    seed: int | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    equal_bytes: tuple[Mapping[str, Any], ...] = ()
    allocations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unit_weights: Mapping[str, int] = field(default_factory=dict)
    sensitivity: Mapping[str, Any] = field(default_factory=dict)
    asr: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"summary {self.title!r:.80}"
        names = [row.name for row in self.rows]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise FormatError(f"{where}: row name(s) {', '.join(repeated[:5])} appear twice; names must differ")
        for name in ("versions", "data", "allocations", "unit_weights", "sensitivity", "asr", "extra"):
            object.__setattr__(self, name, _mapping(getattr(self, name), name=name, where=where))
        for row, units in self.allocations.items():
            _mapping(units, name=f"allocations.{row}", where=where)
        for unit, count in self.unit_weights.items():
            number = _number(count, name=f"unit_weights.{unit}", where=where)
            if number is not None and number < 0:
                raise FormatError(f"{where}: 'unit_weights.{unit}' is {number:g}; expected at least 0")
        for unit, entry in _mapping(self.sensitivity.get("units"), name="sensitivity.units", where=where).items():
            entry = _mapping(entry, name=f"sensitivity.{unit}", where=where)
            table = _mapping(entry.get("sensitivity"), name=f"sensitivity.{unit}", where=where)
            for name, value in [*table.items(), ("trace", entry.get("trace"))]:
                _number(value, name=f"sensitivity.{unit}.{name}", where=where)
        for entry in self.equal_bytes:
            entry = _mapping(entry, name="equal_bytes", where=where)
            for key in ("interpolated_nats", "nats", "delta_nats", "delta_nats_stderr"):
                _number(entry.get(key), name=f"equal_bytes.{key}", where=where)
        for name, entry in _mapping(self.asr.get("lists"), name="asr.lists", where=where).items():
            for key, value in _mapping(entry, name=f"asr.lists.{name}", where=where).items():
                if key in ("utterances", "words", "oracle_wer", "first_pass_wer"):
                    _number(value, name=f"asr.lists.{name}.{key}", where=where)

    def row(self, name: str | None) -> SummaryRow | None:
        """The row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("rows", "extra")}
        values |= {"equal_bytes": list(self.equal_bytes), "notes": list(self.notes)}
        head = {"format": SUMMARY_FORMAT, "format_version": SUMMARY_VERSION, "title": values.pop("title")}
        head |= {name: values.pop(name) for name in ("seed", "versions", "command", "data", "baseline")}
        return head | {"rows": [row.to_json() for row in self.rows]} | values | dict(self.extra)

    @classmethod
    def from_json(cls, data: Any, *, where: str = "summary") -> Summary:
        """Inverse of :meth:`to_json`; optional keys may be absent or null. Raises FormatError naming ``where``."""
        if not isinstance(data, Mapping) or data.get("format", SUMMARY_FORMAT) != SUMMARY_FORMAT:
            raise FormatError(f"{where}: not a mixbits summary; expected an object with format {SUMMARY_FORMAT!r}")
        if data.get("format_version", SUMMARY_VERSION) != SUMMARY_VERSION:
            found = f"{data.get('format_version')!r:.40}"
            raise FormatError(f"{where}: format_version is {found}; this mixbits reads {SUMMARY_VERSION}")
        for name in ("rows", "notes", "equal_bytes"):
            if not isinstance(data.get(name) or [], (list, tuple)) or (name == "rows" and data.get("rows") is None):
                raise FormatError(f"{where}: {name!r} is missing or not a list; expected e.g. 'rows': [{{'name': …}}]")
        for name in ("title", "command", "baseline"):
            if not isinstance(data.get(name) or "", str):
                raise FormatError(f"{where}: {name!r} is {data[name]!r:.60}; expected text")
        known = {item.name for item in fields(cls)} - {"extra"}
        values = {k: v for k, v in data.items() if k in known and v is not None}
        values["title"] = values.get("title", "results")
        values["rows"] = tuple(SummaryRow.from_json(row, where=where) for row in data["rows"])
        values["notes"] = tuple(str(note) for note in data.get("notes") or [])
        values["equal_bytes"] = tuple(data.get("equal_bytes") or [])
        extra = {k: v for k, v in data.items() if k not in known and k not in ("format", "format_version")}
        try:
            return cls(**values, extra=extra)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None


def read_summary(path: str | Path) -> Summary:
    """Read ``summary.json`` (or a run folder that holds one). Raises DataError or FormatError naming the path."""
    path = Path(path)
    if path.is_dir():
        path = path / "summary.json"
    return Summary.from_json(read_json(path), where=str(path))


def write_summary(path: str | Path, summary: Summary | Mapping[str, Any]) -> Path:
    """Write a summary (checked first if it is a mapping), atomically. Raises FormatError for values that cannot be."""
    if not isinstance(summary, Summary):
        summary = Summary.from_json(plain(summary), where=str(path))
    return write_json(path, summary.to_json())

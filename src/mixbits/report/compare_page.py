"""A comparison of recognizers' outputs as one self-contained HTML page, and the same sentences and tables for a terminal.

Computes nothing but rounding and differences of what the record (:mod:`mixbits.pipeline.compare`) holds. Every text of the record is
made printable and escaped; words may be of any script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mixbits import __version__
from mixbits.jsonfile import write_text
from mixbits.report.cells import DASH, number, printable
from mixbits.report.compare_plots import all_plots, level_text, wer_intervals

TEMPLATE = "compare.html.j2"
MAX_GROUPS = 500
MAX_COLUMNS = 400
_JOINERS = "([\u200c\u200d])"  # not printable by Python's rule, yet part of words in Persian and the scripts of India
_KEEP, _FOLD = 3, 9


def render_comparison(record: Mapping[str, Any], out_html: str | Path, *, title: str | None = None) -> Path:
    """Write the page of a comparison record; returns its path."""
    return write_text(out_html, comparison_page(record, title=title))


def comparison_page(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = lambda text: Markup(text)  # our own drawing, written by an XML serializer
    text = resources.files("mixbits.report").joinpath("templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    r = _cleaned(record)
    return environment.from_string(text).render(
        title=default_title(r) if title is None else _clean_text(title),
        r=r,
        sentences=sentences(r),
        systems=system_table(r),
        tests=test_table(r),
        oracle=_oracle_table(r),
        plots=all_plots(r),
        groups=[_group_table(r, field, rows) for field, rows in r["groups"].items()],
        examples=[_pair_examples(entry) for entry in r["examples"] if entry["best"] or entry["worst"]],
        made=_made_rows(r),
        level=level_text(r),
        version=__version__,
    )


def default_title(record: Mapping[str, Any]) -> str:
    """``b against a``, or the number of systems."""
    names = list(record["systems"])
    return f"{names[1]} against {names[0]}" if len(names) == 2 else f"{len(names)} systems compared"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """One sentence a pair: what may be said about it, and what may not."""
    systems, level = record["systems"], level_text(record)
    corrected = " after Holm's correction" if len(record["tests"]) > 1 else ""
    found = []
    for test in record["tests"]:
        a, b = test["a"], test["b"]
        rates = f"{b}: {number(systems[b]['wer'])} % WER against {number(systems[a]['wer'])} % of {a}"
        if test["outcome"] == "same output":
            found.append(f"{rates}: the same output in every utterance.")
            continue
        low, high = (number(bound, sign=True) for bound in test["delta_wer_interval"])
        text = f"{rates}, {number(test['delta_wer'], sign=True)} points ({level} interval {low} to {high}): "
        p = f"{p_words(test['p_holm'])}{corrected}"
        if test["outcome"] in ("better", "worse"):
            text += f"significantly {test['outcome']} ({p})."
        elif test["outcome"] == "same errors":
            text += f"the outputs differ, the errors of no segment do; {_bound(test, level)}."
        else:
            text += f"no significant difference ({p}), which is no proof of equality: {_bound(test, level)}."
        if test["within_margin"] is not None:
            word = "is within" if test["within_margin"] else "is not shown to be within"
            text += f" It {word} the margin of {number(record['settings']['margin'])} points."
        found.append(text)
    return found


def _bound(test: Mapping[str, Any], level: str) -> str:
    upper = number(test["delta_wer_upper"], sign=True)
    if test["delta_wer_upper"] < 0:
        return f"the {level} bound of this pair alone, {upper} points, allows no loss"
    return f"the loss is at most {upper} points ({level} bound)"


def p_words(p: float | None) -> str:
    """A p-value in a sentence; never 0."""
    return "p unknown" if p is None else "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"


def p_cell(p: float | None) -> str:
    """A p-value in a table; never 0."""
    return DASH if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def system_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: one system a row; columns that say nothing are left out."""
    intervals, systems = wer_intervals(record), record["systems"]
    differs = any(entry["sclite_differs"] for entry in systems.values())
    has_gap = any(entry["share_of_gap"] for entry in systems.values())
    has_bytes = any(entry["bytes"] for entry in systems.values())
    headers = ["System", "WER %", f"{level_text(record)} interval", "Sub", "Del", "Ins", "Errors"]
    headers += ["Errors, sclite's alignment"] * differs + ["Wrong utterances"]
    headers += ["Oracle gap recovered"] * has_gap + ["Model bytes"] * has_bytes
    rows = []
    for name, entry in systems.items():
        interval = intervals.get(name)
        row = [
            name,
            number(entry["wer"]),
            DASH if interval is None else f"{number(interval[0])} to {number(interval[1])}",
        ]
        row += [f"{entry['errors'][key]:,}" for key in ("sub", "del", "ins")]
        row.append(f"{_total(entry['errors']):,}")
        row += [f"{_total(entry['sclite_errors']):,}"] * differs
        row.append(f"{entry['wrong_utterances']:,} of {record['utterances']:,}")
        row += [DASH if entry["share_of_gap"] is None else f"{number(100 * entry['share_of_gap'], 1)} %"] * has_gap
        row += [f"{entry['bytes']:,}" if entry["bytes"] else DASH] * has_bytes
        rows.append(row)
    return headers, rows


def test_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: one pair a row."""
    level = level_text(record)
    headers = ["System", "Against", "Outcome", "ΔWER", f"{level} interval", f"At most, {level}", "p", "p, Holm", "Z", "Segments",
               "Changed: better, worse, same"]  # fmt: skip
    rows = []
    for test in record["tests"]:
        low, high = test["delta_wer_interval"]
        changed = test["changed"]
        outcome = test["outcome"] + (" (sign test)" if test["test"] == "sign test" and test["p"] is not None else "")
        rows.append([
            test["b"], test["a"], outcome, number(test["delta_wer"], sign=True), f"{number(low, sign=True)} to {number(high, sign=True)}",
            number(test["delta_wer_upper"], sign=True), p_cell(test["p"]), p_cell(test["p_holm"]),
            number(test["z"], 3, sign=True), f"{test['segments']:,}",
            f"{changed['changed']:,}: {changed['better']:,}, {changed['worse']:,}, {changed['same_errors']:,}",
        ])  # fmt: skip
    return headers, rows


def _total(errors: Mapping[str, int]) -> int:
    return errors["sub"] + errors["del"] + errors["ins"]


def _clean_text(text: str) -> str:
    return "".join(part if re.fullmatch(_JOINERS, part) else printable(part) for part in re.split(_JOINERS, text))


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Mapping):
        return {_clean_text(str(key)): _cleaned(item) for key, item in value.items()}
    return [_cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value


def _oracle_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One N a row, oracle and anti-oracle of every system that has lists."""
    curves = record["oracle"]
    sizes = sorted({point["hypotheses"] for points in curves.values() for point in points})
    rows = []
    for size in sizes:
        row = [f"{size:,}"]
        for points in curves.values():
            found = next((p for p in points if p["hypotheses"] == size), None)
            row += [DASH] * 2 if found is None else [number(found["oracle_wer"]), number(found["anti_oracle_wer"])]
        rows.append(row)
    return ["N", *(f"{name}{what}" for name in curves for what in (", oracle", ", anti-oracle"))], rows


def _group_table(record: Mapping[str, Any], field: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells are (text, difference to the first system, "better" | "worse" | "")."""
    names = list(record["systems"])
    rows = []
    for group in groups[:MAX_GROUPS]:
        base = group["systems"][names[0]]
        cells = []
        for name in names:
            wer = group["systems"][name]["wer"]
            delta = None if wer is None or name == names[0] else wer - base["wer"]
            kind = "" if not delta else "better" if delta < 0 else "worse"
            cells.append((number(wer), "" if delta is None else number(delta, sign=bool(delta)), kind))
        rows.append((group["name"], f"{group['utterances']:,}", f"{base['words']:,}", cells))
    return {
        "field": field,
        "names": names,
        "rows": rows,
        "left_out": max(0, len(groups) - MAX_GROUPS),
        "count": len(groups),
    }


def _pair_examples(entry: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (("best", "Most improved"), ("worst", "Most worsened"))
    found = {key: [_example(e) for e in entry[key]] for key, _ in kinds}
    return {"a": entry["a"], "b": entry["b"], "parts": [(title, found[key]) for key, title in kinds if found[key]]}


def _example(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as (reference, (word, kind), (word, kind)); a long run that both have right as one number."""
    columns: list[Any] = []
    run: list[Any] = []
    for reference, *words in entry["columns"]:
        column = (reference, [(word, _kind(reference, word)) for word in words])
        if all(kind == "right" for _, kind in column[1]):
            run.append(column)
            continue
        columns += [*_folded(run), column]
        run = []
    columns += _folded(run)
    left = max(0, len(columns) - MAX_COLUMNS)
    return {**entry, "columns": columns[:MAX_COLUMNS], "left_out": left}


def _folded(run: list[Any]) -> list[Any]:
    return run if len(run) < _FOLD else [*run[:_KEEP], len(run) - 2 * _KEEP, *run[-_KEEP:]]


def _kind(reference: str | None, word: str | None) -> str:
    if word == reference:
        return "right" if word is not None else "none"
    return "ins" if reference is None else "del" if word is None else "sub"


def _made_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Files, hashes, settings and versions as (name, value)."""
    rows = []
    for name, entry in record["systems"].items():
        rows += [(name, value) for value in (entry["source"], entry["data_hash"]) if value]
    rows += [(name, str(value)) for name, value in record["settings"].items() if value is not None]
    drawn = record["tests"][0] if record["tests"] else None
    if drawn:
        unit = "blocks (speakers or conversations)" if drawn["bootstrap_blocked"] else "utterances"
        rows.append(("bootstrap", f"{drawn['bootstrap_draws']:,} draws of {drawn['bootstrap_blocks']:,} {unit}"))
    return rows + [(name, str(value)) for name, value in record["versions"].items() if value is not None]

"""Summaries: round trip, unknown keys kept, null allowed everywhere, and impossible values refused."""

import json

import pytest

from mixbits.errors import DataError, FormatError
from mixbits.runs import Summary, SummaryRow, read_summary, write_summary


def minimal(**changes):
    return {"format": "mixbits-summary", "format_version": 1, "rows": [{"name": "full"}]} | changes


def test_round_trip_through_a_file_keeps_unknown_keys(tmp_path):
    data = minimal(
        title="t",
        seed=3,
        rows=[{"name": "full", "bytes": 10, "ppl": 2.5, "colour": "red"}],
        future={"x": 1},
        notes=["a"],
        unit_weights={"b": 2, "a": 1},
    )
    path = write_summary(tmp_path / "summary.json", data)
    summary = read_summary(path)
    assert summary == read_summary(tmp_path)
    assert summary.rows[0].extra == {"colour": "red"}
    written = json.loads(path.read_text())
    assert written["future"] == {"x": 1}
    assert written["rows"][0]["colour"] == "red"
    assert list(written["unit_weights"]) == ["b", "a"]
    assert Summary.from_json(summary.to_json()) == summary


def test_every_row_has_the_eight_columns(tmp_path):
    row = SummaryRow("full").to_json()
    assert list(row) == ["name", "bytes", "ratio", "bits_per_weight", "ppl", "ppl_stderr", "wer", "p_value_vs_full"]


def test_null_is_allowed_wherever_a_value_is_optional():
    data = minimal() | dict.fromkeys(
        ["title", "seed", "versions", "command", "data", "baseline", "equal_bytes", "allocations", "asr", "notes"]
    )
    data["rows"] = [dict.fromkeys(SummaryRow("x").to_json()) | {"name": "full", "errors": None, "method": None}]
    summary = Summary.from_json(data)
    assert summary.rows == (SummaryRow("full"),)
    assert summary.title == "results"


def test_a_diverged_run_is_unknown_not_a_crash(tmp_path):
    path = write_summary(tmp_path / "s.json", Summary("t", (SummaryRow("x", ppl=float("inf"), wer=float("nan")),)))
    assert read_summary(path).rows[0].ppl is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a mixbits summary"),
        ({"format_version": 2}, "format_version is 2"),
        ({"rows": None}, "'rows' is missing"),
        ({"rows": {"a": 1}}, "'rows' is missing or not a list"),
        ({"rows": ["full"]}, "a row is 'full'"),
        ({"rows": [{}]}, "'name' is None"),
        ({"rows": [{"name": " "}]}, "'name' is ' '"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "a appear twice"),
        ({"rows": [{"name": "a", "bytes": -1}]}, "'bytes' is -1"),
        ({"rows": [{"name": "a", "bytes": 1.5}]}, "whole number"),
        ({"rows": [{"name": "a", "bytes": True}]}, "expected a number"),
        ({"rows": [{"name": "a", "ppl": "12"}]}, "'ppl' is '12'"),
        ({"rows": [{"name": "a", "ppl": 10**400}]}, "beyond 2"),
        ({"rows": [{"name": "a", "p_value_vs_full": 1.5}]}, "probability"),
        ({"rows": [{"name": "a", "errors": 3}]}, "'errors' is 3"),
        ({"rows": [{"name": "a", "significance": 3}]}, "expected text or null"),
        ({"allocations": {"learned": "2"}}, "allocations.learned"),
        ({"unit_weights": {"u": "many"}}, "unit_weights.u"),
        ({"unit_weights": {"u": -4}}, "unit_weights.u"),
        ({"sensitivity": {"units": {"u": {"sensitivity": {"2": "x"}}}}}, "sensitivity.u"),
        ({"equal_bytes": [3]}, "equal_bytes"),
        ({"asr": {"lists": {"dev": {"oracle_wer": "low"}}}}, "oracle_wer"),
        ({"title": 5}, "'title' is 5"),
    ],
)
def test_impossible_values_are_format_errors_naming_the_file(tmp_path, change, message):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(minimal(**change)))
    with pytest.raises(FormatError, match=message) as caught:
        read_summary(path)
    assert str(path) in str(caught.value)


def test_missing_and_not_an_object(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(FormatError, match="not a mixbits summary"):
        read_summary(tmp_path)

"""``mixbits report`` from files on disk: table, page, and every bad input one line and exit code 2."""

import json

import pytest

from mixbits.cli.main import main
from mixbits.runs import Summary, SummaryRow, write_summary


@pytest.fixture
def run_folder(tmp_path):
    rows = (
        SummaryRow("full", bytes=1000, ppl=100.0, ppl_stderr=1.0, wer=10.0),
        SummaryRow("uniform-2", bytes=70, ppl=120.0),
    )
    write_summary(tmp_path / "run" / "summary.json", Summary("a [bold]title[/bold]", rows, baseline="full"))
    return tmp_path / "run"


def test_prints_the_table_and_writes_the_page(run_folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(run_folder), "-o", str(page)]) == 0
    output = capsys.readouterr().out
    assert "a [bold]title[/bold]" in output
    assert "uniform-2" in output
    assert "+20.0 %" in output
    assert str(page) in output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_quiet_and_several_summaries(run_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    summary = run_folder / "summary.json"
    assert main(["report", str(summary), str(summary), "-o", str(page), "--quiet"]) == 0
    assert "uniform-2" not in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count("<section") == 2


def test_bad_input_is_one_line_and_no_page(run_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"format": "mixbits-summary", "format_version": 9, "rows": []}))
    for path, message in ((tmp_path / "gone.json", "no such file"), (broken, "format_version is 9")):
        assert main(["report", str(run_folder), str(path), "-o", str(page)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"mixbits: error: {path}: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not page.exists()
    assert main(["report", str(run_folder), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report"]) == 2

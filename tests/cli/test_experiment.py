"""``mixbits experiment``: a recipe file, overrides, summary and report; mistakes that are one line each."""

from pathlib import Path

import pytest

from mixbits.cli.main import main
from mixbits.runs import read_summary

RECIPE = """
title: tiny
text: {train: "${TINY}/text.txt", valid: "${TINY}/valid.txt", test: "${TINY}/valid.txt"}
model: {num_layers: 1, hidden_size: 16, feed_forward_size: 32, num_heads: 2, context: 16}
full: {epochs: 1, context: 16}
quantize: {train: {epochs: 0.5, context: 16, teacher_weight: 0.5}, refine_epochs: 0.2}
measure: {num_probes: 2, num_blocks: 4}
rows:
  - {name: uniform-1, spec: "1"}
  - {name: uniform-4, spec: "4"}
  - {name: learned, ratio: 2}
"""


@pytest.fixture
def recipe(tmp_path, tiny_world, monkeypatch):
    monkeypatch.setenv("TINY", str(tiny_world))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_summary_and_report(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["experiment", str(recipe), "title=renamed", "measure.num_probes=3", "-o", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "uniform-4" in printed
    assert "learned" in printed
    summary = read_summary(out)
    assert summary.title == "renamed"
    assert [r.name for r in summary.rows] == ["full", "full-continued", "uniform-1", "uniform-4", "learned"]
    assert summary.command.endswith("title=renamed measure.num_probes=3")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "uniform-4" in page
    assert main(["experiment", str(recipe), "full.epochs=2", "-o", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "other settings (full, measure)" in error
    assert error.count("\n") == 1


def test_mistakes(recipe, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")

    def fails(*arguments, saying):
        assert main(["experiment", *arguments, "-o", out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mixbits: error: ")
        assert error.count("\n") == 1
        assert saying in error

    fails(str(tmp_path / "none.yaml"), saying="no such recipe")
    fails(str(recipe), "full.epoch=3", saying="full.epoch: Extra inputs are not permitted")
    fails(str(recipe), "nonsense", saying="is not key=value")
    fails(str(recipe), "quantize.method=magic", saying="quantize.method")
    fails(str(recipe), "rows=[{name: learned, ratio: 500}]", saying="cannot be met")
    fails(str(recipe), "text.test=missing.txt", saying="missing.txt: no such text file")
    monkeypatch.delenv("TINY")
    fails(str(recipe), saying="environment variable TINY is not set")


def test_a_dry_run_shows_sizes_and_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("MIXBITS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "ptb-small.yaml"
    assert main(["experiment", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "learned-16x" in out
    assert "16.00" in out
    assert "missing: ${MIXBITS_DATA}/ptb/ptb.train.txt" in out
    assert not any(tmp_path.iterdir())

"""``mixbits compare`` from files on disk: tables, page, JSON, and every bad input one line and exit code 2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.jsonl import write_nbest
from mixbits.asr.rescore import LmFeatures, apply_weights
from mixbits.asr.weights import Weights
from mixbits.cli.main import main

_path = Path(__file__).parents[1] / "pipeline" / "compare_example.py"
_spec = importlib.util.spec_from_file_location("compare_example", _path)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``first.jsonl.gz``, ``rescored.jsonl`` with its ``weights.json``, ``hyp.trn``, ``ref.trn``, and a model directory ``lm``."""
    path = tmp_path_factory.mktemp("lists")
    lists = example.make_lists()
    write_nbest(path / "first.jsonl.gz", lists)
    scores = np.array([h.lm_score for entry in lists for h in entry.hypotheses])
    ones = np.ones(len(scores), dtype=np.int64)
    weights = Weights(neural_lm_scale=1.5)
    write_nbest(
        path / "rescored.jsonl", apply_weights(lists, LmFeatures(scores, 0 * ones, ones, 1, 0.0), weights).lists
    )
    weights.save(path / "weights.json")
    (path / "hyp.trn").write_text("".join(f"{e.hypotheses[-1].text} ({e.utterance})\n" for e in lists))
    (path / "ref.trn").write_text("".join(f"{e.reference} ({e.utterance})\n" for e in lists))
    (path / "lm").mkdir()
    (path / "lm" / "model.safetensors").write_bytes(b"x" * 12_345)
    return path


def run(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_tables_page_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, results = tmp_path / "new" / "page.html", tmp_path / "c.json"
    code = run(
        f"first pass={folder / 'first.jsonl.gz'}", folder / "rescored.jsonl", folder / "hyp.trn", "--by", "speaker", "--by", "noise",
        "--weights", f"rescored={folder / 'weights.json'}", "--model", f"rescored={folder / 'lm'}", "--margin", "0.5", "--all-pairs",
        "--examples", "3", "-o", page, "--json", results,
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    record = json.loads(results.read_text())
    assert list(record["systems"]) == ["first pass", "rescored", "hyp"]
    assert len(record["tests"]) == 3
    assert list(record["groups"]) == ["speaker", "noise"]
    assert record["systems"]["rescored"]["bytes"] == 12_345
    chosen = {curve["system"]: curve["chosen"] for curve in record["weights"]}
    assert chosen == {"first pass": None, "rescored": 1.5}
    for entry in record["systems"].values():
        assert f"{entry['wer']:.2f}" in captured.out
    assert "significantly better" in captured.out
    assert "\N{REPLACEMENT CHARACTER}" not in captured.out
    assert f"wrote {page}" in captured.out
    text = page.read_text(encoding="utf-8")
    assert "<h1>3 systems compared</h1>" in text
    assert "12,345" in text


def test_transcripts_with_references_of_their_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "hyp.trn", f"again={folder / 'hyp.trn'}", "--references", folder / "ref.trn") == 0
    output = capsys.readouterr().out
    assert "the same output in every utterance" in output
    assert "120 utterances" in output


def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, rescored, target = folder / "first.jsonl.gz", folder / "rescored.jsonl", tmp_path / "page.html"
    (tmp_path / "cut.jsonl").write_text(rescored.read_text()[:5000])
    lines = rescored.read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[:50]))
    (tmp_path / "empty").mkdir()
    cases = [
        ((first,), "at least two outputs"),
        ((first, tmp_path / "gone.jsonl"), "no such file"),
        ((first, tmp_path / "cut.jsonl"), f"{tmp_path / 'cut.jsonl'}:"),
        ((first, tmp_path / "short.jsonl"), "has no output for 70 utterances"),
        ((first, first), "two systems are named 'first'"),
        ((folder / "hyp.trn", f"x={folder / 'hyp.trn'}"), "--references FILE"),
        ((first, rescored, "--by", "accent"), "field 'accent'"),
        ((first, rescored, "--weights", "nobody=x"), "NAME one of first, rescored"),
        ((first, rescored, "--weights", "rescored"), "expected NAME=PATH"),
        ((first, rescored, "--weights", f"rescored={folder / 'ref.trn'}"), "not a weights file"),
        ((first, rescored, "--model", f"rescored={tmp_path / 'empty'}"), "holds no weight files"),
        ((first, rescored, "--alpha", "2"), "alpha is 2"),
        ((first, rescored, "--margin", "-1"), "margin is -1"),
        ((first, rescored, "--references", tmp_path / "gone"), "gone"),
    ]
    for arguments, message in cases:
        assert run(*arguments, "-o", target) == 2
        captured = capsys.readouterr()
        assert captured.out == "", message
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert not target.exists()
    for option, path, message in (
        ("-o", tmp_path, "is a folder"),
        ("--json", rescored, "is the same file as"),
        ("-o", first / "x", "is a file"),
    ):
        assert run(first, rescored, option, path) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_common_utterances_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "rescored.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[:50]))
    assert run(folder / "first.jsonl.gz", tmp_path / "short.jsonl", "--common") == 0
    output = capsys.readouterr().out
    assert "50 utterances" in output
    assert "Note: Compared are the 50 utterances that all systems have" in output


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--references", "--by", "--weights", "--model", "--margin", "--common"):
        assert option in text

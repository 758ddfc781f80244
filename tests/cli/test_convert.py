"""``mixbits convert`` from files on disk: every format and back, what would be lost, one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from mixbits.asr.formats.registry import InputFormat, OutputFormat, read_any, write_any
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.cli import convert
from mixbits.cli.main import main

LISTS = [
    NBest(f"s{s}-u{u}", (Hypothesis("null", -1.5, -2.0), Hypothesis("", -2.5, -1.0)), f"ref {u}", f"s{s}", "c")
    for s in range(2)
    for u in range(3)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_any(tmp_path / "lists.jsonl.gz", LISTS)
    return tmp_path / "lists.jsonl.gz"


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_option_values_are_the_formats() -> None:
    assert get_args(convert.InputName) == get_args(InputFormat)
    assert get_args(convert.OutputName) == get_args(OutputFormat)


def test_the_page_of_formats_names_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats" / "nbest.md").read_text(encoding="utf-8")
    for name in get_args(OutputFormat):
        assert f"| `{name}` |" in page, name


@pytest.mark.parametrize("format", ["kaldi", "espnet1", "mlm-scoring", "jsonl"])
def test_there_and_back(source: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "there", tmp_path / "back.jsonl.gz"
    assert run(source, there, "--output-format", format) == 0
    assert capsys.readouterr().out == f"wrote {there}: 6 utterances, 12 hypotheses ({format})\n"
    assert run(there, back) == 0
    assert back.read_bytes() == source.read_bytes()


def test_what_would_be_lost_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "beams.tsv"
    assert run(source, target) == 2
    assert "nemo cannot hold lm_score (12 times, first in 's0-u0')" in capsys.readouterr().err
    assert not target.exists()
    assert run(source, target, "--drop", "lm_score,speaker", "--top", 1) == 0
    assert target.read_text() == "null\t-1.5\n" * 6
    assert (
        run(target, tmp_path / "e", "--output-format", "espnet2", "--manifest", tmp_path / "beams.manifest.json") == 0
    )
    assert [entry.speaker for entry in read_any(tmp_path / "e")] == [None] * 6


def test_transcripts_and_references(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "hyp.trn") == 0
    assert (tmp_path / "hyp.trn").read_text().splitlines()[:2] == ["null (s0-u0)", "null (s0-u1)"]
    assert run(source, tmp_path / "ref.trn", "--transcript", "reference") == 0
    assert "6 utterances, reference transcripts (trn)" in capsys.readouterr().out
    bare = tmp_path / "bare.json"
    assert run(source, bare, "--output-format", "mlm-scoring", "--drop", "reference") == 0
    assert "ref" not in json.loads(bare.read_text())["s0-u0"]
    assert run(bare, tmp_path / "full.jsonl.gz", "--references", tmp_path / "ref.trn") == 0
    assert list(read_any(tmp_path / "full.jsonl.gz")) == LISTS
    (tmp_path / "alt.trn").write_text("{ a / b } (s0-u0)\n")
    assert run(bare, tmp_path / "x.jsonl", "--references", tmp_path / "alt.trn") == 2
    assert "--alternations first" in capsys.readouterr().err
    assert run(bare, tmp_path / "x.jsonl", "--references", tmp_path / "alt.trn", "--alternations", "first") == 0
    assert [entry.reference for entry in read_any(tmp_path / "x.jsonl")] == ["a", *[None] * 5]


def test_gzipped_kaldi_folder(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "k", "--output-format", "kaldi", "--gzip") == 0
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "acwt.gz", "lmwt.withlm.gz", "references", "utt2reco", "utt2spk", "words_text.gz",
    ]  # fmt: skip
    assert list(read_any(tmp_path / "k")) == LISTS


def test_mistakes_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    cases = [
        (
            (source, target),
            "the name does not tell the format (.jsonl, .tsv and .trn do); give --output-format: jsonl, kaldi",
        ),
        ((source, source), "IN and OUT are the same"),
        ((tmp_path / "gone", target, "--output-format", "jsonl"), "no such file"),
        ((source, target, "--output-format", "jsonl", "--gzip"), "only the archives of Kaldi folders are gzipped"),
        ((source, target, "--output-format", "jsonl", "--symbols", source), "--symbols belongs to the format kaldi"),
        (
            (source, target, "--output-format", "jsonl", "--format", "nemo"),
            "no such file; the manifest says which utterances",
        ),
        ((source, target, "--output-format", "jsonl", "--format", "kaldi"), "cannot be read as a folder"),
        ((source, target, "--output-format", "jsonl", "--format", "espnet1"), 'expected the key "utts"'),
        ((source, target, "--output-format", "jsonl", "--drop", "speeker"), "cannot drop 'speeker'"),
        ((source, tmp_path, "--output-format", "kaldi"), "is there already"),
        ((source, tmp_path, "--output-format", "jsonl"), "a directory"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message.lower() in captured.err.lower()
        assert not target.exists()

"""``mixbits rescore`` on lists of every format: the same numbers as on JSONL, and results in every format."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mixbits.asr.formats.registry import HOLDS, drop_fields, lost_fields, read_any, write_any
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.cli.main import main

_path = Path(__file__).parents[1] / "pipeline" / "speech_example.py"
_spec = importlib.util.spec_from_file_location("speech_example", _path)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)
SUFFIX = {"nemo": ".tsv", "jsonl": ".jsonl"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    for name in ("dev.jsonl", "test.jsonl.gz"):
        lists = read_any(folder / name)
        for format in HOLDS:
            write_any(folder / f"{name[:3]}-{format}{SUFFIX.get(format, '')}", lists[:60], format=format)  # type: ignore[arg-type]
    return folder


def run(*arguments: object) -> int:
    return main(["rescore", *map(str, arguments)])


def result(world: Path, folder: Path, format: str, *more: object) -> Any:
    suffix = SUFFIX.get(format, "")
    lists, dev = world / f"tes-{format}{suffix}", world / f"dev-{format}{suffix}"
    assert run(lists, "-m", world / "trained", "--dev", dev, "--json", folder / "r.json", *more) == 0
    return json.loads((folder / "r.json").read_text())


def test_the_same_numbers_from_every_format(world: Path, tmp_path: Path) -> None:
    expected = result(world, tmp_path, "jsonl", "-o", tmp_path / "out.jsonl")
    rescored = list(read_any(tmp_path / "out.jsonl"))
    for format in HOLDS:
        if format == "jsonl":
            continue
        target = tmp_path / f"{format}.out"
        found = result(world, tmp_path, format, "-o", target, "--output-format", format)
        assert found["rows"] == expected["rows"], format
        assert found["weights"] == expected["weights"], format
        written = list(read_any(target, format=format))  # type: ignore[arg-type]
        lost = set(lost_fields(rescored, format))  # type: ignore[arg-type]
        kept = drop_fields(rescored, lost)
        if format in ("nemo", "espnet2"):
            assert lost == {"total_score", "neural_lm_score"}
            for entry, before in zip(written, rescored, strict=True):
                totals = [hypothesis.extra["total_score"] for hypothesis in before.hypotheses]
                assert [hypothesis.acoustic_score for hypothesis in entry.hypotheses] == totals
                assert [hypothesis.text for hypothesis in entry.hypotheses] == [h.text for h in before.hypotheses]
        else:
            assert lost == ({"total_score"} if format == "kaldi" else set())
            assert written == kept, format


def test_transcripts_and_what_has_no_place(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand = ("-m", world / "trained", "--lm-scale", 1)
    assert run(world / "tes-kaldi", *hand, "-o", tmp_path / "out.trn") == 0
    assert run(world / "tes-kaldi", *hand, "-o", tmp_path / "out.jsonl") == 0
    lines = [f"{entry.one_best.text} ({entry.utterance})" for entry in read_any(tmp_path / "out.jsonl")]
    assert (tmp_path / "out.trn").read_text().splitlines() == lines
    capsys.readouterr()
    assert run(world / "tes-kaldi", *hand, "-o", tmp_path / "out.tsv") == 0
    assert f"Note: {tmp_path / 'out.tsv'} has no place for neural_lm_score, total_score." in capsys.readouterr().out


def test_what_the_output_cannot_hold_is_said_before_scoring(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_any(tmp_path / "ragged.jsonl", [NBest(f"u{n}", (Hypothesis("dogs", -1.0),) * n) for n in (1, 2)])
    (tmp_path / "m.manifest.json").write_text('{"audio_filepath": "u.wav"}\n')
    hand = ("-m", tmp_path / "no-model", "--lm-scale", 1)
    for options, message in (
        (("-o", tmp_path / "o.tsv"), "holds lists of one length: keep the first 1 of each"),
        (("-o", tmp_path / "m.tsv"), "is not ours to write over"),
        (("-o", tmp_path / "o.x"), "the name does not tell the format"),
    ):
        assert run(tmp_path / "ragged.jsonl", *hand, *options) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1

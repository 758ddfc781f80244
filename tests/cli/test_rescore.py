"""``mixbits rescore`` from files on disk: table, written files, and every bad input one line and exit code 2."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixbits.asr.formats.jsonl import read_nbest, write_nbest
from mixbits.asr.weights import load_weights
from mixbits.asr.wer import one_best_errors
from mixbits.cli.main import main

_path = Path(__file__).parents[1] / "pipeline" / "speech_example.py"
_spec = importlib.util.spec_from_file_location("speech_example", _path)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    return folder


def run(*arguments: object) -> int:
    return main(["rescore", *map(str, arguments)])


def test_tuned_on_dev_with_a_reference_model(world, tmp_path, capsys):
    rescored, weights, results = tmp_path / "new" / "out.jsonl.gz", tmp_path / "w.json", tmp_path / "r.json"
    code = run(
        world / "test.jsonl.gz", "--model", world / "trained", "--dev", world / "dev.jsonl",
        "--reference-model", world / "untrained", "-o", rescored, "--save-weights", weights, "--json", results,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0
    record = json.loads(results.read_text())
    assert record["format"] == "mixbits-rescoring"
    assert set(record["rows"]) == {"first-pass", "first-pass-tuned", "reference", "model"}
    for name, row in record["rows"].items():
        assert f"{row['wer']:.2f}" in output, name
    assert "oracle" in output
    assert "p (reference)" in output
    assert f"Verdict: {record['rows']['model']['significance']}" in output
    assert "200 utterances" in output
    assert rescored.read_bytes()[:2] == b"\x1f\x8b"
    lists = read_nbest(rescored)
    assert one_best_errors(lists).wer == record["rows"]["model"]["wer"]
    assert "total_score" in json.loads(gzip.decompress(rescored.read_bytes()).splitlines()[0])["hypotheses"][0]
    assert load_weights(weights).neural_lm_scale == record["weights"]["model"]["neural_lm_scale"]

    assert run(world / "test.jsonl.gz", "--model", world / "trained", "--weights", weights) == 0
    again = capsys.readouterr().out
    assert f"{record['rows']['model']['wer']:.2f}" in again
    assert "p (reference)" not in again


def test_by_hand_and_without_references(world, tmp_path, capsys):
    rescored, results = tmp_path / "out.jsonl", tmp_path / "r.json"
    options = ("--lm-scale", 0.5, "--word-insertion-penalty", "-1.5", "--max-tokens", 64, "--one-by-one")
    code = run(world / "blind.jsonl", "-m", world / "trained", *options, "-o", rescored, "--json", results)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "10 of 10 utterances have no reference: no word error rates" in captured.out
    assert "language model 0.5, per word -1.5" in captured.out
    record = json.loads(results.read_text())
    assert record["rows"] is None
    assert record["weights"]["model"]["word_insertion_penalty"] == -1.5
    first = read_nbest(rescored)[0].hypotheses[0]
    words = len(first.words)
    expected = first.acoustic_score + 0.5 * first.extra["neural_lm_score"] - 1.5 * words
    assert first.extra["total_score"] == pytest.approx(expected)


def test_references_from_files_beside_the_lists(world, tmp_path, capsys):
    texts = {}
    for name in ("dev.jsonl", "test.jsonl.gz"):
        lists = read_nbest(world / name).lists
        texts[name] = tmp_path / f"{name}.trn"
        texts[name].write_text("".join(f"{entry.reference} ({entry.utterance})\n" for entry in lists))
        write_nbest(tmp_path / name, [replace(entry, reference=None) for entry in lists])
    with_own, with_files = tmp_path / "own.json", tmp_path / "files.json"
    model = ("--model", world / "trained")
    assert run(world / "test.jsonl.gz", *model, "--dev", world / "dev.jsonl", "--json", with_own) == 0
    capsys.readouterr()
    blind = (tmp_path / "test.jsonl.gz", *model, "--dev", tmp_path / "dev.jsonl", "--json", with_files)
    assert run(*blind) == 2
    assert "reference" in capsys.readouterr().err
    assert run(*blind, "--references", texts["test.jsonl.gz"], "--dev-references", texts["dev.jsonl"]) == 0
    own, files = (json.loads(path.read_text()) for path in (with_own, with_files))
    assert files["rows"] == own["rows"]
    assert files["weights"] == own["weights"]
    assert files["dev_references"] == str(texts["dev.jsonl"])
    capsys.readouterr()
    hand = (tmp_path / "test.jsonl.gz", *model, "--lm-scale", 0.5)
    assert run(*hand, "--dev-references", texts["dev.jsonl"]) == 2
    assert "references for a dev list are given, but no dev list" in " ".join(capsys.readouterr().err.split())
    assert run(*hand, "--references", texts["dev.jsonl"]) == 2
    assert "holds no reference for any of the 200 utterances" in " ".join(capsys.readouterr().err.split())


def test_where_weights_come_from(world, tmp_path, capsys):
    base = (world / "test.jsonl.gz", "-m", world / "trained")
    dev = ("--dev", world / "dev.jsonl")
    cases = {
        (): "give --dev DEV_LIST, or --weights FILE",
        (*dev, "--lm-scale", "1"): "--dev and --lm-scale exclude each other",
        (*dev, "--weights", tmp_path / "w.json"): "--dev and --weights exclude each other",
        ("--word-insertion-penalty", "1"): "--word-insertion-penalty needs --lm-scale",
        ("--lm-scale", "nan"): "neural_lm_scale is nan",
        ("--weights", tmp_path / "gone.json"): "cannot be read",
        ("--lm-scale", "1", "--first-pass-lm-scale", "1"): "first-pass lm_score, which these lists do not have",
    }
    for options, message in cases.items():
        assert run(*base, *options) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("mixbits: error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err


def test_bad_input_is_one_line_and_writes_nothing(world, tmp_path, capsys):
    broken, upper = tmp_path / "broken.jsonl", tmp_path / "upper.jsonl"
    good = (world / "blind.jsonl").read_text()
    broken.write_text(good + '{"utterance": "x", "hypotheses": [{"text": "a", "acoustic_score": NaN}]}\n')
    upper.write_text(good.replace("dogs", "DOGS").replace("cats", "CATS").replace("birds", "BIRDS").replace("chase", "CHASE").replace("watch", "WATCH"))  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    hand, target = ("--lm-scale", "1"), tmp_path / "out.jsonl"
    dev = world / "dev.jsonl"
    cases = [
        ((broken, "-m", world / "trained", *hand), f"{broken}:11: "),
        ((upper, "-m", world / "trained", *hand), "outside the model's vocabulary"),
        ((dev, "-m", empty, *hand), "expected a Hugging Face"),
        ((dev, "-m", world / "trained", "--dev", dev), "80 utterances"),
        ((dev, "-m", world / "trained", "--dev", world / "blind.jsonl"), "'blind-0' has no reference"),
        ((tmp_path / "gone", "-m", world / "trained", *hand), "no such file"),
    ]
    for arguments, message in cases:
        assert run(*arguments, "-o", target) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert not target.exists()
    for option, path, message in (("-o", tmp_path, "is a folder"), ("-o", dev, "same file as LIST")):
        assert run(dev, "-m", world / "trained", *hand, option, path) == 2
        assert message in capsys.readouterr().err
    for option in ("-o", "--json", "--save-weights"):
        assert run(dev, "-m", world / "trained", *hand, option, broken / "deep" / "out") == 2
        captured = capsys.readouterr()
        assert f"{broken} is a file; expected a folder" in captured.err
        assert "Scored" not in captured.out
    assert run(dev, "-m", world / "trained", *hand, "-o", target, "--json", target) == 2
    assert "same file as --output" in capsys.readouterr().err
    assert read_nbest(dev)[0].utterance == "dev-0"


def test_lower_case_and_overlap_on_purpose(world, tmp_path, capsys):
    upper = tmp_path / "upper.jsonl"
    lines = [json.loads(line) for line in (world / "dev.jsonl").read_text().splitlines()]
    for line in lines:
        line["reference"] = line["reference"].upper()
        for hypothesis in line["hypotheses"]:
            hypothesis["text"] = hypothesis["text"].upper()
    upper.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = tmp_path / "out.jsonl.xz"
    options = ("--dev", upper, "--lower-case", "--allow-overlap", "-o", target, "--cache", tmp_path / "cache")
    assert run(upper, "-m", world / "trained", *options) == 0
    assert "80 utterances of this list were tuned on: its word error rates are too good" in capsys.readouterr().out
    assert read_nbest(target)[0].one_best.text.isupper()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_history_unknown_words_and_parts_of_the_list_itself(world, tmp_path, capsys):
    lists, results = world / "test.jsonl.gz", tmp_path / "r.json"
    how = (
        "--history",
        "first-pass",
        "--history-tokens",
        6,
        "--unknown-words",
        "spelling",
        "--long-hypotheses",
        "window",
    )
    assert run(lists, "--model", world / "trained", "--cross-validate", 3, *how, "--json", results) == 0
    assert "Cross-validated over 3 parts of whole speakers" in capsys.readouterr().out
    scoring = json.loads(results.read_text())["scoring"]
    assert (scoring["history"], scoring["max_history_tokens"], scoring["unknown_policy"]) == (
        "first-pass",
        6,
        "spelling",
    )
    assert scoring["unknown_words"] > 0

    by_hand = ("--model", world / "trained", "--lm-scale", 0.5)
    assert run(lists, *by_hand, "--merge-order", 1, "--json", results) == 0
    merging = json.loads(results.read_text())["merging"]
    assert f"{merging['changed']} one-bests changed" in capsys.readouterr().out

    for wrong, message in (
        (("--cross-validate", 3, "--dev", world / "dev.jsonl"), "exclude each other"),
        (("--cross-validate", 3, "--history", "rescored"), "cross-validate with 'first-pass'"),
        (("--lm-scale", 1, "--unknown-words", "shared"), "needs the number of words it stands for"),
        (("--lm-scale", 1, "--merge-order", 2, "--history", "reference"), "exclude each other"),
        (("--lm-scale", 1, "--merge-order", 2, "--one-by-one"), "need prefix tries"),
    ):
        assert run(lists, "--model", world / "trained", *wrong) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split()), error
        assert "Traceback" not in error


def test_help_names_the_options(capsys):
    assert main(["rescore", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--dev", "--weights", "--lm-scale", "--lower-case", "--allow-overlap"):
        assert option in text

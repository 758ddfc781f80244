"""``mixbits ngram``, and ``mixbits evaluate --ngram``: from text to figures, and one line for bad input."""

import json
import math
import re

import numpy as np
import pytest

from mixbits.asr.formats.arpa import read_arpa
from mixbits.cli.main import main


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """The tiny language, a model of its words, and a trigram of a part of its text."""
    folder = tmp_path_factory.mktemp("ngram")
    lines = (tiny_world / "text.txt").read_text().splitlines()
    (folder / "text.txt").write_text("\n".join([*lines[:90], "the zebra sees it"]) + "\n")
    (folder / "test.txt").write_text("\n".join([*lines[90:120], "a zebra"]) + "\n")
    backwards = [" ".join(reversed(line.split())) for line in lines[:40]]
    (folder / "valid.txt").write_text("\n".join([*lines[30:60], *backwards]) + "\n")
    ask = ["ngram", str(folder / "text.txt"), "-o", str(folder / "m.arpa.gz"), "--order", "3", "--discount-fallback"]
    assert main([*ask, "--vocabulary", str(tiny_world / "full")]) == 0
    assert main(["ngram", *ask[1:3], str(folder / "open.arpa"), *ask[4:]]) == 0
    return folder


def test_what_is_written_and_said(world, tiny_world, capsys):
    assert (
        main(["ngram", str(world / "text.txt"), "-o", str(world / "x.arpa"), "--prune", "0,0,2", "--discount-fallback"])
        == 0
    )
    out = capsys.readouterr().out
    assert "words in 91 sentences; vocabulary" in out
    assert re.search(r"3-grams: \d+, \d+ kept; discounts \d\.\d+, ", out)
    assert "(fallback: the counts give none)" in out
    assert read_arpa(world / "x.arpa").order == 4
    closed = read_arpa(world / "m.arpa.gz")
    assert "zebra" not in closed
    assert "cow" in closed
    (world / "words.txt").write_text("".join(f"{word} {number}\n" for number, word in enumerate(closed.words)))
    ask = ["--order", "3", "--discount-fallback", "--vocabulary", str(world / "words.txt")]
    assert main(["ngram", str(world / "text.txt"), "-o", str(world / "y.arpa"), *ask]) == 0
    again = read_arpa(world / "y.arpa")
    sentences = [line.split() for line in (world / "test.txt").read_text().splitlines()]
    assert np.allclose(again.score(sentences).log_p, closed.score(sentences).log_p, atol=1e-5)


def evaluate(world, tiny_world, tmp_path, *options):
    ask = ["evaluate", str(tiny_world / "full"), "--text", str(world / "test.txt"), "--json", str(tmp_path / "o.json")]
    assert main([*ask, *options]) == 0
    return json.loads((tmp_path / "o.json").read_text())


def test_interpolated_perplexity(world, tiny_world, tmp_path, capsys):
    arpa = str(world / "m.arpa.gz")
    found = evaluate(world, tiny_world, tmp_path, "--ngram", arpa)
    ngram = found["ngram"]
    scores = read_arpa(arpa).score([line.split() for line in (world / "test.txt").read_text().splitlines()])
    assert ngram["alone"]["nats"] == pytest.approx(-scores.log_p.mean(), abs=1e-5)
    assert ngram["alone"]["num_words"] == found["num_words"]
    assert ngram["model"]["nats"] == pytest.approx(found["nats"], abs=1e-5)  # one token a word
    assert (ngram["weight"], ngram["alone"]["num_left_out"]) == (0.5, 0)
    assert ngram["unknown_words"]["num_unknown_to_both"] == ngram["unknown_words"]["num_unknown_to_ngram"] == 1
    assert ngram["unknown_words"]["shared_among"] == 1
    assert ngram["delta_nats"] == pytest.approx(ngram["interpolated"]["nats"] - ngram["model"]["nats"])
    floor = [math.log(2) + min(ngram[name]["nats"] for name in ("model", "alone"))]
    assert ngram["interpolated"]["nats"] <= floor[0]
    whole = evaluate(world, tiny_world, tmp_path, "--ngram", arpa, "--ngram-weight", "1")["ngram"]
    assert whole["interpolated"]["nats"] == pytest.approx(whole["model"]["nats"])
    out = capsys.readouterr().out
    assert "3-gram" in out
    assert "weight 0.5000 for the model (given)" in out


def test_the_tuned_weight_is_the_best_one(world, tiny_world, tmp_path, capsys):
    arpa, text = str(world / "m.arpa.gz"), str(world / "valid.txt")
    tuned = evaluate(world, tiny_world, tmp_path, "--ngram", arpa, "--ngram-weight", f"tune:{text}")["ngram"]
    assert tuned["tuned_on_sha256"] is not None
    ask = ["evaluate", str(tiny_world / "full"), "--text", text, "--ngram", arpa, "--json", str(tmp_path / "v.json")]
    nats = {}
    for weight in (tuned["weight"], tuned["weight"] * 0.8, min(1.0, tuned["weight"] * 1.25)):
        assert main([*ask, "--ngram-weight", str(weight)]) == 0
        nats[weight] = json.loads((tmp_path / "v.json").read_text())["ngram"]["interpolated"]["nats"]
    assert min(nats, key=nats.__getitem__) == tuned["weight"]
    assert "(tuned)" in capsys.readouterr().out


def test_a_reference_is_interpolated_as_well(world, tiny_world, tmp_path, capsys):
    reference = str(tiny_world / "full")
    found = evaluate(world, tiny_world, tmp_path, "--ngram", str(world / "m.arpa.gz"), "--reference", reference)
    assert found["ngram"]["delta_nats_to_reference"] == 0
    assert found["reference"]["ngram"]["interpolated"] == found["ngram"]["interpolated"]
    assert "nats per word" in capsys.readouterr().out


def test_words_that_one_side_knows(world, tiny_world, tmp_path):
    """An n-gram model that knows zebra, which the tokenizer does not; and one that knows less than the tokenizer."""
    more = evaluate(world, tiny_world, tmp_path, "--ngram", str(world / "open.arpa"))["ngram"]["unknown_words"]
    assert (more["num_unknown_to_ngram"], more["num_unknown_to_both"]) == (1, 1)
    (world / "few.txt").write_text("the\na\n")
    ask = ["--order", "2", "--discount-fallback", "--vocabulary", str(world / "few.txt")]
    assert main(["ngram", str(world / "text.txt"), "-o", str(world / "few.arpa"), *ask]) == 0
    few = evaluate(world, tiny_world, tmp_path, "--ngram", str(world / "few.arpa"))["ngram"]
    tokens = sorted(set(" ".join((tiny_world / "text.txt").read_text().splitlines()).split()))
    assert few["unknown_words"]["shared_among"] == len(tokens) - 2 + 1
    assert few["alone"]["num_left_out"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ngram-weight", "0.5"], "needs --ngram"),
        (["--ngram", "m.arpa.gz", "--ngram-weight", "0"], "expected above 0"),
        (["--ngram", "m.arpa.gz", "--ngram-weight", "nan"], "expected above 0"),
        (["--ngram", "m.arpa.gz", "--ngram-weight", "half"], "tune:FILE"),
        (["--ngram", "m.arpa.gz", "--ngram-weight", "tune:"], "tune:FILE"),
        (["--ngram", "m.arpa.gz", "--ngram-weight", "tune:test.txt"], "tune the n-gram's weight on another"),
        (["--ngram", "none.arpa"], "no such file"),
        (["--ngram", "test.txt"], "no line \\data\\"),
    ],
)
def test_bad_evaluations(world, tiny_world, options, message, capsys, monkeypatch):
    monkeypatch.chdir(world)
    assert main(["evaluate", str(tiny_world / "full"), "--text", "test.txt", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mixbits: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.txt"], "no such text file"),
        (["text.txt", "--order", "0"], "order is 0"),
        (["text.txt", "--prune", "0,x"], "expected whole numbers"),
        (["text.txt", "--prune", "1"], "the first (for single words) 0"),
        (["text.txt"], "--discount-fallback"),
        (["text.txt", "--vocabulary", "none"], "no such text file"),
        (["text.txt", "--vocabulary", "text.txt"], "expected one word a line"),
    ],
)
def test_bad_estimates(world, options, message, capsys, monkeypatch):
    monkeypatch.chdir(world)
    assert main(["ngram", *options, "-o", "new.arpa"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mixbits: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (world / "new.arpa").exists()
    assert main(["ngram", "text.txt", "-o", str(world)]) == 2
    assert "is a folder" in capsys.readouterr().err

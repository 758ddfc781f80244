"""Rescoring with an n-gram model beside the neural one: mixed word by word, or with a weight of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.features import FEATURES
from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.kenlm_model import load_ngram
from mixbits.asr.ngram_features import ngram_features
from mixbits.asr.rescore import apply_weights, features_of
from mixbits.asr.weights import Weights, load_weights
from mixbits.cli.main import main
from mixbits.errors import DataError, SpecError
from mixbits.pipeline.lm_scores import SpeechModel, neural_features
from mixbits.pipeline.ngram import estimate_ngram
from mixbits.pipeline.rescore import rescore_list
from mixbits.pipeline.scoring import ScoreSettings

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    text = "\n".join(example.sentences(np.random.default_rng(5), 300))
    (folder / "text.txt").write_text(text + "\n")
    estimate_ngram(folder / "text.txt", folder / "3.arpa", order=3, discount_fallback=True)
    return folder


@pytest.fixture(scope="module")
def ngram(world):
    return load_ngram(world / "3.arpa", engine="numpy")


def test_word_by_word(world, ngram) -> None:
    lists = read_nbest(world / "test.jsonl.gz").lists[:20]
    model = SpeechModel(world / "trained")
    neural, own = neural_features(model, lists), ngram_features(lists, ngram)
    for share, expected in ((0.0, neural.neural_lm_score), (1.0, own.ngram_score)):
        found = ScoreSettings(ngram=ngram, ngram_weight=share).score(model, lists)
        assert found.neural_lm_score == pytest.approx(expected, abs=1e-4)
        assert found.ngram_score is None
        for count in ("num_tokens", "num_unknown"):
            assert getattr(found, count).tolist() == getattr(neural, count).tolist()
        assert found.num_nodes == neural.num_nodes
    mixed = ScoreSettings(ngram=ngram).score(model, lists).neural_lm_score
    assert np.all(mixed >= np.minimum(neural.neural_lm_score, own.ngram_score) - 1e-6)


def test_with_a_weight_of_its_own(world, ngram) -> None:
    lists = read_nbest(world / "test.jsonl.gz").lists[:20]
    model = SpeechModel(world / "trained")
    lm = ScoreSettings(ngram=ngram, ngram_mode="log-linear").score(model, lists)
    own = ngram_features(lists, ngram).ngram_score
    assert lm.neural_lm_score.tolist() == neural_features(model, lists).neural_lm_score.tolist()
    assert lm.ngram_score is not None
    assert lm.ngram_score.tolist() == own.tolist()
    weights = Weights(neural_lm_scale=0.5, ngram_scale=0.25)
    table = features_of(lists, lm)
    assert table.values[:, FEATURES.index("ngram_score")].tolist() == own.tolist()
    done = apply_weights(lists, lm, weights)
    best = done.lists[0].one_best
    expected = best.acoustic_score + 0.5 * best.extra["neural_lm_score"] + 0.25 * best.extra["ngram_score"]
    assert best.extra["total_score"] == pytest.approx(expected)
    with pytest.raises(DataError, match="give the n-gram model"):
        apply_weights(lists, neural_features(model, lists), weights)


def test_tuned_together(world, ngram) -> None:
    settings = ScoreSettings(ngram=ngram, ngram_mode="log-linear", history="first-pass")
    found = rescore_list(world / "test.jsonl.gz", world / "untrained", dev=world / "dev.jsonl", settings=settings)
    assert found.entries is not None
    assert found.weights["model"].ngram_scale > 0
    assert found.entries["model"]["wer"] < found.entries["first-pass-tuned"]["wer"]


def test_command(world, tmp_path, capsys) -> None:
    result, saved = tmp_path / "r.json", tmp_path / "w.json"
    command = [
        "rescore",
        str(world / "test.jsonl.gz"),
        "--model",
        str(world / "trained"),
        "--ngram",
        str(world / "3.arpa"),
    ]
    assert main([*command, "--dev", str(world / "dev.jsonl"), "--json", str(result)]) == 0
    scoring = json.loads(result.read_text())["scoring"]
    assert (scoring["ngram_mode"], scoring["ngram_weight"]) == ("interpolate", 0.5)
    by_hand = ["--ngram-mode", "log-linear", "--lm-scale", "0.4", "--ngram-scale", "0.3", "--save-weights", str(saved)]
    assert main([*command, *by_hand]) == 0
    assert "n-gram 0.3" in capsys.readouterr().out
    assert load_weights(saved).ngram_scale == 0.3
    record = json.loads(saved.read_text())
    del record["ngram_scale"]  # a file of an earlier version
    saved.write_text(json.dumps(record))
    assert load_weights(saved).ngram_scale == 0
    for more in (
        ["--history", "first-pass"],
        ["--merge-order", "2"],
        ["--unknown-words", "spelling"],
        ["--one-by-one"],
    ):
        assert main([*command, "--lm-scale", "1", *more]) == 2
        assert "use the log-linear mode for these" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "bad.arpa").write_text("no model")
    assert main([*command[:-1], str(tmp_path / "bad.arpa"), "--lm-scale", "1"]) == 2
    error = capsys.readouterr().err
    assert "bad.arpa" in error
    assert "Traceback" not in error


def test_refusals(ngram) -> None:
    with pytest.raises(SpecError, match="n-gram model's share is 1\\.5"):
        ScoreSettings(ngram=ngram, ngram_weight=1.5)

"""Speech: synthesis is deterministic, scores are natural logs split exactly, lists are sorted, and end to end."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from demo.arpa import ArpaModel
from demo.prepare import Settings, main, prepare
from demo.recognition import (
    NBEST_LM_SCALE,
    FirstPass,
    Recognizer,
    ScoredText,
    build_first_pass,
    natural_log_score,
    nbest_list,
    read_dictionary,
)
from demo.speech import SPEAKERS, nbest_lines, nbest_record, synthesize, utterances
from kaldialign import edit_distance

from mixbits.errors import DataError

WHY = "not installed: pip install 'mixbits[demo]'"
SENTENCES = [
    "return the value of the name",
    "return the list of all the names",
    "the value is not a list of names",
    "the name of the file is the value",
    "remove all the names of the list",
    "the file is not the name of a value",
]


@pytest.fixture(scope="module")
def first_pass(tmp_path_factory) -> FirstPass:
    pytest.importorskip("pocketsphinx", reason=f"pocketsphinx is {WHY}")
    return build_first_pass([*SENTENCES, "the xyzzyfoo is here"], read_dictionary(), tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    pytest.importorskip("espeakng_loader", reason=f"espeakng-loader is {WHY}")
    return synthesize(utterances("dev", SENTENCES[1:3]), seed=5)


def test_score_is_a_power_of_the_log_base() -> None:
    for integer in (0, -1, -2500, -40000):
        expected = integer * 1024 * math.log(1.0001)
        assert natural_log_score(math.pow(1.0001, integer)) == pytest.approx(expected, abs=1e-6)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive"):
            natural_log_score(bad)


def test_lists_are_sorted_unique_short_and_add_up() -> None:
    words = ("<s>", "</s>", *(f"w{number}" for number in range(30)))
    model = ArpaModel(1, {(word,): -1.0 - 0.01 * i for i, word in enumerate(words)}, {})
    paths = [(f"w{number}", -100.0 - (number * 7) % 30) for number in range(30)]
    paths += [("w0", -300.0), ("w29", -50.0), ("w29", -60.0)]
    found = nbest_list(paths, model)
    assert len(found) == 20
    assert len({item.text for item in found}) == 20
    assert found[0].text == "w29"
    totals = [item.total_score for item in found]
    assert totals == sorted(totals, reverse=True)
    for item in found:
        combined = max(total for text, total in paths if text == item.text)
        assert item.acoustic_score + NBEST_LM_SCALE * (item.lm_score - 1.0) == pytest.approx(combined, abs=1e-9)
        assert item.lm_score == pytest.approx(model.log_probability[(item.text,)] - 1.01, abs=1e-4)
    assert nbest_list([], model) == []


def test_synthesis_is_deterministic(audio) -> None:
    # the library keeps state, so a repetition is exact only in a fresh process; here: format, level and noise
    assert all(samples.dtype == np.int16 and samples.ndim == 1 for samples in audio)
    assert all(1.0 < len(samples) / 16000 < 6.0 for samples in audio)
    assert all(11_000 < np.abs(samples.astype(int)).max() < 13_000 for samples in audio)
    silence = audio[0][:1600].astype(float)
    assert 15 < silence.std() < 25
    spectrum = np.abs(np.fft.rfft(audio[0].astype(float))) ** 2
    above = spectrum[int(len(spectrum) * 7600 / 8000) :].mean()
    assert above < 1e-3 * spectrum.mean()


def test_recognizer_repeats_and_is_right_on_easy_speech(first_pass, audio) -> None:
    recognizer = Recognizer(first_pass)
    lists = [recognizer.recognize(samples) for samples in audio]
    recognizer.restart()
    assert recognizer.recognize(audio[0]) == lists[0]
    pairs = zip(SENTENCES[1:3], lists, strict=True)
    errors = sum(edit_distance(sentence.split(), found[0].text.split())["total"] for sentence, found in pairs)
    assert errors <= 3  # of 15 words
    assert "xyzzyfoo" not in first_pass.dictionary.read_text()
    assert all(math.isfinite(h.acoustic_score) and h.lm_score < 0 for found in lists for h in found)
    silence = recognizer.recognize(np.zeros(8000, np.int16))
    assert len(silence) >= 1


def test_acoustic_score_does_not_depend_on_the_lm_scale(first_pass, audio) -> None:
    """The lattice is the same, so total - scale * lm must be, too: it checks the log base, the shift and the sign."""
    ours, half = Recognizer(first_pass), Recognizer(first_pass, nbest_lm_scale=NBEST_LM_SCALE / 2)
    start = ours.model.word_score("<s>", ())

    def acoustic(recognizer: Recognizer, scale: float) -> dict[str, float]:
        best: dict[str, float] = {}
        for text, total in recognizer.paths(audio[1]):
            best[text] = max(total, best.get(text, -math.inf))
        return {text: total - scale * (ours.model.sentence_score(text) + start) for text, total in best.items()}

    full_scores, half_scores = acoustic(ours, NBEST_LM_SCALE), acoustic(half, NBEST_LM_SCALE / 2)
    common = full_scores.keys() & half_scores.keys()
    assert len(common) >= 3
    for text in common:
        rounding = 0.11 * 2 * (len(text.split()) + 2)  # one step of 0.1 nats a word and decoder
        assert abs(full_scores[text] - half_scores[text]) < rounding
    spread = max(full_scores.values()) - min(full_scores.values())
    assert spread > 20  # the bound above would not notice a wrong factor otherwise


def test_records_follow_the_nbest_format() -> None:
    items = utterances("dev", ["a b", "c d"])
    assert [item.name for item in items] == ["dev-0001", "dev-0002"]
    assert items[0].speaker == SPEAKERS[0]
    line = nbest_lines(items, [[ScoredText("a b", -1.2346, -2.0)], [ScoredText("", 0.0, -1.0)]]).splitlines()[0]
    assert (
        json.loads(line)
        == nbest_record(items[0], [ScoredText("a b", -1.2346, -2.0)])
        == {
            "utterance": "dev-0001",
            "reference": "a b",
            "speaker": "en-us",
            "hypotheses": [{"text": "a b", "acoustic_score": -1.2346, "lm_score": -2.0}],
        }
    )


def test_prepare_end_to_end_skips_and_repeats(tmp_path: Path, capsys) -> None:
    pytest.importorskip("pocketsphinx", reason=f"pocketsphinx is {WHY}")
    pytest.importorskip("espeakng_loader", reason=f"espeakng-loader is {WHY}")
    settings = Settings(num_dev=2, num_test=3, max_documents=200)
    manifest = prepare(tmp_path / "one", settings, num_processes=1)
    assert manifest["complete"]
    files = {name: entry for stage in manifest["stages"].values() for name, entry in stage["files"].items()}
    assert files["speech/dev.jsonl"]["num_lines"] == 2
    assert files["speech/test.jsonl"]["num_lines"] == 3
    train = set((tmp_path / "one/train.txt").read_text().splitlines())
    for line in (tmp_path / "one/speech/test.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["reference"] not in train
        assert 1 <= len(record["hypotheses"]) <= 20
        totals = [h["acoustic_score"] + NBEST_LM_SCALE * h["lm_score"] for h in record["hypotheses"]]
        assert all(first >= second for first, second in pairwise(totals))

    stamp = (tmp_path / "one/speech/dev.jsonl").stat().st_mtime_ns
    assert prepare(tmp_path / "one", settings, num_processes=1) == manifest
    assert (tmp_path / "one/speech/dev.jsonl").stat().st_mtime_ns == stamp
    (tmp_path / "one/speech/dev.jsonl").write_text("cut short")
    again = prepare(tmp_path / "one", settings, num_processes=2)
    assert again["stages"]["speech"]["files"] == manifest["stages"]["speech"]["files"]  # the same bytes, two processes
    assert not list((tmp_path / "one").rglob("*.tmp"))


@pytest.mark.parametrize("package", ["pocketsphinx", "espeakng-loader"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch, capsys) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("demo.prepare.metadata.version", version)
    assert main(["-o", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert package in message
    assert "pip install 'mixbits[demo]'" in message


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 1"):
        prepare(tmp_path, Settings(num_dev=0))

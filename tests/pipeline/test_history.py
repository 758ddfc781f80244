"""Earlier utterances as context, unknown words, cross-validation and merged histories, with a trained toy model."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.rescore import apply_weights
from mixbits.asr.spelling import SpellingModel
from mixbits.asr.tune import tune_on_lists
from mixbits.asr.weights import Weights
from mixbits.errors import DataError, SpecError
from mixbits.lm.forest import score_sequences
from mixbits.pipeline.cross_validation import cross_validate, folds_of
from mixbits.pipeline.history import conversations, earlier_texts
from mixbits.pipeline.lm_scores import SpeechModel, neural_features
from mixbits.pipeline.rescore import rescore_list
from mixbits.pipeline.scoring import ScoreSettings, tune_system

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

NATS = 1e-4
WEIGHTS = Weights(neural_lm_scale=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    return folder


@pytest.fixture(scope="module")
def model(world) -> SpeechModel:
    return SpeechModel(world / "trained")


def spoken(utterance: str, *texts: str, conversation: str | None = "c", **more) -> NBest:
    hypotheses = tuple(Hypothesis(text, -float(rank)) for rank, text in enumerate(texts))
    return NBest(utterance, hypotheses, "dogs chase mice", conversation=conversation, **more)


LISTS = [
    spoken("a1", "dogs chase mice", "cats chase mice"),
    spoken("b1", "birds watch fish", "birds chase", conversation="d"),
    spoken("a2", "cats watch", "cats watch fish and dogs"),
    spoken("a3", "mice", "worms dogs"),
    spoken("b2", "fish", "birds chase mice", conversation="d"),
]


def by_hand(model: SpeechModel, context: list[int], text: str) -> float:
    """log p(text and its end | context), from two plain scores."""
    ids = [*context, *model.tokenizer(text)["input_ids"], 2]
    whole, before = (score_sequences(model.model, [part])[0] for part in (ids, context))
    return float(whole - before)


def test_conversations_keep_the_order_or_follow_the_start() -> None:
    assert conversations(LISTS) == [[0, 2, 3], [1, 4]]
    timed = [replace(entry, extra={"start": start}) for entry, start in zip(LISTS, (3, 9, 1.5, 2, 10), strict=True)]
    assert conversations(timed) == [[2, 3, 0], [1, 4]]
    timed[2] = replace(timed[2], extra={"start": "soon"})
    assert conversations(timed) == [[0, 2, 3], [1, 4]]
    speakers = [
        spoken("x", "a", conversation=None, speaker="c"),
        LISTS[0],
        spoken("y", "a", conversation=None, speaker="c"),
    ]
    assert conversations(speakers) == [[0, 2], [1]]
    with pytest.raises(DataError, match="'x' names neither conversation nor speaker"):
        conversations([spoken("x", "a", conversation=None)])


def test_earlier_texts_end_with_the_latest() -> None:
    texts = ["dogs chase mice", "fish", "cats watch", "mice", "x"]
    found = earlier_texts([[0, 2, 3], [1, 4]], texts, max_words=100)
    assert found == [[], [], ["dogs chase mice"], ["dogs chase mice", "cats watch"], ["fish"]]
    assert earlier_texts([[0, 2, 3]], texts, max_words=3)[3] == ["cats watch"]
    assert earlier_texts([[0, 2, 3]], texts, max_words=4)[3] == ["dogs chase mice", "cats watch"]


@pytest.mark.parametrize("history", ["first-pass", "reference"])
def test_history_is_read_and_not_scored(model, history) -> None:
    lm = ScoreSettings(history=history, max_history_tokens=6).score(model, LISTS)
    texts = [entry.one_best.text if history == "first-pass" else entry.reference for entry in LISTS]
    ids = [[*model.tokenizer(text)["input_ids"], 2] for text in texts]
    before = [[], [], ids[0], [*ids[0], *ids[2]][-6:], ids[1]]
    expected = [
        by_hand(model, [2, *b], h.text) for b, entry in zip(before, LISTS, strict=True) for h in entry.hypotheses
    ]
    assert lm.neural_lm_score == pytest.approx(expected, abs=NATS)
    one_by_one = ScoreSettings(history=history, max_history_tokens=6, scoring="one-by-one").score(model, LISTS)
    assert one_by_one.neural_lm_score == pytest.approx(expected, abs=NATS)


def test_rescored_history_takes_what_was_chosen(model) -> None:
    settings = ScoreSettings(history="rescored", max_history_tokens=7)
    lm = settings.score(model, LISTS, weights=WEIGHTS)
    for group in conversations(LISTS):
        tail: list[int] = []
        for number in group:
            entry, rows = LISTS[number], slice(2 * number, 2 * number + 2)
            expected = [by_hand(model, [2, *tail[-7:]], h.text) for h in entry.hypotheses]
            assert lm.neural_lm_score[rows] == pytest.approx(expected, abs=NATS)
            best = max(range(2), key=lambda rank: entry.hypotheses[rank].acoustic_score + 0.5 * expected[rank])
            tail += [*model.tokenizer(entry.hypotheses[best].text)["input_ids"], 2]
    assert lm.num_tokens.tolist() == [len(h.words) + 1 for entry in LISTS for h in entry.hypotheses]
    with pytest.raises(SpecError, match="needs weights"):
        settings.score(model, LISTS)


def test_rescored_history_is_tuned_with_the_weights_of_the_first_pass(world, model) -> None:
    dev = read_nbest(world / "dev.jsonl")
    settings = ScoreSettings(history="rescored", max_history_tokens=6)
    first = tune_system(model, dev, settings=replace(settings, history="first-pass"))
    lm = settings.score(model, dev, weights=first)
    expected = tune_on_lists(dev, neural_lm_score=lm.neural_lm_score, num_unknown=lm.num_unknown).weights
    assert tune_system(model, dev, settings=settings).as_array().tolist() == expected.as_array().tolist()


def test_history_has_a_cache_of_its_own(world, tmp_path) -> None:
    plain = neural_features(world / "trained", LISTS, cache=tmp_path)
    settings = ScoreSettings(history="first-pass", cache=tmp_path)
    with_history = settings.score(SpeechModel(world / "trained"), LISTS)
    again = settings.score(SpeechModel(world / "trained"), LISTS)
    assert len(list(tmp_path.iterdir())) == 2
    assert again.neural_lm_score.tolist() == with_history.neural_lm_score.tolist()
    assert not np.allclose(plain.neural_lm_score, with_history.neural_lm_score)


def test_unknown_words(model) -> None:
    lists = [spoken("u", "dogs chase mumble", "dogs chase dogz mumble", "dogs chase mice")]
    plain = neural_features(model, lists)
    assert plain.num_unknown.tolist() == [1, 2, 0]
    shared = neural_features(model, lists, unknown_policy="shared", num_unknown_types=50)
    assert shared.neural_lm_score - plain.neural_lm_score == pytest.approx([-math.log(50), -2 * math.log(50), 0])
    spelled = neural_features(model, lists, unknown_policy="spelling")
    known = [word for word in model.tokenizer.get_vocab() if word not in model.tokenizer.all_special_tokens]
    spelling = SpellingModel(known)
    mumble, dogz = spelling.log_prob("mumble"), spelling.log_prob("dogz")
    assert spelled.neural_lm_score - plain.neural_lm_score == pytest.approx([mumble, mumble + dogz, 0])
    assert dogz > mumble
    with pytest.raises(SpecError, match="needs the number of words it stands for"):
        ScoreSettings(unknown_policy="shared")
    with pytest.raises(SpecError, match="for sharing only; the policy is spelling"):
        ScoreSettings(unknown_policy="spelling", num_unknown_types=3)


def test_sliding_window(model) -> None:
    lists = [spoken("u", " ".join(["dogs", "chase", "mice", "and"] * 10), "dogs chase mice")]
    found = neural_features(model, lists, long_hypotheses="window")
    ids = [2, *model.tokenizer(lists[0].hypotheses[0].text)["input_ids"], 2]
    assert len(ids) == 42
    expected = score_sequences(model.model, [ids[:17]])[0]
    for start in range(17, 42, 8):  # 17 ids at most, half of them new
        stop = min(start + 8, 42)
        window = ids[stop - 17 : stop]
        whole, before = (score_sequences(model.model, [w])[0] for w in (window, window[: start - stop]))
        expected += whole - before
    assert found.neural_lm_score == pytest.approx([expected, by_hand(model, [2], "dogs chase mice")], abs=NATS)
    assert found.num_windows == 1


def test_folds_are_whole_speakers(world) -> None:
    lists = read_nbest(world / "test.jsonl.gz").lists
    folds, unit = folds_of(lists, 5, seed=1)
    assert unit == "speakers"
    assert sorted(number for fold in folds for number in fold) == list(range(len(lists)))
    speakers = [{lists[number].speaker for number in fold} for fold in folds]
    assert sum(len(some) for some in speakers) == len(set.union(*speakers)) == 12
    assert folds_of(lists, 5, seed=1)[0] == folds
    assert folds_of(lists, 5, seed=2)[0] != folds
    assert folds_of(lists, 20, seed=1)[1] == "utterances"
    with pytest.raises(DataError, match="5 utterances for 6 parts"):
        folds_of(LISTS, 6, seed=0)


def test_cross_validation_never_uses_its_own_references(world, model) -> None:
    file = read_nbest(world / "test.jsonl.gz")
    settings = ScoreSettings()
    found = cross_validate(model, file, settings=settings, num_folds=4, seed=3)
    lm = settings.score(model, file)
    for fold in folds_of(file.lists, 4, seed=3)[0]:
        rest = [number for number in range(len(file)) if number not in fold]
        part = lm.part(file, rest)
        weights = tune_on_lists(
            [file[n] for n in rest], neural_lm_score=part.neural_lm_score, num_unknown=part.num_unknown, seed=3
        ).weights
        expected = apply_weights([file[n] for n in fold], lm.part(file, fold), weights).one_best
        assert [found.rescored.lists[number].one_best.text for number in fold] == expected
    result = rescore_list(world / "test.jsonl.gz", world / "trained", num_folds=4, seed=3)
    assert result.lists == found.rescored.lists
    assert result.entries is not None
    assert result.entries["model"]["wer"] < result.entries["first-pass-tuned"]["wer"]
    assert any("Cross-validated over 4 parts of whole speakers" in note for note in result.notes)
    assert result.weights["model"].dev_utterances == tuple(entry.utterance for entry in file)
    with pytest.raises(SpecError, match="cross-validate with 'first-pass'"):
        cross_validate(model, file, settings=ScoreSettings(history="rescored"), num_folds=4)


def test_merged_histories_say_what_they_changed(world) -> None:
    way = {"weights": WEIGHTS}
    exact = rescore_list(world / "test.jsonl.gz", world / "trained", **way)
    merged = rescore_list(world / "test.jsonl.gz", world / "trained", settings=ScoreSettings(merge_order=1), **way)
    assert exact.merging is None
    assert merged.merging is not None
    error = np.abs(merged.lm.neural_lm_score - exact.lm.neural_lm_score)
    changed = sum(a.one_best.text != b.one_best.text for a, b in zip(exact.lists, merged.lists, strict=True))
    if merged.merging["lists"] == len(exact.lists):
        assert merged.merging["mean_nats"] == pytest.approx(error.mean(), abs=NATS)
        assert merged.merging["max_nats"] == pytest.approx(error.max(), abs=NATS)
        assert merged.merging["changed"] == changed
    assert merged.merging["max_nats"] > 0.01
    assert merged.lm.num_nodes < exact.lm.num_nodes
    with pytest.raises(SpecError, match="exclude each other"):
        ScoreSettings(merge_order=2, history="first-pass")

"""Rescoring with model directories: scores, vocabulary, cache, tuning on dev only, comparison, refusals."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.jsonl import read_nbest, write_nbest
from mixbits.asr.nbest import Hypothesis, NBest, reference_texts
from mixbits.asr.rescore import apply_weights
from mixbits.asr.significance import mapsswe
from mixbits.asr.weights import Weights
from mixbits.asr.wer import sum_errors
from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model
from mixbits.lm.forest import score_sequences
from mixbits.pipeline import lm_scores
from mixbits.pipeline.evidence import list_evidence
from mixbits.pipeline.lm_scores import SpeechModel, neural_features, unknown_share, unknown_words
from mixbits.pipeline.ngram import train_ngram
from mixbits.pipeline.rescore import ScoreSettings, rescore_list, rescore_systems, tune_system
from mixbits.pipeline.scoring import ngram_alone
from mixbits.pipeline.speech_rows import compare, list_facts
from mixbits.pipeline.verdicts import judge
from mixbits.summary import SummaryRow

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

NATS = 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    return folder


@pytest.fixture(scope="module")
def result(world):
    systems = {"full": world / "trained", "same": world / "trained", "empty-headed": world / "untrained"}
    return rescore_systems(
        systems, world / "dev.jsonl", {"test": world / "test.jsonl.gz"}, cache=world / "cache", seed=4
    )


def one_list(*texts: str, utterance: str = "u", reference: str | None = "dogs chase mice") -> list[NBest]:
    return [NBest(utterance, tuple(Hypothesis(text, -float(rank)) for rank, text in enumerate(texts)), reference)]


def test_features_are_plain_scores(world):
    model, tokenizer = load_model(world / "trained")
    lists = [*one_list("dogs chase mice", "", "dogs mumble <unk> mice"), *one_list("CATS", utterance="v")]
    features = neural_features((model, tokenizer), lists)
    ids = [[2, *tokenizer(h.text)["input_ids"], 2] for entry in lists for h in entry.hypotheses]
    assert features.neural_lm_score == pytest.approx(score_sequences(model, ids), abs=NATS)
    assert features.num_unknown.tolist() == [0, 0, 2, 1]
    assert features.num_tokens.tolist() == [4, 1, 5, 2]
    lowered = neural_features((model, tokenizer), lists, lower_case=True)
    assert lowered.num_unknown.tolist() == [0, 0, 2, 0]
    one_by_one = neural_features(world / "trained", lists, scoring="one-by-one")
    assert one_by_one.neural_lm_score == pytest.approx(features.neural_lm_score, abs=NATS)


def test_packed_directory(world, tmp_path):
    from mixbits.packing.checkpoint import save_packed
    from mixbits.quant.grid import quantize_weight
    from mixbits.quant.units import find_units, unit_matrices
    from mixbits.spec import BitAllocation, QuantSpec

    model, tokenizer = load_model(world / "trained")
    inventory = find_units(model)
    allocation = BitAllocation.uniform(inventory, QuantSpec(8))
    weights = {n: quantize_weight(w, QuantSpec(8)) for n, w in unit_matrices(model, inventory).items()}
    save_packed(model, inventory, allocation, weights, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    lists = read_nbest(world / "dev.jsonl")
    packed = neural_features(tmp_path / "packed", lists)
    full = neural_features(world / "trained", lists)
    assert packed.neural_lm_score == pytest.approx(full.neural_lm_score, abs=0.5)
    assert not np.array_equal(packed.neural_lm_score, full.neural_lm_score)


def test_cache(world, tmp_path, monkeypatch):
    lists = read_nbest(world / "dev.jsonl")
    first = neural_features(world / "trained", lists, cache=tmp_path)
    (file,) = tmp_path.iterdir()

    def no_model(path):
        raise AssertionError("the model was loaded although its scores are kept")

    with monkeypatch.context() as patch:
        patch.setattr(lm_scores, "load_model", no_model)
        again = neural_features(world / "trained", lists, cache=tmp_path)
        assert np.array_equal(again.neural_lm_score, first.neural_lm_score)
        assert np.array_equal(again.num_unknown, first.num_unknown)
        assert (again.num_nodes, again.seconds) == (first.num_nodes, first.seconds)
        for other in ({"lower_case": False, "scoring": "one-by-one"}, {}):
            with pytest.raises(AssertionError, match="model was loaded"):
                neural_features(world / ("trained" if other else "untrained"), lists, cache=tmp_path, **other)
        with pytest.raises(AssertionError, match="model was loaded"):
            neural_features(world / "trained", lists[1:], cache=tmp_path)
    for damaged in (b"", file.read_bytes()[:200], b"not a zip file"):
        file.write_bytes(damaged)
        repaired = neural_features(world / "trained", lists, cache=tmp_path)
        assert np.array_equal(repaired.neural_lm_score, first.neural_lm_score)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert neural_features(load_model(world / "trained"), lists, cache=tmp_path / "none").num_nodes == first.num_nodes
    assert not (tmp_path / "none").exists()


def test_vocabulary_mismatch_shows_the_way_out(world):
    with pytest.raises(
        DataError, match=r"100% of the words .*vocabulary of 12 .*'DOGS'.* lower case it would be 0%: .*--lower-case"
    ):
        neural_features(world / "trained", one_list("DOGS CHASE MICE", "DOGS"))
    with pytest.raises(DataError, match=r"67% .*use a model that was trained on such words"):
        neural_features(world / "trained", one_list("hunde chase mäuse"))
    assert neural_features(world / "trained", one_list("hunde chase mice")).num_unknown.tolist() == [1]
    upper = example.word_tokenizer(["DOGS CHASE MICE"])
    words = ["dogs chase"]
    with pytest.raises(DataError, match=r"upper case it would be 0%: write the lists in upper case"):
        lm_scores.check_vocabulary(upper, words, unknown_words(upper, words), lower_case=False)
    with pytest.raises(DataError, match=r"leave --lower-case out"):
        lm_scores.check_vocabulary(upper, words, unknown_words(upper, words), lower_case=True)
    assert unknown_share(upper, ["DOGS dogs", ""]) == 0.5
    assert unknown_share(upper, []) == 0.0


def test_tokenizer_without_unknown_words(world):
    tokenizer = SpeechModel(world / "trained").tokenizer
    tokenizer.unk_token = tokenizer.eos_token
    assert unknown_words(tokenizer, ["dogs mumble"]) == frozenset()


def test_too_long_is_refused_by_name(world):
    long = " ".join(["dogs"] * 16)
    with pytest.raises(DataError, match=r"'u', hypothesis 2: 18 tokens, but the model takes at most 17"):
        neural_features(world / "trained", one_list("dogs", long))
    assert neural_features(world / "trained", one_list(" ".join(["dogs"] * 15))).num_tokens.tolist() == [16]


def test_a_trained_model_helps_and_its_copy_loses_nothing(result, world):
    rows, lists = result["rows"], read_nbest(world / "test.jsonl.gz")
    assert set(rows) == {"first-pass", "first-pass-tuned", "full", "same", "empty-headed"}
    facts = result["lists"]["test"]
    assert (facts["utterances"], facts["hypotheses"]) == (200, 1000)
    assert facts["oracle_wer"] == 0
    assert facts["first_pass_wer"] == rows["first-pass"]["wer"]
    assert rows["full"]["wer"] < 0.7 * rows["first-pass"]["wer"]
    assert rows["full"]["p_value_vs_full"] is None
    assert rows["same"]["wer"] == rows["full"]["wer"]
    assert rows["same"]["p_value_vs_full"] is None  # no difference at all: undetermined
    assert rows["same"]["delta_wer_upper_95"] == pytest.approx(
        100 * 1.6448536269514722**2 / facts["words"]
    )  # 2.7 errors
    assert rows["same"]["no_significant_loss"] is True
    assert rows["same"]["significance"].startswith("no significant loss: WER +0.00 points: at most +")
    assert rows["empty-headed"]["significance"].startswith("loss: WER +")
    assert rows["empty-headed"]["no_significant_loss"] is False
    assert rows["empty-headed"]["p_value_vs_full"] < 0.05
    assert result["gain_significant"] is True
    assert "full is" not in result["notes"][-1]
    assert "significantly better than that" in result["notes"][-1]
    for name, row in rows.items():
        errors = row["errors"]
        assert row["wer"] == pytest.approx(100 * (errors["sub"] + errors["del"] + errors["ins"]) / errors["words"])
        assert errors["words"] == sum(len(entry.reference.split()) for entry in lists)
        SummaryRow.from_json({"name": name, **row})
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("mode", ["interpolate", "log-linear"])
def test_each_system_with_an_ngram_model_too(world, mode):
    sentences = [entry.reference for entry in example.make_lists("text", 300, 77)]
    ngram = train_ngram(sentences, load_model(world / "trained")[1], order=3)
    systems = {"full": world / "trained", "same": world / "trained"}
    options = {"ngram": ngram, "ngram_mode": mode, "ngram_weight": 0.4, "seed": 4}
    found = rescore_systems(systems, world / "dev.jsonl", {"test": world / "test.jsonl.gz"}, **options)
    rows = found["rows"]
    assert list(rows) == [
        "first-pass", "first-pass-tuned", "full", "same", "ngram", "full+ngram", "same+ngram"
    ]  # fmt: skip
    assert rows["ngram"]["wer"] < rows["first-pass"]["wer"]
    assert rows["same+ngram"]["wer"] == rows["full+ngram"]["wer"]
    assert rows["same+ngram"]["significance"].startswith("no significant loss")
    assert found["ngram"] == {"order": 3, "mode": mode, "weight": 0.4}
    assert "compared with full+ngram" in found["notes"][-1]
    dev, test = (read_nbest(world / name) for name in ("dev.jsonl", "test.jsonl.gz"))
    settings = ScoreSettings(ngram=ngram, ngram_mode=mode, ngram_weight=0.4)
    model = SpeechModel(world / "trained")
    weights = tune_system(model, dev, settings=settings, seed=4)
    texts = apply_weights(test, settings.score(model, test), weights).one_best
    assert sum_errors(reference_texts(test), texts).wer == rows["full+ngram"]["wer"]
    alone = ngram_alone(ngram, test)
    expected = ngram.score([h.text.split() for entry in test for h in entry.hypotheses]).sentence_scores()
    np.testing.assert_allclose(alone.ngram_score, expected)
    assert not alone.neural_lm_score.any()
    for taken in ("ngram", "full+ngram"):
        with pytest.raises(SpecError, match="is taken"):
            rescore_systems(
                {"full": world / "trained", taken: world / "trained"}, world / "dev.jsonl", {"t": world / "x"}
            )


def test_weights_come_from_dev_alone(result, world, tmp_path):
    """Other references of the test list change its figures and no weight."""
    changed = [replace(entry, reference="birds watch worms") for entry in read_nbest(world / "test.jsonl.gz")]
    write_nbest(tmp_path / "test.jsonl", changed)
    other = rescore_systems(
        {"full": world / "trained"}, world / "dev.jsonl", {"other": tmp_path / "test.jsonl"}, cache=world / "cache",
        seed=4, first_pass_tuned=False,
    )  # fmt: skip
    assert other["headline"] == "other"
    assert set(other["rows"]) == {"first-pass", "full"}
    assert other["weights"]["full"] == result["weights"]["full"]
    assert other["dev_wer"]["full"] == result["dev_wer"]["full"]
    assert other["rows"]["full"]["wer"] != result["rows"]["full"]["wer"]
    tuned = tune_system(
        SpeechModel(world / "trained"), read_nbest(world / "dev.jsonl"), settings=ScoreSettings(), seed=4
    )
    assert tuned.neural_lm_scale == result["weights"]["full"]["neural_lm_scale"] > 0
    assert tuned.model_hash == SpeechModel(world / "trained").model_hash
    assert len(tuned.dev_utterances) == 80


def test_second_run_needs_no_model_and_says_the_same(result, world, monkeypatch):
    monkeypatch.setattr(lm_scores, "load_model", None)
    systems = {"full": world / "trained", "same": world / "trained", "empty-headed": world / "untrained"}
    again = rescore_systems(
        systems, world / "dev.jsonl", {"test": world / "test.jsonl.gz"}, cache=world / "cache", seed=4
    )
    assert again == result


def test_comparison_is_that_of_a_certificate():
    rng = np.random.default_rng(0)
    lists = example.make_lists("c", 150, 9)
    references = [entry.reference for entry in lists]

    def corrupt(share: float) -> list[str]:
        return [" ".join("x" if rng.random() < share else w for w in text.split()) for text in references]

    outputs = {"first-pass": corrupt(0.4), "full": corrupt(0.1), "small": corrupt(0.12)}
    rows = compare(lists, outputs, "full", seed=5)
    blocks = [entry.speaker for entry in lists]
    first = outputs["first-pass"]
    texts = {"first_pass": first, "first_pass_tuned": first, "full": outputs["full"], "packed": outputs["small"]}
    expected = list_evidence(references, **texts, blocks=blocks, seed=5)
    judgement = judge({"": expected}, alpha=0.05)[""]
    assert judgement.verdict == "unresolved"
    assert rows["small"]["significance"] == f"unresolved: {judgement.reason}"
    assert rows["small"]["delta_wer_upper_95"] == expected.figures["delta_wer_upper"]
    assert rows["small"]["p_value_vs_full"] == mapsswe(references, outputs["full"], outputs["small"]).p
    assert rows["full"]["p_value_vs_first_pass"] == mapsswe(references, outputs["first-pass"], outputs["full"]).p
    assert rows["first-pass"]["p_value_vs_full"] == rows["full"]["p_value_vs_first_pass"]
    assert "delta_wer" not in rows["first-pass"]


def test_a_small_gain_and_no_change_prove_nothing():
    """Nine errors gained, none lost: the bootstrap's bound alone is 0 and would call that no loss, 1.8 errors are allowed, 2.7 possible."""
    lists = [NBest(f"u{i}", (Hypothesis("a", 0.0),), " ".join(f"w{i}-{k}" for k in range(6))) for i in range(60)]
    references = [entry.reference for entry in lists]

    def wrong(num, word):
        return [t.replace(f"-{word}", "-x") if i < num else t for i, t in enumerate(references)]

    first = [t.replace("-4", "-x") if i < 3 else t for i, t in enumerate(wrong(10, 2))]
    outputs = {"first-pass": first, "full": wrong(4, 4), "small": wrong(4, 4)}
    row = compare(lists, outputs, "full")["small"]
    assert row["delta_wer_interval_95"] == [0, 0]
    assert row["delta_wer_upper_95"] > 100 * 0.2 * 9 / 360
    assert row["no_significant_loss"] is False
    assert row["significance"].startswith(
        "unresolved: WER +0.00 points: not significantly worse, but it may be up to +0.75"
    )


def test_no_claim_when_tuning_alone_does_as_well():
    lists = example.make_lists("c", 150, 9)
    references = [entry.reference for entry in lists]
    good, bad = references, [t.replace("dogs chase", "x y").replace("chase", "x") for t in references]
    outputs = {"first-pass": bad, "first-pass-tuned": good, "full": good, "small": good}
    row = compare(lists, outputs, "full")["small"]
    assert row["no_significant_loss"] is False
    assert row["significance"].startswith("unresolved: ")
    assert "full precision does not significantly beat the first pass" in row["significance"]
    del outputs["first-pass-tuned"]
    assert compare(lists, outputs, "full")["small"]["no_significant_loss"] is True


def test_refusals(world, tmp_path):
    dev, test, full = world / "dev.jsonl", world / "test.jsonl.gz", {"full": world / "trained"}
    with pytest.raises(DataError, match=r"80 utterances .*'dev-0'.* tuned on"):
        rescore_systems(full, dev, {"test": dev})
    with pytest.raises(DataError, match=r"'blind-0' has no reference"):
        rescore_systems(full, dev, {"test": world / "blind.jsonl"})
    with pytest.raises(DataError, match=r"'blind-0' has no reference"):
        rescore_systems(full, world / "blind.jsonl", {"test": test})
    with pytest.raises(SpecError, match="no system is named 'full'"):
        rescore_systems({"other": world / "trained"}, dev, {"test": test})
    with pytest.raises(SpecError, match="'first-pass' is taken"):
        rescore_systems({**full, "first-pass": world / "trained"}, dev, {"test": test})
    for tests in ({}, {"dev": test}):
        with pytest.raises(SpecError, match="at least one test list"):
            rescore_systems(full, dev, tests)
    with pytest.raises(DataError, match=r"no config\.json|no tokenizer"):
        rescore_systems({"full": tmp_path}, dev, {"test": test})
    with pytest.raises(DataError, match="no such file"):
        rescore_systems(full, dev, {"test": tmp_path / "gone.jsonl"})
    with pytest.raises(SpecError, match="either weights, or a dev list"):
        rescore_list(test, world / "trained")


def test_overlap_may_be_allowed(world):
    found = rescore_systems(
        {"full": world / "trained"}, world / "dev.jsonl", {"test": world / "dev.jsonl"}, allow_overlap=True
    )
    assert found["rows"]["full"]["wer"] == pytest.approx(found["dev_wer"]["full"])


def test_one_list_with_given_weights(world):
    weights = Weights(neural_lm_scale=1.0, model_hash="another")
    done = rescore_list(world / "test.jsonl.gz", world / "trained", weights=weights)
    assert set(done.entries) == {"first-pass", "model"}
    assert done.facts == list_facts(read_nbest(world / "test.jsonl.gz"))
    assert any("another model" in note for note in done.notes)
    assert "against the first pass: better" in done.entries["model"]["significance"]
    for before, after in zip(read_nbest(world / "test.jsonl.gz"), done.lists, strict=True):
        assert sorted(h.text for h in before.hypotheses) == sorted(h.text for h in after.hypotheses)
        totals = [h.acoustic_score + h.extra["neural_lm_score"] for h in after.hypotheses]
        assert totals == sorted(totals, reverse=True)


def test_missing_references_are_counted(world, tmp_path):
    blind = rescore_list(world / "blind.jsonl", world / "trained", dev=world / "dev.jsonl")
    assert blind.entries is None
    assert blind.facts is None
    assert any(note == "10 of 10 utterances have no reference: no word error rates." for note in blind.notes)
    both = [*read_nbest(world / "blind.jsonl"), *read_nbest(world / "test.jsonl.gz")]
    write_nbest(tmp_path / "both.jsonl", both)
    weights = Weights(neural_lm_scale=0.5)
    some = rescore_list(tmp_path / "both.jsonl", world / "trained", weights=weights)
    part = rescore_list(world / "test.jsonl.gz", world / "trained", weights=weights)
    assert any("10 of 210 utterances have no reference" in note and "other 200" in note for note in some.notes)
    assert some.entries == part.entries
    assert len(some.lists) == 210


def test_a_boundary_written_in_a_hypothesis_is_no_boundary(world):
    _, tokenizer = load_model(world / "trained")
    encoded = lm_scores.encode_texts(tokenizer, ["dogs </s> mice", "dogs chase"])
    assert all(ids[0] == ids[-1] == 2 and 2 not in ids[1:-1] for ids in encoded.values())
    assert encoded["dogs </s> mice"][2] == tokenizer.unk_token_id

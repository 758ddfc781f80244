"""A comparison record against sums made here, its tests, its curves, and what brings systems together."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.jsonl import write_nbest
from mixbits.asr.nbest import NBest
from mixbits.asr.rescore import LmFeatures, apply_weights
from mixbits.asr.significance import mapsswe
from mixbits.asr.weights import Weights
from mixbits.asr.wer import ErrorTable, count_errors, error_table
from mixbits.errors import DataError, FormatError, SpecError
from mixbits.pipeline.compare import compare_systems
from mixbits.pipeline.compare_inputs import System, match_systems, read_system
from mixbits.pipeline.weight_curve import weight_curves

_spec = importlib.util.spec_from_file_location("compare_example", Path(__file__).parent / "compare_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def systems() -> list[System]:
    return example.three_systems()


@pytest.fixture(scope="module")
def record(systems: list[System]) -> dict:
    return compare_systems(match_systems(systems), groups=["speaker", "noise"], num_examples=4)


def _errors(system: System) -> list[int]:
    return [count_errors(e.reference or "", e.one_best.text).num_errors for e in system.lists]


# ---- the figures --------------------------------------------------------------------------------------------------------


def test_word_errors_and_gap_are_sums(systems: list[System], record: dict) -> None:
    words = sum(len((entry.reference or "").split()) for entry in systems[0].lists)
    assert (record["utterances"], record["words"]) == (120, words)
    floor = sum(min(count_errors(e.reference or "", h.text).num_errors for h in e.hypotheses) for e in systems[0].lists)
    first = sum(_errors(systems[0]))
    for system in systems:
        entry, errors = record["systems"][system.name], _errors(system)
        assert entry["wer"] == pytest.approx(100 * sum(errors) / words)
        assert sum(entry["errors"][key] for key in ("sub", "del", "ins")) == sum(errors)
        assert entry["wrong_utterances"] == sum(count > 0 for count in errors)
        assert entry["share_of_gap"] == pytest.approx((first - sum(errors)) / (first - floor))
        curve = record["oracle"][system.name]
        assert [point["hypotheses"] for point in curve] == [1, 2, 5, 6]
        assert curve[0]["oracle_wer"] == curve[0]["anti_oracle_wer"] == entry["wer"]
        assert curve[-1]["oracle_wer"] == pytest.approx(100 * floor / words)
    assert record["systems"]["both"]["wer"] < record["systems"]["first"]["wer"] < record["systems"]["backwards"]["wer"]


def test_tests_are_mapsswe_with_holm(systems: list[System], record: dict) -> None:
    references = [entry.reference or "" for entry in systems[0].lists]
    both, backwards = record["tests"]
    for test, system in ((both, systems[1]), (backwards, systems[2])):
        alone = mapsswe(references, systems[0].texts, system.texts)
        assert (test["a"], test["b"], test["test"]) == ("first", system.name, "MAPSSWE")
        assert (test["p"], test["z"], test["segments"]) == (alone.p, alone.z, alone.num_segments)
        delta = record["systems"][system.name]["wer"] - record["systems"]["first"]["wer"]
        assert test["delta_wer"] == pytest.approx(delta)
        assert test["delta_wer_interval"][0] < test["delta_wer"] < test["delta_wer_interval"][1]
        assert test["delta_wer_upper"] == max(test["delta_wer_upper_bootstrap"], test["delta_wer_upper_score"])
        assert (test["bootstrap_blocked"], test["bootstrap_blocks"]) == (True, 12)
    small, large = sorted([both["p"], backwards["p"]])
    adjusted = {small: 2 * small, large: max(2 * small, large)}
    for test in (both, backwards):
        assert test["p_holm"] == pytest.approx(adjusted[test["p"]])
    assert (both["outcome"], backwards["outcome"]) == ("better", "worse")


def test_all_outcomes() -> None:
    def systems_of(*texts: list[str]) -> list[System]:
        references = ["a b c d", "e f g h", "a c e g"] * 20
        return [
            System(
                f"x{number}",
                tuple(
                    NBest(f"u{i}", (example.Hypothesis(text, 0.0),), reference)
                    for i, (reference, text) in enumerate(zip(references, column * 20, strict=True))
                ),
            )
            for number, column in enumerate(texts)
        ]

    right, other = ["a b c d", "e f g h", "a c e g"], ["a b c d", "e f g q", "a c e g"]
    swapped, mixed = ["a b c d", "e f g r", "a c e g"], ["q b c d", "e f g h", "a c e g"]

    def outcome(*texts: list[str]) -> tuple[str, str]:
        test = compare_systems(match_systems(systems_of(*texts)))["tests"][0]
        return test["outcome"], test["test"]

    assert outcome(right, right) == ("same output", "sign test")
    assert outcome(other, swapped) == ("same errors", "sign test")
    assert outcome(other, mixed) == ("no significant difference", "MAPSSWE")
    assert outcome(other, right) == ("better", "sign test")  # every segment differs by one: no spread for MAPSSWE
    assert outcome(right, other) == ("worse", "sign test")


def test_few_utterances_and_segments_are_said(systems: list[System]) -> None:
    few = [replace(system, lists=system.lists[:8]) for system in systems[:2]]
    warning = compare_systems(match_systems(few))["tests"][0]["warning"]
    assert "segments (below 50" in warning
    assert "only 8 utterances to draw from" in warning
    many = [replace(system, lists=tuple(replace(e, speaker=None) for e in system.lists)) for system in systems[:2]]
    found = compare_systems(match_systems(many))["tests"][0]
    assert (found["bootstrap_blocked"], found["warning"]) == (False, None)


def test_margin_and_pairs(systems: list[System]) -> None:
    matched = match_systems(systems)
    pairs = [("both", "backwards"), ("backwards", "both")]
    found = compare_systems(matched, pairs=pairs, margin=50.0, alpha=0.1, seed=3)
    assert [(test["a"], test["b"]) for test in found["tests"]] == pairs
    assert [test["within_margin"] for test in found["tests"]] == [True, True]
    assert found["tests"][0]["delta_wer"] == -found["tests"][1]["delta_wer"]
    assert compare_systems(matched, pairs=pairs, margin=0.01)["tests"][0]["within_margin"] is False
    for options, message in (
        ({"pairs": [("first", "first")]}, "cannot compare"),
        ({"pairs": [("first", "nobody")]}, "cannot compare 'nobody'"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"alpha": 0.7}, "alpha is 0.7"),
    ):
        with pytest.raises(SpecError, match=message):
            compare_systems(matched, **options)
    with pytest.raises(DataError, match=r"field 'accent'.*noise"):
        compare_systems(matched, groups=["accent"])


def test_groups_add_up_in_natural_order(record: dict) -> None:
    assert [row["name"] for row in record["groups"]["speaker"]] == [f"s{number}" for number in range(12)]
    assert [row["name"] for row in record["groups"]["noise"]] == ["high", "low"]
    for rows in record["groups"].values():
        assert sum(row["utterances"] for row in rows) == 120
        for name, entry in record["systems"].items():
            for key in ("sub", "del", "ins", "words"):
                assert sum(row["systems"][name][key] for row in rows) == entry["errors"][key]
            for row in rows:
                part = row["systems"][name]
                assert part["wer"] == pytest.approx(100 * (part["sub"] + part["del"] + part["ins"]) / part["words"])


def test_examples_are_the_largest_changes_word_by_word(systems: list[System], record: dict) -> None:
    lists = {entry.utterance: (entry, other) for entry, other in zip(systems[0].lists, systems[1].lists, strict=True)}
    changes = sorted(b - a for a, b in zip(_errors(systems[0]), _errors(systems[1]), strict=True))
    examples = record["examples"][0]
    assert [e["errors"][1] - e["errors"][0] for e in examples["best"]] == changes[:4]
    assert [e["errors"][1] - e["errors"][0] for e in examples["worst"]] == [c for c in changes[::-1][:4] if c > 0]
    for found in examples["best"] + examples["worst"]:
        a, b = lists[found["utterance"]]
        for column, text in enumerate((a.reference or "", a.one_best.text, b.one_best.text)):
            assert [c[column] for c in found["columns"] if c[column] is not None] == text.split()


def test_the_record_is_json_and_repeats(systems: list[System], record: dict) -> None:
    again = compare_systems(match_systems(systems), groups=["speaker", "noise"], num_examples=4)
    assert json.dumps(again, allow_nan=False) == json.dumps(record)
    assert record["format"] == "mixbits-comparison"


# ---- WER by weight ------------------------------------------------------------------------------------------------------


def weight_curve(system: System, table: ErrorTable) -> dict | None:
    return next(iter(weight_curves([system], [table])), None)


def _at(curve: dict, weight: float) -> int:
    return curve["errors"][int(np.searchsorted(curve["edges"], weight)) - 1]


def test_the_curve_of_a_rescored_list_goes_through_what_was_chosen(tmp_path: Path) -> None:
    """Penalties and unknown words are in the rest of the total; the file alone with its weights gives the same curve."""
    lists = example.make_lists()
    rng = np.random.default_rng(7)
    count = sum(len(entry.hypotheses) for entry in lists)
    lm = LmFeatures(rng.normal(-5, 3, count), rng.integers(0, 3, count), np.ones(count, dtype=np.int64), count, 0.0)
    weights = Weights(1.0, 0.3, 0.7, -0.4, 1.5)
    done = apply_weights(lists, lm, weights)
    curve = weight_curve(System("x", done.lists, weights=weights), error_table(done.lists))
    assert curve is not None
    assert (curve["weight"], curve["chosen"]) == ("neural_lm_scale", 0.7)
    for weight in (0.01, 0.2, 0.7, 0.9, 1.3):
        expected = apply_weights(lists, lm, replace(weights, neural_lm_scale=weight))
        assert _at(curve, weight) == error_table(expected.lists).total().num_errors
    assert curve["edges"][0] == 0
    assert curve["edges"][-1] >= 1.4
    assert curve["best_errors"] == min(curve["errors"]) == _at(curve, curve["best"])

    write_nbest(tmp_path / "r.jsonl.gz", done.lists)
    read = replace(read_system(str(tmp_path / "r.jsonl.gz")), weights=weights)
    again = weight_curve(read, error_table(read.lists))
    assert again is not None
    assert np.array_equal(again["edges"], curve["edges"])
    assert weight_curve(replace(read, weights=None), error_table(read.lists)) is None
    both = weight_curves([read, System("y", lists)], [error_table(read.lists), error_table(lists)])
    assert [found["system"] for found in both] == ["r", "y"]
    assert both[0]["edges"][-1] == both[1]["edges"][-1] >= curve["edges"][-1]


def test_the_curve_of_a_first_pass_score(systems: list[System]) -> None:
    table = error_table(systems[0].lists)
    curve = weight_curve(systems[0], table)
    assert curve is not None
    assert (curve["weight"], curve["chosen"]) == ("first_pass_lm_scale", None)
    assert _at(curve, 2.0) == sum(_errors(systems[1]))
    assert _at(curve, 1e-9) == sum(_errors(systems[0]))
    weights = Weights(0.5, 1.0, 0.0, 0.5)
    expected = example.reordered(
        systems[0].lists, lambda h: 0.5 * h.acoustic_score + (h.lm_score or 0) + 0.5 * len(h.words)
    )
    found = weight_curve(replace(systems[0], weights=weights), table)
    assert found is not None
    assert found["chosen"] == 1.0
    assert _at(found, 1.0) == error_table(expected).total().num_errors
    bare = example.make_lists(lm=False)
    assert weight_curve(System("x", bare), error_table(bare)) is None


def test_a_score_that_is_no_number_is_refused(systems: list[System]) -> None:
    def with_field(value: object) -> tuple[NBest, ...]:
        return tuple(
            replace(
                e,
                hypotheses=tuple(
                    replace(h, extra={"total_score": value, "neural_lm_score": 1.0}) for h in e.hypotheses
                ),
            )
            for e in systems[0].lists
        )

    for value in ("high", True, [1], 10**400):
        lists = with_field(value)
        with pytest.raises(DataError, match="field 'total_score'"):
            weight_curve(System("x", lists, weights=Weights()), error_table(lists))


# ---- bringing systems together ------------------------------------------------------------------------------------------


def test_systems_come_in_any_order_and_format(systems: list[System], tmp_path: Path) -> None:
    first, second = systems[:2]
    write_nbest(tmp_path / "first.jsonl.gz", first.lists)
    (tmp_path / "second.trn").write_text(
        "".join(f"{e.one_best.text} ({e.utterance})\n" for e in reversed(second.lists))
    )
    (tmp_path / "text").write_text("".join(f"{e.utterance} {e.one_best.text}\n" for e in second.lists))
    (tmp_path / "ref.trn").write_text("".join(f"{e.reference} ({e.utterance})\n" for e in first.lists))
    read = [
        read_system(str(tmp_path / "first.jsonl.gz")),
        read_system(str(tmp_path / "second.trn")),
        read_system(f"t={tmp_path / 'text'}"),
    ]
    assert [system.name for system in read] == ["first", "second", "t"]
    matched = match_systems(read)
    assert matched.systems[1].texts == matched.systems[2].texts == second.texts
    assert matched.utterances[5].speaker == "s5"
    assert matched.systems[1].lists[5].speaker == "s5"
    found = compare_systems(matched)
    assert (
        found["systems"]["second"]["errors"]
        == compare_systems(match_systems([first, second]))["systems"]["both"]["errors"]
    )
    assert set(found["oracle"]) == {"first"}
    only_text = match_systems(read[1:], references=tmp_path / "ref.trn")
    assert [entry.reference for entry in only_text.utterances] == [e.reference for e in reversed(first.lists)]
    with pytest.raises(DataError, match="no reference for any of 120 utterances; give them with --references"):
        match_systems(read[1:])


def test_names(systems: list[System], tmp_path: Path) -> None:
    write_nbest(tmp_path / "a=b.v2.jsonl.xz", systems[0].lists)
    path = tmp_path / "a=b.v2.jsonl.xz"
    assert read_system(str(path)).name == "a=b.v2"
    assert read_system(f"lm 16x={path}").name == "lm 16x"
    with pytest.raises(SpecError, match="expected a file, or NAME=FILE"):
        read_system("name=")
    with pytest.raises(DataError, match="no such file"):
        read_system(str(tmp_path / "gone.jsonl"))
    with pytest.raises(SpecError, match="two systems are named 'first'"):
        match_systems([systems[0], systems[0]])
    with pytest.raises(SpecError, match="at least two systems, got 1"):
        match_systems(systems[:1])
    (tmp_path / "bytes").write_bytes(b"\x00\xff\x80" * 50)
    with pytest.raises((DataError, FormatError), match="bytes"):
        read_system(str(tmp_path / "bytes"))


def test_missing_utterances(systems: list[System]) -> None:
    short = replace(systems[1], lists=systems[1].lists[3:])
    with pytest.raises(DataError, match=r"'both' has no output for 3 utterances .*first: 'u0'.*--common"):
        match_systems([systems[0], short])
    with pytest.raises(DataError, match="'both' has no output for 3"):
        match_systems([short, systems[0]])
    matched = match_systems([systems[0], short], common=True)
    assert [entry.utterance for entry in matched.utterances] == [f"u{number}" for number in range(3, 120)]
    assert "117 utterances that all systems have" in matched.notes[0]
    renamed = replace(systems[1], lists=tuple(replace(e, utterance="x" + e.utterance) for e in systems[1].lists))
    with pytest.raises(DataError, match=r"share no utterance.*'u0' and 'xu0'"):
        match_systems([systems[0], renamed], common=True)


def test_references_that_contradict_or_miss(systems: list[System], tmp_path: Path) -> None:
    other = replace(systems[1], lists=(replace(systems[1].lists[0], reference="quite another"), *systems[1].lists[1:]))
    with pytest.raises(DataError, match=r"'u0' has different references in 'first'.*'both' \('quite another'\)"):
        match_systems([systems[0], other])
    blind = replace(systems[0], lists=tuple(replace(e, reference=None) for e in systems[0].lists))
    assert match_systems([blind, systems[1]]).utterances[0].reference == systems[1].lists[0].reference
    (tmp_path / "ref.trn").write_text("".join(f"{e.reference} ({e.utterance})\n" for e in systems[0].lists[:100]))
    matched = match_systems([systems[0], other], references=tmp_path / "ref.trn")
    assert len(matched.utterances) == 100
    assert matched.notes == ("20 of 120 utterances have no reference and are left out.",)


# ---- real lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: real lists not compared")
def test_kaldi_lists_at_two_weights() -> None:
    """Kaldi's counts at LM weights 16 and 12, from its own 100-best lists; sclite's alignment finds one error more at 16."""
    path = Path(os.environ["MIXBITS_DATA"]) / "lattices" / "kaldi_weather" / "mono.100best.jsonl.gz"
    lists = read_system(str(path)).lists
    ranked = [System(f"w{w}", example.reordered(lists, lambda h: h.acoustic_score / w + h.lm_score)) for w in (16, 12)]  # noqa: B023
    found = compare_systems(match_systems(ranked))
    totals = {
        name: {k: v for k, v in entry["errors"].items() if k != "words"} for name, entry in found["systems"].items()
    }
    assert {name: sum(counts.values()) for name, counts in totals.items()} == {"w16": 332, "w12": 343}
    assert found["systems"]["w16"]["sclite_differs"]
    assert sum(found["systems"]["w16"]["sclite_errors"][key] for key in ("sub", "del", "ins")) == 333
    assert found["tests"][0]["segment_errors"][0] == 333
    assert found["tests"][0]["outcome"] == "no significant difference"

"""The sentences against hand-made numbers: every claim has a case in which it must not be made."""

import importlib.util
from pathlib import Path

import pytest

from mixbits.report import headline
from mixbits.report.kinds import row_kind
from mixbits.runs import Summary

_spec = importlib.util.spec_from_file_location("example", Path(__file__).parent / "example.py")
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def say(row=None, equal=None, asr=None, **top):
    data = example.example_summary()
    data["rows"] = [r for r in data["rows"] if r["name"] != "learned-20x"]
    next(r for r in data["rows"] if r["name"] == "learned-16x").update(row or {})
    data["equal_bytes"][0].update(equal or {})
    data["asr"].update(asr or {})
    paragraphs = headline(Summary.from_json(data | top))
    assert len(paragraphs) == 1
    return paragraphs[0].replace("\u00a0", " ")


def test_the_example_in_full():
    text = say()
    assert "16.15 times smaller than full precision, 1.42 MB, 1.98 bits per weight" in text
    assert "+9.4 %, +0.0900 ± 0.0030 nats per token: not lossless." in text
    assert "At equal bytes it is better than uniform bits by 0.0280 ± 0.0030" in text
    assert "No significant WER loss" in text


@pytest.mark.parametrize(
    ("delta", "stderr", "claimed"),
    [(-0.02, 0.003, True), (-0.002, 0.003, False), (0.0, 0.003, False), (0.09, 0.003, False)],
)
def test_lossless_is_only_said_if_the_interval_is_below_zero(delta, stderr, claimed):
    text = say({"delta_nats": delta, "delta_nats_stderr": stderr})
    assert (": lossless" in text) is claimed
    assert ("not lossless" in text) is (delta == 0.09)


def test_no_standard_error_no_claim():
    text = say({"delta_nats": -0.5, "delta_nats_stderr": None}, {"delta_nats": -0.5, "delta_nats_stderr": None})
    assert text.count("no standard error, so no claim") == 2
    assert "better" not in text
    assert ": lossless" not in text


def test_an_error_over_seeds_is_added_in_quadrature():
    """0.003 over sentences and 0.004 over seeds are 0.005; both claims hold by the first alone."""
    row, equal = {"delta_nats": -0.008, "delta_nats_stderr": 0.003}, {"delta_nats": -0.008, "delta_nats_stderr": 0.003}
    assert ": lossless" in say(row, equal)
    assert "it is better than uniform bits" in say(row, equal)
    seeds = {"delta_nats_seed_stderr": 0.004}
    text = say({**row, **seeds}, {**equal, **seeds})
    assert f"{chr(0x2212)}0.0080 ± 0.0050 nats per token: the difference is within its error" in text
    assert "not measurably better than uniform bits: 0.0080 ± 0.0050 nats per token lower, within the error" in text
    assert ": lossless" in say({"delta_nats": -0.01, "delta_nats_stderr": 0.003, **seeds})
    for unknown in (None, "x", True):
        assert say(row | {"delta_nats_seed_stderr": unknown}, equal) == say(row, equal)


def test_worse_than_uniform_is_said_so():
    assert "NOT better than uniform bits: worse by 0.0300 ± 0.0030" in say(equal={"delta_nats": 0.03})


def test_a_difference_within_the_error_is_not_a_win():
    text = say(equal={"delta_nats": -0.004, "delta_nats_stderr": 0.003})
    assert "not measurably better than uniform bits: 0.0040 ± 0.0030 nats per token lower, within the error" in text


def test_without_a_comparison_the_verdict_or_its_absence_is_told():
    assert "at equal bytes: no neighbour." in say(equal={"delta_nats": None, "verdict": "no neighbour"})
    assert "Not compared with uniform" in say(equal_bytes=[])


@pytest.mark.parametrize(
    ("row", "asr", "expected"),
    [
        ({"delta_wer_upper_95": 1.2}, {}, "cannot rule out a loss of words"),
        ({}, {"gain_significant": False}, "this test cannot show that nothing was lost"),
        ({}, {"gain_significant": None}, "do not say whether words were lost"),
        ({"delta_wer_upper_95": None}, {}, "do not say whether words were lost"),
        (
            {"no_significant_loss": False, "significance": "unresolved: so"},
            {},
            "the run's rule asks for more (unresolved: so)",
        ),
        ({"p_value_vs_full": 0.01}, {}, "That is a significant loss of words"),
    ],
)
def test_no_loss_of_words_is_only_said_when_the_rule_holds(row, asr, expected):
    text = say(row, asr=asr)
    assert expected in text
    assert "No significant WER loss" not in text


def test_first_pass_better_than_full_means_no_claim():
    data_rows = example.example_summary()["rows"]
    data_rows[0]["wer"] = 40.0
    rows = [r for r in data_rows if r["name"] != "learned-20x"]
    assert "No significant WER loss" not in " ".join(
        headline(Summary.from_json({**example.example_summary(), "rows": rows}))
    )


def test_words_are_compared_with_the_system_that_p_and_bound_are_against():
    # Bound 0.75 points: a fifth of the gain of full (3.82) allows it, a fifth of full-continued's (2.84) does not.
    data = example.example_summary()
    rows = {row["name"]: row for row in data["rows"]}
    rows["full-continued"]["wer"] = 49.0
    data["rows"] = [row for row in data["rows"] if row["name"] != "learned-20x"]
    rows["learned-16x"] |= {"delta_wer_upper_95": 0.75, "p_value_vs_full": 0.4}
    for system, claimed in (("full", True), ("full-continued", False)):
        data["asr"] |= {"reference_system": system, "gain_significant": True}
        text = headline(Summary.from_json(data))[0].replace("\u00a0", " ")
        assert f"p = 0.400 against {system}" in text
        assert ("No significant WER loss" in text) is claimed


def test_no_learned_row_and_no_rows_at_all():
    rows = [{"name": "full", "ppl": 3.0}]
    assert headline(Summary.from_json({"rows": rows})) == ["No learned bits in these results; systems: full."]
    assert headline(Summary.from_json({"rows": []})) == ["No learned bits in these results; systems: none."]


def test_a_learned_row_of_nulls_claims_nothing():
    text = " ".join(headline(Summary.from_json({"rows": [{"name": "learned-x"}]})))
    assert text == "learned-x: size unknown. Its perplexity is unknown. Not compared with uniform at equal bytes."


def test_more_learned_rows_than_fit_are_counted():
    paragraphs = headline(Summary.from_json({"rows": [{"name": f"learned-{i}"} for i in range(5)]}))
    assert len(paragraphs) == 4
    assert "2 more learned" in paragraphs[-1]


def test_a_row_with_any_name_is_learned_if_a_measure_is_recorded():
    rows = [
        {"name": "bits-a", "measure": "kl"},
        {"name": "bits-b", "measure": None},
        {"name": "other"},
        {"name": "full"},
    ]
    summary = Summary.from_json({"rows": rows})
    assert [row_kind(row) for row in summary.rows] == ["learned", "uniform", "", "full"]
    assert [text.split(":")[0] for text in headline(summary)] == ["bits-a"]


def test_rows_with_an_ngram_model_are_for_the_table_only():
    data = example.example_summary()
    before = headline(Summary.from_json(data))
    empty = {"bytes": None, "ratio": None, "bits_per_weight": None, "ppl": None, "ppl_stderr": None}
    data["rows"].append({"name": "learned-16x+ngram", **empty, "wer": 6.2})
    assert headline(Summary.from_json(data)) == before

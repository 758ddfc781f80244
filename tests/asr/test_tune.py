"""Exact line search against dense grids, tuning against planted weights, the weights file."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixbits.asr.features import FEATURES, FeatureTable, feature_table, has_lm_score
from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.linesearch import PaddedLists, StepFunction, errors_along_line
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.tune import tune_on_lists, tune_weights
from mixbits.asr.weights import SCALES, Weights, check_no_overlap, load_weights
from mixbits.asr.wer import error_table
from mixbits.errors import DataError, FormatError


def _table(rng: np.random.Generator, num_lists: int, longest: int = 8) -> FeatureTable:
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, longest + 1, size=num_lists))])
    values = rng.normal(size=(int(offsets[-1]), len(FEATURES))) * [5, 3, 4, 2, 1, 2]
    return FeatureTable(values, offsets)


def test_two_lines_cross_where_they_should() -> None:
    # Scores: 1 + 0 t and 0 + 1 t cross at t = 1; the second has fewer errors.
    offsets = np.array([0, 2])
    steps = errors_along_line(
        np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([3, 1]), PaddedLists.from_offsets(offsets), low=-4, high=9
    )
    assert steps.edges.tolist() == [-4, 1, 9]
    assert steps.values.tolist() == [3, 1]
    assert steps.best_point() == (5.0, 1)


def test_middle_of_the_widest_interval_and_open_ends() -> None:
    inf = float("inf")
    assert StepFunction(np.array([-inf, 0, 1, 4, 6, inf]), np.array([2, 1, 3, 1, 2])).best_point() == (5.0, 1)
    assert StepFunction(np.array([-inf, 0, 1, inf]), np.array([1, 1, 2])).best_point() == (0.5, 1)
    assert StepFunction(np.array([-inf, 0, 4, inf]), np.array([3, 2, 1])).best_point() == (6.0, 1)
    assert StepFunction(np.array([-inf, 0, 4, inf]), np.array([1, 2, 3])).best_point() == (-2.0, 1)
    assert StepFunction(np.array([0.0, inf]), np.array([7])).best_point() == (0.0, 7)


def _errors_at(t: float, a: np.ndarray, b: np.ndarray, errors: np.ndarray, offsets: np.ndarray) -> int:
    total = 0
    for start, stop in pairwise(offsets):
        total += int(errors[start + int(np.argmax(a[start:stop] + t * b[start:stop]))])
    return total


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), num_lists=st.integers(1, 12), whole=st.booleans())
@example(seed=1_000_000, num_lists=7, whole=True)
def test_step_function_equals_brute_force(seed: int, num_lists: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 9, size=num_lists))])
    size = int(offsets[-1])
    a, b = rng.normal(size=(2, size))
    if whole:  # whole numbers make parallel and concurrent lines
        a, b = np.round(2 * a), np.round(2 * b)
    errors = rng.integers(0, 5, size=size)
    steps = errors_along_line(a, b, errors, PaddedLists.from_offsets(offsets))
    inner = np.clip(steps.edges, -1e3, 1e3)
    for left, right, value in zip(inner[:-1], inner[1:], steps.values, strict=True):
        if right - left > 1e-6:
            for share in (0.01, 0.37, 0.99):
                assert _errors_at(left + share * (right - left), a, b, errors, offsets) == value
    grid = [_errors_at(t, a, b, errors, offsets) for t in np.linspace(-20, 20, 401) + 0.00123]
    assert steps.values.min() <= min(grid)
    clipped = errors_along_line(a, b, errors, PaddedLists.from_offsets(offsets), low=-0.7, high=1.3)
    t, value = clipped.best_point()
    assert -0.7 < t < 1.3
    if len(clipped.values) > 1 and np.diff(clipped.edges).max() > 1e-6:
        # With whole numbers the middle may be a point where three lines meet, and the third wins there alone, by the tie.
        near = (t, t - 1e-7, t + 1e-7) if whole else (t,)
        assert value in {_errors_at(point, a, b, errors, offsets) for point in near}


def test_best_rows_takes_the_first_of_equals() -> None:
    values = np.zeros((5, len(FEATURES)))
    values[:, 0] = [1, 2, 2, 0, 0]
    assert FeatureTable(values, np.array([0, 3, 5])).best_rows(Weights().as_array()).tolist() == [1, 3]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_weights_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = _table(rng, 300)
    planted = np.array([1.0, 0.4, 0.8, -1.5, -3.0, 0.6])
    errors = np.ones(len(table.values), dtype=np.int64)
    errors[table.best_rows(planted)] = 0
    result = tune_weights(table, errors, seed=seed)
    assert result.num_errors <= 3
    assert result.num_errors == int(errors[table.best_rows(result.weights.as_array())].sum())
    assert result.weights.as_array() == pytest.approx(planted, rel=0.15, abs=0.05)
    assert result.weights.acoustic_scale == 1.0
    assert tune_weights(table, errors, seed=seed) == result


def test_one_weight_reaches_the_grid_minimum() -> None:
    rng = np.random.default_rng(7)
    table = _table(rng, 60)
    errors = rng.integers(0, 6, size=len(table.values))
    fixed = tuple(name for name in SCALES if name != "neural_lm_scale")
    result = tune_weights(table, errors, fixed=fixed)
    grid = [errors[table.best_rows([1, 0, scale, 0, 0, 0])].sum() for scale in np.linspace(0, 20, 20_001)]
    assert result.num_errors <= min(grid)
    assert result.weights.as_array()[[0, 1, 3, 4, 5]].tolist() == [1, 0, 0, 0, 0]


def test_never_worse_than_the_start_and_lm_scales_not_negative() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        table = _table(rng, 30)
        errors = rng.integers(0, 6, size=len(table.values))
        result = tune_weights(table, errors, seed=seed, num_restarts=2)
        assert result.num_errors <= result.num_errors_before
        assert result.weights.first_pass_lm_scale >= 0
        assert result.weights.neural_lm_scale >= 0


def test_useless_features_keep_their_weight() -> None:
    lists = [NBest(f"u{i}", (Hypothesis("a b", -1.0), Hypothesis("a c", -2.0)), "a c") for i in range(5)]
    result = tune_on_lists(lists, neural_lm_score=[-2.0, -1.0] * 4 + [-2.0, -0.5], model_hash="m", data_hash="d")
    weights = result.weights
    assert (result.num_errors_before, result.num_errors) == (5, 0)
    assert weights.neural_lm_scale > 1
    assert (weights.first_pass_lm_scale, weights.word_insertion_penalty, weights.unknown_word_penalty) == (0, 0, 0)
    assert (weights.model_hash, weights.data_hash, weights.dev_errors, weights.dev_words) == ("m", "d", 0, 10)
    assert weights.dev_utterances == ("u0", "u1", "u2", "u3", "u4")


def test_single_list_and_single_hypothesis() -> None:
    result = tune_on_lists([NBest("u", (Hypothesis("", -1.0),), "a")])
    assert result.weights.as_array().tolist() == [1, 0, 0, 0, 0, 0]


def test_tuning_refuses() -> None:
    table = _table(np.random.default_rng(0), 3)
    with pytest.raises(DataError, match="expected one each"):
        tune_weights(table, [1])
    errors = np.zeros(len(table.values), dtype=int)
    with pytest.raises(DataError, match="acoustic scale at 1"):
        tune_weights(table, errors, initial=Weights(acoustic_scale=0.1))
    with pytest.raises(DataError, match="no weights are named"):
        tune_weights(table, errors, fixed=["lm"])


def test_features_and_missing_lm_scores() -> None:
    lists = [
        NBest("u1", (Hypothesis("a b", -1.0, -3.0), Hypothesis("", -2.0, -4.0))),
        NBest("u2", (Hypothesis("a", -5.0, -6.0),)),
    ]
    table = feature_table(lists, neural_lm_score=[-7, -8, -9], num_unknown=[1, 0, 0], ngram_score=[-1, -4, -2])
    assert table.values.tolist() == [[-1, -3, -7, 2, 1, -1], [-2, -4, -8, 0, 0, -4], [-5, -6, -9, 1, 0, -2]]
    assert has_lm_score(lists)
    with pytest.raises(DataError, match="'u3', hypothesis 2 has no lm_score"):
        feature_table([*lists, NBest("u3", (Hypothesis("a", -1.0, -1.0), Hypothesis("b", -1.0)))])
    with pytest.raises(DataError, match="'u0', hypothesis 1 has no lm_score"):
        feature_table([NBest("u0", (Hypothesis("a", -1.0),)), *lists])
    with pytest.raises(DataError, match="shape"):
        feature_table(lists, neural_lm_score=[1, 2])
    with pytest.raises(DataError, match="neural_lm_score of hypothesis row 1"):
        feature_table(lists, neural_lm_score=[1, float("nan"), 2])
    with pytest.raises(DataError, match="no n-best lists"):
        feature_table([])


def test_weights_round_trip_and_overlap(tmp_path: Path) -> None:
    weights = Weights(1.0, 0.25, 0.5, -0.1, 0.1 + 0.2, 0.7, "m", "d", 3, 10, 100, ("u1", "é"))
    weights.save(tmp_path / "w.json")
    assert load_weights(tmp_path / "w.json") == weights
    other = [NBest("u7", (Hypothesis("a", -1.0),))]
    check_no_overlap(weights, other)
    shared = [*other, NBest("u1", (Hypothesis("a", -1.0),))]
    with pytest.raises(DataError, match="'u1'"):
        check_no_overlap(weights, shared)
    check_no_overlap(weights, shared, allow_overlap=True)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format_version": 2},
        {"neural_lm_scale": "1"},
        {"neural_lm_scale": True},
        {"neural_lm_scale": float("nan")},
        {"seed": 1.5},
        {"dev_utterances": [1]},
        {"surprise": 1},
    ],
)
def test_bad_weights_files(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "w.json"
    Weights().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=r"w\.json"):
        load_weights(path)


def test_broken_or_missing_weights_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(tmp_path / "none.json")
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "mixbits-rescoring-weights"}'):
        (tmp_path / "w.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"w\.json"):
            load_weights(tmp_path / "w.json")


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: tuning speed not checked")
def test_tuning_real_lists_is_fast_and_helps() -> None:
    lists = list(read_nbest(Path(os.environ["MIXBITS_DATA"]) / "librispeech_10best" / "dev_other.jsonl.gz"))
    table = error_table(lists)
    rng = np.random.default_rng(0)
    pretended_lm = -1.0 * table.errors + rng.normal(size=len(table.errors))
    started = time.process_time()
    result = tune_on_lists(lists, neural_lm_score=pretended_lm, num_unknown=rng.poisson(0.3, size=len(pretended_lm)))
    assert time.process_time() - started < 30
    assert result.num_errors < 0.9 * result.num_errors_before
    assert result.num_errors >= table.picked_errors(table.oracle_picks()).sum()


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: Kaldi's counts not checked")
def test_kaldi_100best_reaches_kaldis_own_best() -> None:
    path = Path(os.environ["MIXBITS_DATA"]) / "lattices" / "kaldi_weather" / "mono.100best.jsonl.gz"
    lists = list(read_nbest(path))
    errors, table = error_table(lists).errors, feature_table(lists)
    # Kaldi's best weight is 16, with 332 errors; here acoustic scores are unscaled, so the LM gets the weight.
    assert errors[table.best_rows([1, 16, 0, 0, 0])].sum() == 332
    tuned = tune_on_lists(lists, fixed=["word_insertion_penalty"])
    assert tuned.num_errors <= 332
    assert tuned.weights.first_pass_lm_scale == pytest.approx(16, abs=1)

"""Rank correlation against scipy's; its bootstrap error against the spread over fresh data."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from mixbits.errors import DataError
from mixbits.quant.measures.agreement import rank_agreement
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.spec import ModelInventory, QuantSpec, Unit, parse_specs

SPECS = parse_specs(["1", "2", "4"])


def table(values):
    return {f"u{i}": dict(zip(SPECS, map(float, row), strict=False)) for i, row in enumerate(values)}


def test_values_are_spearmans_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (12, 3)), rng.normal(size=(12, 3))
    found = rank_agreement(table(x), table(y))
    assert found.overall.value == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert found.overall.num_pairs == 36
    for j, spec in enumerate(SPECS):
        assert found.per_spec[spec].value == pytest.approx(stats.spearmanr(x[:, j], y[:, j]).statistic)
        assert found.per_spec[spec].num_pairs == 12
    assert rank_agreement(table(x), table(x)).overall.value == pytest.approx(1)
    assert rank_agreement(table(x), table(-x)).per_spec[SPECS[0]].value == pytest.approx(-1)


def test_bootstrap_error_is_the_spread_over_fresh_units():
    rng = np.random.default_rng(1)

    def draw():
        x = rng.normal(size=(200, 1))
        return table(x), table(x + rng.normal(size=(200, 1)))

    spread = np.std([rank_agreement(*draw(), num_resamples=2).overall.value for _ in range(1000)], ddof=1)
    errors = [rank_agreement(*draw(), seed=s, num_resamples=200).overall.stderr for s in range(20)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_sensitivities_and_mappings_and_only_what_both_have():
    values = np.random.default_rng(2).normal(size=(5, 3))
    inventory = ModelInventory(tuple(Unit(f"u{i}", f"u{i}.weight", 2, 2, "linear") for i in range(5)), ())
    units = {n: UnitSensitivity(v, dict.fromkeys(v, 0.0), dict.fromkeys(v, 1.0)) for n, v in table(values).items()}
    found = Sensitivities("loss", inventory, units, 1.0)
    other = {**table(values[:4, :2]), "unknown": {SPECS[0]: 1.0}}
    result = rank_agreement(found, other, seed=3)
    assert result.overall.num_pairs == 8
    assert list(result.per_spec) == list(SPECS[:2])
    assert result == rank_agreement(found, other, seed=3)
    data = json.loads(json.dumps(result.to_json()))
    assert data["spearman"] == pytest.approx(1)
    assert data["per_spec"]["1-papers-row"]["num_pairs"] == 4


def test_a_constant_side_has_no_ranks():
    values = np.random.default_rng(2).normal(size=(5, 3))
    flat = rank_agreement(table(np.zeros((5, 3))), table(values)).overall
    assert math.isnan(flat.value)
    assert flat.stderr == math.inf
    assert flat.to_json() == {"spearman": None, "stderr": None, "num_pairs": 15}


def test_bad_input():
    values = table(np.ones((4, 3)))
    with pytest.raises(DataError, match=r"2 unit\(s\) in common"):
        rank_agreement(values, {"u0": values["u0"], "u3": values["u3"], "x": values["u1"]})
    with pytest.raises(DataError, match="no spec in common"):
        rank_agreement(values, {n: {QuantSpec(8): 1.0} for n in values})

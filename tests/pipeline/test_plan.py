"""Dry runs: every shipped recipe without any data, and the same sizes as the real thing with data."""

from pathlib import Path

import pytest

from mixbits.errors import SpecError
from mixbits.lm.presets import build_model
from mixbits.pipeline.plan import files_of, plan
from mixbits.pipeline.prepare import prepare_text
from mixbits.pipeline.settings import ExperimentSettings, load_experiment
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, predicted_bytes

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_can_be_planned_without_data(path, monkeypatch):
    for name in ("MIXBITS_DATA", "MIXBITS_DEMO", "SWBD_DATA"):
        monkeypatch.delenv(name, raising=False)
    settings = load_experiment(path, unset="keep")
    found = plan(settings)
    assert list(found.missing) == files_of(settings)
    assert all(name.startswith("${") for name in found.missing)
    assert [row.name for row in found.rows] == [row.name for row in settings.rows]
    for row, planned in zip(settings.rows, found.rows, strict=True):
        assert planned.ratio == pytest.approx(found.full_bytes / planned.bytes)
        if row.ratio is not None:
            assert planned.ratio == pytest.approx(row.ratio, rel=1e-3)


def test_the_papers_switchboard_recipe(monkeypatch):
    """30,000 words, 6 layers, d 512, FF 1024: the papers' 106 MB; 20 hypotheses; the 4-gram at equal weight."""
    monkeypatch.delenv("SWBD_DATA", raising=False)
    settings = load_experiment(next(p for p in RECIPES if p.stem == "swbd-paper"), unset="keep")
    found = plan(settings)
    assert found.full_bytes / 2**20 == pytest.approx(106, rel=0.02)
    assert (settings.speech.max_hypotheses, settings.speech.interpolate) == (20, "equal")


def test_with_data_the_vocabulary_is_the_real_one(texts):
    data = {
        "title": "tiny",
        "text": {n: str(texts / f"{n}.txt") for n in ("train", "valid", "test")},
        "model": {"num_layers": 1, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "context": 16},
        "full": {"context": 16},
        "quantize": {"train": {"context": 16}},
        "rows": [{"name": "uniform-2", "spec": "2"}],
    }
    settings = ExperimentSettings.model_validate(data)
    found, text = plan(settings), prepare_text(settings)
    assert found.missing == ()
    assert found.vocabulary == len(text.tokenizer)
    inventory = find_units(build_model(settings.model, text.tokenizer, seed=0))
    assert found.rows[0].bytes == predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec.parse("2")))
    with pytest.raises(SpecError, match=r"budget of \d+ bytes cannot be met"):
        plan(ExperimentSettings.model_validate(data | {"rows": [{"name": "a", "ratio": 30}]}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ratio": 30}, r"row a: a budget of \d+ bytes cannot be met"),
        ({"spec": "2", "quantize": {"progressive": [[0.2, 8], [0.2, 4]]}}, "row a: progressive stages are"),
        ({"ratio": 2, "start": "prototypes"}, "row a: prototypes are trained uniform rows; 1 with"),
        ({"ratio": 2, "measure": "prototypes"}, "row a: prototypes are trained uniform rows; 1 with"),
    ],
)
def test_rows_that_would_fail_after_hours_are_refused(texts, row, message):
    data = {
        "title": "tiny",
        "text": {n: str(texts / f"{n}.txt") for n in ("train", "valid", "test")},
        "model": {"num_layers": 1, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "context": 16},
        "full": {"context": 16},
        "quantize": {"train": {"context": 16}},
        "rows": [{"name": "uniform-4", "spec": "4"}, {"name": "a", **row}],
    }
    with pytest.raises(SpecError, match=message):
        plan(ExperimentSettings.model_validate(data))


def test_seeds_are_checked():
    data = {"title": "t", "text": {"train": "a", "valid": "b", "test": "c"}, "rows": [{"name": "a", "spec": "2"}]}
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        ExperimentSettings.model_validate(data | {"seeds": [0, -1]})

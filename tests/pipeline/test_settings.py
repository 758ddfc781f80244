"""Recipes: what is read, what is overridden, and one clear error for everything else."""

from pathlib import Path

import pytest
import yaml

from mixbits.errors import DataError, SpecError
from mixbits.lm.train_settings import TrainSettings
from mixbits.pipeline.settings import ExperimentSettings, QuantizeSettings, load_experiment, portable, validate

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RECIPE = {
    "title": "tiny",
    "text": {"train": "${TEXT_FOLDER}/train.txt", "valid": "v", "test": "t"},
    "rows": [{"name": "uniform-2", "spec": "2"}, {"name": "learned", "ratio": 16}],
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXT_FOLDER", "/data")
    path = tmp_path / "recipe.yaml"

    def write(**changes):
        path.write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf-8")
        return path

    return write


def test_defaults_variables_and_overrides(recipe):
    found = load_experiment(
        recipe(), ("full.epochs=2", "full.learning_rate=1e-4", "text.max_train_words=100", "seed=7")
    )
    assert isinstance(found, ExperimentSettings)
    assert found.text.train == ("/data/train.txt",)
    assert (found.full.epochs, found.full.learning_rate, found.text.max_train_words, found.seed) == (2, 1e-4, 100, 7)
    assert (found.quantize.train.teacher_weight, found.quantize.train.dropout) == (1.0, "off")
    assert found.rows[1].ratio == 16


def test_a_group_given_in_part_keeps_its_other_defaults(recipe):
    """Also by an override where the recipe has none of the group, and in a row; what is given is left as it is."""
    whole = load_experiment(recipe()).quantize
    asked = {"epochs": 5.0, "batch_size": 4}
    in_part = load_experiment(recipe(quantize={"train": asked})).quantize
    assert in_part == whole.model_copy(update={"train": whole.train.model_copy(update=asked)})
    assert (in_part.train.dropout, in_part.train.teacher_weight, in_part.train.learning_rate) == ("off", 1.0, 1.5e-3)
    assert load_experiment(recipe(), ("quantize.train.epochs=5", "quantize.train.batch_size=4")).quantize == in_part
    row = {"name": "a", "spec": "2", "quantize": {"train": asked}}
    assert load_experiment(recipe(rows=[row])).rows[0].settings(whole) == in_part
    given = TrainSettings(epochs=5)
    assert QuantizeSettings(train=given).train == given
    assert QuantizeSettings.model_validate(in_part.model_dump()) == in_part
    with pytest.raises(SpecError, match=r"quantize\.train: "):
        load_experiment(recipe(quantize={"train": 3}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, monkeypatch):
    monkeypatch.setenv("MIXBITS_DATA", "/data")
    for name in ("MIXBITS_DEMO", "SWBD_DATA"):
        monkeypatch.setenv(name, "/data")
    assert load_experiment(path).rows


def test_paths_in_results_name_the_variable_and_nothing_else_does(monkeypatch):
    monkeypatch.setenv("MIXBITS_DATA", "/data/")
    monkeypatch.setenv("MIXBITS_THREADS", "1")
    given = {
        "train": ["/data/ptb/a.txt", "/database"],
        "valid": "/data",
        "specs": ("1-row-s8", "1.58", "1"),
        "epochs": 1,
    }
    assert portable(given) == {
        "train": ["${MIXBITS_DATA}/ptb/a.txt", "/database"],
        "valid": "${MIXBITS_DATA}",
        "specs": ["1-row-s8", "1.58", "1"],
        "epochs": 1,
    }


def test_unset_variable(recipe, monkeypatch):
    path = recipe()
    monkeypatch.delenv("TEXT_FOLDER")
    with pytest.raises(DataError, match=r"text\.train: environment variable TEXT_FOLDER is not set"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("full.epochs", "not key=value"),
        ("full.epoch=3", r"full\.epoch: Extra inputs"),
        ("nosuch.a=1", "nosuch: Extra inputs"),
        ("title.a=1", "'title' is not a group"),
        ("full.epochs=[1", "value cannot be read"),
        ("full.epochs=fast", r"full\.epochs: "),
        ("full.epochs=.inf", r"full\.epochs: "),
        ("full.learning_rate=.nan", r"full\.learning_rate: "),
        ("full.epochs=0", r"full\.epochs: .*greater than 0"),
        ("full.seed=-1", r"full\.seed: "),
        ("full.precision=float16", r"full\.precision: "),
        ("full.context=64", "must be the same number"),
        ("model.preset=gpt", r"model\.preset: "),
        ("model.hidden_size=250", "not a multiple of num_heads"),
        ("measure.num_probes=0", r"measure\.num_probes: "),
    ],
)
def test_bad_overrides(recipe, override, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_experiment(recipe(), (override,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a"}], "exactly one of 'spec'"),
        ([{"name": "a", "spec": "2", "ratio": 3}], "exactly one of 'spec'"),
        ([{"name": "a", "spec": "2"}, {"name": "a", "spec": "4"}], "differ from each other"),
        ([{"name": "full", "spec": "2"}], "differ from each other and from full"),
        ([{"name": "../a", "spec": "2"}], "name"),
        ([{"name": "a", "ratio": -1}], "greater than 0"),
    ],
)
def test_bad_rows(recipe, rows, message):
    with pytest.raises(SpecError, match=message):
        load_experiment(recipe(rows=rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not a YAML file"),
        (b"\xff\xfe", "not a YAML file"),
        (b"- 1\n", "expected a YAML mapping"),
        (b"", "mapping"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load_experiment(tmp_path / "r.yaml")
    with pytest.raises(DataError, match="no such recipe"):
        load_experiment(tmp_path / "other.yaml")


def test_every_wrong_key_is_named_in_one_line():
    with pytest.raises(SpecError) as caught:
        validate(TrainSettings, {"epochs": -1, "batch": 3, "schedule": "step"}, where="here")
    text = str(caught.value)
    assert text.startswith("here: ")
    assert all(key in text for key in ("epochs: ", "batch: ", "schedule: "))
    assert "\n" not in text

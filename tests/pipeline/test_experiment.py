"""A whole recipe on a tiny language: run, run again, killed and resumed, changed settings, equal bytes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mixbits.asr.formats.jsonl import write_nbest
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.errors import DataError, SpecError
from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import from_nll
from mixbits.pipeline import experiment
from mixbits.pipeline.experiment import baseline_name, run_experiment
from mixbits.pipeline.manifest import verify_manifest
from mixbits.pipeline.measuring import Measuring, prototype_rows
from mixbits.pipeline.rows import TrainedRow
from mixbits.pipeline.settings import ExperimentSettings, load_experiment
from mixbits.pipeline.summarize import _bit_notes, equal_bytes, equal_bytes_rows
from mixbits.runs import read_json, read_summary
from mixbits.spec import BitAllocation, QuantSpec

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TRAIN = {"batch_size": 8, "context": 16, "precision": "float32"}


def recipe(texts, **changes):
    data = {
        "title": "tiny",
        "text": {n: str(texts / f"{n}.txt") for n in ("train", "valid", "test")},
        "model": {
            "num_layers": 1, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "context": 16, "dropout": 0.0,
        },
        "full": {**TRAIN, "epochs": 4, "learning_rate": 1e-2},
        "quantize": {
            "train": {**TRAIN, "epochs": 1, "learning_rate": 3e-3, "teacher_weight": 0.5},
            "refine_epochs": 0.4, "refine_learning_rate": 1e-3, "admm": {"num_updates": 10},
        },
        "measure": {"num_probes": 2, "num_blocks": 4},
        "rows": [
            {"name": "uniform-1", "spec": "1"},
            {"name": "uniform-4", "spec": "4"},
            {"name": "learned", "ratio": 2.5},
            {"name": "learned-admm", "ratio": 2.5, "method": "admm"},
            {"name": "learned-large", "ratio": 1.2},
        ],
    }  # fmt: skip
    return ExperimentSettings.model_validate(data | changes)


def lists(name, texts, seed):
    """n-best lists: the right sentence and two with a word exchanged, in any order."""
    rng, result = np.random.default_rng(seed), []
    for i, text in enumerate(texts):
        words = text.split()
        wrong = [" ".join([*words[:k], words[k - 1], *words[k + 1 :]]) for k in (1, len(words) - 1)]
        found = [Hypothesis(t, float(rng.normal())) for t in (text, *wrong)]
        found.sort(key=lambda h: -h.acoustic_score)
        result.append(NBest(f"{name}-{i}", tuple(found), text, f"{name}-s{i % 8}"))
    return result


@pytest.fixture(scope="module")
def speech(texts, sentences_of):
    write_nbest(texts / "dev.jsonl", lists("dev", sentences_of(25, 11), 11))
    write_nbest(texts / "heard.jsonl", lists("heard", sentences_of(25, 12), 12))
    return {
        "dev": str(texts / "dev.jsonl"),
        "test": {"test": str(texts / "heard.jsonl")},
        "ngram": {"order": 2, "weight": 0.3},
    }


def numbers(path):
    """A summary without what depends on the clock, the machine or an interruption."""
    data = read_json(path)
    data.pop("versions")
    for row in data["rows"]:
        row.pop("train_seconds", None)
    return data


@pytest.fixture(scope="module")
def finished(texts, speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    settings = recipe(texts, speech=speech)
    return settings, run_experiment(settings, folder, command="test", show_progress=False)


def test_the_summary(finished, texts):
    settings, path = finished
    summary = read_summary(path)  # checks itself
    names = [row.name for row in summary.rows]
    assert names[0] == "first-pass"
    models = ["full", "full-continued", *(row.name for row in settings.rows)]
    mixed = [f"{name}+ngram" for name in models]
    assert [n for n in names if not n.startswith("first-pass")] == ["ngram", *models, *mixed]
    assert summary.asr["ngram"] == {"order": 2, "mode": "interpolate", "weight": 0.3}
    assert all(summary.row(name).bytes is None and summary.row(name).wer is not None for name in mixed)
    full = summary.row("full")
    assert (full.bits_per_weight, full.ratio) == (32, 1)
    assert full.ppl < 20  # of 26 words
    assert full.ppl == pytest.approx(math.exp(full.nats))
    for row in settings.rows:
        found = summary.row(row.name)
        file = path.parent / row.name / "model" / "model.safetensors"
        assert found.bytes == file.stat().st_size
        assert found.ratio == pytest.approx(full.bytes / found.bytes)
        assert found.bits_per_weight == pytest.approx(32 / found.ratio)
        assert found.method == (row.method or "straight-through")
        assert found.epochs in (1, 1.4)
        assert found.train_seconds > 0
        assert found.wer is not None
        if row.ratio:
            assert found.ratio >= row.ratio
    base = summary.row(summary.baseline)
    assert (base.delta_nats, base.delta_nats_stderr) == (0, 0)
    assert base.valid_ppl == min(full.valid_ppl, summary.row("full-continued").valid_ppl)
    for row in summary.rows:
        if row.nats is not None:
            assert row.delta_nats == pytest.approx(row.nats - base.nats, abs=1e-6)
    assert set(summary.allocations["uniform-1"].values()) == {
        "1-papers-row",
        "4-papers-row",
    }  # positions have four bits
    assert summary.row("uniform-1").extra["grid"] == ["1-papers-row", "4-papers-row"]
    assert verify_manifest(path.parent) == []
    assert set(summary.unit_weights) == set(summary.allocations["learned"]) == set(summary.sensitivity["units"])
    entries = {e["name"]: e for e in summary.equal_bytes}
    assert entries["learned"]["neighbours"] == ["uniform-1", "uniform-4"]
    assert entries["learned-admm"] == {
        "name": "learned-admm", "neighbours": [],
        "verdict": "no uniform row was trained as this one was (admm, 1 epochs, from full)",
    }  # fmt: skip
    assert "no uniform rows on both sides" in entries["learned-large"]["verdict"]
    assert summary.asr["lists"]["test"]["utterances"] == 25
    assert any("admm_primal" in e for e in read_json(path)["training_logs"]["learned-admm"])


def test_again_is_instant_and_the_same(finished, monkeypatch):
    settings, path = finished
    before = {p: p.stat().st_mtime_ns for p in path.parent.rglob("*") if p.is_file()}
    expected = numbers(path)
    for name in ("train_and_pack", "perplexity"):
        monkeypatch.setattr(experiment, name, lambda *a, **k: pytest.fail("must not be called"))
    monkeypatch.setattr("mixbits.pipeline.measuring.measure_stream", lambda *a, **k: pytest.fail("must not measure"))
    monkeypatch.setattr("mixbits.pipeline.train.train_model", lambda *a, **k: pytest.fail("must not train"))
    run_experiment(settings, path.parent, command="test", show_progress=False)
    assert numbers(path) == expected
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"summary.json", "settings.json", "manifest.json"}


def test_from_nothing_gives_the_same(finished, texts, tmp_path):
    """Determinism for a seed; without speech lists, the rows after ``learned`` left out."""
    _, path = finished
    settings = recipe(texts, rows=[{"name": "uniform-1", "spec": "1"}, {"name": "learned", "ratio": 2.5}])
    again = read_summary(run_experiment(settings, tmp_path / "again", show_progress=False))
    expected = read_summary(path)
    for name in ("full", "full-continued", "uniform-1", "learned"):
        mine, theirs = again.row(name), expected.row(name)
        for field in ("bytes", "nats", "ppl_stderr", "valid_ppl", "delta_nats"):
            assert getattr(mine, field) == getattr(theirs, field), (name, field)
    other = recipe(texts, rows=[], seed=1)
    different = read_summary(run_experiment(other, tmp_path / "other", show_progress=False))
    assert different.row("full").nats != expected.row("full").nats


class Killed(Exception):
    """Stands for SIGKILL."""


def test_killed_three_times_and_resumed(finished, texts, tmp_path, monkeypatch):
    from mixbits.lm.train import LMTrainer

    _, path = finished
    settings = recipe(texts, rows=[{"name": "learned", "ratio": 2.5}])
    real = LMTrainer.training_step
    for place, step in (("full", 40), ("full-continued", 5), ("codes", 12), ("refine", 3)):

        def dies(self, *args, place=place, step=step, **kwargs):
            if place in Path(self.args.output_dir).parts and self.state.global_step == step:
                raise Killed
            return real(self, *args, **kwargs)

        monkeypatch.setattr(LMTrainer, "training_step", dies)
        with pytest.raises(Killed):
            run_experiment(settings, tmp_path / "killed", show_progress=False)
        assert not (tmp_path / "killed" / "summary.json").exists()
    monkeypatch.undo()
    got = read_summary(run_experiment(settings, tmp_path / "killed", show_progress=False))
    expected = read_summary(path)
    for name in ("full", "full-continued", "learned"):
        mine, theirs = got.row(name), expected.row(name)
        for field in ("bytes", "nats", "ppl_stderr", "valid_ppl", "delta_nats", "epochs"):
            assert getattr(mine, field) == getattr(theirs, field), (name, field)
        assert mine.train_seconds is None  # not known for a row that was interrupted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full": {**TRAIN, "epochs": 5, "learning_rate": 1e-2}}, r"other settings \(full\)"),
        ({"vocabulary": {"max_words": 10}}, r"other settings \(vocabulary\)"),
        ({"seed": 3}, r"other settings \(seed\)"),
        ({"measure": {"num_probes": 3, "num_blocks": 4}}, r"other settings \(measure\)"),
        ({"rows": [{"name": "learned", "ratio": 2.0}]}, r"other settings \(row learned\)"),
    ],
)
def test_other_settings_in_the_same_folder(finished, texts, change, message):
    _, path = finished
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match=message):
        run_experiment(recipe(texts, **change), path.parent, show_progress=False)
    assert before == {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}


def test_other_text_in_the_same_folder(finished, texts, tmp_path):
    settings, path = finished
    words = (texts / "train.txt").read_text()
    (tmp_path / "more.txt").write_text(words + "the big dog sees a cat\n")
    text = settings.text.model_copy(update={"train": (str(tmp_path / "more.txt"),)})
    before = (path.parent / "full" / "row.json").read_bytes()
    with pytest.raises(DataError, match="full: holds a model made with other settings or data"):
        run_experiment(settings.model_copy(update={"text": text}), path.parent, show_progress=False)
    assert (path.parent / "full" / "row.json").read_bytes() == before


def test_refused_before_anything_is_trained(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "train_full", lambda *a, **k: pytest.fail("must not train"))

    def attempt(error, message, **changes):
        with pytest.raises(error, match=message):
            run_experiment(recipe(texts, **changes), tmp_path / "run", show_progress=False)
        assert not (tmp_path / "run").exists()

    attempt(SpecError, "cannot be met: the smallest file possible", rows=[{"name": "learned", "ratio": 100}])
    attempt(SpecError, "bit width 5", rows=[{"name": "uniform-5", "spec": "5"}])
    attempt(
        DataError, r"dev\.nowhere\.jsonl: no such", speech={"dev": "dev.nowhere.jsonl", "test": {"test": "x.jsonl"}}
    )
    (tmp_path / "foreign.txt").write_text("der kleine hund sieht einen alten vogel\n" * 40)
    files = {n: str(texts / f"{n}.txt") for n in ("train", "valid")}
    attempt(DataError, "text.test: .* unknown", text={**files, "test": str(tmp_path / "foreign.txt")})


def test_the_baseline_is_chosen_on_validation(tmp_path):
    def rows(full, continued):
        values = {"full": full, "full-continued": continued}
        return {n: TrainedRow(tmp_path, {"valid_nats": v}) for n, v in values.items()} | {
            "learned": TrainedRow(tmp_path, {"valid_nats": 0.0})
        }

    assert baseline_name(rows(4.0, 3.9)) == "full-continued"
    assert baseline_name(rows(3.9, 4.0)) == "full"
    assert baseline_name(rows(4.0, 4.0)) == "full"


def stream_of(num_sentences, length):
    sentence = np.repeat(np.arange(num_sentences, dtype=np.int32), length)
    ids = np.zeros(len(sentence) + 1, np.int32)
    return TokenStream(ids, sentence, len(sentence), 0, "00")


class TestEqualBytes:
    stream = stream_of(50, 4)
    sizes = {"u1": 100, "u2": 200, "u4": 400, "learned": 250}  # noqa: RUF012

    def results(self, learned):
        rng = np.random.default_rng(0)
        base = rng.uniform(1, 3, 200).astype(np.float32)
        nll = {"u1": base + 1.0, "u2": base + 0.6, "u4": base + 0.2, "learned": learned(base, rng)}
        return {n: from_nll(v.astype(np.float32), self.stream, context=8, stride=4) for n, v in nll.items()}

    def entry(self, values, **sizes):
        return equal_bytes("learned", self.sizes | sizes, self.results(values), ["u1", "u2", "u4"], self.stream)

    def test_against_hand_computation(self):
        # A quarter of the way from 200 to 400 bytes: 0.75 * 0.6 + 0.25 * 0.2 = 0.5 above the base.
        found = self.entry(lambda base, rng: base + 0.3 + rng.normal(0, 0.01, 200))
        results = self.results(lambda base, rng: base + 0.3 + rng.normal(0, 0.01, 200))
        expected = 0.75 * results["u2"].nats_per_token + 0.25 * results["u4"].nats_per_token
        assert found["interpolated_nats"] == pytest.approx(expected, abs=1e-6)
        assert found["delta_nats"] == pytest.approx(-0.2, abs=0.005)
        assert found["neighbours"] == ["u2", "u4"]
        difference = results["learned"].nll - (0.75 * results["u2"].nll + 0.25 * results["u4"].nll)
        means = difference.reshape(50, 4).mean(1)  # sentences of equal length: the plain standard error of their means
        assert found["delta_nats_stderr"] == pytest.approx(means.std(ddof=1) / math.sqrt(50), rel=1e-3)
        assert found["verdict"].startswith("learned bits are better")
        assert f"{100 * math.expm1(found['delta_nats']):.2f} % perplexity" in found["verdict"]

    def test_worse(self):
        found = self.entry(lambda base, rng: base + 0.7 + rng.normal(0, 0.01, 200))
        assert found["verdict"].startswith("learned bits are not better")

    def test_undecided(self):
        found = self.entry(lambda base, rng: base + 0.5 + rng.normal(0, 1.0, 200))
        assert abs(found["delta_nats"]) < 2 * found["delta_nats_stderr"]
        assert "cannot be told apart" in found["verdict"]

    @pytest.mark.parametrize("size", [99, 401])
    def test_out_of_range(self, size):
        found = self.entry(lambda base, rng: base, learned=size)
        assert found == {
            "name": "learned", "neighbours": [], "verdict": f"no uniform rows on both sides of {size} bytes",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("own", "neighbours"),
        [
            ({}, ["u2", "u4"]),
            ({"quantize": {"scales": "learned", "admm": {"num_updates": 3}}}, ["u2", "u4"]),  # the default; not read
            ({"quantize": {"scales": "follow"}}, ["u2-scales", "u4-scales"]),
            ({"quantize": {"train": {"epochs": 9}}}, ["u2-long", "u4-long"]),
            ({"method": "admm"}, ["u2-admm", "u4-admm"]),
            ({"method": "admm", "quantize": {"admm": {"num_updates": 3}}}, []),
            ({"start": "prototypes"}, []),
        ],
    )
    def test_only_rows_trained_alike_are_compared(self, own, neighbours, texts):
        kinds = {
            "": {}, "-scales": {"quantize": {"scales": "follow"}}, "-long": {"quantize": {"train": {"epochs": 9}}},
            "-admm": {"method": "admm"},
        }  # fmt: skip
        rows = [{"name": f"u{b}{kind}", "spec": str(b), **how} for kind, how in kinds.items() for b in (2, 4)]
        settings = recipe(texts, rows=[*reversed(rows), {"name": "learned", "ratio": 8, **own}])
        known = self.results(lambda base, rng: base + 0.3)
        sizes = {row.name: self.sizes[row.name.partition("-")[0]] for row in settings.rows}
        results = {row.name: known[row.name.partition("-")[0]] for row in settings.rows}
        (entry,) = equal_bytes_rows(settings, sizes, results, self.stream)
        assert entry["neighbours"] == neighbours
        assert ("no uniform row was trained as this one was" in entry["verdict"]) is (not neighbours)

    def test_seeds_that_disagree_leave_it_undecided(self):
        results = self.results(lambda base, rng: base + 0.4)  # 0.1 better than the curve, in every sentence alike
        shifts = {"u1": (0, 0, 0), "u2": (0, 0.04, -0.04), "u4": (0, 0.2, -0.2), "learned": (0.2, 0, -0.2)}
        by_seed = {
            n: [from_nll((results[n].nll + s).astype(np.float32), self.stream, context=8, stride=4) for s in shifts[n]]
            for n in results
        }
        once = equal_bytes("learned", self.sizes, results, ["u1", "u2", "u4"], self.stream)
        found = equal_bytes("learned", self.sizes, results, ["u1", "u2", "u4"], self.stream, by_seed)
        assert once["verdict"].startswith("learned bits are better")
        deltas = [0.2, -0.75 * 0.04 - 0.25 * 0.2, -0.2 + 0.75 * 0.04 + 0.25 * 0.2]
        assert found["delta_nats_seed_stderr"] == pytest.approx(np.std(deltas, ddof=1) / math.sqrt(3), rel=1e-4)
        assert "cannot be told apart" in found["verdict"]
        assert {k: v for k, v in found.items() if k not in ("verdict", "delta_nats_seed_stderr")} == {
            k: v for k, v in once.items() if k != "verdict"
        }
        single = equal_bytes("learned", self.sizes, results, ["u2", "u4"], self.stream, dict.fromkeys(results, ()))
        assert single == once

    def test_exactly_a_uniform_size(self):
        found = self.entry(lambda base, rng: base + 0.6, learned=200)
        assert found["neighbours"] == ["u2", "u2"]
        assert found["delta_nats"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path, monkeypatch):
    for name in ("MIXBITS_DATA", "MIXBITS_DEMO", "SWBD_DATA"):
        monkeypatch.setenv(name, "/nowhere")
    settings = load_experiment(path)
    assert settings.rows
    assert json.dumps(settings.model_dump())
    for name in ("MIXBITS_DATA", "MIXBITS_DEMO", "SWBD_DATA"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match=r"environment variable (MIXBITS_D|SWBD_DATA)"):
        load_experiment(path)


def test_there_are_recipes():
    assert {"ptb-small"} <= {path.stem for path in RECIPES}


def test_the_first_uniform_row_with_the_default_settings_is_the_prototype(texts):
    rows = [
        {"name": "admm", "spec": "2", "method": "admm"},
        {"name": "started", "spec": "2", "start": "prototypes"},
        {"name": "first", "spec": "2", "method": "straight-through", "quantize": {"scales": "learned"}},
        {"name": "again", "spec": "2-half-step-row"},
        {"name": "four", "spec": "4"},
        {"name": "long", "spec": "4", "quantize": {"train": {"epochs": 9}}},
        {"name": "learned", "ratio": 2.2, "measure": "prototypes"},
    ]
    settings = recipe(texts, rows=rows)
    found = {"2-half-step-row": "first", "4-papers-row": "four"}
    assert {str(spec): row.name for spec, row in prototype_rows(settings).items()} == found
    trained = {row.name: TrainedRow(Path(row.name), {}) for row in settings.rows}
    run = Measuring(settings, None, None, None, Path(), trained)
    assert {str(spec): row.folder.name for spec, row in run.uniform_rows().items()} == found
    assert [row.name for row in sorted(settings.rows, key=experiment._turn)][-2:] == ["started", "learned"]
    with pytest.raises(SpecError, match="prototypes are trained uniform rows"):
        Measuring(settings, None, None, None, Path(), {"four": trained["four"]}).uniform_rows()


def test_what_is_doubtful_of_measuring_and_solving_is_noted():
    facts = {
        "unused_bytes": 7,
        "next_larger": {"bytes": 1007, "predicted_loss_increase_nats": 0.25, "proved_smallest": True},
        "negative_sensitivities_clamped_to_zero": ["fc1", "fc2"],
    }
    found = SimpleNamespace(
        measured={"hessian": SimpleNamespace(provenance={"warnings": ["one probe: the standard error is unknown"]})},
        allocations={
            "uniform-1": BitAllocation({"fc1": QuantSpec(1)}),
            "learned": BitAllocation({"fc1": QuantSpec(1)}, facts),
        },
    )
    assert _bit_notes(found) == [
        "hessian: one probe: the standard error is unknown.",
        "learned: 7 bytes stay unused; the next size that helps is 1,007 bytes (0.25 nats).",
        "learned: 2 unit(s) with a negative sensitivity counted as 0: fc1, fc2.",
    ]


def test_every_measure_learns_bits_and_seeds_are_averaged(texts, tmp_path):
    """Two seeds; bits learned by six measures, one of them shared by sublayers, one row started from the uniform ones."""
    train = {**TRAIN, "epochs": 0.2, "learning_rate": 3e-3, "teacher_weight": 1.0}
    specs = ["1-row-s8", "2-row-s8", "4-row-s8"]
    learned = [
        {"name": f"learned-{m}", "ratio": 2.2, "measure": m}
        for m in ("hessian", "fisher", "kl", "loss", "prototypes", "search")
    ]
    settings = recipe(
        texts,
        full={**TRAIN, "epochs": 2, "learning_rate": 1e-2},
        quantize={"train": train, "refine_epochs": 0},
        measure={"measure": "kl", "num_probes": 2, "num_blocks": 4, "specs": specs},
        search={"candidates": specs, "epochs": 0.2, "batch_size": 8, "precision": "float32"},
        compare_measures=["loss"],
        seeds=[3, 5],
        rows=[
            *({"name": f"uniform-{s[0]}", "spec": s} for s in specs),
            {"name": "uniform-2-proximal", "spec": specs[1], "method": "proximal"},
            {"name": "uniform-2-steps", "spec": specs[1], "quantize": {"progressive": [[0.3, 8]], "scales": "follow"}},
            *learned,
            {"name": "learned-search-program", "ratio": 2.2, "measure": "search", "choice": "integer-program"},
            {"name": "learned-sublayer", "ratio": 2.2, "granularity": "sublayer", "start": "prototypes"},
        ],
    )
    path = run_experiment(settings, tmp_path / "seeds", show_progress=False)
    summary, data = read_summary(path), read_json(path)
    assert data["seeds"] == [3, 5]
    assert set(data["measures"]) == {"kl", "hessian", "fisher", "loss", "prototypes", "search"}
    for name in ("hessian", "fisher", "kl"):
        for when in ("before", "after"):
            found = data["measures"][name][f"rank_correlation_{when}_training"]
            assert -1 <= found["spearman"] <= 1
        assert data["measures"][name]["cost_forward_backwards"] > 0
        assert data["measures"][name]["median_relative_stderr"] > 0
    base = summary.row(summary.baseline)
    for row in summary.rows:
        by_seed = row.extra["ppl_by_seed"]
        assert row.nats == pytest.approx(np.mean(np.log(by_seed)), abs=1e-5)
        assert row.delta_nats == pytest.approx(np.mean(row.extra["delta_nats_by_seed"]), abs=1e-5)
        spread = np.diff(row.extra["delta_nats_by_seed"])[0]
        assert row.extra["delta_nats_seed_stderr"] == pytest.approx(abs(spread) / 2)  # of two values
        if row.name.startswith("learned"):
            assert row.ratio >= 2.2
    assert base.extra["delta_nats_seed_stderr"] == 0
    for unit in ("q_proj", "k_proj", "v_proj"):  # one spec for the attention block
        bits = summary.allocations["learned-sublayer"]
        name = f"model.decoder.layers.0.self_attn.{unit}"
        assert bits[name] == bits["model.decoder.layers.0.self_attn.out_proj"]
    for seed in (3, 5):
        assert verify_manifest(path.parent / f"seed-{seed}") == []
        assert read_json(path.parent / f"seed-{seed}" / "settings.json")["full"]["seed"] == seed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"name": "a", "ratio": 3, "measure": "prototypes"}]}, "no specs|at least two rows"),
        ({"rows": [{"name": "a", "spec": "2", "measure": "kl"}]}, "row 'a' is uniform"),
        ({"rows": [{"name": "a", "spec": "2", "quantize": {"train": {"epochz": 1}}}]}, "epochz"),
        (
            {"rows": [{"name": "a", "spec": "2", "method": "admm", "quantize": {"progressive": [[0.3, 8]]}}]},
            "progressive",
        ),
        ({"seeds": [1, 1]}, "each may be there once"),
        ({"rows": [{"name": "a", "spec": "0.5-product-v16", "method": "admm"}]}, "admm needs grids of levels"),
    ],
)
def test_rows_that_make_no_sense_are_refused_before_training(texts, tmp_path, change, message):
    with pytest.raises((SpecError, ValueError), match=message):
        run_experiment(recipe(texts, **change), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run" / "full").exists()

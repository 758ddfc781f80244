"""Quantized training of a tiny model on a tiny language, packed, loaded back."""

import json

import pytest
import torch

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.lm.checkpoint import load_model
from mixbits.lm.corpus import encode_file
from mixbits.lm.perplexity import perplexity
from mixbits.lm.train import TrainSettings
from mixbits.pipeline import quantize
from mixbits.pipeline.quantize import pack, quantize_model, round_to_nearest, train_quantized
from mixbits.pipeline.settings import QuantizeSettings
from mixbits.quant.grid import dequantize
from mixbits.quant.method import stored_weights, trained_units
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, predicted_bytes


def settings(method="straight-through", *, epochs=1.0, refine_epochs=0.5, **more):
    train = TrainSettings(
        epochs=epochs, batch_size=8, context=16, learning_rate=3e-3, teacher_weight=0.5, precision="float32"
    )
    return QuantizeSettings(
        method=method,
        train=train,
        refine_epochs=refine_epochs,
        refine_learning_rate=1e-3,
        admm={"num_updates": 10},
        **more,
    )


def mixed(inventory):
    widths = (2, 1.58, 1, 4, 3, 8, 16)
    return BitAllocation({u.name: QuantSpec(widths[i % 7]) for i, u in enumerate(inventory.units)})


@pytest.fixture(scope="module")
def streams(texts, trained):
    tokenizer = load_model(trained)[1]
    return [encode_file(tokenizer, texts / f"{name}.txt") for name in ("train", "valid", "test")]


@pytest.mark.parametrize("method", ["straight-through", "admm", "proximal"])
def test_from_training_to_a_loaded_file(tmp_path, trained, streams, method):
    train, valid, test = streams
    model, tokenizer = load_model(trained)
    teacher = load_model(trained)[0]
    teacher_before = {k: v.clone() for k, v in teacher.state_dict().items()}
    inventory = find_units(model)
    allocation = mixed(inventory)
    rounded = load_model(trained)[0]
    coarse = round_to_nearest(rounded, allocation)
    with stored_weights(rounded, trained_units(rounded, inventory, allocation), coarse):
        start = perplexity(rounded, valid, context=16).nats_per_token

    weights, record = train_quantized(
        model, train, valid, allocation, settings(method), tmp_path / "work", teacher=teacher, show_progress=False
    )
    model.eval()
    assert set(weights) == {u for u, s in allocation.specs.items() if s.is_quantized}
    assert record["epochs"] in (1.0, 1.5)
    assert record["steps"] > 10
    assert {"valid_nats", "refine_valid_nats", "log"} <= set(record)
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    for unit in trained_units(model, inventory, allocation):
        assert torch.equal(unit.matrix, dequantize(weights[unit.name]))  # the model holds what is stored

    saved = pack(model, tokenizer, allocation, weights, tmp_path / "packed")
    assert saved.file_bytes == predicted_bytes(inventory, allocation)
    loaded, _ = load_model(tmp_path / "packed")
    with stored_weights(model, trained_units(model, inventory, allocation), weights):
        expected = perplexity(model, test, context=16)
        on_valid = perplexity(model, valid, context=16).nats_per_token
    got = perplexity(loaded, test, context=16)
    assert got.nats_per_token == pytest.approx(expected.nats_per_token, abs=1e-6)
    torch.testing.assert_close(torch.tensor(got.nll), torch.tensor(expected.nll), rtol=1e-5, atol=1e-5)
    assert on_valid < start  # training helped against rounding
    if method == "admm":
        figures = [e for e in record["log"] if "admm_primal" in e]
        assert len(figures) == 10
        assert all(0 < e["admm_primal"] < 1 and e["admm_gamma"] > 0 for e in figures)


def test_refinement_that_does_not_help_is_rolled_back(tmp_path, trained, streams, monkeypatch):
    train, valid, _ = streams
    allocation = mixed(find_units(load_model(trained)[0]))

    def run(folder, **kwargs):
        model, _ = load_model(trained)
        return model, *train_quantized(
            model, train, valid, allocation, settings(**kwargs), folder, teacher=None, show_progress=False
        )

    plain, plain_weights, plain_record = run(tmp_path / "plain", refine_epochs=0)
    real = quantize.train_model

    def worse(model, *args, **kwargs):
        found = real(model, *args, **kwargs)
        return {**found, "valid_nats": 99.0} if "refine" in kwargs["title"] else found

    monkeypatch.setattr(quantize, "train_model", worse)
    model, weights, record = run(tmp_path / "rolled", refine_epochs=0.5)
    assert record["refine_valid_nats"] == 99.0
    assert (record["valid_nats"], record["epochs"]) == (plain_record["valid_nats"], plain_record["epochs"])
    for name, weight in plain_weights.items():
        assert torch.equal(weights[name].codes, weight.codes)
        assert torch.equal(weights[name].scales, weight.scales)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("method", ["straight-through", "admm"])
@pytest.mark.parametrize("stage", ["codes", "refine"])
def test_killed_and_resumed_gives_the_same(tmp_path, trained, streams, monkeypatch, method, stage):
    from mixbits.lm.train import LMTrainer

    train, valid, _ = streams
    allocation = mixed(find_units(load_model(trained)[0]))

    def run(folder):
        model, _ = load_model(trained)
        weights, record = train_quantized(
            model, train, valid, allocation, settings(method, epochs=2, refine_epochs=2), folder,
            teacher=None, show_progress=False,
        )  # fmt: skip
        return weights, record, model

    expected = run(tmp_path / "whole")
    real, count = LMTrainer.training_step, [0]

    def dies(self, *args, **kwargs):
        if ("refine" in str(self.args.output_dir)) == (stage == "refine"):
            count[0] += 1
            if count[0] == self.state.max_steps - 3:  # after the first epoch's checkpoint
                raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", dies)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.undo()
    got = run(tmp_path / "killed")
    for name, weight in expected[0].items():
        assert torch.equal(got[0][name].codes, weight.codes)
        assert torch.equal(got[0][name].scales, weight.scales)
    for (name, p), q in zip(got[2].named_parameters(), expected[2].parameters(), strict=True):
        assert torch.equal(p, q), name
    assert got[1]["valid_nats"] == expected[1]["valid_nats"]
    assert got[1]["steps"] == expected[1]["steps"]


def test_all_units_at_16_bits_train_nothing(tmp_path, trained, streams):
    model, _ = load_model(trained)
    allocation = BitAllocation.uniform(find_units(model), QuantSpec(16))
    weights, record = train_quantized(model, *streams[:2], allocation, settings(), tmp_path, show_progress=False)
    assert weights == {}
    assert record["steps"] == 0


def write_allocation(path, specs):
    path.write_text(json.dumps({"format": "mixbits-allocation", "format_version": 1, "specs": specs}))
    return path


def test_quantize_model_rounds_without_text_and_trains_with_it(tmp_path, trained, texts, streams):
    test = streams[2]
    rounded = quantize_model(trained, tmp_path / "rounded", settings=settings(), spec="1.58")
    learned = quantize_model(
        trained, tmp_path / "trained", settings=settings(), spec="1.58", text=texts / "train.txt",
        valid=texts / "valid.txt", show_progress=False,
    )  # fmt: skip
    assert rounded.file_bytes == learned.file_bytes
    assert not (tmp_path / "trained.work").exists()
    nats = {n: perplexity(load_model(tmp_path / n)[0], test, context=16).nats_per_token for n in ("rounded", "trained")}
    assert nats["trained"] < nats["rounded"]


def test_allocations_that_do_not_fit(tmp_path, trained):
    good = {u.name: "2" for u in find_units(load_model(trained)[0]).units}
    first = next(iter(good))
    cases = {
        "unknown unit": ({**good, "model.nowhere": "2"}, SpecError, "unknown unit.*model.nowhere"),
        "missing unit": ({k: v for k, v in good.items() if k != first}, SpecError, f"misses unit.*{first}"),
        "bad spec": ({**good, first: "5"}, SpecError, "bit width 5"),
        "specs not an object": ([1], FormatError, "'specs' is missing"),
    }
    for name, (specs, error, message) in cases.items():
        path = write_allocation(tmp_path / f"{name}.json", specs)
        with pytest.raises(error, match=message):
            quantize_model(trained, tmp_path / "out", settings=settings(), allocation=path)
    for name, text, message in (
        ("not json", "{", "not JSON"),
        ("empty", "", "is empty"),
        ("other json", "[]", "not a mixbits allocation"),
        ("newer", '{"format": "mixbits-allocation", "format_version": 9, "specs": {}}', "format_version is 9"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match=message):
            quantize_model(trained, tmp_path / "out", settings=settings(), allocation=tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        quantize_model(trained, tmp_path / "out", settings=settings(), allocation=tmp_path / "missing.json")
    with pytest.raises(SpecError, match="exactly one of"):
        quantize_model(trained, tmp_path / "out", settings=settings())
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_is_not_destroyed(tmp_path, trained):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not a model directory"):
            quantize_model(trained, tmp_path / "photos", settings=settings(), spec="2", overwrite=overwrite)
        with pytest.raises(DataError, match="is the model itself"):
            quantize_model(trained, trained, settings=settings(), spec="2", overwrite=overwrite)
    assert (tmp_path / "photos" / "me.jpg").exists()
    quantize_model(trained, tmp_path / "out", settings=settings(), spec="2")
    with pytest.raises(DataError, match="--overwrite"):
        quantize_model(trained, tmp_path / "out", settings=settings(), spec="4")
    done = quantize_model(trained, tmp_path / "out", settings=settings(), spec="4", overwrite=True)
    assert done.bits_per_weight > 4
    with pytest.raises(DataError, match="is quantized already"):
        quantize_model(tmp_path / "out", tmp_path / "again", settings=settings(), spec="2")


def test_a_model_with_nan_is_named(tmp_path, make_model):
    def spoil(model):
        model.model.decoder.layers[0].fc1.weight.data[3, 4] = float("nan")

    broken = make_model(tmp_path / "broken", change=spoil)
    with pytest.raises(DataError, match=r"layers\.0\.fc1\.weight has NaN"):
        quantize_model(broken, tmp_path / "out", settings=settings(), spec="2")


def test_text_that_does_not_fit_the_vocabulary(tmp_path, trained, texts, caplog):
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("der kleine hund sieht einen alten vogel\n" * 400)
    arguments = {"settings": settings(), "spec": "2", "valid": texts / "valid.txt", "show_progress": False}
    with pytest.raises(DataError, match=r"foreign\.txt: \d+ % of its words are unknown"):
        quantize_model(trained, tmp_path / "out", text=foreign, **arguments)
    half = tmp_path / "half.txt"
    half.write_text("the small xyz sees xyz dog\n" * 100)
    quantize_model(trained, tmp_path / "out", text=half, **arguments)
    assert "words are unknown" in caplog.text
    short = tmp_path / "short.txt"
    short.write_text("the cat\n")
    with pytest.raises(DataError, match="less than one block"):
        quantize_model(trained, tmp_path / "out2", text=short, **arguments)

"""``mixbits.compress`` end to end on tiny models of four families."""

import dataclasses
import os
import re

import pytest
import torch

import mixbits
from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model
from mixbits.lm.corpus import encode_file
from mixbits.lm.perplexity import perplexity
from mixbits.lm.train import TrainSettings
from mixbits.pipeline import compress as module
from mixbits.pipeline import quantize
from mixbits.pipeline.manifest import verify_manifest
from mixbits.pipeline.rows import TrainedRow
from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings
from mixbits.quant.guard import uniform_allocations
from mixbits.quant.units import find_units
from mixbits.runs import read_json
from mixbits.spec import BitAllocation, QuantSpec, parse_specs, predicted_bytes

MEASURE = MeasureSettings(measure="hessian", num_probes=2, num_blocks=4, specs=("1", "1.58", "2", "3", "4", "8"))


def quick(method="straight-through", **more):
    train = TrainSettings(epochs=0.3, batch_size=8, learning_rate=3e-3, teacher_weight=0.5, precision="float32")
    return QuantizeSettings(method=method, train=train, refine_epochs=0.2, admm={"num_updates": 5}, **more)


def run(model, texts, output, **kwargs):
    given = {"ratio", "max_bytes", "bits_per_weight"} & set(kwargs)
    defaults = {"quantize": quick(), "measure": MEASURE, "valid": texts / "valid.txt", "show_progress": False}
    if not given:
        defaults["bits_per_weight"] = 13.0
    return mixbits.compress(model, text=kwargs.pop("text", texts / "train.txt"), output=output, **(defaults | kwargs))


def test_the_whole_line_and_again(tmp_path, trained, texts, monkeypatch):
    out = tmp_path / "out"
    done = run(trained, texts, out, max_bytes=4600)
    size = os.path.getsize(out / "model.safetensors")
    full, tokenizer = load_model(trained)
    inventory = find_units(full)
    assert size == done.file_bytes == predicted_bytes(inventory, done.allocation) <= 4600
    assert done.compression_ratio == pytest.approx(4 * inventory.num_parameters / size)
    assert done.bits_per_weight == pytest.approx(8 * size / inventory.num_parameters)
    loaded = mixbits.load(out)
    stream = encode_file(tokenizer, texts / "test.txt")
    assert perplexity(loaded, stream, context=16).ppl < len(tokenizer)
    assert (out / "tokenizer.json").is_file()
    assert "straight-through" in (out / "README.md").read_text()
    kept = read_json(tmp_path / "out.work" / "allocation.json")
    assert kept["specs"] == {u: str(s) for u, s in done.allocation.specs.items()}

    # the same call again: at once, nothing loaded
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("must not load"))
    again = run(trained, texts, out, max_bytes=4600)
    assert dataclasses.asdict(again) == dataclasses.asdict(done) | {"record": again.record}
    assert again.record["bytes"] == size
    monkeypatch.undo()

    # another budget: refused without overwrite, and nothing changes; then solved from the same sensitivities
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        run(trained, texts, out, max_bytes=5200)
    assert (out / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(module, "measure_stream", lambda *a, **k: pytest.fail("must not measure"))
    larger = run(trained, texts, out, max_bytes=5200, overwrite=True)
    assert 4600 < larger.file_bytes <= 5200
    monkeypatch.setattr(module, "train_and_pack", lambda *a, **k: pytest.fail("must not train"))
    back = run(trained, texts, out, max_bytes=4600, overwrite=True)
    assert back.file_bytes == size
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.work"]
    assert not [p for p in (tmp_path / "out.work").iterdir() if p.name in ("copy.partial", "replaced")]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gpt2", "admm"),
        ("gpt2-untied", "straight-through"),
        ("llama", "straight-through"),
        ("llama-untied", "admm"),
        ("qwen3", "admm"),
        ("qwen3-untied", "straight-through"),
        ("opt-untied", "straight-through"),
    ],
)
def test_every_family_trains_and_loads(tmp_path, make_model, texts, family, method):
    name, _, untied = family.partition("-")
    model = make_model(tmp_path / "full", name, tied=not untied)
    done = run(model, texts, tmp_path / "out", bits_per_weight=16.0, quantize=quick(method))
    assert done.bits_per_weight <= 16.0
    assert done.record["steps"] > 0
    full, tokenizer = load_model(model)
    heads = [u for u in find_units(full).units if "lm_head" in (u.name, *u.tied)]
    assert len(heads) == 1
    assert bool(heads[0].tied) == (not untied)
    loaded = mixbits.load(tmp_path / "out")
    stream = encode_file(tokenizer, texts / "valid.txt")
    nats = perplexity(loaded, stream, context=16).nats_per_token
    assert nats == pytest.approx(done.record["valid_nats"], abs=0.2)  # windows differ, weights do not
    assert nats < perplexity(full, stream, context=16).nats_per_token  # from random weights, anything trained is better
    ids = loaded.generate(torch.tensor([[tokenizer.eos_token_id]]), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] >= 2


def test_rounding_only(tmp_path, trained, texts):
    done = run(trained, texts, tmp_path / "out", bits_per_weight=13.0, train=False)
    assert done.file_bytes == os.path.getsize(tmp_path / "out" / "model.safetensors")
    assert "round to nearest" in (tmp_path / "out" / "README.md").read_text()


def test_a_killed_run_goes_on(tmp_path, trained, texts, monkeypatch):
    whole = run(trained, texts, tmp_path / "whole", max_bytes=4600)
    real = quantize.pack
    monkeypatch.setattr(quantize, "pack", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(trained, texts, tmp_path / "out", max_bytes=4600)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(quantize, "pack", real)
    monkeypatch.setattr(module, "measure_stream", lambda *a, **k: pytest.fail("must not measure"))
    done = run(trained, texts, tmp_path / "out", max_bytes=4600)
    assert done.file_bytes == whole.file_bytes
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_impossible_budget_is_refused_before_measuring(tmp_path, trained, texts, monkeypatch):
    monkeypatch.setattr(module, "measure_stream", lambda *a, **k: pytest.fail("must not measure"))
    with pytest.raises(SpecError, match="cannot be met: the smallest file possible") as caught:
        run(trained, texts, tmp_path / "out", max_bytes=700)
    smallest = int(re.search(r"specs is (\d+) bytes", str(caught.value)).group(1))
    assert not (tmp_path / "out.work").exists()
    monkeypatch.undo()
    done = run(trained, texts, tmp_path / "out", max_bytes=smallest, train=False)  # it is the smallest: just possible
    assert done.file_bytes == smallest
    with pytest.raises(SpecError, match="cannot be met"):
        run(trained, texts, tmp_path / "out2", max_bytes=smallest - 1, train=False)
    with pytest.raises(SpecError, match="cannot be met"):
        run(trained, texts, tmp_path / "out2", ratio=1000.0)


def test_budgets_that_make_no_sense(tmp_path, trained, texts):
    with pytest.raises(SpecError, match="exactly one of ratio"):
        run(trained, texts, tmp_path / "out", ratio=4.0, max_bytes=4600)
    with pytest.raises(SpecError, match="exactly one of ratio"):
        mixbits.compress(trained, text=texts / "train.txt", output=tmp_path / "out")
    for ratio in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(SpecError):
            run(trained, texts, tmp_path / "out", ratio=ratio)


def test_what_is_in_the_way_is_not_destroyed(tmp_path, trained, texts):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="never overwritten"):
            run(trained, texts, tmp_path / "photos", overwrite=overwrite)
        with pytest.raises(DataError, match="is a file"):
            run(trained, texts, tmp_path / "file", overwrite=overwrite)
        with pytest.raises(DataError, match="the model itself"):
            run(trained, texts, trained, overwrite=overwrite)
    assert (tmp_path / "photos" / "me.jpg").exists()


def test_a_changed_output_is_not_taken_for_the_result(tmp_path, trained, texts):
    run(trained, texts, tmp_path / "out", max_bytes=4600, train=False)
    weights = tmp_path / "out" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8] + bytes(8))
    with pytest.raises(DataError, match="exists already"):
        run(trained, texts, tmp_path / "out", max_bytes=4600, train=False)
    run(trained, texts, tmp_path / "out", max_bytes=4600, train=False, overwrite=True)
    assert weights.read_bytes() == good


def test_bad_input(tmp_path, trained, texts, make_model, monkeypatch):
    monkeypatch.setattr(module, "measure_stream", lambda *a, **k: pytest.fail("must not measure"))

    def spoil(model):
        model.model.decoder.layers[0].fc2.bias.data[1] = float("inf")

    broken = make_model(tmp_path / "broken", change=spoil)
    with pytest.raises(DataError, match=r"fc2\.bias has NaN or infinite"):
        run(broken, texts, tmp_path / "out")
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("der kleine hund sieht einen alten vogel\n" * 400)
    with pytest.raises(DataError, match="unknown to the model's tokenizer"):
        run(trained, texts, tmp_path / "out", text=foreign)
    with pytest.raises(DataError, match="unknown to the model's tokenizer"):
        run(trained, texts, tmp_path / "out", valid=foreign)
    short = tmp_path / "short.txt"
    short.write_text("the cat sees the dog\n")
    with pytest.raises(DataError, match=r"short\.txt: 6 tokens are less than one block"):
        run(trained, texts, tmp_path / "out", valid=short)
    with pytest.raises(DataError, match=r"nothing\.txt"):
        run(trained, texts, tmp_path / "out", text=tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: holds no text"):
        run(trained, texts, tmp_path / "out", text=tmp_path / "empty.txt")
    for nowhere in (".", "/", ".."):
        with pytest.raises(DataError, match=r"not the name of a new folder"):
            run(trained, texts, nowhere)
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        run(trained, texts, tmp_path / "short.txt" / "out")
    with pytest.raises(DataError, match=r"nowhere: no config\.json; expected a Hugging Face model"):
        run(tmp_path / "nowhere", texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_uniform_bits_win_where_learned_ones_lose(tmp_path, trained, texts, monkeypatch):
    """The learned allocation is replaced by a foolish one: one bit for all but the biggest waste."""
    real = module.allocate

    def foolish(inventory, sensitivities, *, max_bytes):
        good = real(inventory, sensitivities, max_bytes=max_bytes)
        specs = {u.name: QuantSpec.parse("8" if u.is_position_table else "1") for u in inventory.units}
        return BitAllocation(specs, good.provenance)

    monkeypatch.setattr(module, "allocate", foolish)
    done = run(trained, texts, tmp_path / "out", max_bytes=6000)
    assert "loses to uniform" in done.guard
    assert done.guard.endswith("is returned")
    assert "1-papers-row" not in {str(s) for s in done.allocation.specs.values()}
    work = tmp_path / "out.work"
    assert read_json(work / "allocation.json")["specs"] == {u: str(s) for u, s in done.allocation.specs.items()}
    inputs = read_json(work / "manifest.json")["solver_inputs"]
    assert inputs["learned"]["solver_input_sha256"] is not None
    assert inputs["learned"]["specs_sha256"] != inputs["packed"]["specs_sha256"]
    assert done.file_bytes == os.path.getsize(tmp_path / "out" / "model.safetensors") <= 6000
    without = run(trained, texts, tmp_path / "out", max_bytes=6000, guard=False, overwrite=True)
    assert without.guard is None
    assert without.file_bytes < done.file_bytes
    assert without.record["valid_nats"] > done.record["valid_nats"]


def test_learned_bits_stand_where_they_win(tmp_path, trained, texts):
    done = run(trained, texts, tmp_path / "out", max_bytes=5200, train=False)  # rounding: deterministic and quick
    assert "learned bits" in done.guard
    again = run(trained, texts, tmp_path / "out", max_bytes=5200, train=False)
    assert again.guard == done.guard
    assert verify_manifest(tmp_path / "out.work") == []


def test_the_guard_says_so_where_there_is_nothing_to_compare_with(tmp_path, trained, texts):
    least = uniform_allocations(find_units(load_model(trained)[0]), parse_specs(["1"]), 10**9)[0]
    smallest = min(run_size(trained, spec) for spec in ("1", "2"))
    done = run(trained, texts, tmp_path / "out", max_bytes=smallest, train=False)
    assert done.guard == "the learned bits are uniform ones: uniform 1-papers-row, position tables too"
    assert done.file_bytes < least.provenance["predicted_bytes"]
    few = MeasureSettings(measure="hessian", num_probes=1, num_blocks=1, specs=("4", "8"))
    done = run(trained, texts, tmp_path / "few", max_bytes=9000, train=False, measure=few)
    assert any("one probe" in note for note in done.notes)


def run_size(model, spec):
    """Bytes of the file with everything, position tables too, at one spec."""
    inventory = find_units(load_model(model)[0])
    return predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec.parse(spec), everywhere=True))


def test_the_guard_compares_on_a_single_sentence_without_a_standard_error(tmp_path, trained, texts):
    rows = []
    for name, size in (("learned", 900), ("uniform", 800)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(trained)
        rows.append(TrainedRow(tmp_path / name, {"bytes": size}))
    (tmp_path / "one.txt").write_text(" ".join((texts / "valid.txt").read_text().split()[:40]) + "\n")
    one = encode_file(load_model(trained)[1], tmp_path / "one.txt")
    verdict = module._compare(*rows, "uniform 2", one, 16, 1000)
    assert (verdict.is_learned, verdict.delta_nats) == (True, 0.0)
    assert "(standard error unknown)" in verdict.sentence

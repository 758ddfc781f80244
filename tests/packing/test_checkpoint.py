"""Writing packed models: exact sizes, what stands in the directory, and everything that must be refused before writing."""

import dataclasses
import json
import os
import zlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from mixbits.errors import DataError, SpecError
from mixbits.packing.bitpack import unpack_codes
from mixbits.packing.checkpoint import to_float16
from mixbits.spec import BitAllocation, QuantSpec, predicted_bytes

EMBED = "model.decoder.embed_tokens"
FC1 = "model.decoder.layers.0.fc1"


class FakeTokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_directory_holds_everything(job, tmp_path):
    job.model.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    card = {"title": "A | small model", "perplexity": 123.456789, "made by": "one\nline"}
    saved = job.save(tmp_path / "deep" / "m", tokenizer=FakeTokenizer(), card=card)
    directory = tmp_path / "deep" / "m"
    assert saved.directory == directory
    assert sorted(os.listdir(directory)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert os.listdir(directory.parent) == ["m"]  # no temporary files left
    size = os.path.getsize(directory / "model.safetensors")
    assert saved.file_bytes == size == predicted_bytes(job.inventory, job.allocation)
    assert saved.compression_ratio == job.inventory.full_bytes / size
    config = json.loads((directory / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (config["architectures"], config["dtype"]) == (["OPTForCausalLM"], "float32")
    assert (quantization["quant_method"], quantization["format_version"], quantization["file_bytes"]) == (
        "mixbits",
        2,
        size,
    )
    assert quantization["byte_order"] == "little"
    stored = load_file(directory / "model.safetensors")
    assert quantization["checksums"] == {n: f"{zlib.crc32(t.numpy().tobytes()):08x}" for n, t in stored.items()}
    assert quantization["units"][EMBED] == {
        "spec": str(job.allocation.specs[EMBED]),
        "rows": 23,
        "cols": 16,
        "kind": "embedding",
        "tied": ["lm_head"],
    }
    assert json.loads((directory / "generation_config.json").read_text())["max_new_tokens"] == 7
    readme = (directory / "README.md").read_text()
    for text in (
        "# A \\| small model",
        "| perplexity | 123.457 |",
        "| made by | one line |",
        f"| {FC1} |",
        f"{size:,} bytes",
    ):
        assert text in readme
    assert job.model.config.dtype != "float16"
    assert not hasattr(job.model.config, "quantization_config")  # the model at hand is left alone


def test_tensors_read_back_by_the_safetensors_library(job, packed):
    tensors = load_file(packed / "model.safetensors")
    for unit in job.inventory.units:
        spec = job.allocation.specs[unit.name]
        if not spec.is_quantized:
            expected = job.model.get_submodule(unit.name).weight.detach().half()
            assert torch.equal(tensors[unit.weight], expected)
            continue
        quantized = job.weights[unit.name]
        codes = unpack_codes(tensors[unit.weight], spec.bit_width, unit.num_weights, spec=spec)
        assert torch.equal(codes.view(unit.rows, unit.cols), quantized.codes)
        assert torch.equal(tensors[f"{unit.name}.scales"].float(), quantized.scales)
    for name, _ in job.inventory.others:
        assert torch.equal(tensors[name], job.model.state_dict()[name].half())


def test_the_same_input_gives_the_same_file(job, tmp_path):
    job.save(tmp_path / "a")
    job.save(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_overwriting(job, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    job.save(target)  # an empty directory is fine
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(SpecError, match="not empty"):
        job.save(target)
    job.allocation = BitAllocation.uniform(job.inventory, QuantSpec(16))
    job.weights = {}
    job.save(target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() != before
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("important")
    with pytest.raises(SpecError, match="not a model directory"):
        job.save(tmp_path / "other", overwrite=True)
    with pytest.raises(SpecError, match="is a file"):
        job.save(tmp_path / "other" / "thesis.tex")


def test_a_failure_leaves_nothing_and_keeps_the_old_model(job, packed):
    class Broken:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    before = (packed / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        job.save(packed, tokenizer=Broken(), overwrite=True)
    assert os.listdir(packed.parent) == [packed.name]
    assert (packed / "model.safetensors").read_bytes() == before


def _change(job, **fields):
    job.weights[FC1] = dataclasses.replace(job.weights[FC1], **fields)


def _scales(job, value):
    scales = job.weights[FC1].scales.clone()
    scales[-1] = value
    _change(job, scales=scales)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda j: j.weights.pop(FC1), "no quantized weight for unit.*fc1"),
        (lambda j: j.weights.update(nonsense=j.weights[FC1]), "unit.*nonsense.*not store packed"),
        (lambda j: j.allocation.specs.pop(FC1), "misses unit.*fc1"),
        (lambda j: j.allocation.specs.update(ghost=QuantSpec(2)), "unknown unit.*ghost"),
        (lambda j: _change(j, spec=QuantSpec(4, "half-step")), "fc1: weight was quantized to 4-half-step"),
        (lambda j: _change(j, codes=j.weights[FC1].codes.T), r"fc1: codes are torch.uint8 of shape \(16, 21\)"),
        (lambda j: _change(j, codes=j.weights[FC1].codes.int()), "fc1: codes are torch.int32"),
        (lambda j: _change(j, codes=j.weights[FC1].codes + 250), "fc1: code .* is out of range"),
        (lambda j: _change(j, scales=j.weights[FC1].scales[1:]), "fc1: 20 scales; .* needs 21"),
        (lambda j: _scales(j, float("nan")), "fc1: a scale is NaN"),
        (lambda j: _scales(j, float("inf")), "fc1: a scale is NaN or infinite"),
        (lambda j: _scales(j, 0.1), "fc1: scales are not exactly float16"),
    ],
)
def test_inconsistent_weights_are_refused(spoil, message, job, tmp_path):
    assert job.allocation.specs[FC1].bit_width == 1
    spoil(job)
    with pytest.raises(SpecError, match=message):
        job.save(tmp_path / "m")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "has NaN"), (float("-inf"), "infinite"), (7e4, "7e\\+04 does not fit float16")],
)
def test_bad_values_in_other_parameters(value, message, job, tmp_path):
    with torch.no_grad():
        job.model.model.decoder.layers[0].fc2.bias[3] = value
    with pytest.raises(DataError, match=rf"layers\.0\.fc2\.bias: .*{message}"):
        job.save(tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_inventory_of_another_model(job, tmp_path):
    job.inventory = dataclasses.replace(job.inventory, others=(*job.inventory.others, ("model.extra", (2,))))
    with pytest.raises(SpecError, match=r"model\.extra: in the inventory but not in the model"):
        job.save(tmp_path / "m")
    good = job.inventory.others[:-1]
    job.inventory = dataclasses.replace(job.inventory, others=good[1:])
    with pytest.raises(SpecError, match="neither a unit nor listed"):
        job.save(tmp_path / "m")
    job.inventory = dataclasses.replace(job.inventory, others=good)
    job.model.model.decoder.embed_positions.weight = torch.nn.Parameter(torch.zeros(3, 16))
    with pytest.raises(SpecError, match=r"embed_positions\.weight: shape is \(3, 16\)"):
        job.save(tmp_path / "m")


def test_integer_buffers_would_be_lost(job, tmp_path):
    job.model.register_buffer("steps", torch.tensor([3]))
    with pytest.raises(SpecError, match=r"steps: torch\.int64"):
        job.save(tmp_path / "m")


def test_declared_tie_that_is_not_there(job, tmp_path):
    from mixbits.quant.units import find_units

    job.model.lm_head.weight = torch.nn.Parameter(job.model.lm_head.weight.detach().clone())
    job.inventory = find_units(job.model)
    job.allocation = BitAllocation.uniform(job.inventory, QuantSpec(16))
    job.weights = {}
    with pytest.raises(SpecError, match="tie_word_embeddings=False"):
        job.save(tmp_path / "m")


def test_tie_that_only_the_model_at_hand_has(job, tmp_path):
    from mixbits.quant.units import find_units

    job.model.config.tie_word_embeddings = False
    job.inventory = find_units(job.model)
    job.allocation = BitAllocation({u.name: QuantSpec(16) for u in job.inventory.units})
    job.weights = {}
    with pytest.raises(SpecError, match="share one tensor"):
        job.save(tmp_path / "m")


def test_embedding_with_max_norm(job, tmp_path):
    job.model.model.decoder.embed_tokens.max_norm = 1.0
    with pytest.raises(SpecError, match="max_norm"):
        job.save(tmp_path / "m")


def test_to_float16_rounds_and_keeps_the_largest():
    assert to_float16(torch.tensor([65504.0, 1e-9]), "x").tolist() == [65504.0, 0.0]

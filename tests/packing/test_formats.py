"""Group scales, byte scales and codebooks in files and layers: bytes by hand, exact round trips, hostile values refused."""

import dataclasses
import hashlib
import json
import os
import struct

import pytest
import torch
from torch import nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

import mixbits
from mixbits.errors import FormatError, SpecError
from mixbits.packing.checkpoint import packed_tensors
from mixbits.packing.inspect import inspect_packed
from mixbits.packing.modules import PackedEmbedding, packed_layer
from mixbits.packing.verify import read_units, verify_packed
from mixbits.packing.weightfile import read_weight_file, write_weight_file
from mixbits.quant.grid import dequantize, quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantizedWeight, QuantSpec, Unit, stored_tensors, unit_tensors

FILE = "model.safetensors"
SPECS = [
    QuantSpec.parse(t)
    for t in (
        *("1-g4", "1.58-g5-s8", "2-g64", "2-g3-s8", "3-g2", "4-half-step-g7-s8", "8-g16", "8-row-s8", "1.58-row-s8"),
        *("1-v8", "0.5-v16", "0.667-v12-tensor", "4-v2", "2-tensor", "2"),
    )
]
SHAPES = [(1, 1), (1, 7), (5, 1), (7, 13), (31, 3), (16, 64)]


def weights(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def packed_of(layer, spec):
    """A layer packed alone: (its quantized weight, its tensors by name, the packed layer with them in place)."""
    model = nn.Module()
    model.add_module("layer", layer)
    inventory = find_units(model)
    (unit,) = inventory.units
    quantized = quantize_weight(unit_matrices(model, inventory)["layer"], spec)
    tensors = packed_tensors(model, inventory, BitAllocation({"layer": spec}), {"layer": quantized})
    new = packed_layer(unit, spec, layer)
    for entry in unit_tensors(unit, spec):
        buffer = getattr(new, entry.name.removeprefix("layer."))
        assert (buffer.dtype, buffer.shape) == (tensors[entry.name].dtype, tensors[entry.name].shape)
        buffer.copy_(tensors[entry.name])
    return quantized, tensors, new


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_compute_with_exactly_the_quantized_weight(spec, shape):
    rows, cols = shape
    linear, conv, table = nn.Linear(cols, rows), Conv1D(rows, cols), nn.Embedding(rows, cols)
    x = weights(4, cols, seed=1)
    for layer in (linear, conv):
        quantized, _, packed = packed_of(layer, spec)
        dense = dequantize(quantized)
        with torch.no_grad():
            layer.weight.copy_(dense.T if isinstance(layer, Conv1D) else dense)
        assert torch.equal(packed(x), layer(x))
    quantized, _, packed = packed_of(table, spec)
    dense = dequantize(quantized)
    assert torch.equal(packed.matrix(), dense)
    everything, few = torch.arange(rows).repeat(2), torch.tensor([[rows - 1]])
    assert torch.equal(packed(everything), dense[everything])
    assert torch.equal(packed(few), dense[few])  # looks up single rows when the table is large enough
    packed.to(torch.bfloat16)
    assert packed.is_intact()
    assert torch.equal(packed.to(torch.float32).matrix(), dense)
    head = packed_layer(Unit("layer", "layer.weight", rows, cols, "embedding", ("head",)), spec, linear, owner=packed)
    assert not list(head.buffers())[1:]
    assert torch.equal(head(x), nn.functional.linear(x, dense, linear.bias))


def test_bytes_of_group_scales_by_hand():
    """3 x 5, two bits, groups of 2, 2 and 1 columns, byte scales; every stored byte computed with plain integers."""
    layer, spec = nn.Linear(5, 3, bias=False), QuantSpec.parse("2-g2-s8")
    codes = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 1, 0, 2], [2, 0, 1, 1, 3]], dtype=torch.uint8)
    supers, scale_codes = [0.5, 2.0, 0.0], [[255, 1, 128], [3, 255, 255], [255, 255, 255]]
    scales = torch.tensor([c * s / 256 for s, row in zip(supers, scale_codes, strict=True) for c in row])
    model = nn.Module()
    model.add_module("a", layer)
    allocation, inventory = BitAllocation({"a": spec}), find_units(model)
    found = packed_tensors(model, inventory, allocation, {"a": QuantizedWeight(spec, codes, scales)})
    assert found["a.scales"].numpy().tobytes() == struct.pack("<3e", *supers)
    # A row of zeros keeps whatever code its scales are rounded to; the two others are told by their values.
    assert found["a.scale_codes"][:6].tolist() == [c for row in scale_codes[:2] for c in row]
    assert bool((found["a.scale_codes"] > 0).all())
    number = sum(int(c) << (2 * i) for i, c in enumerate(codes.flatten()))
    assert found["a.weight"].numpy().tobytes() == number.to_bytes(4, "little")
    assert [t.name for t in stored_tensors(inventory, allocation)] == ["a.scales", "a.scale_codes", "a.weight"]


def test_bytes_of_a_codebook_by_hand():
    """2 x 5 in vectors of 3 columns: two bytes a row; the codebook row by row, the last vector one column too long."""
    layer, spec = nn.Embedding(2, 5), QuantSpec.parse("2.67-product-v3")
    codebook = (torch.arange(256 * 3) / 64 - 6).reshape(256, 3)
    codes, scales = torch.tensor([[7, 255], [0, 128]], dtype=torch.uint8), torch.tensor([0.5 * 255, 0.5 * 4]) / 256
    model = nn.Module()
    model.add_module("a", layer)
    quantized = QuantizedWeight(spec, codes, scales, codebook, 5)
    found = packed_tensors(model, find_units(model), BitAllocation({"a": spec}), {"a": quantized})
    assert found["a.codebook"].numpy().tobytes() == struct.pack("<768e", *codebook.flatten().tolist())
    assert (found["a.weight"].tolist(), found["a.scale_codes"].tolist()) == ([7, 255, 0, 128], [255, 4])
    assert found["a.scales"].tolist() == [0.5]
    expected = torch.cat([codebook[0], codebook[128][:2]]) * (0.5 * 4 / 256)
    assert torch.equal(dequantize(quantized)[1], expected)


GOLDEN = "5761edb98115f9cdda48a5c05c1f842880b2b958350b4efb9be65197811a1484"


def test_golden_file(tmp_path):
    """The whole file of fixed tensors never changes: what is written today stays readable."""
    units = tuple(Unit(f"u{i}", f"u{i}.weight", 7, 13, "linear") for i in range(len(SPECS)))
    stored = [t for unit, spec in zip(units, SPECS, strict=True) for t in unit_tensors(unit, spec)]
    stored.sort(key=lambda t: t.dtype != "F16")
    tensors = {}
    for t in stored:
        count = t.num_bytes if t.dtype == "U8" else t.num_bytes // 2
        flat = torch.arange(1, count + 1)
        tensors[t.name] = (flat % 2 + 1).to(torch.uint8) if t.dtype == "U8" else (flat / 8192).half().reshape(t.shape)
    write_weight_file(tmp_path / FILE, stored, tensors)
    assert hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest() == GOLDEN
    parsed = read_weight_file(tmp_path / FILE)
    assert parsed.tensors == tuple(stored)
    reader = parsed.reader()
    assert all(torch.equal(reader.tensor(t), tensors[t.name]) for t in stored)


# --- whole models


EMBED, POSITIONS = "model.decoder.embed_tokens", "model.decoder.embed_positions"
FC1, FC2, Q = (f"model.decoder.layers.0.{leaf}" for leaf in ("fc1", "fc2", "self_attn.q_proj"))


@pytest.fixture
def formats(job, tmp_path):
    """A job and the directory it was packed to: every new format once, positions at 8 bits in groups."""
    named = {EMBED: "0.5-v16", POSITIONS: "8-g5-s8", FC1: "2-g4-s8", FC2: "1-v8-tensor", Q: "1.58-row-s8"}
    specs = {**job.allocation.specs, **{name: QuantSpec.parse(text) for name, text in named.items()}}
    matrices = unit_matrices(job.model, job.inventory)
    job.allocation = BitAllocation(specs)
    job.weights = {n: quantize_weight(matrices[n], s) for n, s in specs.items() if s.is_quantized}
    saved = job.save(tmp_path / "model")
    assert saved.file_bytes == os.path.getsize(tmp_path / "model" / FILE)
    return job, tmp_path / "model"


def test_inspection_counts_every_byte(formats):
    job, directory = formats
    info = inspect_packed(directory)
    units = {u.name: u for u in info.units}
    assert {n: u.spec for n, u in units.items()} == {n: str(s) for n, s in job.allocation.specs.items()}
    total = sum(u.num_bytes for u in info.units) + sum(t.num_bytes for t in info.others)
    assert info.header_bytes + total == info.file_bytes
    for name in (EMBED, POSITIONS, FC1, Q):
        assert units[name].scale_max == pytest.approx(float(job.weights[name].scales.max()))
        assert units[name].scale_mean == pytest.approx(float(job.weights[name].scales.double().mean()))
    assert units[FC2].scale_max is None
    assert not {t.name for t in info.others} & {f"{FC1}.scale_codes", f"{EMBED}.codebook", f"{POSITIONS}.weight"}
    assert info.num_parameters == job.inventory.num_parameters  # positions beyond the context do not count


def _rewrite(directory, name, change):
    parsed = read_weight_file(directory / FILE)
    reader = parsed.reader()
    tensors = {t.name: reader.tensor(t) for t in parsed.tensors}
    stored = [t for t in parsed.tensors if change is not None or t.name != name]
    if change is not None:
        change(tensors[name])
    write_weight_file(directory / FILE, stored, tensors)


def _set(index, value):
    return lambda tensor: tensor.view(-1).__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{FC1}.scales", _set(1, float("nan")), r"fc1\.scales': has NaN"),
        (f"{FC1}.scales", _set(1, -1.0), r"fc1\.scales': a shared scale is negative"),
        (f"{Q}.scales", _set(0, float("inf")), r"q_proj\.scales': has NaN or infinite"),
        (f"{FC1}.scale_codes", _set(3, 0), r"fc1\.scale_codes': a scale code is 0"),
        (f"{FC1}.scale_codes", None, r"fc1\.scale_codes' is missing"),
        (f"{EMBED}.codebook", _set(5, float("nan")), r"embed_tokens\.codebook': has NaN"),
        (f"{EMBED}.codebook", None, r"embed_tokens\.codebook' is missing"),
        (f"{FC2}.codebook", None, r"fc2\.codebook' is missing"),
        (f"{POSITIONS}.weight", _set(0, 255), r"embed_positions\.weight': code 255 is out of range"),
    ],
)
def test_damaged_values_name_file_tensor_and_field(name, change, message, formats):
    _rewrite(formats[1], name, change)
    with pytest.raises(FormatError, match=message) as caught:
        verify_packed(formats[1])
    assert FILE in str(caught.value)


@pytest.mark.parametrize(
    ("unit", "spec", "message"),
    [
        (FC1, "2-half-step-g8-s8", r"fc1\.scale_codes': shape is \(84,\); expected \(42,\) \(scale_codes of spec 2"),
        (FC1, "2-half-step-row-s8", r"fc1\.scale_codes': shape is"),
        (FC1, "2-half-step-row", r"fc1\.scale_codes' is U8 but no unit"),
        (EMBED, "0.5-product-v16-tensor", r"embed_tokens\.scale_codes' is U8 but no unit"),
        (EMBED, "1-product-v8", r"embed_tokens\.weight': shape is \(23,\); expected \(46,\)"),
        (FC2, "1-product-v8", r"fc2\.scale_codes' is missing"),
        (Q, "1.58-papers-row", r"q_proj\.scales': shape is \(1,\); expected \(16,\)"),
    ],
)
def test_specs_that_do_not_fit_the_file(unit, spec, message, formats):
    path = formats[1] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["units"][unit]["spec"] = spec
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        verify_packed(formats[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("2-half-step-g0", r"\.spec: group_size is 0"),
        ("2-half-step-g-4", r"\.spec: unknown grid 'half-step-g-4'"),
        ("2-half-step-g999999999", r"\.spec: group_size is 999999999"),
        ("2-half-step-g" + "9" * 5000, r"\.spec: unknown grid"),
        ("2-half-step-group", r"\.spec: unknown grid 'half-step-group'"),
        ("2-half-step-tensor-s8", r"\.spec: a single scale per tensor"),
        ("0.5-product-v0", r"\.spec: .*0 columns"),
        ("0.5-product-v16-g4", r"\.spec: .*got 'group'"),
        ("16-float-row-s8", r"\.spec: a 16-bit float unit has no scales"),
    ],
)
def test_hostile_specs(spec, message):
    unit = {"spec": spec, "rows": 4, "cols": 8, "kind": "linear", "tied": []}
    with pytest.raises(FormatError, match=message) as caught:
        read_units({"quant_method": "mixbits", "format_version": 1, "units": {"a": unit}}, where="c.json")
    assert "c.json" in str(caught.value)


@pytest.mark.parametrize(
    ("unit", "changes", "message"),
    [
        (FC1, {"scales": 1.01}, r"fc1: scales are not exactly 8-bit scales"),
        (FC1, {"codebook": torch.zeros(256, 1)}, r"fc1: has a codebook, but .* has fixed levels"),
        (EMBED, {"codebook": None}, r"embed_tokens: codebook None for 16 columns; .* needs \(256, 16\)"),
        (EMBED, {"codebook": torch.zeros(255, 16)}, r"embed_tokens: codebook \(255, 16\)"),
        (EMBED, {"cols": 15}, r"for 15 columns; .* for 16"),
        (EMBED, {"codebook": torch.full((256, 16), 0.1)}, "codebook is not exactly float16"),
        (EMBED, {"codebook": torch.full((256, 16), float("nan"))}, "codebook is not exactly float16"),
        (EMBED, {"codes": torch.zeros(23, 2, dtype=torch.uint8)}, r"codes are torch.uint8 of shape \(23, 2\)"),
    ],
)
def test_inconsistent_weights_are_refused(unit, changes, message, formats, tmp_path):
    job, _ = formats
    if "scales" in changes:
        changes = {"scales": job.weights[unit].scales * changes["scales"]}
    job.weights[unit] = dataclasses.replace(job.weights[unit], **changes)
    with pytest.raises(SpecError, match=message):
        job.save(tmp_path / "other")


# --- OPT's positions


@pytest.mark.parametrize("spec", ["4", "8", "8-g5-s8", "0.5-v16"])
def test_opt_positions_compute_what_the_original_does(spec):
    table = OPTLearnedPositionalEmbedding(12, 10)
    quantized, _, packed = packed_of(table, QuantSpec.parse(spec))
    assert isinstance(packed, PackedEmbedding)
    with torch.no_grad():
        table.weight.copy_(dequantize(quantized))
    full = torch.ones(2, 12, dtype=torch.long)
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    right = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    for mask in (full, full[:, :1], left, right, left.float(), left.int()):
        assert torch.equal(packed(mask), table(mask))
        assert torch.equal(packed(mask, mask.shape[1] - 1), table(mask, mask.shape[1] - 1))
    ids = torch.tensor([[3, -1, 11]])
    assert torch.equal(packed(None, 0, position_ids=ids), table(None, 0, position_ids=ids))
    assert torch.equal(packed(full, 5, position_ids=ids), table(full, 5, position_ids=ids))
    with pytest.raises(IndexError):
        packed(None, 0, position_ids=torch.tensor([[12]]))


def test_files_whose_positions_are_no_unit_stay_readable(job, tmp_path):
    """Before position tables became units they stood among the other tensors; such a file still verifies and loads."""
    inventory = job.inventory
    positions = next(u for u in inventory.units if u.is_position_table)
    job.inventory = dataclasses.replace(
        inventory,
        units=tuple(u for u in inventory.units if u is not positions),
        others=((positions.weight, (positions.rows, positions.cols)), *inventory.others),
    )
    job.allocation = BitAllocation({n: s for n, s in job.allocation.specs.items() if n != positions.name})
    job.weights.pop(positions.name)
    job.save(tmp_path / "old")
    loaded = mixbits.load(tmp_path / "old")
    table = loaded.get_submodule(positions.name)
    assert isinstance(table, OPTLearnedPositionalEmbedding)
    assert torch.equal(table.weight, job.model.get_submodule(positions.name).weight.half().float())

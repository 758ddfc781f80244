"""Sizes, header and allocations: numbers counted by hand, the safetensors library as the reader of the header."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixbits.errors import FormatError, SpecError
from mixbits.spec import (
    HEADER_MULTIPLE,
    BitAllocation,
    ModelInventory,
    QuantSpec,
    StoredTensor,
    Unit,
    bits_per_weight,
    compression_ratio,
    parse_specs,
    predicted_bytes,
    safetensors_header,
    stored_tensors,
    unit_tensors,
)

EMBED = Unit("embed", "embed.weight", 10, 8, "embedding", ("lm_head",))
CONV = Unit("conv", "conv.weight", 5, 3, "conv1d")
INVENTORY = ModelInventory((EMBED, CONV), (("conv.bias", (5,)), ("positions", (6, 8))), unused_position_weights=16)


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        (QuantSpec(1), (-1, 1)),
        (QuantSpec(1.58), (-1, 0, 1)),
        (QuantSpec(2), (-1.5, -0.5, 0.5, 1.5)),
        (QuantSpec(3), (-3, -2, -1, 0, 1, 2, 3)),
        (QuantSpec(4), tuple(range(-7, 8))),
        (QuantSpec(8), tuple(range(-127, 128))),
        (QuantSpec(3, "half-step"), (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)),
    ],
    ids=str,
)
def test_levels(spec, levels):
    assert spec.levels == levels
    assert spec.is_quantized


def test_float_has_no_levels_and_no_scales():
    spec = QuantSpec(16)
    assert (spec.grid, spec.is_quantized, spec.num_scales(9, 4)) == ("float", False, 0)
    with pytest.raises(SpecError, match="no levels"):
        _ = spec.levels


@pytest.mark.parametrize(
    ("width", "num_weights", "expected"),
    [
        (1, 0, 0),
        (1, 1, 1),
        (1, 9, 2),
        (1.58, 5, 1),
        (1.58, 6, 2),
        (2, 5, 2),
        (3, 8, 3),
        (3, 3, 2),
        (4, 3, 2),
        (8, 7, 7),
        (16, 7, 14),
    ],
)
def test_code_bytes(width, num_weights, expected):
    assert QuantSpec(width).code_bytes(num_weights) == expected


def test_unit_bytes_counts_scales_per_row_or_per_tensor():
    assert QuantSpec(2).unit_bytes(10, 8) == 20 + 2 * 10
    assert QuantSpec(2, granularity="tensor").unit_bytes(10, 8) == 20 + 2
    assert QuantSpec(16).unit_bytes(10, 8) == 160


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2-g4", 20 + 2 * 10 * 2),
        ("2-g5", 20 + 2 * 10 * 2),  # groups of 5 and 3 columns
        ("2-g64", 20 + 2 * 10),  # wider than a row: one group
        ("2-g4-s8", 20 + 10 * 2 + 2 * 10),
        ("2-row-s8", 20 + 10 + 2),
        ("1.58-row-s8", 16 + 10 + 2),
        ("1-product-v8", 10 + 10 + 2 + 2 * 256 * 8),
        ("0.5-product-v16", 10 + 10 + 2 + 2 * 256 * 16),
        ("2.67-product-v3-tensor", 10 * 3 + 2 * 256 * 3),
    ],
)
def test_unit_bytes_of_groups_bytes_and_codebooks(text, expected):
    spec = QuantSpec.parse(text)
    assert spec.unit_bytes(10, 8) == expected
    assert sum(t.num_bytes for t in unit_tensors(EMBED, spec)) == expected


def test_unit_tensors_name_what_is_stored():
    assert unit_tensors(EMBED, QuantSpec.parse("2-g5-s8")) == (
        StoredTensor("embed.scales", "F16", (10,)),
        StoredTensor("embed.scale_codes", "U8", (20,)),
        StoredTensor("embed.weight", "U8", (20,)),
    )
    assert unit_tensors(EMBED, QuantSpec.parse("0.667-product-v12")) == (
        StoredTensor("embed.scales", "F16", (1,)),
        StoredTensor("embed.codebook", "F16", (256, 12)),
        StoredTensor("embed.scale_codes", "U8", (10,)),
        StoredTensor("embed.weight", "U8", (10,)),
    )
    assert [t.name for t in unit_tensors(EMBED, QuantSpec.parse("1-v8-tensor"))] == ["embed.codebook", "embed.weight"]


def test_file_order_is_floats_then_bytes():
    allocation = BitAllocation({"embed": QuantSpec.parse("1-v8"), "conv": QuantSpec.parse("2-g2-s8")})
    names = [t.name for t in stored_tensors(INVENTORY, allocation)]
    assert names == [
        *["embed.scales", "embed.codebook", "conv.scales", "conv.bias", "positions"],
        *["embed.scale_codes", "embed.weight", "conv.scale_codes", "conv.weight"],
    ]


def test_product_has_no_levels():
    spec = QuantSpec(0.5)
    assert (spec.grid, spec.vector_size, spec.num_levels, spec.code_bits) == ("product", 16, 256, 8)
    with pytest.raises(SpecError, match=r"no levels.*codebook"):
        _ = spec.levels
    assert QuantSpec(1, "product") == QuantSpec.parse("1-v8") == QuantSpec.parse("1-product")


def test_uniform_keeps_four_bits_for_positions():
    table = Unit("model.embed_positions", "model.embed_positions.weight", 6, 8, "embedding")
    inventory = ModelInventory((EMBED, table, Unit("transformer.wpe", "w", 6, 8, "embedding")), ())
    for low in (QuantSpec(2), QuantSpec.parse("0.5-v16"), QuantSpec(1.58, granularity="tensor")):
        specs = BitAllocation.uniform(inventory, low).specs
        four = QuantSpec(4, scale_bits=low.scale_bits)
        assert specs == {"embed": low, table.name: four, "transformer.wpe": four}
    for high in (QuantSpec(4, "half-step"), QuantSpec(8), QuantSpec(16)):
        assert set(BitAllocation.uniform(inventory, high).specs.values()) == {high}
    assert not Unit("position_head", "w", 6, 8, "linear").is_position_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", QuantSpec(2, "half-step")),
        (2, QuantSpec(2)),
        (1.58, QuantSpec(1.58)),
        ("1.58", QuantSpec(1.58)),
        ("4-half-step", QuantSpec(4, "half-step")),
        ("4-tensor", QuantSpec(4, granularity="tensor")),
        ("3-papers-tensor", QuantSpec(3, "papers", "tensor")),
        ("2-half-step-row", QuantSpec(2)),
        ("16", QuantSpec(16)),
        ("2-half-step-g64", QuantSpec(2, granularity="group", group_size=64)),
        ("2-g64", QuantSpec(2, granularity="group", group_size=64)),
        ("2-half-step-g64s8", QuantSpec(2, "half-step", "group", 64, 8)),
        ("2-g64-s8", QuantSpec(2, "half-step", "group", 64, 8)),
        ("1.58-papers-row-s8", QuantSpec(1.58, scale_bits=8)),
        ("2-s8", QuantSpec(2, scale_bits=8)),
        ("0.5", QuantSpec(0.5, "product")),
        ("0.667-product-v12", QuantSpec(8 / 12, "product")),
        ("0.5-v16-tensor", QuantSpec(0.5, "product", "tensor")),
    ],
)
def test_parse(text, expected):
    assert QuantSpec.parse(text) == expected


@pytest.mark.parametrize(
    "spec",
    [
        *[QuantSpec(w, granularity=g) for w in (1, 1.58, 2, 3, 4, 8, 16) for g in ("row", "tensor")],
        *[QuantSpec(w, "", "group", size, bits) for w in (1, 1.58, 2, 8) for size in (2, 64) for bits in (8, 16)],
        *[QuantSpec(8 / v, "product", g) for v in range(2, 65) for g in ("row", "tensor")],
        QuantSpec(3, scale_bits=8),
    ],
    ids=str,
)
def test_parse_inverts_str(spec):
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two", "cannot read 'two'"),
        ("", "cannot read ''"),
        ("nan", "bit width nan does not exist"),
        ("inf", "bit width inf does not exist"),
        ("5", "bit width 5 does not exist on grid 'papers'"),
        ("2-papers", "use 1.58"),
        ("2-cubic", "unknown grid 'cubic'"),
        ("16-half-step", "does not exist"),
        ("2-half-step-column", "unknown grid"),
        ("2-g0", "group_size is 0"),
        ("2-g1", "group_size is 1"),
        ("2-g99999999", "group_size is 99999999"),
        ("2-g-64", "unknown grid 'g-64'"),
        ("2-g9999999999", "unknown grid"),
        ("2-row-g64", "unknown grid 'row'"),
        ("2-half-steps8", "unknown grid"),
        ("2-tensor-s8", "single scale per tensor"),
        ("16-g64", "no scales"),
        ("16-s8", "no scales"),
        ("0.5-product-v8", "8 columns is not 0.5 bits"),
        ("0.5-v0", "0 columns is not 0.5 bits"),
        ("2-half-step-v8", "belongs to grid 'product'"),
        ("0.5-v16-g4", "got 'group'"),
        ("0.001", "does not exist on grid 'product'"),
        ("0.3-product", "does not exist on grid 'product'"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)


def test_bad_granularity_and_parse_specs():
    with pytest.raises(SpecError, match="granularity is 'column'"):
        QuantSpec(2, granularity="column")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="group_size is None"):
        QuantSpec(2, granularity="group")
    with pytest.raises(SpecError, match="group_size is True"):
        QuantSpec(2, granularity="group", group_size=True)
    with pytest.raises(SpecError, match=r"group_size is 64 but granularity is 'row'"):
        QuantSpec(2, group_size=64)
    with pytest.raises(SpecError, match="scale_bits is 4"):
        QuantSpec(2, scale_bits=4)  # type: ignore[arg-type]
    assert parse_specs(["2", 1, "2-half-step-row"]) == (QuantSpec(2), QuantSpec(1))


def test_counts_ties_once_and_leaves_out_unused_positions():
    assert INVENTORY.num_parameters == 80 + 15 + 5 + 48 - 16
    assert INVENTORY.full_bytes == 4 * 132
    assert compression_ratio(INVENTORY, 132) == 4.0
    assert bits_per_weight(INVENTORY, 132) == 8.0


def test_stored_tensors_names_shapes_order():
    allocation = BitAllocation({"embed": QuantSpec(1.58), "conv": QuantSpec(16)})
    assert stored_tensors(INVENTORY, allocation) == (
        StoredTensor("embed.scales", "F16", (10,)),
        StoredTensor("conv.weight", "F16", (3, 5)),  # as Conv1D keeps it
        StoredTensor("conv.bias", "F16", (5,)),
        StoredTensor("positions", "F16", (6, 8)),
        StoredTensor("embed.weight", "U8", (16,)),
    )


def test_header_is_padded_and_read_by_safetensors(tmp_path):
    allocation = BitAllocation.uniform(INVENTORY, QuantSpec(3))
    stored = stored_tensors(INVENTORY, allocation)
    header = safetensors_header(stored)
    assert len(header) % HEADER_MULTIPLE == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    entries = json.loads(header[8:])
    assert entries["__metadata__"] == {"format": "mixbits", "format_version": "1"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(range(256)) * 10)
    path.write_bytes(path.read_bytes()[: predicted_bytes(INVENTORY, allocation)])
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {t.name for t in stored}
        for t in stored:
            tensor = file.get_tensor(t.name)
            assert tuple(tensor.shape) == t.shape
            assert tensor.dtype == {"U8": torch.uint8, "F16": torch.float16}[t.dtype]


def test_predicted_bytes_by_hand():
    allocation = BitAllocation({"embed": QuantSpec(2), "conv": QuantSpec(1, granularity="tensor")})
    data = (20 + 2 * 10) + (2 + 2) + 2 * 5 + 2 * 48
    assert (
        predicted_bytes(INVENTORY, allocation) == len(safetensors_header(stored_tensors(INVENTORY, allocation))) + data
    )


def test_predicted_bytes_close_to_the_library_own_file(tmp_path):
    """The library pads its header to 8 bytes and we to 64: the same file but for that and the metadata."""
    allocation = BitAllocation.uniform(INVENTORY, QuantSpec(4))
    dtypes = {"U8": torch.uint8, "F16": torch.float16}
    tensors = {t.name: torch.zeros(t.shape, dtype=dtypes[t.dtype]) for t in stored_tensors(INVENTORY, allocation)}
    save_file(tensors, tmp_path / "y.safetensors", metadata={"format": "mixbits", "format_version": "1"})
    assert 0 <= predicted_bytes(INVENTORY, allocation) - (tmp_path / "y.safetensors").stat().st_size < 64


def test_allocation_must_name_exactly_the_units():
    with pytest.raises(SpecError, match=r"unknown unit.*head"):
        BitAllocation({"embed": QuantSpec(2), "conv": QuantSpec(2), "head": QuantSpec(2)}).check(INVENTORY)
    with pytest.raises(SpecError, match=r"misses unit.*conv"):
        predicted_bytes(INVENTORY, BitAllocation({"embed": QuantSpec(2)}))


def test_allocation_json_round_trip():
    allocation = BitAllocation(
        {"embed": QuantSpec(1.58), "conv": QuantSpec(8, granularity="tensor")}, {"method": "ilp"}
    )
    data = json.loads(json.dumps(allocation.to_json()))
    assert BitAllocation.from_json(data) == allocation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a mixbits allocation"),
        ({"format_version": 99}, "format_version is 99"),
        ({"format_version": None}, "format_version is None"),
        ({"specs": ["2"]}, "'specs' is missing"),
        ({"specs": None}, "'specs' is missing"),
    ],
)
def test_allocation_json_errors_name_the_file(change, message):
    data = {**BitAllocation({"embed": QuantSpec(2)}).to_json(), **change}
    with pytest.raises(FormatError, match=f"a.json: .*{message}"):
        BitAllocation.from_json(data, where="a.json")


def test_allocation_json_bad_spec_and_not_an_object():
    data = {**BitAllocation({}).to_json(), "specs": {"embed": "7"}}
    with pytest.raises(SpecError, match=r"a\.json: bit width 7"):
        BitAllocation.from_json(data, where="a.json")
    with pytest.raises(FormatError, match="not a mixbits allocation"):
        BitAllocation.from_json([1])

"""Committed packed models, one a format version, split and archived: their bytes stay, and they load to the stated values.

Two oracles: the formulas of ``make_golden.py``, and a reader of the format in plain Python, written from docs/formats/packed.md.
"""

import importlib.util
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch

import mixbits
from mixbits.errors import FormatError
from mixbits.packing.archive import unarchive_packed
from mixbits.packing.inspect import inspect_packed
from mixbits.packing.verify import verify_packed
from mixbits.quant.units import find_units
from mixbits.spec import QuantSpec

_spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).parent / "make_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir())
WEIGHT_FILES = {
    "v1/model.safetensors": 0xC6171AE3,
    "v2/model.safetensors": 0xC6171AE3,
    "v2-shards/model-00001-of-00002.safetensors": 0xC7F6C58A,
    "v2-shards/model-00002-of-00002.safetensors": 0x79AE5DEB,
}


def test_every_version_is_there():
    assert FOLDERS == ["v1", "v2", "v2-archive", "v2-shards"]


def test_committed_weight_files_are_what_they_were():
    found = {name: zlib.crc32((GOLDEN / name).read_bytes()) for name in WEIGHT_FILES}
    assert found == WEIGHT_FILES


def test_what_is_written_today_is_the_latest_golden_model(tmp_path):
    golden.make(tmp_path / "whole")
    golden.make(tmp_path / "split", max_shard_bytes=golden.SHARD_BYTES)
    for made, folder in (("whole", "v2"), ("split", "v2-shards")):
        names = sorted(path.name for path in (GOLDEN / folder).iterdir())
        assert sorted(path.name for path in (tmp_path / made).iterdir()) == names
        for name in names:
            one, two = tmp_path / made / name, GOLDEN / folder / name
            if name == "config.json":  # transformers writes its own version into it
                ours, theirs = (json.loads(path.read_text())["quantization_config"] for path in (one, two))
                assert ours == theirs
            else:
                assert one.read_bytes() == two.read_bytes()


def test_archive_unpacks_to_the_very_files(tmp_path):
    unarchive_packed(GOLDEN / "v2-archive", tmp_path / "m")
    for path in (GOLDEN / "v2").iterdir():
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "m").iterdir())) == 2


def _stated(unit) -> torch.Tensor:
    """The unit's weight as the formulas state it, computed with Python's numbers."""
    spec, rows, cols = QuantSpec.parse(golden.SPECS[unit.name]), unit.rows, unit.cols
    if not spec.is_quantized:
        return torch.tensor([golden.other(i) for i in range(rows * cols)]).view(rows, cols)
    scale, width = golden.scales(spec, rows, cols), spec.num_codes(rows, cols) // rows
    group = spec.group_size or cols
    per_row = spec.num_groups(cols)
    found = []
    for row in range(rows):
        for col in range(cols):
            c = golden.code(row * width + col // spec.vector_size, spec.num_levels)
            if spec.is_product:
                level = golden.centroid(c * spec.vector_size + col % spec.vector_size)
            else:
                level = spec.levels[c]
            s = scale[0 if spec.granularity == "tensor" else row * per_row + (col // group if spec.group_size else 0)]
            found.append(level * s)
    return torch.tensor(found).view(rows, cols)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_model_loads_to_the_stated_values(folder):
    model = mixbits.load(GOLDEN / folder)
    source = golden.build()
    for unit in find_units(source).units:
        layer = model.get_submodule(unit.name)
        weight = layer.matrix() if golden.SPECS[unit.name] != "16-float-row" else layer.weight
        assert torch.equal(weight, _stated(unit)), unit.name
    assert torch.equal(model.lm_head.matrix(), model.model.decoder.embed_tokens.matrix())
    for name, parameter in source.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("folder", ["v1", "v2"])
def test_bytes_mean_what_the_specification_says(folder):
    """The weight file read with struct and integers alone."""
    raw = (GOLDEN / folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (length + 8) % 64 == 0
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    assert header.pop("__metadata__") == {"format": "mixbits", "format_version": "1"}
    config = json.loads((GOLDEN / folder / "config.json").read_text())["quantization_config"]
    content = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    if folder == "v2":
        assert config["checksums"] == {name: f"{zlib.crc32(part):08x}" for name, part in content.items()}
        assert config["byte_order"] == "little"
    for name, entry in config["units"].items():
        spec, bits = QuantSpec.parse(entry["spec"]), entry["spec"].split("-")[0]
        if bits == "16":
            continue
        count = entry["rows"] * (-(-entry["cols"] // 2) if spec.is_product else entry["cols"])
        packed = content[f"{name}.weight"]
        if bits == "1.58":
            codes = [packed[i // 5] // 3 ** (i % 5) % 3 for i in range(count)]
        else:
            width = 8 if spec.is_product else int(bits)
            stream = int.from_bytes(packed, "little")
            codes = [stream >> (i * width) & (2**width - 1) for i in range(count)]
            assert stream >> (count * width) == 0
        assert codes == [golden.code(i, spec.num_levels) for i in range(count)]
        floats = struct.unpack(f"<{len(content[f'{name}.scales']) // 2}e", content[f"{name}.scales"])
        if spec.scale_bits == 8:
            bytes_ = content[f"{name}.scale_codes"]
            floats = [c * floats[i * len(floats) // len(bytes_)] / 256 for i, c in enumerate(bytes_)]
        assert list(floats) == golden.scales(spec, entry["rows"], entry["cols"])


def test_old_files_have_no_checksums_and_new_ones_must(tmp_path):
    assert [inspect_packed(GOLDEN / name).has_checksums for name in FOLDERS] == [False, True, True, True]
    assert [inspect_packed(GOLDEN / name).format_version for name in FOLDERS] == [1, 2, 2, 2]
    shutil.copytree(GOLDEN / "v1", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"byte_order is None; expected 'little'"):
        verify_packed(tmp_path / "m")
    config["quantization_config"]["byte_order"] = "little"
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="checksums is missing"):
        verify_packed(tmp_path / "m")

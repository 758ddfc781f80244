"""Several weight files: split in order at the limit, read back the same, sizes over all of them, damaged indexes refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.packing.inspect import inspect_packed
from mixbits.packing.verify import verify_packed
from mixbits.packing.weightset import INDEX_NAME, read_weight_files, read_weights, write_weights
from mixbits.spec import StoredTensor, predicted_bytes, shards, stored_tensors

FILE = "model.safetensors"
LIMIT = 400


@pytest.fixture
def split(job, tmp_path):
    """The job saved in shards, and the same model in one file."""
    job.save(tmp_path / "one")
    saved = job.save(tmp_path / "many", max_shard_bytes=LIMIT)
    return tmp_path / "many", tmp_path / "one", saved


def test_split_in_order_each_as_full_as_it_can_be():
    sizes = [3, 4, 5, 20, 1, 0, 9, 10]
    tensors = [StoredTensor(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    parts = shards(tensors, 10)
    assert [[t.num_bytes for t in part] for part in parts] == [[3, 4], [5], [20], [1, 0, 9], [10]]
    assert shards(tensors, 10**9) == (tuple(tensors),)
    assert shards([], 10) == ((),)
    with pytest.raises(SpecError, match="max_shard_bytes is 0"):
        shards(tensors, 0)


def test_shards_hold_the_same_tensors_and_every_byte_counts(job, split):
    many, one, saved = split
    names = sorted(path.name for path in many.glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 3
    assert not (many / FILE).exists()
    total = sum(os.path.getsize(many / name) for name in names)
    assert saved.file_bytes == total == predicted_bytes(job.inventory, job.allocation, max_shard_bytes=LIMIT)
    loaded = {name: load_file(many / name) for name in names}
    whole = load_file(one / FILE)
    index = json.loads((many / INDEX_NAME).read_text())
    assert index["weight_map"] == {tensor: name for name, part in loaded.items() for tensor in part}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    together = {k: v for part in loaded.values() for k, v in part.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[k], whole[k]) for k in whole)
    for part in loaded.values():
        size = sum(t.numel() * t.element_size() for t in part.values())
        assert size <= LIMIT or len(part) == 1


def test_shards_are_verified_and_inspected_as_one(split):
    many, one, saved = split
    (weights, units), (single, _) = verify_packed(many), verify_packed(one)
    assert weights.tensors == single.tensors
    assert weights.path == many / INDEX_NAME
    assert weights.file_bytes == saved.file_bytes
    reader = weights.reader()
    other = single.reader()
    for stored in weights.tensors:
        assert torch.equal(reader.tensor(stored), other.tensor(stored))
        assert reader.raw(stored).tobytes() == other.raw(stored).tobytes()
        assert not reader.array(stored).flags.writeable
    info, whole = inspect_packed(many), inspect_packed(one)
    assert [u.name for u in info.units] == [u.name for u in whole.units]
    assert [u.num_bytes for u in info.units] == [u.num_bytes for u in whole.units]
    assert len(info.files) == len(weights.files)
    total = info.header_bytes + sum(u.num_bytes for u in info.units) + sum(t.num_bytes for t in info.others)
    assert total == info.file_bytes == info.disk_bytes
    assert info.compression_ratio == 4 * info.num_parameters / saved.file_bytes
    assert {u.name for u in units.units} == {u.name for u in info.units}


def test_another_split_removes_the_files_of_the_old_one(job, tmp_path):
    stored = stored_tensors(job.inventory, job.allocation)
    tensors = {t.name: torch.ones(t.shape, dtype={"U8": torch.uint8, "F16": torch.float16}[t.dtype]) for t in stored}
    (tmp_path / "notes.safetensors").write_text("someone else's")
    first = write_weights(tmp_path, stored, tensors, max_shard_bytes=LIMIT)
    names = set(os.listdir(tmp_path))
    second = write_weights(tmp_path, stored, tensors)
    assert set(os.listdir(tmp_path)) == {FILE, "notes.safetensors"}
    assert first.checksums == second.checksums
    assert second.file_bytes == os.path.getsize(tmp_path / FILE) < first.file_bytes
    write_weights(tmp_path, stored, tensors, max_shard_bytes=LIMIT)
    assert set(os.listdir(tmp_path)) == names


def _edit(folder, change):
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"], index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, i: m.update(x="model-00001-of-00009.safetensors"), DataError, "model-00001-of-00009.*no such file"),
        (lambda m, i: m.update(x=min(m.values())), FormatError, "tensor 'x' stands in .*; it is in no file"),
        (lambda m, i: m.update({min(m): max(m.values())}), FormatError, "; it is in model-"),
        (lambda m, i: m.pop(min(m)), FormatError, r"is missing in model\.safetensors\.index\.json"),
        (lambda m, i: m.update(x="../model-00001-of-00002.safetensors"), FormatError, "'x'. is '../model"),
        (lambda m, i: m.update(x="/etc/passwd"), FormatError, "is '/etc/passwd'; expected"),
        (lambda m, i: m.update(x=3), FormatError, "is 3; expected"),
        (lambda m, i: m.clear(), FormatError, "weight_map is missing"),
        (lambda m, i: i.update(weight_map=[1]), FormatError, "weight_map is missing"),
    ],
)
def test_index_that_does_not_fit(change, error, message, split):
    _edit(split[0], change)
    with pytest.raises(error, match=message):
        verify_packed(split[0])


def test_damaged_files_are_named(split):
    many, _, _ = split
    names = sorted(path.name for path in many.glob("*.safetensors"))
    shard = many / names[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=f"{names[2]}: cut short"):
        verify_packed(many)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match=f"{names[2]}: tensor .* damaged"):
        verify_packed(many)
    shard.write_bytes((many / names[1]).read_bytes())
    with pytest.raises(FormatError, match=f"{names[2]}: tensor .* stands in {names[1]}, too"):
        verify_packed(many)
    shard.unlink()
    with pytest.raises(DataError, match=f"{names[2]}: no such file"):
        verify_packed(many)
    (many / INDEX_NAME).write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        read_weights(many)
    (many / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: no such file"):
        read_weights(many)


def test_files_named_by_someone_else(split):
    many, one, _ = split
    paths = sorted(many.glob("*.safetensors"))
    assert read_weight_files(paths).by_name == read_weights(one).by_name
    with pytest.raises(FormatError, match="too"):
        read_weight_files([*paths, one / FILE])

"""Archives: the same bytes come back, gunzip's among them; too little gain is left alone; damage and bombs are refused early."""

import gzip
import json
import os
import random
import shutil
import tracemalloc
import zlib

import pytest
import torch

import mixbits
from mixbits.errors import DataError, FormatError, MixbitsError
from mixbits.packing import archive
from mixbits.packing.archive import (
    archive_file,
    archive_packed,
    disk_bytes,
    is_archived,
    unarchive_packed,
    unarchived,
    unpacked,
    unpacked_blocks,
)
from mixbits.packing.inspect import inspect_packed
from mixbits.packing.verify import verify_packed

FILE, ARCHIVE = "model.safetensors", "model.safetensors.gz"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def archived(packed):
    """The packed model archived, and the files it had."""
    before = files(packed)
    archive_packed(packed)
    return packed, before


def test_round_trip_in_place_and_to_another_folder(archived, tmp_path):
    folder, before = archived
    assert sorted(before) == sorted({name.removesuffix(".gz") for name in files(folder)})
    assert not (folder / FILE).exists()
    assert gzip.decompress((folder / ARCHIVE).read_bytes()) == before[FILE]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["archive"] == "gzip"
    assert unarchive_packed(folder, tmp_path / "other") == tmp_path / "other"
    assert files(tmp_path / "other") == before
    kept = files(folder)
    unarchive_packed(folder)
    assert files(folder) == before
    archive_packed(folder)
    assert files(folder) == kept  # deterministic


def test_saved_archived_is_the_same_as_archived_afterwards(job, archived, tmp_path):
    folder, _ = archived
    saved = job.save(tmp_path / "direct", archive=True)
    assert files(tmp_path / "direct") == files(folder)
    assert saved.disk_bytes == os.path.getsize(folder / ARCHIVE) == disk_bytes(folder)
    plain = job.save(tmp_path / "plain")
    assert plain.disk_bytes == plain.file_bytes == saved.file_bytes == disk_bytes(tmp_path / "plain")
    assert plain.compression_ratio == saved.compression_ratio == job.inventory.full_bytes / saved.file_bytes


def test_archives_are_verified_inspected_and_loaded_as_they_are(archived, tmp_path):
    folder, before = archived
    weights, _ = verify_packed(folder)
    info = inspect_packed(folder)
    assert weights.file_bytes == info.file_bytes == len(before[FILE])
    assert [(f.name, f.num_bytes) for f in info.files] == [(ARCHIVE, os.path.getsize(folder / ARCHIVE))]
    assert info.disk_bytes == os.path.getsize(folder / ARCHIVE)
    assert info.compression_ratio == 4 * info.num_parameters / info.file_bytes
    loaded = mixbits.load(folder)
    assert loaded.name_or_path == str(folder)
    unarchive_packed(folder, tmp_path / "plain")
    plain = mixbits.load(tmp_path / "plain")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / FILE).read_bytes() == before[FILE]
    assert "archive" not in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]


def test_from_pretrained_says_what_to_do(archived):
    from transformers import AutoModelForCausalLM

    with pytest.raises(FormatError, match=r"archived.*mixbits\.load.*mixbits unarchive"):
        AutoModelForCausalLM.from_pretrained(archived[0])


def test_what_another_program_unpacked_is_read(archived):
    folder, before = archived
    (folder / FILE).write_bytes(gzip.decompress((folder / ARCHIVE).read_bytes()))
    (folder / ARCHIVE).unlink()
    assert isinstance(mixbits.load(folder), torch.nn.Module)
    unarchive_packed(folder)  # only the field is left to remove
    assert files(folder) == before


def test_a_folder_is_opened_unpacked(archived, tmp_path):
    folder, before = archived
    with unarchived(folder) as opened:
        assert opened != folder
        assert files(opened) == before
    assert not opened.exists()
    unarchive_packed(folder)
    with unarchived(folder) as opened:
        assert opened == folder
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "none"):
        assert not is_archived(nothing)
        with unarchived(nothing) as opened:  # whoever reads it says what is wrong
            assert opened == nothing


def test_too_little_gain_and_too_much(tmp_path):
    noise = random.Random(0).randbytes(100_000)
    for name, data in (("noise", noise), ("bomb", bytes(1 << 20)), ("nearly", noise[:96_000] + bytes(1000))):
        path = tmp_path / name
        path.write_bytes(data)
        assert archive_file(path) is None
        assert path.read_bytes() == data
    (tmp_path / "good").write_bytes(noise[:90_000] + bytes(10_000))
    made = archive_file(tmp_path / "good")
    assert made is not None
    assert unpacked(made).tobytes() == (tmp_path / "good").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["bomb", "good", "good.gz", "nearly", "noise"]


def test_shards_are_archived_one_by_one(job, tmp_path):
    job.save(tmp_path / "m", max_shard_bytes=1000)
    before = files(tmp_path / "m")
    archive_packed(tmp_path / "m")
    assert any(name.endswith(".gz") for name in files(tmp_path / "m"))
    verify_packed(tmp_path / "m")
    mixbits.load(tmp_path / "m")
    unarchive_packed(tmp_path / "m")
    assert files(tmp_path / "m") == before


def test_cut_anywhere_and_bytes_added(archived):
    folder, _ = archived
    whole = (folder / ARCHIVE).read_bytes()
    for cut in [*range(0, 30), *range(30, len(whole), 53), len(whole) - 1]:
        (folder / ARCHIVE).write_bytes(whole[:cut])
        with pytest.raises(FormatError, match=ARCHIVE):
            verify_packed(folder)
    for added in (b"\0", whole):
        (folder / ARCHIVE).write_bytes(whole + added)
        with pytest.raises(FormatError, match="bytes after the end of the archive"):
            verify_packed(folder)
    with pytest.raises(FormatError, match="bytes after the end"):
        mixbits.load(folder)


def test_every_flipped_bit_is_found(archived):
    folder, before = archived
    whole = (folder / ARCHIVE).read_bytes()
    rng, messages = random.Random(1), []
    for _ in range(300):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        (folder / ARCHIVE).write_bytes(data)
        try:
            weights, _ = verify_packed(folder)
        except MixbitsError as error:
            messages.append(str(error))
            continue
        assert at < 10, "only gzip's own header holds what does not matter, e.g. a time"
        assert weights.files[0].mapped().tobytes() == before[FILE]
    assert len(messages) > 250
    assert all(ARCHIVE in message for message in messages)


def test_a_bomb_is_refused_with_little_memory(archived):
    folder, _ = archived
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(200)] + [packer.flush()])
    (folder / ARCHIVE).write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more than 64 times its size"):
            verify_packed(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(bomb) < 1 << 20 < 200 << 20
    assert peak < archive.MAX_EXPANSION * len(bomb) * 1.2 + (4 << 20)


def test_nothing_to_do_is_said(archived, packed, tmp_path):
    folder, _ = archived
    shutil.copytree(folder, tmp_path / "copy")
    unarchive_packed(tmp_path / "copy")
    with pytest.raises(DataError, match="no archived weight files"):
        unarchive_packed(tmp_path / "copy")
    with pytest.raises(DataError, match="is there already"):
        unarchive_packed(folder, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no weight files"):
        archive_packed(tmp_path / "empty")
    (tmp_path / "copy" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no quantization_config"):
        archive_packed(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json"):
        archive_packed(tmp_path / "copy")


def test_unpacked_blocks_of_a_long_run(tmp_path):
    """A run of one byte: many pieces from a single block of input, none larger than asked for."""
    data = random.Random(0).randbytes(60_000) + bytes(3 << 20)
    (tmp_path / "x.gz").write_bytes(gzip.compress(data))
    blocks = list(unpacked_blocks(tmp_path / "x.gz"))
    assert b"".join(blocks) == data
    assert max(map(len, blocks)) <= 1 << 20

"""Archived models in every job that reads models: the same figures as before, the same hash and ratio, and damage in one error."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest

from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.cli.certify import _print as show
from mixbits.engine import Engine
from mixbits.errors import DataError, FormatError
from mixbits.kernels import cpu
from mixbits.lm.checkpoint import model_hash
from mixbits.packing.archive import archive_packed, disk_bytes
from mixbits.pipeline.certify import certify
from mixbits.pipeline.compress import compress
from mixbits.pipeline.evaluate import evaluate_models
from mixbits.pipeline.lm_scores import neural_features
from mixbits.pipeline.quantize import quantize_model
from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings
from mixbits.report.certificate import certificate_page

ARCHIVE = "model.safetensors.gz"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("archived") / "plain"
    quantize_model(trained, folder, settings=QuantizeSettings(), spec="2", show_progress=False)
    return folder


@pytest.fixture(scope="module")
def archived(plain):
    folder = plain.with_name("archived")
    shutil.copytree(plain, folder)
    archive_packed(folder)
    assert sorted(path.name for path in folder.glob("model.safetensors*")) == [ARCHIVE]
    return folder


def test_the_hash_is_that_of_the_unpacked_files(plain, archived, tmp_path):
    assert model_hash(archived) == model_hash(plain)
    shutil.copytree(plain, tmp_path / "both")  # as when archiving was interrupted
    (tmp_path / "both" / ARCHIVE).write_bytes(b"half")
    assert model_hash(tmp_path / "both") == model_hash(plain)


def test_evaluated_and_certified_alike(plain, archived, trained, texts, capsys):
    text = texts / "test.txt"
    assert evaluate_models(archived, text, reference=plain)["delta_nats"] == 0
    assert evaluate_models(archived, text) == evaluate_models(plain, text)
    one, other = (certify(trained, folder, text=text) for folder in (plain, archived))
    assert other["verdict"] == one["verdict"]
    for name in ("compression_ratio", "stored_ratio"):
        assert other["models"][name] == one["models"][name]
    facts = other["models"]["packed"]
    assert facts["file_bytes"] == os.path.getsize(plain / "model.safetensors")
    assert facts["disk_bytes"] == disk_bytes(archived) == os.path.getsize(archived / ARCHIVE) < facts["file_bytes"]
    assert facts == one["models"]["packed"] | {"disk_bytes": facts["disk_bytes"]}
    assert f"{facts['file_bytes']:,} bytes (archived: {facts['disk_bytes']:,})" in certificate_page(other)
    show(other)
    assert f"{facts['file_bytes']:,} bytes (archived: {facts['disk_bytes']:,} on the disk), " in capsys.readouterr().out
    assert "archived" not in certificate_page(one)


def test_scored_alike(plain, archived, sentences_of):
    texts = sentences_of(6, seed=9)
    lists = [NBest("u", tuple(Hypothesis(text, acoustic_score=-1.0) for text in texts), reference=texts[0])]
    runtimes = ("pytorch", "int8") if cpu.is_available() else ("pytorch",)
    for runtime in runtimes:
        one, other = (neural_features(folder, lists, runtime=runtime) for folder in (plain, archived))
        assert np.array_equal(one.neural_lm_score, other.neural_lm_score)
    if cpu.is_available():
        assert Engine(archived).score([[2, 7, 5]]) == Engine(plain).score([[2, 7, 5]])


def test_unpacked_by_another_program(plain, archived, texts, tmp_path):
    folder = tmp_path / "gunzipped"
    shutil.copytree(archived, folder)
    (folder / "model.safetensors").write_bytes(gzip.decompress((folder / ARCHIVE).read_bytes()))
    (folder / ARCHIVE).unlink()
    assert evaluate_models(folder, texts / "test.txt")["ppl"] == evaluate_models(plain, texts / "test.txt")["ppl"]
    assert model_hash(folder) == model_hash(plain)


def test_damage_is_one_error(archived, texts, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(archived, folder)
    content = (folder / ARCHIVE).read_bytes()
    half = len(content) // 2
    for damaged in (content[:-9], b"PK" + content, content[:half] + b"\0\0\0\0" + content[half + 4 :]):
        (folder / ARCHIVE).write_bytes(damaged)
        for call in (model_hash, lambda path: evaluate_models(path, texts / "test.txt")):
            with pytest.raises(FormatError, match=r"model\.safetensors\.gz.*copy it again"):
                call(folder)


def test_jobs_that_need_full_precision_say_what_an_archive_is(archived, texts, tmp_path):
    with pytest.raises(FormatError, match="this packed model is archived"):
        compress(archived, text=texts / "train.txt", output=tmp_path / "out", ratio=8)


def test_compressed_into_an_archive(trained, texts, tmp_path):
    out, options = tmp_path / "out", {"text": texts / "train.txt", "bits_per_weight": 13.0, "train": False}
    options |= {"measure": MeasureSettings(num_probes=2, num_blocks=4), "guard": False, "show_progress": False}
    done = compress(trained, output=out, archive=True, **options)
    assert sorted(path.name for path in out.glob("model.safetensors*")) == [ARCHIVE]
    assert (
        done.disk_bytes
        == os.path.getsize(out / ARCHIVE)
        < done.file_bytes
        == len(gzip.decompress((out / ARCHIVE).read_bytes()))
    )
    assert done.bits_per_weight <= 13.0
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (described["archive"], described["file_bytes"]) == ("gzip", done.file_bytes)
    assert described["compression_ratio"] == round(done.compression_ratio, 4)
    again = compress(trained, output=out, archive=True, **options)  # at once, without --overwrite
    assert again == done
    plain = compress(trained, output=tmp_path / "plain", **options)
    assert (plain.disk_bytes, plain.compression_ratio) == (plain.file_bytes, done.compression_ratio)
    archive_packed(tmp_path / "plain")  # by hand, afterwards: still the result of that call
    assert compress(trained, output=tmp_path / "plain", **options).disk_bytes == done.disk_bytes
    assert model_hash(tmp_path / "plain") == model_hash(out)
    (out / ARCHIVE).write_bytes(b"damaged")
    with pytest.raises(DataError, match="--overwrite"):
        compress(trained, output=out, archive=True, **options)
    assert compress(trained, output=out, archive=True, overwrite=True, **options) == done

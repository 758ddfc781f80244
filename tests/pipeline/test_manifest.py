"""Manifests: two runs of one seed have the same one bit for bit, another seed another; every change of a file is found."""

from __future__ import annotations

import json

import pytest

from mixbits.errors import DataError, FormatError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import encode_file
from mixbits.pipeline.compress import compress
from mixbits.pipeline.manifest import Difference, content_hash, verify_manifest, write_manifest
from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings
from mixbits.quant.sensitivity import read_sensitivities
from mixbits.runs import hash_file, read_json, write_json


def run(trained, texts, output, seed):
    """A whole ``compress`` run with its manifest in ``<output>.work``; returns the manifest's path."""
    measure = MeasureSettings(num_probes=2, num_blocks=4, seed=seed)
    quantize = QuantizeSettings.model_validate(
        {
            "train": {"epochs": 0.2, "batch_size": 8, "precision": "float32", "learning_rate": 3e-3, "seed": seed},
            "refine_epochs": 0.1,
        }
    )
    done = compress(
        trained, text=texts / "train.txt", valid=texts / "valid.txt", output=output, max_bytes=4600, measure=measure, quantize=quantize,
        show_progress=False,
    )  # fmt: skip
    work = output.with_name(output.name + ".work")
    stream = encode_file(load_model(trained)[1], texts / "train.txt")
    return write_manifest(
        work,
        seed=seed,
        settings={"measure": measure.model_dump(), "quantize": quantize.model_dump(mode="json")},
        data={"train": stream.sha256},
        models={"full": trained, "packed": done.directory},
        sensitivities=[read_sensitivities(path) for path in sorted(work.glob("sensitivities-*.json"))],
        allocations={"packed": done.allocation},
    )


@pytest.fixture(scope="module")
def runs(trained, texts, tmp_path_factory):
    """Manifests of two equal runs in different places and of one with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    return [run(trained, texts, folder / place / "out", seed) for place, seed in (("a", 0), ("b", 0), ("c", 1))]


def test_one_seed_one_manifest(runs, trained):
    first, again, other = (path.read_bytes() for path in runs)
    assert first == again
    assert first != other
    manifest = json.loads(first)
    work = runs[0].parent
    assert manifest["models"]["full"] == model_hash(trained)
    assert manifest["models"]["packed"] == model_hash(work.with_name("out"))
    row = next(name for name in manifest["files"] if name.endswith("row.json"))
    assert "train_seconds" in manifest["files"][row]["without"]
    weights = next(name for name in manifest["files"] if name.endswith("model.safetensors"))
    assert manifest["files"][weights] == {"sha256": hash_file(work / weights)}
    assert [entry["measure"] for entry in manifest["measures"]] == ["fisher"]
    assert manifest["seed"] == 0
    assert set(manifest["solver_inputs"]["packed"]) == {"solver_input_sha256", "specs_sha256"}
    assert set(manifest["files"]) == {
        path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file() and path != runs[0]
    }


def test_differences_are_named(runs, tmp_path):
    import shutil

    work = tmp_path / "work"
    shutil.copytree(runs[0].parent, work)
    assert verify_manifest(work) == []
    files = read_json(work / "manifest.json")["files"]
    row, weights = (next(n for n in files if n.endswith(end)) for end in ("row.json", "model.safetensors"))
    record = read_json(work / row)
    write_json(work / row, record | {"train_seconds": 1e9})  # how long it took is no part of the result
    assert verify_manifest(work) == []
    write_json(work / row, record | {"valid_nats": 0.0})
    data = bytearray((work / weights).read_bytes())
    data[-1] ^= 1
    (work / weights).write_bytes(data)
    (work / "allocation.json").unlink()
    (work / "report.html").write_text("later")
    (work / "train").mkdir()
    (work / "train" / "checkpoint").write_text("ignored")
    expected = {row: "changed", weights: "changed", "allocation.json": "missing", "report.html": "not in the manifest"}
    found = verify_manifest(work)
    assert {d.path: d.problem for d in found} == expected
    assert [d.path for d in found] == sorted(expected)
    assert str(Difference("a", "missing")) == "a: missing"


def test_what_is_left_out_of_a_hash():
    one = {
        "a": [{"train_seconds": 1.0, "train_runtime": 2, "x": 1}],
        "versions": {"torch": "1"},
        "command": "a",
        "b": 2,
    }
    two = {"b": 2, "a": [{"train_seconds": 2.0, "x": 1}], "versions": {}, "command": "b"}
    assert content_hash(one) == content_hash(two) == content_hash({"a": [{"x": 1}], "b": 2})
    assert content_hash(one) != content_hash(one | {"b": 3})
    assert content_hash({"commands": 1}) != content_hash({})


def test_settings_count_without_the_paths_of_data(tmp_path, trained):
    def settings_hash(**settings):
        path = write_manifest(tmp_path, seed=0, settings=settings, data={}, models={"full": trained})
        return read_json(path)["settings_sha256"]

    assert settings_hash(epochs=1, text={"train": "/a"}) == settings_hash(epochs=1, text={"train": "/b"})
    assert settings_hash(epochs=1) != settings_hash(epochs=2)


def test_bad_input(tmp_path, trained):
    with pytest.raises(DataError, match="no such folder; a manifest is written into"):
        write_manifest(tmp_path / "none", seed=0, settings={}, data={}, models={})
    with pytest.raises(DataError, match="no weight files"):
        write_manifest(tmp_path, seed=0, settings={}, data={}, models={"full": tmp_path})
    with pytest.raises(DataError, match="no such file"):
        verify_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"format": "other"})
    with pytest.raises(FormatError, match="not a manifest"):
        verify_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"format": "mixbits-manifest", "format_version": 2, "files": {}})
    with pytest.raises(FormatError, match="format version 2 or its files cannot be read; this mixbits reads 1"):
        verify_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    (tmp_path / "broken.json").write_text("{")
    path = write_manifest(tmp_path, seed=0, settings={}, data={}, models={"full": trained})
    assert set(read_json(path)["files"]) == {"broken.json"}

"""``mixbits verify``, ``archive`` and ``unarchive``: good models in a line, damage in one error and exit code 2."""

import json
import os
import shutil

import pytest

from mixbits.cli.main import main
from mixbits.pipeline.manifest import write_manifest
from mixbits.spec import BitAllocation, QuantSpec

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def model_dir(pack_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify") / "model"
    pack_llama(directory, lambda inventory: BitAllocation.uniform(inventory, QuantSpec(2)))
    return directory


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "m")


def _config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_good_model(model_dir, capsys):
    assert main(["verify", str(model_dir)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    size = os.path.getsize(model_dir / FILE)
    for text in ("good. LlamaForCausalLM, 8 units", f"{size:,} bytes", "format version 2, checksums match"):
        assert text in out
    assert main(["verify", "--json", str(model_dir)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["checksums"], found["archived"], found["files"]) == (True, True, False, 1)
    assert found["file_bytes"] == found["disk_bytes"] == size


def test_version_1_is_good_but_says_what_it_lacks(copy, capsys):
    _config(copy, lambda c: c["quantization_config"].update(format_version=1))
    assert main(["verify", str(copy)]) == 0
    assert "format version 1, no checksums to compare" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-1]), "cut short"),
        (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-1] + b"\xf1"), "its checksum is"),
        (lambda d: (d / FILE).unlink(), "no such file"),
        (lambda d: _config(d, lambda c: c.update(num_hidden_layers=2)), "is missing"),
        (lambda d: _config(d, lambda c: c.update(model_type="none")), "transformers cannot build"),
        (
            lambda d: _config(d, lambda c: c["quantization_config"]["units"]["model.embed_tokens"].update(tied=["x"])),
            "'x' is not a Linear",
        ),
    ],
)
def test_damage_is_one_line_and_exit_code_2(damage, message, as_json, copy, capsys):
    damage(copy)
    assert main(["verify", str(copy), *(["--json"] if as_json else [])]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    if as_json:
        found = json.loads(captured.out)
        assert not found["ok"]
        assert message in found["error"]
    else:
        assert not captured.out


def test_archive_and_back(copy, capsys, tmp_path):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    size = os.path.getsize(copy / FILE)
    assert main(["archive", str(copy)]) == 0
    out = capsys.readouterr().out
    smaller = os.path.getsize(copy / f"{FILE}.gz")
    assert f"{size:,} bytes, archived {smaller:,}: {1 - smaller / size:.1%} saved" in out
    assert main(["verify", "--json", str(copy)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["archived"], found["file_bytes"], found["disk_bytes"]) == (True, size, smaller)
    assert main(["inspect", str(copy)]) == 0
    assert f"{size:,} bytes (archived: {smaller:,} on the disk)" in capsys.readouterr().out
    assert main(["unarchive", str(copy), "--output", str(tmp_path / "out")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main(["unarchive", str(copy)]) == 0
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert main(["unarchive", str(copy)]) == 2
    assert "no archived weight files" in capsys.readouterr().err


def test_archive_that_would_save_too_little(copy, capsys, monkeypatch):
    monkeypatch.setattr("mixbits.packing.archive.MIN_GAIN", 0.99)
    assert main(["archive", str(copy)]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert (copy / FILE).exists()


def test_damaged_models_are_not_archived(copy, capsys):
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-1])
    assert main(["archive", str(copy)]) == 2
    assert "cut short" in capsys.readouterr().err


def test_a_run_is_held_against_its_manifest(copy, tmp_path, capsys):
    run = tmp_path / "run"
    for seed in (0, 1):
        (run / f"seed-{seed}").mkdir(parents=True)
        (run / f"seed-{seed}" / "figures.json").write_text('{"loss": 1}')
        write_manifest(run / f"seed-{seed}", seed=seed, settings={}, data={}, models={"full": copy})
    assert main(["verify", str(run)]) == 0
    assert "good. 2 file(s) of the run are as 2 manifest(s) say" in capsys.readouterr().out
    (run / "seed-1" / "figures.json").write_text('{"loss": 2}')
    assert main(["verify", str(run / "seed-0")]) == 0
    assert main(["verify", str(run)]) == 2
    assert "seed-1: 1 file(s) are not as manifest.json says: figures.json: changed" in capsys.readouterr().err

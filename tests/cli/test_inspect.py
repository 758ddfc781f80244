"""``mixbits inspect``: numbers agree with the specs and the file system; damaged models give one line and exit code 2."""

import json
import os

import numpy as np
import pytest

from mixbits.cli.main import main
from mixbits.spec import BitAllocation, QuantSpec


@pytest.fixture(scope="module")
def model_dir(pack_llama, tmp_path_factory):
    def several_widths(inventory):
        widths = (2, 1.58, 4, 8, 16, 1, 3)
        return BitAllocation({u.name: QuantSpec(widths[i % 7]) for i, u in enumerate(inventory.units)})

    directory = tmp_path_factory.mktemp("inspect") / "model"
    return directory, *pack_llama(directory, several_widths)


def test_json(model_dir, capsys):
    directory, inventory, allocation, weights = model_dir
    assert main(["inspect", str(directory), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["file_bytes"] == os.path.getsize(directory / "model.safetensors")
    assert (info["format_version"], info["has_checksums"]) == (2, True)
    assert info["files"] == [{"name": "model.safetensors", "num_bytes": info["file_bytes"]}]
    assert info["num_parameters"] == inventory.num_parameters
    assert info["compression_ratio"] == inventory.full_bytes / info["file_bytes"]
    assert [u["name"] for u in info["units"]] == [u.name for u in inventory.units]  # the model's own order
    for row, unit in zip(info["units"], inventory.units, strict=True):
        spec = allocation.specs[unit.name]
        assert (row["spec"], row["rows"], row["cols"], row["kind"]) == (str(spec), unit.rows, unit.cols, unit.kind)
        assert row["num_bytes"] == spec.unit_bytes(unit.rows, unit.cols)
        assert row["bits_per_weight"] == 8 * row["num_bytes"] / unit.num_weights
        if spec.is_quantized:
            shares = np.bincount(weights[unit.name].codes.flatten().numpy()) / unit.num_weights
            shares = shares[shares > 0]
            assert row["code_entropy"] == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-12)
            assert row["code_entropy"] <= row["bits_per_code"] == (1.6 if spec.bit_width == 1.58 else spec.bit_width)
            scales = weights[unit.name].scales.double()
            assert row["scale_min"] == scales.min().item()
            assert row["scale_mean"] == pytest.approx(scales.mean().item(), rel=1e-12)
            assert row["scale_max"] == scales.max().item()
        else:
            assert row["scale_mean"] is None
            assert row["code_entropy"] is None
    total = (
        sum(r["num_bytes"] for r in info["units"]) + sum(r["num_bytes"] for r in info["others"]) + info["header_bytes"]
    )
    assert total == info["file_bytes"]
    assert {r["name"] for r in info["others"]} == {name for name, _ in inventory.others}


def test_a_weight_file_stands_for_its_folder(model_dir, capsys):
    directory, *_ = model_dir
    assert main(["inspect", str(directory / "model.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == str(directory)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_table(model_dir, columns, capsys, monkeypatch):
    directory, *_ = model_dir
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    for text in (
        "layers.0.self_attn.q_proj",
        "2-half-step-row",
        "30 x 16",
        "lm_head",
        "other tensors",
        "bits per weight",
    ):
        assert text in out
    assert f"{os.path.getsize(directory / 'model.safetensors'):,} bytes" in out


def _damage(directory, tmp_path, edit):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit(copy)
    return copy


def _config_field(key, value):
    def edit(copy):
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"][key] = value
        (copy / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]), "cut short"),
        (lambda d: (d / "model.safetensors").unlink(), "no such file"),
        (lambda d: (d / "config.json").write_text("{}"), "no quantization_config"),
        (_config_field("num_parameters", 10**9), "num_parameters is 1000000000"),
        (_config_field("num_parameters", 0), "num_parameters is 0"),
        (_config_field("format_version", 3), "format_version is 3"),
    ],
)
def test_damaged_model_is_one_line_and_exit_code_2(edit, message, model_dir, tmp_path, capsys):
    copy = _damage(model_dir[0], tmp_path, edit)
    assert main(["inspect", str(copy)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_missing_directory(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "config.json" in capsys.readouterr().err

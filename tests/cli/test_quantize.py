"""``mixbits quantize``: rounding, training, and mistakes that are one line each."""

import json

import pytest

import mixbits
from mixbits.cli.main import main
from mixbits.errors import DataError


def test_rounds_and_trains(tiny_world, tmp_path, capsys):
    model, text, valid = (str(tiny_world / name) for name in ("full", "text.txt", "valid.txt"))
    assert main(["quantize", model, "-o", str(tmp_path / "rounded"), "--spec", "1.58"]) == 0
    size = (tmp_path / "rounded" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in capsys.readouterr().out
    archive = ["quantize", model, "-o", str(tmp_path / "archived"), "--spec", "1.58", "--archive"]
    assert main(archive) == 0
    smaller = (tmp_path / "archived" / "model.safetensors.gz").stat().st_size
    said = capsys.readouterr().out
    assert f"{size:,} bytes, " in said
    assert f"; archived, {smaller:,} bytes on the disk ({1 - smaller / size:.1%} saved)" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixbits.packing.archive.MIN_GAIN", 0.99)
        assert main([*archive, "--overwrite"]) == 0
    assert "; not archived, that would not save 3 %" in capsys.readouterr().out
    assert (tmp_path / "archived" / "model.safetensors").stat().st_size == size
    units = json.loads((tmp_path / "rounded" / "config.json").read_text())["quantization_config"]["units"]
    specs = {unit: "16" if "fc1" in unit else "2" for unit in units}
    allocation = tmp_path / "allocation.json"
    allocation.write_text(json.dumps({"format": "mixbits-allocation", "format_version": 1, "specs": specs}))
    arguments = ["quantize", model, "-o", str(tmp_path / "trained"), "--allocation", str(allocation), "--text", text]
    arguments += ["--valid", valid, "--epochs", "0.2", "--refine-epochs", "0.2", "--method", "admm"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "bits a weight" in said.out
    assert "nan" not in said.err  # a training too short to log a loss shows none
    assert mixbits.load(tmp_path / "trained").num_parameters() > 0


def test_mistakes(tiny_world, tmp_path, capsys):
    model, out = str(tiny_world / "full"), str(tmp_path / "out")

    def fails(*arguments, saying):
        assert main(["quantize", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mixbits: error: ")
        assert error.count("\n") == 1
        assert saying in error

    fails(model, "-o", out, saying="exactly one of")
    fails(model, "-o", out, "--spec", "7", saying="bit width 7 does not exist")
    fails(model, "-o", out, "--spec", "two", saying="cannot read 'two' as a spec")
    fails(model, "-o", out, "--allocation", str(tmp_path / "none.json"), saying="no such file")
    fails(model, "-o", out, "--spec", "2", "--method", "magic", saying="method: Input should be")
    fails(model, "-o", out, "--spec", "2", "--epochs", "-1", saying="epochs")
    fails(model, "-o", model, "--spec", "2", saying="is the model itself")
    fails(str(tmp_path), "-o", out, "--spec", "2", saying="no config.json")
    trained = ("--spec", "2", "--text", str(tiny_world / "text.txt"), "--learning-rate", "1e30")
    fails(model, "-o", out, *trained, saying="train again with a lower learning_rate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "compress"])
def test_students_train_without_dropout(tiny_world, tmp_path, monkeypatch, command):
    """As the settings' own default is: a student that learns from a teacher needs none."""
    asked = []

    def stop(*args, **options):
        asked.append(options["settings" if command == "quantize" else "quantize"])
        raise DataError("seen")

    monkeypatch.setattr(f"mixbits.pipeline.{command}.{command}{'_model' if command == 'quantize' else ''}", stop)
    more = ["--spec", "2"] if command == "quantize" else ["--ratio", "8"]
    text = ["--text", str(tiny_world / "text.txt")]
    assert main([command, str(tiny_world / "full"), "-o", str(tmp_path / "o"), *text, *more]) == 2
    assert [settings.train.dropout for settings in asked] == ["off"]

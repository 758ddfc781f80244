"""``mixbits compress``: from a model to a file within its budget, and mistakes that are one line each."""

import mixbits
from mixbits.cli.main import main


def command(world, out, *more):
    files = ["--text", str(world / "text.txt"), "--valid", str(world / "valid.txt")]
    return ["compress", str(world / "full"), *files, "-o", str(out), "--probes", "2", "--epochs", "0.2", *more]


def test_a_budget_in_bytes(tiny_world, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(tiny_world, out, "--bytes", "4700")) == 0
    size = (out / "model.safetensors").stat().st_size
    assert size <= 4700
    assert f"{size:,} bytes" in capsys.readouterr().out
    assert mixbits.load(out).num_parameters() > 0
    assert main(command(tiny_world, out, "--bytes", "4700")) == 0  # the same again
    capsys.readouterr()
    assert main(command(tiny_world, out, "--bytes", "5000")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(command(tiny_world, out, "--bytes", "5000", "--overwrite")) == 0
    assert (out / "model.safetensors").stat().st_size <= 5000
    assert main(command(tiny_world, tmp_path / "rounded", "--bits-per-weight", "14", "--no-train", "--archive")) == 0
    smaller = (tmp_path / "rounded" / "model.safetensors.gz").stat().st_size
    assert f"; archived, {smaller:,} bytes on the disk" in capsys.readouterr().out


def test_mistakes(tiny_world, tmp_path, capsys):
    out = tmp_path / "out"

    def fails(*arguments, saying):
        assert main(command(tiny_world, out, *arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("mixbits: error: ")
        assert error.count("\n") == 1
        assert saying in error

    fails("--ratio", "1000", saying="the smallest file possible with these specs is")
    fails(saying="exactly one of ratio, bytes, bits_per_weight")
    fails("--ratio", "2", "--bytes", "4700", saying="exactly one of")
    fails("--ratio", "-2", saying="expected a positive number")
    fails("--ratio", "2", "--specs", "1,9", saying="bit width 9")
    fails("--ratio", "2", "--specs", "", saying="no specs")
    fails("--ratio", "2", "--probes", "0", saying="num_probes")
    fails("--ratio", "2", "--text", str(tmp_path / "none.txt"), saying="none.txt")
    assert not out.exists()
    assert not (tmp_path / "out.work").exists()

"""``mixbits measure`` then ``mixbits allocate`` from its file, and mistakes that are one line each."""

import pytest

from mixbits.cli.main import main
from mixbits.quant.sensitivity import read_sensitivities
from mixbits.spec import parse_specs


def test_measure_then_allocate(tiny_world, tmp_path, capsys):
    output = tmp_path / "s.json"
    text = str(tiny_world / "text.txt")
    command = ["measure", str(tiny_world / "full"), "--text", text, "--probes", "2", "--batch", "3", "--seed", "7"]
    assert main([*command, "--specs", "1, 2,4", "-o", str(output)]) == 0
    assert f"wrote {output}: 7 units, 3 specs, 48 tokens" in capsys.readouterr().out
    found = read_sensitivities(output)
    assert found.specs == parse_specs(["1", "2", "4"])
    facts = found.provenance
    assert (facts["seed"], facts["num_probes"], facts["num_sequences"]) == (7, 2, 3)
    allocation = str(tmp_path / "a.json")
    budget = ["--bytes", "5000", "-o", allocation]
    assert main(["allocate", str(output), *budget, "--model", str(tiny_world / "full")]) == 0
    first = (tmp_path / "s.json").read_bytes()
    assert main([*command, "--specs", "1, 2,4", "-o", str(output)]) == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "0"], "--probes is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--specs", ","], "--specs is 0"),
        (["--specs", "5"], "bit width 5"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes(tiny_world, tmp_path, capsys, arguments, message):
    output = tmp_path / "s.json"
    world = [str(tiny_world / "full"), "--text", str(tiny_world / "text.txt")]
    assert main(["measure", *world, "-o", str(output), "--probes", "1", "--batch", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_file_of_another_model_is_refused(tiny_world, tmp_path, capsys):
    from mixbits.lm.checkpoint import load_model, save_model

    output = tmp_path / "s.json"
    world = [str(tiny_world / "full"), "--text", str(tiny_world / "text.txt")]
    assert main(["measure", *world, "-o", str(output), "--probes", "1", "--batch", "1"]) == 0
    model, tokenizer = load_model(tiny_world / "full")
    model.lm_head.weight.data[0, 0] += 1
    save_model(model, tokenizer, tmp_path / "other")
    command = ["allocate", str(output), "--bytes", "5000", "-o", str(tmp_path / "a.json")]
    assert main([*command, "--model", str(tmp_path / "other")]) == 2
    assert "its weights differ" in capsys.readouterr().err

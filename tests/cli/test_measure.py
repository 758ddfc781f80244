"""``mixbits measure`` then ``mixbits allocate`` from its file, and mistakes that are one line each."""

import pytest

from mixbits.cli.main import main
from mixbits.quant.sensitivity import read_sensitivities
from mixbits.spec import parse_specs


def test_measure_then_allocate(tiny_world, tmp_path, capsys):
    output = tmp_path / "s.json"
    text = str(tiny_world / "text.txt")
    command = ["measure", str(tiny_world / "full"), "--text", text, "--probes", "2", "--batch", "3", "--seed", "7"]
    command += ["--measure", "hessian"]
    assert main([*command, "--specs", "1, 2,4", "-o", str(output)]) == 0
    said = capsys.readouterr().out
    found = read_sensitivities(output)
    size = f"{len(found.units)} units, 3 specs, 48 tokens"
    assert f"wrote {output}: hessian, {size}; cost 5 forward-backward passes, largest relative standard error" in said
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
    ("measure", "options"), [("fisher", []), ("kl", []), ("loss", []), ("hessian", ["--probes", "2"])]
)
def test_every_measure_plain_and_around_an_allocation(tiny_world, tmp_path, capsys, measure, options):
    full, plain, allocation = str(tiny_world / "full"), str(tmp_path / "s.json"), str(tmp_path / "a.json")
    command = ["measure", full, "--text", str(tiny_world / "text.txt"), "--blocks", "3", "--specs", "1,4"]
    command += ["--measure", measure, *options]
    assert main([*command, "-o", plain]) == 0
    assert f"wrote {plain}: {measure}, " in capsys.readouterr().out
    assert main(["allocate", plain, "--bytes", "5000", "-o", allocation]) == 0
    again = str(tmp_path / "again.json")
    assert main([*command, "-o", again, "--around", allocation]) == 0
    first, second = read_sensitivities(plain), read_sensitivities(again)
    assert first.measure == second.measure == measure
    assert (first.provenance["around"], first.provenance["num_sequences"]) == (None, 3)
    assert set(second.provenance["around"]) == set(second.units)
    assert any(first.units[n].loss_increase != u.loss_increase for n, u in second.units.items())


def test_warnings_are_said(tiny_world, tmp_path, capsys):
    command = ["measure", str(tiny_world / "full"), "--text", str(tiny_world / "text.txt"), "--measure", "kl"]
    assert main([*command, "--blocks", "1", "--specs", "2", "-o", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr()
    assert "largest relative standard error unknown" in said.out
    assert "warning: a single sequence" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measure", "magic"], "--measure is 'magic'; expected one of hessian, fisher, kl, loss"),
        (["--around", "nowhere.json"], "nowhere.json: no such file"),
        (["--probes", "0"], "--probes is 0"),
        (["--blocks", "-1"], "--blocks is -1"),
        (["--specs", ","], "--specs is 0"),
        (["--specs", "5"], "bit width 5"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["-o", "."], ".: is a folder; expected a file name"),
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


def test_text_of_another_language_and_a_packed_model_are_refused(tiny_world, tmp_path, capsys):
    foreign, packed = tmp_path / "foreign.txt", str(tmp_path / "packed")
    foreign.write_text("der Wald schläft\n" * 40, encoding="utf-8")
    output = str(tmp_path / "s.json")
    assert main(["measure", str(tiny_world / "full"), "--text", str(foreign), "--measure", "kl", "-o", output]) == 2
    assert "of its words are unknown to the model's tokenizer" in capsys.readouterr().err
    assert main(["quantize", str(tiny_world / "full"), "-o", packed, "--spec", "2"]) == 0
    assert main(["measure", packed, "--text", str(tiny_world / "text.txt"), "-o", output]) == 2
    assert "is quantized already" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()

"""mixbits search writes a file that mixbits allocate solves, and says in one line what is wrong."""

import pytest

from mixbits.cli.main import main
from mixbits.quant.sensitivity import read_sensitivities
from mixbits.runs import read_json
from mixbits.spec import BitAllocation


def arguments(world, output, *more):
    text = str(world / "text.txt")
    return [
        "search",
        str(world / "full"),
        "--text",
        text,
        "-o",
        str(output),
        "--specs",
        "1,2,4",
        "--epochs",
        "1",
        *more,
    ]


def test_search_then_allocate(tiny_world, tmp_path, capsys):
    output, preferences, best = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "best.json"
    more = ["--bytes", "3800", "--batch-size", "4", "--arch-every", "2", "--preferences", str(preferences)]
    more += ["--allocation", str(best)]
    assert main(arguments(tiny_world, output, *more)) == 0
    said = capsys.readouterr().out
    assert f"wrote {output}" in said
    assert "1-best: " in said
    assert "integer program: " in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.json", "p.json", "s.json"]  # no work folder is left
    found = read_sensitivities(output)
    assert found.measure == "search"
    assert found.provenance["budget_bytes"] == 3800
    assert len(read_json(preferences)["history"]) == found.provenance["architecture_steps"]
    chosen = BitAllocation.from_json(read_json(best))
    assert chosen.provenance["method"].startswith("most probable choice of the search")
    assert chosen.provenance["predicted_bytes"] <= 3800
    repaired = chosen.provenance["repaired"]
    assert ("solver_input_sha256" in chosen.provenance) == repaired
    budget = ["--bytes", "3800", "-o", str(tmp_path / "a.json"), "--model", str(tiny_world / "full")]
    assert main(["allocate", str(output), *budget]) == 0
    first = output.read_bytes()
    assert main(arguments(tiny_world, output, *more)) == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "exactly one of ratio, bytes, bits_per_weight"),
        (["--bytes", "100"], "cannot be met"),
        (["--ratio", "1"], "leaves nothing to search"),
        (["--ratio", "10", "--relaxation", "hard"], "relaxation"),
        (["--ratio", "10", "--specs", "2"], "at least two"),
        (["--ratio", "10", "--text", "nowhere.txt"], "nowhere.txt"),
        (["--bytes", "3800", "--preferences", "."], ".: is a folder"),
        (["--bytes", "3800", "--learning-rate", "1e30"], "train again with a lower learning_rate"),
    ],
)
def test_mistakes_are_one_line(tiny_world, tmp_path, capsys, more, message):
    output = tmp_path / "s.json"
    assert main(arguments(tiny_world, output, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

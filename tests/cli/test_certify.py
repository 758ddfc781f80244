"""``mixbits certify`` from files on disk: what it prints and writes, exit codes, and one line for bad input."""

from __future__ import annotations

import json

import pytest

from mixbits.cli.main import main


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """Folder with ``full``, ``packed`` (8 bits, rounded), ``coarse`` (1 bit), text.txt, dev.jsonl and test.jsonl."""
    from mixbits.pipeline.quantize import quantize_model
    from mixbits.pipeline.settings import QuantizeSettings

    folder = tmp_path_factory.mktemp("certify")
    (folder / "full").symlink_to(tiny_world / "full", target_is_directory=True)
    lines = (tiny_world / "text.txt").read_text().splitlines()
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    for name, spec in (("packed", "8"), ("coarse", "1")):
        quantize_model(folder / "full", folder / name, settings=QuantizeSettings(), spec=spec, show_progress=False)
    for name, chosen in (("dev", lines[:20]), ("test", lines[20:60])):
        rows = []
        for number, line in enumerate(chosen):
            wrong = " ".join([*line.split()[:-1], "bird"])
            hypotheses = [
                {"text": t, "acoustic_score": -1.0 - i} for i, t in enumerate((wrong, line)[:: 1 if number % 3 else -1])
            ]
            rows.append(json.dumps({"utterance": f"{name}-{number}", "reference": line, "hypotheses": hypotheses}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_verdict_files_and_exit_codes(world, tmp_path, capsys):
    output, page = tmp_path / "new" / "certificate.json", tmp_path / "page.html"
    ask = ["certify", str(world / "full"), str(world / "packed"), "--text", str(world / "text.txt")]
    assert main([*ask, "-o", str(output), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["format"] == "mixbits-certificate"
    assert out.startswith("Lossless at alpha = 0.05")
    assert found["verdict"] == "lossless"
    assert f"{found['models']['packed']['file_bytes']:,} bytes" in out
    assert f"wrote {output}" in out
    assert "Lossless at alpha = 0.05" in page.read_text()
    # one sentence proves nothing: exit code 1
    (tmp_path / "one.txt").write_text("the small cat sees a mouse\n")
    assert main([*ask[:-1], str(tmp_path / "one.txt"), "--alpha", "0.01"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Unresolved at alpha = 0.01")
    assert "+- unknown nats" in out


def test_lists(world, capsys):
    ask = ["certify", str(world / "full"), str(world / "coarse"), "--text", str(world / "text.txt")]
    code = main([*ask, "--dev", str(world / "dev.jsonl"), "--nbest", str(world / "test.jsonl"), "--seed", "3"])
    out = capsys.readouterr().out
    assert code in (0, 1)
    assert "WER %       test.jsonl: first pass 1" in out
    assert "of 40 one-bests changed" in out
    assert "warning: list test.jsonl: only" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["packed", "full", "--text", "text.txt"], "quantized already"),
        (["full", "packed", "--text", "nothing"], "no such text file"),
        (["full", "nothing", "--text", "text.txt"], "no config.json"),
        (["full", "packed", "--text", "text.txt", "--nbest", "test.jsonl"], "test lists without a dev list"),
        (["full", "packed", "--text", "text.txt", "--alpha", "5"], "expected a significance level between 0 and 0.5"),
        (["full", "packed", "--text", "text.txt", "--margin-nats", "0"], "expected a positive number"),
        (["full", "packed", "--text", "text.txt", "-o", "full"], "--output full: is a folder"),
        (["full", "packed", "--text", "text.txt", "-o", "x", "--html", "x"], "is the same file as --output"),
        (["full", "packed", "--text", "text.txt", "--html", "text.txt/x"], "is a file; expected a folder"),
    ],
)
def test_bad_input(world, options, message, capsys, monkeypatch):
    monkeypatch.chdir(world)
    before = sorted(path.name for path in world.rglob("*"))
    assert main(["certify", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mixbits: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in world.rglob("*")) == before

"""``mixbits evaluate``: what it prints, and one line for bad input (the way from text to figures is in test_train)."""

import json

import pytest
import torch

from mixbits.cli.main import main
from mixbits.lm.checkpoint import save_model
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer

SIZE = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=16, num_heads=2, context=12)


def write_model(path, words="a b c d e", change=None):
    tokenizer = word_tokenizer([words], max_length=12)
    model = build_model(SIZE, tokenizer, seed=0)
    if change:
        with torch.no_grad():
            change(model)
    save_model(model, tokenizer, path)


@pytest.fixture
def setting(tmp_path):
    write_model(tmp_path / "m")
    (tmp_path / "t.txt").write_text("a b c zzz\nd e\nb\n")
    return tmp_path


def test_figures_and_unknown_words(setting, capsys):
    assert (
        main(["evaluate", str(setting / "m"), "--text", str(setting / "t.txt"), "--context", "8", "--stride", "2"]) == 0
    )
    out = capsys.readouterr().out
    assert "(10 tokens, 10 words with sentence ends, 1 unknown, each predicted as one <unk>; window 8, stride 2)" in out


def test_one_sentence_has_an_unknown_standard_error(setting, capsys):
    (setting / "one.txt").write_text("a b\n")
    ask = ["evaluate", str(setting / "m"), "--text", str(setting / "one.txt"), "--json", str(setting / "o.json")]
    assert main(ask) == 0
    assert json.loads((setting / "o.json").read_text())["nats_stderr"] is None


def break_weights(model):
    model.get_input_embeddings().weight[3] = float("nan")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (None, ["m", "--text", "nothing"], "no such text file"),
        (None, ["nothing", "--text", "t.txt"], "no config.json"),
        (
            lambda d: write_model(d / "x", "other words"),
            ["m", "--text", "t.txt", "--reference", "x"],
            "different vocab",
        ),
        (lambda d: write_model(d / "x", change=break_weights), ["x", "--text", "t.txt"], "non-finite"),
        (lambda d: (d / "m/model.safetensors").write_bytes(b"x"), ["m", "--text", "t.txt"], "cannot be loaded"),
        (lambda d: (d / "t.txt").write_bytes(b"\xff\xfea"), ["m", "--text", "t.txt"], "not UTF-8"),
        (None, ["m", "--text", "t.txt", "--context", "13"], "does not fit"),
        (None, ["m", "--text", "t.txt", "--stride", "0"], "does not fit"),
        (None, ["m", "--text", "t.txt", "--json", "m"], "is a folder"),
    ],
)
def test_bad_input(setting, prepare, options, message, capsys, monkeypatch):
    if prepare:
        prepare(setting)
    monkeypatch.chdir(setting)
    before = sorted(p.name for p in setting.rglob("*"))
    assert main(["evaluate", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mixbits: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(p.name for p in setting.rglob("*")) == before

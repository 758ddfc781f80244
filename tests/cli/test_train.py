"""``mixbits train``, then ``mixbits evaluate``; bad input gives one line and exit code 2 and leaves nothing half-written."""

import json
import lzma
import random

import pytest

from mixbits.cli.main import main
from mixbits.lm.trainer import LMTrainer

SMALL = [
    "--layers", "1", "--hidden", "16", "--feed-forward", "32", "--heads", "2", "--context", "12", "--batch-size", "8",
    "--learning-rate", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator, words = random.Random(0), [f"w{i}" for i in range(30)]
    lines = [" ".join(generator.choice(words) for _ in range(generator.randint(3, 9))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_train_then_evaluate(text, tmp_path, capsys):
    model = tmp_path / "deep" / "m"
    assert main(["train", str(text), "-o", str(model), "--epochs", "1", *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"wrote {model}: ")
    assert "validation perplexity" in captured.out
    assert all(line.startswith("training: step ") for line in captured.err.splitlines())
    assert contents(tmp_path / "deep")[0] == "m"
    assert not (tmp_path / "deep" / "m.work").exists()
    out = tmp_path / "new" / "out.json"
    ask = ["evaluate", str(model), "--text", str(text), "--reference", str(model), "--json", str(out)]
    assert main(ask) == 0
    captured = capsys.readouterr()
    found = json.loads(out.read_text())
    assert f"perplexity {found['ppl']:.2f} +- {found['ppl_stderr']:.2f} per token" in captured.out
    assert "difference +0.0000 +- 0.0000 nats per token" in captured.out
    assert found["delta_nats"] == 0
    assert found["num_words"] == found["num_tokens"] == sum(len(li.split()) + 1 for li in text.read_text().splitlines())
    assert {"ppl", "word_ppl", "nats_stderr", "model_sha256", "text_sha256", "reference", "versions"} <= found.keys()


def test_llama_from_compressed_text_with_a_tokenizer_of_its_own(text, tmp_path, capsys):
    from mixbits.lm.tokenizer import word_tokenizer

    packed = tmp_path / "t.xz"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    word_tokenizer(text.read_text().splitlines(), max_words=12).save_pretrained(tmp_path / "words")
    ask = ["--preset", "llama", "--tokenizer", str(tmp_path / "words"), "--epochs", "0.5", "--valid", str(text), *SMALL]
    assert main(["train", str(packed), "-o", str(tmp_path / "m"), *ask]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 15


BAD = {
    "no text": ["NOTHING", []],
    "empty": [b"", []],
    "latin-1": ["café noir\n".encode("latin-1") * 100, []],
    "utf-16": ["some words\n".encode("utf-16") * 100, []],
    "too few sentences": [b"one two three\n" * 5, []],
    "too short": [b"one two\n" + b"a\n" * 50, ["--context", "64"]],
    "valid missing": [None, ["--valid", "NOTHING"]],
    "layers": [None, ["--layers", "0"]],
    "heads": [None, ["--heads", "3"]],
    "llama dropout": [None, ["--preset", "llama", "--dropout", "0.1"]],
    "llama odd head": [None, ["--preset", "llama", "--hidden", "18"]],
    "preset": [None, ["--preset", "gpt"]],
    "precision": [None, ["--precision", "float8"]],
    "epochs": [None, ["--epochs", "nan"]],
    "endless": [None, ["--epochs", "inf"]],
    "learning rate": [None, ["--learning-rate", "-1"]],
    "seed": [None, ["--seed", "-1"]],
    "vocabulary": [None, ["--vocabulary", "0"]],
    "min count": [None, ["--min-count", "100000"]],
    "tokenizer": [None, ["--tokenizer", "NOTHING"]],
    "diverges": [None, ["--learning-rate", "1e30", "--precision", "float32", "--epochs", "3"]],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_no_model(case, text, tmp_path, capsys, monkeypatch):
    content, options = BAD[case]
    source = tmp_path / "bad.txt" if content is not None else text
    if isinstance(content, bytes):
        source.write_bytes(content)
    before = contents(tmp_path)
    options = [str(tmp_path / "nothing") if option == "NOTHING" else option for option in options]
    assert main(["train", str(source), "-o", str(tmp_path / "m"), *SMALL, *options]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("training: step")]
    assert len(errors) == 1
    assert errors[0].startswith("mixbits: error: ")
    assert captured.out == ""
    assert contents(tmp_path) == before
    assert not (tmp_path / "m").exists()


def test_an_output_in_use_is_kept(text, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    assert main(["train", str(text), "-o", str(tmp_path / "m"), *SMALL]) == 2
    assert "exists already" in capsys.readouterr().err
    assert contents(tmp_path) == ["m", "m/precious"]


def test_control_c_says_how_to_go_on_and_resume_does(text, tmp_path, capsys):
    command = ["train", str(text), "-o", str(tmp_path / "m"), "--epochs", "2", *SMALL]
    original = LMTrainer.training_step

    def interrupted_at(step):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        return training_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "training_step", interrupted_at(1))
        assert main(command) == 130
        assert "interrupted before the first checkpoint" in capsys.readouterr().err
        patch.setattr(LMTrainer, "training_step", interrupted_at(19))
        assert main(command) == 130
    error = capsys.readouterr().err
    assert f"checkpoints are in {tmp_path / 'm.work'}: run the same command with --resume to go on" in error
    assert "Traceback" not in error
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command[:-1], "0.02", "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert not (tmp_path / "m.work").exists()
    assert (tmp_path / "m" / "model.safetensors").is_file()

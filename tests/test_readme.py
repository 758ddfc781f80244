"""The README's own commands and Python, run as they stand but on a tiny text and with small sizes added."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mixbits.cli.main import main

README = Path(__file__).parent.parent / "README.md"
SMALL = {
    "train": "--layers 1 --hidden 128 --feed-forward 512 --heads 2 --context 16 --epochs 2",
    "compress": "--epochs 1 --probes 3",
    "ngram": "--discount-fallback",
}
NAMES = ["the cat", "a dog", "the old man", "my sister", "the teacher"]
VERBS = ["sees", "likes", "follows", "hears", "finds"]
PLACES = ["in the garden", "at home", "near the river", "after lunch", "every day"]


def _sentences() -> list[str]:
    return [f"{a} {v} {b} {p}" for a in NAMES for v in VERBS for b in NAMES for p in PLACES if a != b]


def _lists(sentences: list[str], prefix: str) -> str:
    lines = []
    for number, reference in enumerate(sentences):
        words = reference.split()
        wrong = " ".join([*words[:-1], words[0]])
        texts = [wrong, reference] if number % 2 else [reference, wrong]
        hypotheses = [{"text": t, "acoustic_score": -10.0 - 0.2 * rank} for rank, t in enumerate(texts)]
        lines.append(json.dumps({"utterance": f"{prefix}-{number}", "reference": reference, "hypotheses": hypotheses}))
    return "\n".join(lines) + "\n"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sentences = _sentences()
    (tmp_path / "train.txt").write_text("\n".join(sentences[::2]) + "\n")
    (tmp_path / "test.txt").write_text("\n".join(sentences[1::8]) + "\n")
    (tmp_path / "dev.jsonl").write_text(_lists(sentences[3::16], "dev"))
    (tmp_path / "test.jsonl").write_text(_lists(sentences[5::16], "test"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_python_of_the_readme(folder: Path) -> None:
    lines = [line.split("#")[0] for block in _blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("mixbits ")]
    known = "train compress inspect verify evaluate certify ngram rescore compare"
    assert [c[1] for c in commands] == known.split()
    for command in commands:
        arguments = [*command[1:], *shlex.split(SMALL.get(command[1], ""))]
        allowed = (0, 1) if command[1] == "certify" else (0,)  # 1: after one epoch it need not be lossless
        assert main(arguments) in allowed, arguments
    rescored = [json.loads(line) for line in (folder / "rescored.jsonl").read_text().splitlines()]
    assert len(rescored) == len((folder / "test.jsonl").read_text().splitlines())
    (code,) = _blocks("python")
    code = code.replace('output="lm-16x-py")', 'output="lm-16x-py", train=False, show_progress=False)')
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    small = names["small"]
    assert small.file_bytes == (folder / "lm-16x-py" / "model.safetensors").stat().st_size  # type: ignore[attr-defined]
    assert small.compression_ratio >= 16  # type: ignore[attr-defined]


def test_links_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("http") or (README.parent / target).exists(), target

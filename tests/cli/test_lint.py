"""``mixbits lint``: one planted fault of each kind is found at its place; clean lists give exit code 0."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mixbits.asr.formats.registry import write_any
from mixbits.asr.lint import KINDS, Findings, lint_lists
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.cli.main import main


def run(*arguments: object) -> int:
    return main(["lint", *map(str, arguments)])


def hyp(text: str, score: float, lm: float | None = None) -> dict[str, Any]:
    return {"text": text, "acoustic_score": score} | ({} if lm is None else {"lm_score": lm})


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = {"utterance": "good", "reference": "a", "hypotheses": [hyp("a", -1), hyp("b", -2)]}


def test_every_kind_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "l.jsonl",
        GOOD,
        GOOD,
        "{broken",
        {"utterance": "none", "hypotheses": []},
        '{"utterance": "nan", "hypotheses": [{"text": "a", "acoustic_score": NaN}]}',
        GOOD | {"utterance": "mixed", "hypotheses": [hyp("a", -2), hyp("b", -1), hyp("c", -3)]},
        GOOD | {"utterance": "silent", "hypotheses": [hyp(" ", -1), hyp("b", -2), hyp("b", -3)]},
        {"utterance": "bare", "hypotheses": [hyp("a", -1), hyp("b", -2), hyp("c", -2)]},
    )
    assert run(path, "--json") == 1
    record = json.loads(capsys.readouterr().out)
    expected = dict.fromkeys(KINDS, 1) | {"cost sign": 0}
    assert record["findings"] == expected
    places = record["places"]
    assert f"{path}:2: utterance 'good' was on line 1" in places["duplicate"][0]
    assert f"{path}:3: not JSON" in places["unreadable"][0]
    assert f"{path}:4" in places["missing"][0]
    assert f"{path}:5: not JSON: NaN" in places["not finite"][0]
    assert places["order"] == ["utterance 'mixed': not sorted by its scores"]
    assert places["empty"] == ["utterance 'silent', hypothesis 1"]
    assert places["ragged"] == ["utterance 'good': 2 hypotheses; the longest list has 3"]
    assert places["no reference"] == ["utterance 'bare'"]
    assert run(path) == 1
    output = capsys.readouterr().out
    assert "8 findings" in output
    for kind, count in expected.items():
        assert (kind in output) == (count > 0)


def test_clean_lists_and_unreadable_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "l.jsonl", GOOD)
    assert run(path) == 0
    assert "1 utterances, 2 hypotheses, 1 references; nothing found" in capsys.readouterr().out
    assert run(tmp_path / "gone") == 2
    assert run(write(tmp_path / "bad.jsonl", "x", "y")) == 2
    assert "all 2 lines are bad" in capsys.readouterr().err


def test_references_given_apart_are_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [GOOD | {"utterance": name, "reference": None} for name in ("a", "b")]
    path, references = write(tmp_path / "l.jsonl", *bare), write(tmp_path / "r.trn", "x (a)", "y (a)")
    assert run(path) == 0
    capsys.readouterr()
    assert run(path, "--references", references, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["places"]["no reference"] == ["utterance 'b'"]
    assert "r.trn:2: utterance 'a' was in" in found["places"]["duplicate"][0]


def test_costs_in_the_place_of_scores(tmp_path: Path) -> None:
    falling = [(-1.0, -2.0), (-1.5, -4.0), (-3.0, -3.5)]
    for sign, expected in ((1.0, 0), (-1.0, 3)):
        lists = [NBest(f"u{n}", tuple(Hypothesis("a", sign * a) for a, _ in falling)) for n in range(3)]
        findings = Findings()
        lint_lists(lists, findings)
        assert (findings.counts["cost sign"], findings.total) == (expected, expected)
    positive = [NBest("u", tuple(Hypothesis("a", a, -lm) for a, lm in falling))]
    findings = Findings()
    lint_lists(positive, findings)
    assert findings.counts["cost sign"] == 3
    assert "lm_score 2 is above 0" in findings.places["cost sign"][0]


def test_order_with_two_scores_holds_for_some_scale() -> None:
    def order(*scores: tuple[float, float]) -> int:
        findings = Findings()
        lint_lists([NBest("u", tuple(Hypothesis("a", a, lm) for a, lm in scores))], findings)
        return findings.counts["order"]

    assert order((-100.0, -1.0), (-90.0, -5.0), (-95.0, -6.0)) == 0  # scales up to 0.4
    assert order((-100.0, -1.0), (-90.0, -5.0), (-100.0, -4.0)) == 0  # 0.1 to 0.4
    assert order((-1.0, -1.0), (-1.0, -5.0), (-1.0, -1.0)) == 1
    assert order((-1.0, -1.0), (-1.0, -1.0)) == 0


def test_kaldi_folder_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = [NBest(f"u{n}", (Hypothesis("a b", -2.0, -1.0), Hypothesis("c", -2.0, -3.0))) for n in range(3)]
    write_any(tmp_path / "k", lists, format="kaldi")
    costs = tmp_path / "k" / "acwt"
    lines = costs.read_text().splitlines()
    costs.write_text("\n".join([*lines[:3], "u1-2 nan", lines[4]]) + "\nx-1 3\n")
    assert run(tmp_path / "k", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["format"] == "kaldi"
    assert record["utterances"] == 3
    assert "acwt:4: a cost is nan" in record["places"]["not finite"][0]
    assert "no cost of 'u2-2'" in record["places"]["missing"][0]
    assert "'x-1' has a cost here and no words" in record["places"]["missing"][1]


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: no real lists")
def test_real_lists(capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(os.environ["MIXBITS_DATA"])
    assert run(data / "librispeech_10best" / "test_clean.jsonl.gz") == 0
    assert "2,620 utterances, 26,200 hypotheses, 2,620 references; nothing found" in capsys.readouterr().out
    assert run(data / "lattices" / "kaldi_weather" / "mono.100best.jsonl.gz", "--json") == 1
    counts = json.loads(capsys.readouterr().out)["findings"]
    assert {kind for kind, count in counts.items() if count} == {"ragged"}

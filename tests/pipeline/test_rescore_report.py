"""``mixbits rescore --report``: the comparison of a run has the run's own figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mixbits.cli.main import main
from mixbits.errors import DataError
from mixbits.pipeline.rescore import rescore_list
from mixbits.pipeline.rescore_report import rescoring_comparison

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

FIRST, TUNED, REFERENCE, MODEL = "first pass", "first pass tuned", "reference: untrained", "model: trained"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    return folder


def test_the_comparison_has_the_figures_of_the_run(world: Path) -> None:
    test, model, reference = world / "test.jsonl.gz", world / "trained", world / "untrained"
    result = rescore_list(test, model, dev=world / "dev.jsonl", reference_model=reference, keep_rankings=True)
    record = rescoring_comparison(result, test, model, reference)
    assert list(record["systems"]) == [FIRST, TUNED, REFERENCE, MODEL]
    assert result.entries is not None
    assert result.facts is not None
    for name, row in zip(
        (FIRST, TUNED, REFERENCE, MODEL), ("first-pass", "first-pass-tuned", "reference", "model"), strict=True
    ):
        assert record["systems"][name]["wer"] == result.entries[row]["wer"]
        assert record["systems"][name]["errors"] == result.entries[row]["errors"]
    pairs = [(FIRST, TUNED), (FIRST, REFERENCE), (FIRST, MODEL), (TUNED, MODEL), (REFERENCE, MODEL)]
    assert [(found["a"], found["b"]) for found in record["tests"]] == pairs
    assert record["tests"][2]["p"] == result.entries["model"]["p_value_vs_first_pass"]
    assert record["tests"][4]["p"] == result.entries["model"]["p_value_vs_full"]
    for points in record["oracle"].values():
        assert points[-1]["oracle_wer"] == result.facts["oracle_wer"]
    size = (model / "model.safetensors").stat().st_size
    assert [entry["bytes"] for entry in record["systems"].values()][2:] == [size, size]
    curves = {curve["system"]: curve for curve in record["weights"]}
    assert set(curves) == {REFERENCE, MODEL}
    chosen = curves[MODEL]["chosen"]
    assert chosen == result.weights["model"].neural_lm_scale
    found = curves[MODEL]["errors"][int(np.searchsorted(curves[MODEL]["edges"], chosen)) - 1]
    assert 100 * found / record["words"] == pytest.approx(result.entries["model"]["wer"])
    assert record["notes"][-len(result.notes) :] == list(result.notes)


def test_cross_validated_lists_have_no_curve(world: Path) -> None:
    test, model = world / "test.jsonl.gz", world / "trained"
    result = rescore_list(test, model, num_folds=3, keep_rankings=True)
    record = rescoring_comparison(result, test, model, cross_validated=True)
    assert list(record["systems"]) == [FIRST, TUNED, MODEL]
    assert record["weights"] == []
    assert result.entries is not None
    assert record["systems"][MODEL]["wer"] == result.entries["model"]["wer"]


def test_rankings_are_kept_only_when_asked_and_need_references(world: Path) -> None:
    assert rescore_list(world / "test.jsonl.gz", world / "trained", dev=world / "dev.jsonl").rankings == {}
    with pytest.raises(DataError, match="no utterance has a reference"):
        rescore_list(world / "blind.jsonl", world / "trained", dev=world / "dev.jsonl", keep_rankings=True)


def test_the_command_writes_the_page(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["rescore", world / "test.jsonl.gz", "-m", world / "trained", "--lm-scale", "0.5", "--report", page]
    assert main([str(argument) for argument in arguments]) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<h1>test.jsonl.gz rescored with trained</h1>" in text
    assert f"{MODEL} against {FIRST}, utterance by utterance" in text
    arguments[1] = world / "blind.jsonl"
    page.unlink()
    assert main([str(argument) for argument in arguments]) == 2
    assert "nothing to report on" in capsys.readouterr().err
    assert not page.exists()

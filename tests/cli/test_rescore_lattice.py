"""``mixbits rescore-lattice`` from files on disk: every format in and out, best paths, lists, certificates, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixbits.asr.formats.arpa import read_arpa
from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.formats.kaldi_lattice import KaldiKind, WordSymbols, read_kaldi_lattices, write_kaldi_lattices
from mixbits.asr.formats.lattice_files import detect_lattice, find_lattices
from mixbits.asr.formats.slf import read_slf
from mixbits.asr.formats.slf_write import write_slf
from mixbits.asr.lattice import Lattice, PathWeights, make_lattice
from mixbits.asr.lattice_paths import best_path, nbest_paths
from mixbits.cli.main import main

WORDS = ("the", "cat", "dog", "sees", "likes", "a", "mouse")
SYMBOLS = WordSymbols(dict(enumerate(("", *WORDS))), {word: number for number, word in enumerate(("", *WORDS))})


def sausage(name: str, *, swap: bool = False) -> Lattice:
    """the (cat | dog) (sees | likes) a mouse."""
    return make_lattice(
        utterance=name, src=[0, 1, 1, 2, 2, 3, 4], dst=[1, 2, 2, 3, 3, 4, 5], word=[1, 3, 2, 4, 5, 6, 7] if swap else [1, 2, 3, 4, 5, 6, 7],
        labels=["", *WORDS], lm_score=[-1, -2, -2.5, -1, -1.5, 0, -1], acoustic_score=[-50, -60, -55, -70, -66, -20, -80],
        num_states=6, start=0, finals=[5], weights=PathWeights(0.1, 1.0, 0.0),
    )  # fmt: skip


def run(*arguments: object) -> int:
    return main(["rescore-lattice", *map(str, arguments)])


@pytest.fixture
def kaldi(tmp_path: Path) -> Path:
    write_kaldi_lattices(tmp_path / "lat.gz", [sausage("u1"), sausage("u2", swap=True)], symbols=SYMBOLS)
    (tmp_path / "words.txt").write_text(
        "".join(f"{word or '<eps>'} {number}\n" for word, number in SYMBOLS.ids.items())
    )
    return tmp_path


def test_kaldi_archive(tiny_world: Path, kaldi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, trn, lists, results = (kaldi / name for name in ("new.gz", "best.trn", "lists.jsonl", "r.json"))
    code = run(
        kaldi / "lat.gz", "-m", tiny_world / "full", "-o", output, "--words", kaldi / "words.txt", "--acoustic-scale", 0.1, "--best-path", trn,
        "--nbest", 3, "--nbest-output", lists, "--json", results, "--interpolate", 0.5, "--beam", 100,
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "2 lattices, 2 of them exactly; 14 of 14 arcs touched (100%)" in captured.out
    new = list(read_kaldi_lattices(output, symbols=SYMBOLS))
    assert [lattice.utterance for lattice in new] == ["u1", "u2"]
    written = trn.read_text().splitlines()
    for lattice, line, entry in zip(new, written, read_nbest(lists), strict=True):
        best = best_path(lattice, PathWeights(0.1))
        assert line == f"{best.text} ({lattice.utterance})"
        assert len(entry.hypotheses) == 3
        assert entry.one_best.text == best.text
        assert entry.one_best.lm_score == pytest.approx(best.lm_score, abs=1e-4)
        old = best_path(sausage(lattice.utterance, swap=lattice.utterance == "u2"), PathWeights(0.1))
        if old.words == best.words:
            assert entry.one_best.lm_score == pytest.approx(
                0.5 * old.lm_score + 0.5 * entry.one_best.extra["neural_lm_score"], abs=1e-6
            )
    record = json.loads(results.read_text())
    assert record["totals"]["best_max_gap_nats"] < 1e-4
    assert [one["is_exact"] for one in record["utterances"]] == [True, True]


def test_folder_of_slf_files_with_scales_of_the_header(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in (10, 9):
        write_slf(folder / f"u{number}.slf", sausage(f"u{number}"))
    (folder / "readme.txt").write_text("these are lattices\nno more\n")
    assert [file.name for file in find_lattices(folder).files] == ["u9.slf", "u10.slf"]
    assert (
        run(folder, "-m", tiny_world / "full", "-o", output, "--merge-order", 2, "--max-paths", 0, "--beam", 100) == 0
    )
    assert "0 of them exactly" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["u10.slf", "u9.slf"]
    assert read_slf(output / "u9.slf").weights == PathWeights(0.1, 1.0, 0.0)
    assert run(folder, "-m", tiny_world / "full", "-o", output) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(output, "-m", tiny_world / "full", "--best-path", tmp_path / "x.trn") == 0
    assert (tmp_path / "x.trn").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "{d}/x"], "word"),
        ([], "nothing to write"),
        (["--nbest", "3", "-o", "{d}/x"], "--nbest needs --nbest-output"),
        (["-o", "{d}/lat.gz"], "is the same file as LATTICES"),
        (["-o", "{d}/x", "--words", "{d}/none"], "no such file"),
        (["-o", "{d}/x", "--words", "{d}/words.txt", "--interpolate", "nan"], "interpolate"),
        (["-o", "{d}/x", "--words", "{d}/words.txt", "--lm-scale", "inf"], "lm_scale"),
        (
            ["-o", "{d}/x", "--words", "{d}/words.txt", "--max-arcs", "2", "--acoustic-scale", "0.1"],
            "give a larger max_arcs",
        ),
    ],
)
def test_refusals_leave_nothing_behind(tiny_world: Path, kaldi: Path, capsys, options: list[str], message: str) -> None:
    before = sorted(kaldi.iterdir())
    assert run(kaldi / "lat.gz", "-m", tiny_world / "full", *(option.format(d=kaldi) for option in options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(kaldi.iterdir()) == before


def test_damaged_archives_leave_nothing_behind(
    tiny_world: Path, kaldi: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = kaldi / "bad"
    write_kaldi_lattices(bad, [sausage("u1"), sausage("u2")], symbols=SYMBOLS)
    bad.write_bytes(bad.read_bytes()[:-30])
    code = run(
        bad,
        "-m",
        tiny_world / "full",
        "-o",
        kaldi / "x",
        "--words",
        kaldi / "words.txt",
        "--best-path",
        kaldi / "x.trn",
    )
    assert code == 2
    assert "the file ends inside" in capsys.readouterr().err
    assert not (kaldi / "x").exists()
    assert not (kaldi / "x.trn").exists()


def test_an_utterance_in_two_files_of_a_folder(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    for name in ("lat.1", "lat.2"):
        write_kaldi_lattices(folder / name, [sausage("u1")], kind=KaldiKind(binary=False))
    assert run(folder, "-m", tiny_world / "full", "-o", tmp_path / "out") == 2
    assert "'u1' is in two files" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_formats_are_told_apart_by_content(kaldi: Path, tmp_path: Path) -> None:
    write_kaldi_lattices(tmp_path / "text", [sausage("u1")], kind=KaldiKind(binary=False))
    write_slf(tmp_path / "slf.gz", sausage("u1"))
    found = {name: detect_lattice(tmp_path / name) for name in ("lat.gz", "text", "slf.gz", "words.txt")}
    assert found == {"lat.gz": "kaldi", "text": "kaldi", "slf.gz": "slf", "words.txt": None}


def test_the_model_that_made_the_lattices_is_taken_out(
    tiny_world: Path, kaldi: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, arpa = kaldi / "lm.txt", kaldi / "lm.arpa"
    text.write_text("the cat sees a mouse\nthe dog likes a mouse\nthe cat likes a dog\n")
    assert main(["ngram", str(text), "-o", str(arpa), "--order", "2", "--discount-fallback"]) == 0
    output = kaldi / "new.gz"
    common = [
        kaldi / "lat.gz", "-m", tiny_world / "full", "-o", output, "--words", kaldi / "words.txt", "--acoustic-scale", 0.1, "--beam", 100,
        "--old-lm", arpa, "--interpolate", 0.5, "--nbest", 4, "--nbest-output", kaldi / "lists.jsonl",
    ]  # fmt: skip
    capsys.readouterr()
    assert run(*common, "--merge-order", 1) == 2
    assert "merge_order is 1, but old_lm is a 2-gram model" in capsys.readouterr().err
    assert run(*common, "--old-lm-scale", 1) == 2
    assert "both old_lm and old_lm_scale are given" in capsys.readouterr().err
    assert not output.exists()
    assert run(*common) == 0, capsys.readouterr().err
    model = read_arpa(arpa)
    old = {
        (name, path.words): path.lm_score
        for name, swap in (("u1", False), ("u2", True))
        for path in nbest_paths(sausage(name, swap=swap), 4)
    }
    lists = read_nbest(kaldi / "lists.jsonl").lists
    assert len(lists) == 2
    for entry in lists:
        assert len(entry.hypotheses) == 4
        for one in entry.hypotheses:
            words = tuple(one.text.split())
            ngram = float(model.score([words]).sentence_scores()[0])
            expected = old[entry.utterance, words] + 0.5 * (one.extra["neural_lm_score"] - ngram)
            assert one.lm_score == pytest.approx(expected, abs=1e-4)

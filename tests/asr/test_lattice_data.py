"""Real lattices: Kaldi's own error counts, the AMI golden list, one lattice in two formats, and lattices of 70,000 links."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.kaldi_lattice import KaldiKind, read_kaldi_lattices, read_word_symbols, write_kaldi_lattices
from mixbits.asr.formats.slf import read_slf
from mixbits.asr.formats.slf_write import write_slf
from mixbits.asr.lattice import PathWeights
from mixbits.asr.lattice_paths import best_path, count_paths, nbest_paths
from mixbits.asr.wer import ErrorCounts, count_errors

pytestmark = pytest.mark.skipif(
    "MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: real lattices not checked"
)
DATA = Path(os.environ.get("MIXBITS_DATA", ".")) / "lattices"
WEATHER, AMI = DATA / "kaldi_weather", DATA / "ami_en2001a_mit"


@pytest.mark.parametrize("system", ["mono", "tri3a"])
def test_one_best_makes_exactly_kaldis_errors_at_every_weight(system: str, tmp_path: Path) -> None:
    symbols = read_word_symbols(WEATHER / "words.txt")
    lines = (line.partition(" ") for line in (WEATHER / "refs.txt").read_text().splitlines())
    references = {key: text for key, _, text in lines}
    files = sorted((WEATHER / system).glob("lat.*.gz"))
    lattices = [lattice for file in files for lattice in read_kaldi_lattices(file, symbols=symbols)]
    assert sorted(lattice.utterance for lattice in lattices) == sorted(references)
    table = re.findall(r"lmwt=(\d+) %WER \S+ \[ (\d+) / (\d+),", (WEATHER / system / "kaldi_wers.txt").read_text())
    assert len(table) == 11
    for weight, errors, words in table:
        hypotheses = [best_path(lattice, PathWeights(acoustic_scale=1 / int(weight))).text for lattice in lattices]
        pairs = zip((references[lattice.utterance] for lattice in lattices), hypotheses, strict=True)
        counts = sum((count_errors(*pair) for pair in pairs), ErrorCounts())
        assert (weight, counts.num_errors, counts.num_words) == (weight, int(errors), int(words))
    again = tmp_path / "lat.gz"
    for kind in (KaldiKind(), KaldiKind(binary=False)):
        write_kaldi_lattices(again, lattices[:20], kind=kind, symbols=symbols)
        for old, new in zip(lattices[:20], read_kaldi_lattices(again, symbols=symbols), strict=True):
            ids, new_ids = old.transition_ids, new.transition_ids
            assert (ids is None) == (new_ids is None)
            old_order, new_order = (np.lexsort((x.lm_score, x.acoustic_score, x.dst, x.src)) for x in (old, new))
            for name in ("src", "dst", "lm_score", "acoustic_score"):
                np.testing.assert_array_equal(getattr(old, name)[old_order], getattr(new, name)[new_order])


def test_ami_expands_to_exactly_its_eleven_hypotheses_with_the_same_sums() -> None:
    lattice = read_slf(next((AMI / "htk_slf").glob("AMI_ES2011a*.lat.gz")))
    (golden,) = (AMI / "htk_slf").glob("*.nbest")
    expected = {}
    for line in golden.read_text().splitlines():
        numbers, _, text = line.partition("|")
        expected[text.strip()] = [float(number) for number in numbers.split()[1:]]
    assert count_paths(lattice) == len(expected) == 11
    found = {}
    for path in nbest_paths(lattice, 12):
        others = [float(lattice.other[name][path.arcs].sum()) for name in ("n", "i.1", "i.2")]
        found[path.text] = ([path.acoustic_score, path.lm_score, *others], len(path.arcs))
    assert found.keys() == expected.keys()
    for text, (sums, num_links) in found.items():  # links and golden sums have three decimals, the acoustic ones two
        assert sums == pytest.approx(expected[text], abs=0.0005 * (num_links + 1))


def test_one_lattice_in_two_formats_agrees(tmp_path: Path) -> None:
    slf = read_slf(DATA / "toy" / "theanolm_lattice.slf")
    (kaldi,) = read_kaldi_lattices(DATA / "toy" / "theanolm_lattice.lat")
    assert slf.utterance == kaldi.utterance == "utterance 123"
    assert slf.weights == PathWeights(1.0, 12.3, 0.7)
    assert count_paths(slf) == count_paths(kaldi) == 32
    for weights in (slf.weights, PathWeights(), PathWeights(0.05, 1, -3)):
        ours, theirs = nbest_paths(slf, 100, weights), nbest_paths(kaldi, 100, weights)
        assert len(ours) == len(theirs) == 12
        for a, b in zip(ours, theirs, strict=True):
            assert (a.total_score, a.lm_score, a.acoustic_score) == pytest.approx(
                (b.total_score, b.lm_score, b.acoustic_score)
            )
            assert len(a.words) == len(b.words)
    write_slf(tmp_path / "x.slf", kaldi)
    again = [path.total_score for path in nbest_paths(read_slf(tmp_path / "x.slf"), 100)]
    assert again == pytest.approx([path.total_score for path in nbest_paths(kaldi, 100)])


def test_ami_kaldi_text_with_words_and_with_numbers() -> None:
    words = list(read_kaldi_lattices(AMI / "kaldi_text.words.lat"))
    numbers = list(read_kaldi_lattices(AMI / "kaldi_text.int.lat"))
    assert len(words) == len(numbers) == 10
    weights = PathWeights(acoustic_scale=0.1)
    for a, b in zip(words, numbers, strict=True):
        assert (a.utterance, a.num_arcs, count_paths(a)) == (b.utterance, b.num_arcs, count_paths(b))
        assert best_path(a, weights).total_score == best_path(b, weights).total_score


def test_lattices_of_tens_of_thousands_of_links_are_read_fast() -> None:
    links, started = 0, time.process_time()
    for path in sorted((DATA / "pocketsphinx_slf").glob("*.slf.gz"))[:4]:
        lattice = read_slf(path)
        assert lattice.start == lattice.num_states - 1
        assert best_path(lattice).words
        links += lattice.num_arcs
    assert links > 60_000
    assert time.process_time() - started < 60e-6 * links, "a link takes about 12 microseconds on a quiet machine"

"""Taking the n-gram model that made a lattice out of its scores."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.asr.formats.arpa import read_arpa
from mixbits.asr.formats.kaldi_lattice import read_kaldi_lattices, read_word_symbols
from mixbits.asr.lattice import Lattice, PathWeights, make_lattice
from mixbits.asr.lattice_ngram import ngram_scores
from mixbits.asr.lattice_paths import LatticeSearch
from mixbits.asr.lattice_rescore import LatticeSettings, rescore_lattice, split_states
from mixbits.asr.ngram import BackoffModel, NgramTable
from mixbits.asr.trie import TokenForest
from mixbits.errors import DataError, SpecError

_spec = importlib.util.spec_from_file_location("lattice_cases", Path(__file__).with_name("lattice_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ARPA = """\\data\\
ngram 1=6
ngram 2=6
ngram 3=3

\\1-grams:
-0.9\t</s>
-99\t<s>\t-0.3
-0.7\ta\t-0.2
-0.8\tbé\t-0.1
-1.1\tc\t-0.4
-0.6\td

\\2-grams:
-0.2\t<s> a\t-0.15
-0.5\ta bé\t-0.25
-0.4\tbé c
-0.3\tc </s>
-0.9\ta a\t-0.05
-0.35\td d

\\3-grams:
-0.1\t<s> a bé
-0.12\ta bé c
-0.45\ta a </s>

\\end\\
"""
IDS = {word: number for number, word in enumerate(cases.WORDS, 1)}


@pytest.fixture(scope="module")
def trigram(tmp_path_factory: pytest.TempPathFactory) -> BackoffModel:
    path = tmp_path_factory.mktemp("arpa") / "3gram.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return read_arpa(path)


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[0, *(IDS[word] for word in text.split()), 0] for text in texts]


def unigram(forest: TokenForest) -> np.ndarray:
    return np.where(np.asarray(forest.parents) < 0, 0.0, -1.0 - np.asarray(forest.tokens))


def unigram_alone(words: Sequence[str]) -> float:
    return sum(-1.0 - IDS[word] for word in words) - 1.0


@given(lattice=cases.lattices(), order=st.sampled_from([0, 3, 4]))
def test_scores_of_every_path_sum_to_the_sentence_score(trigram: BackoffModel, lattice: Lattice, order: int) -> None:
    found = split_states(lattice, order, max_arcs=10**6)
    assert found is not None
    split = found[0]
    arcs, finals = ngram_scores(split, trigram)
    for path, row in cases.all_paths(split):
        (expected,) = trigram.score([cases.words(split, path)]).sentence_scores()
        assert arcs[path].sum() + finals[row] == pytest.approx(expected, abs=1e-9)


@given(lattice=cases.lattices(), weight=st.floats(0, 1), max_paths=st.sampled_from([0, 10**6]))
def test_the_rest_of_the_old_score_stays(
    trigram: BackoffModel, lattice: Lattice, weight: float, max_paths: int
) -> None:
    settings = LatticeSettings(
        PathWeights(0.2, 1.5, -0.5), interpolate=weight, old_lm=trigram, merge_order=3, max_paths=max_paths
    )
    done = rescore_lattice(lattice, encode=encode, score_forest=unigram, settings=settings)
    expected = set()
    for words, old, acoustic, _ in cases.path_table(lattice, with_ids=False):
        ngram = float(trigram.score([words]).sentence_scores()[0])
        expected.add((words, round(old + weight * (unigram_alone(words) - ngram), 4), round(acoustic, 4)))
    found = {(w, round(lm, 4), round(ac, 4)) for w, lm, ac, _ in cases.path_table(done.lattice, with_ids=False)}
    ours, theirs = sorted(found), sorted(expected)
    assert [one[0] for one in ours] == [one[0] for one in theirs]
    np.testing.assert_allclose([one[1:] for one in ours], [one[1:] for one in theirs], atol=2e-4)
    assert done.certificate.max_gap < 1e-9
    for one in done.hypotheses:
        assert one.exact_total_score == pytest.approx(one.path.total_score, abs=1e-9)


def test_settings_that_contradict_each_other(trigram: BackoffModel) -> None:
    with pytest.raises(SpecError, match="merge_order is 2, but old_lm is a 3-gram model; expected a merge_order of at"):
        LatticeSettings(PathWeights(), old_lm=trigram, merge_order=2)
    with pytest.raises(SpecError, match="both old_lm and old_lm_scale are given"):
        LatticeSettings(PathWeights(), old_lm=trigram, old_lm_scale=0.5)
    assert LatticeSettings(PathWeights(), old_lm=trigram, merge_order=0, interpolate=0.3).old_scale == 1


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: real lattices not checked")
def test_kaldi_lattices_less_their_own_model_hardly_depend_on_the_words() -> None:
    folder = Path(os.environ["MIXBITS_DATA"]) / "lattices" / "kaldi_weather"
    symbols, model = read_word_symbols(folder / "words.txt"), read_arpa(folder / "lm.arpa")
    spreads = []
    for lattice in list(read_kaldi_lattices(folder / "tri3a" / "lat.1.gz", symbols=symbols))[:6]:
        found = split_states(lattice, model.order, max_arcs=10**6)
        assert found is not None
        arcs, finals = ngram_scores(found[0], model)
        split, rest = LatticeSearch(found[0], PathWeights(1 / 12)), []
        for path in split.nbest(20):
            row = int(np.searchsorted(split.lattice.finals, split.lattice.dst[path.arcs[-1]]))
            ngram = arcs[path.arcs].sum() + finals[row]
            assert ngram == pytest.approx(float(model.score([path.words]).sentence_scores()[0]), abs=1e-6)
            rest.append((path.lm_score, path.lm_score - ngram))
        spreads.append(np.std(rest, axis=0))
    old, without = np.mean(spreads, axis=0)
    assert without < 0.3 * old  # transitions and pronunciations are left


def test_a_word_that_the_model_does_not_know_is_named() -> None:
    model = BackoffModel(("<s>", "</s>", "a"), (NgramTable(np.arange(3), np.array([-99.0, -1.0, -0.5]), None),))
    lattice = make_lattice(
        utterance="u1", src=[0], dst=[1], word=[1], labels=["", "dog"], lm_score=[-1.0], acoustic_score=[-2.0],
        num_states=2, start=0, finals=[1],
    )  # fmt: skip
    with pytest.raises(DataError, match="utterance 'u1': the n-gram model does not know the word 'dog' and has no"):
        ngram_scores(lattice, model)

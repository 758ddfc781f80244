"""Back-off scoring: against KenLM's own expected values, and against a slow reference that follows the definition."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

from mixbits.asr.formats.arpa import read_arpa
from mixbits.asr.ngram import LN10, MISSING_UNKNOWN_LOG10, BackoffModel
from mixbits.errors import DataError, FormatError

DATA = os.environ.get("MIXBITS_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MIXBITS_DATA is not set: no KenLM test files")

TINY = """made by hand

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-0.5 </s>
-99 <s> -0.2
-0.7 a -0.1
-0.8\tb\t-0.4
-1.5 <unk> -0.05

\\2-grams:
-0.25 <s> a -0.05
-0.35 a b -0.15
-0.45 b </s>

\\3-grams:
-0.125 <s> a b

\\end\\
"""


def write(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.arpa"
    path.write_text(text)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> BackoffModel:
    return read_arpa(write(tmp_path))


@pytest.mark.parametrize(
    ("text", "log10"),
    [
        ("a b", [-0.25, -0.125, -0.15 - 0.45]),  # bigram, trigram, back-off of (a, b) and bigram
        ("b", [-0.2 - 0.8, -0.45]),  # (<s>, b) is not stored: no back-off weight
        ("a", [-0.25, -0.05 - 0.1 - 0.5]),
        ("", [-0.2 - 0.5]),
        ("x a", [-0.2 - 1.5, -0.05 - 0.7, -0.1 - 0.5]),
        ("<unk> a", [-0.2 - 1.5, -0.05 - 0.7, -0.1 - 0.5]),
        ("<s> a", [-0.2 - 1.5, -0.05 - 0.7, -0.1 - 0.5]),  # text, not a boundary
    ],
)
def test_by_hand(tiny: BackoffModel, text: str, log10: list[float]) -> None:
    scores = tiny.score([text.split()])
    assert scores.log_p / LN10 == pytest.approx(log10, abs=1e-12)
    assert scores.sentence_scores() == pytest.approx([sum(log10) * LN10], abs=1e-12)
    assert scores.is_unknown.tolist() == [word in ("x", "<unk>", "<s>") for word in text.split()] + [False]


@needs_data
def test_the_values_that_kenlm_expects() -> None:
    """lm/model_test.cc: Continuation, Blanks, Unknowns, MinimalState."""
    model = read_arpa(f"{DATA}/arpa/kenlm_test.arpa")
    sentence = ["looking", "on", "a", "little", "the", "biarritz", "not_found", "more", "."]
    scores = model.score([sentence, ["looking", "on", "a", "little", "more", "loin"]])
    expected = [
        -0.484652,
        -0.348837,
        -0.0155266,
        -0.00306122,
        -4.04005,
        -1.9889,
        -2.29666,
        -21.20632,
        -0.51363,
        -0.0191651,
    ]
    assert scores.of(0) / LN10 == pytest.approx(expected, abs=6e-6)  # they print six digits
    assert scores.ngram_length[:10].tolist() == [2, 3, 4, 5, 1, 1, 1, 1, 2, 3]
    assert scores.of(1)[4:6] / LN10 == pytest.approx([-0.00181395, -0.0432557], abs=2e-6)
    without = {
        "also would consider higher looking": [-1.687872, -2, -3, -4, -5],
        "also would consider not_found": [-1.687872, -2, -3, -1.995635 - 7.0 - 0.30103],
        "higher looking not_found": [-1.509559, -1.285941 - 0.30103, -1.995635 - 0.4771212],
        "higher looking consider": [-1.509559, -1.285941 - 0.30103, -1.687872 - 0.4771212],
        "would consider higher looking": [-1.687872, -1.687872 - 0.30103, -1.509559 - 0.30103, -1.285941 - 0.30103],
        "not_found not_found2 not_found3": [-1.995635, -15.0, -17.0],
        "not_found however not_found3": [-1.995635, -4.0, -6.0],
        "foo bar bar": [-3.141592, -6.0, -2.718281 + 3.0],
        "to look a": [-1.687872, -0.2922095, -7.0],
    }
    found = model.score([text.split() for text in without], histories=[[]] * len(without), sentence_end=False)
    for number, expected in enumerate(without.values()):
        assert found.of(number) / LN10 == pytest.approx(expected, abs=6e-6)  # they print six digits


@needs_data
def test_a_model_without_unknown_word_gives_it_what_kenlm_does() -> None:
    model = read_arpa(f"{DATA}/arpa/kenlm_test_nounk.arpa")
    assert not model.has_unknown
    scores = model.score([["not_found", "looking"]], histories=[[]], sentence_end=False)
    assert scores.log_p[0] == MISSING_UNKNOWN_LOG10 * LN10
    assert scores.log_p[1] / LN10 == pytest.approx(-1.285941)
    assert scores.is_unknown.tolist() == [True, False]


def slow_log10(
    entries: dict[tuple[str, ...], tuple[float, float]], order: int, history: tuple[str, ...], word: str
) -> float:
    """The definition, recursively; ``entries``: n-gram -> (log10 p, log10 back-off)."""
    history = history[max(0, len(history) - order + 1) :]
    ngram = (*history, word)
    if ngram in entries:
        return entries[ngram][0]
    if not history:
        return MISSING_UNKNOWN_LOG10
    return entries.get(history, (0.0, 0.0))[1] + slow_log10(entries, order, history[1:], word)


def random_arpa(seed: int, order: int, num_words: int) -> tuple[str, dict[tuple[str, ...], tuple[float, float]]]:
    """A model that no text ever made, and its entries."""
    rng = random.Random(seed)
    words = ["</s>", *(f"w{i}" for i in range(num_words)), *(["<unk>"] if seed % 2 else [])]
    levels = [[("<s>",), *((word,) for word in words)]]
    for _ in range(1, order):
        before = [ngram for ngram in levels[-1] if ngram[-1] != "</s>"]
        levels.append(sorted({(*rng.choice(before), rng.choice(words)) for _ in range(4 * num_words)}))
    entries = {
        ngram: (round(rng.uniform(-4, -0.1), 4), round(rng.uniform(-2, 1), 4)) for level in levels for ngram in level
    }
    lines = ["\\data\\", *(f"ngram {n}={len(level)}" for n, level in enumerate(levels, 1))]
    for n, level in enumerate(levels, 1):
        rng.shuffle(level)
        lines += ["", f"\\{n}-grams:"]
        for ngram in level:
            log_p, backoff = entries[ngram]
            lines.append(f"{log_p}\t{' '.join(ngram)}" + (f"\t{backoff}" if n < order else ""))
    return "\n".join([*lines, "", "\\end\\", ""]), entries


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_definition(tmp_path: Path, order: int, seed: int) -> None:
    text, entries = random_arpa(seed, order, 12)
    model = read_arpa(write(tmp_path, text))
    rng = random.Random(seed + 100)
    sentences = [[f"w{rng.randrange(14)}" for _ in range(rng.randrange(9))] for _ in range(60)]
    scores = model.score(sentences)
    known = {ngram[0] for ngram in entries if len(ngram) == 1}
    for number, words in enumerate(sentences):
        mapped = [word if word in known else "<unk>" for word in words]
        row = ["<s>", *mapped, "</s>"]
        expected = [slow_log10(entries, order, tuple(row[:i]), row[i]) for i in range(1, len(row))]
        assert scores.of(number) / LN10 == pytest.approx(expected, abs=1e-9)
    again = model.score(sentences, histories=[["<s>"]] * len(sentences))
    assert np.array_equal(again.log_p, scores.log_p)


def test_histories_continue_a_sentence(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path, random_arpa(1, 4, 10)[0]))
    words = [f"w{i % 11}" for i in range(30)]
    whole = model.score([words], sentence_end=False).log_p
    row = ["<s>", *words]
    apart = model.score([[word] for word in words], histories=[row[: i + 1] for i in range(30)], sentence_end=False)
    assert np.allclose(apart.log_p, whole, atol=1e-12)
    ids = np.array([model.ids["<s>"], *model.encode(words)])
    padded = np.full((30, 6), -1)
    for i in range(30):
        kept = ids[max(0, i - 5) : i + 1]
        padded[i, 6 - len(kept) :] = kept
    assert np.allclose(model.next_log_p(padded, ids[1:]), whole, atol=1e-12)


def test_parts_of_bounded_size_give_the_same(tiny: BackoffModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [["a", "b", "x"][: i % 4] for i in range(50)]
    whole = tiny.score(sentences)
    monkeypatch.setattr("mixbits.asr.ngram._TOKENS_AT_ONCE", 7)
    parts = tiny.score(sentences)
    assert np.array_equal(whole.log_p, parts.log_p)
    assert np.array_equal(whole.is_unknown, parts.is_unknown)
    assert tiny.score([]).log_p.shape == (0,)


def test_what_is_known(tiny: BackoffModel) -> None:
    assert "a" in tiny
    assert not any(word in tiny for word in ("x", "<s>", "</s>", "<unk>"))
    with pytest.raises(DataError, match="1 histories for 2 sentences"):
        tiny.score([["a"], ["b"]], histories=[[]])


def test_models_check_themselves(tiny: BackoffModel) -> None:
    with pytest.raises(FormatError, match="twice"):
        BackoffModel(("<s>", "</s>", "a", "a", "b"), tiny.tables)
    with pytest.raises(FormatError, match="no </s>"):
        BackoffModel(("<s>", "c", "a", "d", "b"), tiny.tables)
    with pytest.raises(FormatError, match="one 1-gram for each word"):
        BackoffModel((*tiny.words, "more"), tiny.tables)
    assert math.isfinite(tiny.score([["a"]]).log_p[0])

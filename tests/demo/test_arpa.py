"""The ARPA reader against hand-computed back-off sums and against pocketsphinx's own n-gram code."""

import math

import pytest
from demo.arpa import read_arpa

from mixbits.errors import FormatError

TINY = """made by hand

\\data\\
ngram 1=4
ngram 2=3
ngram 3=1

\\1-grams:
-0.5000 </s> -0.3010
-0.6000 <s> -0.2000
-0.7000 a -0.1000
-0.8000\tb\t-0.4000

\\2-grams:
-0.2500 <s> a -0.0500
-0.3500 a b -0.1500
-0.4500 b </s>

\\3-grams:
-0.1250 <s> a b

\\end\\
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.arpa"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("text", "log10"),
    [
        ("a b", -0.25 - 0.125 + (-0.15 - 0.45)),  # bigram, trigram, back-off of (a, b) + bigram
        ("b", (-0.2 - 0.8) - 0.45),  # back-off of <s> + unigram; (<s>, b) unseen: no back-off weight
        ("a", -0.25 + (-0.05 - 0.1 - 0.5)),  # two back-offs
        ("", -0.2 - 0.5),
    ],
)
def test_back_off_by_hand(tiny, text: str, log10: float) -> None:
    assert read_arpa(tiny).sentence_score(text) == pytest.approx(log10 * math.log(10), abs=1e-12)


def test_unknown_word_is_an_error(tiny) -> None:
    with pytest.raises(KeyError, match="zebra"):
        read_arpa(tiny).sentence_score("a zebra")


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: text.index("\\end")], lambda text: text.replace("-0.3500 a b", "-0.35x0 a b"), lambda text: "",
     lambda text: text.replace("-0.3500 a b -0.1500", "-0.3500 a")],
)  # fmt: skip
def test_malformed_files_are_refused(tiny, damage) -> None:
    tiny.write_text(damage(TINY))
    with pytest.raises(FormatError, match=r"tiny\.arpa"):
        read_arpa(tiny)


def test_same_probability_as_pocketsphinx(tiny) -> None:
    pocketsphinx = pytest.importorskip(
        "pocketsphinx", reason="pocketsphinx is not installed: pip install 'mixbits[demo]'"
    )
    theirs = pocketsphinx.NGramModel.readfile(str(tiny))
    words = ["<s>", "b", "a", "b", "a", "a", "</s>"]
    expected = sum(theirs.prob(words[max(0, i - 2) : i + 1][::-1]) for i in range(1, len(words))) * math.log(1.0001)
    assert read_arpa(tiny).sentence_score("b a b a a") == pytest.approx(expected, abs=2e-3)

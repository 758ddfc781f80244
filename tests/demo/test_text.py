"""The demo's text: what counts as prose, how words are written, and that no held-out sentence is trained on."""

import ast

import pytest
from demo.documents import builtin_documents, source_documents, topic_documents
from demo.text import (
    TextSplit,
    documentation_sentences,
    hash_fraction,
    normalise_words,
    sentences_of,
    spell_number,
    split_sentences,
)

DOCSTRING = """Open a file, e.g. for reading.

The `mode` argument doesn't default to ``"rb"``; see :func:`os.path.join`!  It is
called 21 times.

    >>> open("x")
    this is the output of the call

An example of its use::

    with open(path) as the_file:
        it is not a sentence of the text

:param name: the name of the file to be opened
* A list item that is long enough.
Heading of the section
----------------------
x = y[0] + {a: b} * (c = d) in the code
"""


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("0", "zero"),
        ("13", "thirteen"),
        ("40", "forty"),
        ("99", "ninety nine"),
        ("100", "one hundred"),
        ("512", "five hundred twelve"),
        ("1000", "one thousand"),
        ("20021", "twenty thousand twenty one"),
        ("999999", "nine hundred ninety nine thousand nine hundred ninety nine"),
        ("007", "zero zero seven"),
        ("1234567", "one two three four five six seven"),
    ],
)
def test_numbers_are_spelled(digits: str, words: str) -> None:
    assert spell_number(digits) == words


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("It doesn't return `None`.", "it doesn't return none"),
        ("See :func:`os.path.join()` and getattr_static()", "see os path join and getattr static"),
        ("the 'quoted' word and the users' own", "the quoted word and the users own"),
        ("a TestCase of version 3.8 in 1,024 bytes [1]", "a test case of version three point eight in one thousand twenty four bytes"),
        ("", ""),
        ("¿ñ 漢字?", ""),
    ],
)  # fmt: skip
def test_words_are_letters_only(sentence: str, words: str) -> None:
    assert " ".join(normalise_words(sentence)) == words


def test_code_doctest_and_headings_are_left_out() -> None:
    assert list(sentences_of(DOCSTRING)) == [
        "open a file for example for reading",
        "the mode argument doesn't default to rb",
        "it is called twenty one times",
        "an example of its use",
        "the name of the file to be opened",
        "a list item that is long enough",
    ]


def test_documents_are_deterministic_and_plentiful() -> None:
    topics, builtins = list(topic_documents()), list(builtin_documents())
    assert topics == list(topic_documents())
    assert builtins == list(builtin_documents())
    assert len(topics) > 50
    assert any("len" in name for name, _ in builtins)
    sentences = documentation_sentences(topics)
    assert len(sentences) > 1500
    assert len(sentences) == len(set(sentences))
    assert set("".join(sentences)) <= set("abcdefghijklmnopqrstuvwxyz' ")
    assert "the built in function len returns the number of items of a sequence" in sentences


def test_source_files_are_parsed_not_imported(tmp_path) -> None:
    (tmp_path / "b.py").write_text('"""Doc of b."""\nraise SystemExit("imported")\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text('class C:\n    """Doc of C."""\n    def f(self):\n        """Doc of f."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not wanted."""\n')
    assert [text for _, text in source_documents(tmp_path)] == ["Doc of C.", "Doc of f.", "Doc of b."]
    assert ast.get_docstring(ast.parse((tmp_path / "b.py").read_text())) == "Doc of b."


def _sentences(count: int) -> list[str]:
    return [f"the word {spell_number(str(number))} is here" for number in range(count)]


def test_split_is_disjoint_complete_and_independent_of_order() -> None:
    sentences = _sentences(3000)
    dictionary = frozenset(word for sentence in sentences for word in sentence.split()) - {"seven"}
    split = split_sentences(sentences, dictionary, num_speech=100, seed=1)
    parts = [split.train, split.valid, split.test, split.speech]
    assert sorted(sentence for part in parts for sentence in part) == sorted(sentences)
    assert len(split.speech) == 100
    assert all("seven" not in sentence.split() for sentence in split.speech)
    assert 60 < len(split.valid) < 180
    assert 60 < len(split.test) < 180
    turned = split_sentences(sentences[::-1], dictionary, num_speech=100, seed=1)
    assert turned.speech == split.speech
    assert set(turned.train) == set(split.train)
    more = split_sentences([*sentences, "one more sentence for all of us"], dictionary, num_speech=100, seed=1)
    assert set(split.train) <= set(more.train) | set(more.speech)
    assert split_sentences(sentences, dictionary, num_speech=100, seed=2).speech != split.speech


def test_hash_fraction_is_uniform() -> None:
    values = [hash_fraction(sentence, seed=0) for sentence in _sentences(4000)]
    assert all(0.0 <= value < 1.0 for value in values)
    standard_error = (1 / 12 / len(values)) ** 0.5
    assert abs(sum(values) / len(values) - 0.5) < 4 * standard_error


def test_a_sentence_in_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one part"):
        TextSplit(train=["a b"], valid=["a b"], test=[], speech=[])

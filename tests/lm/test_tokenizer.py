"""Word-level vocabularies and tokenizer directories."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.errors import DataError
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer

SENTENCES = ["b a a c </s>", "c b <unk> ##d <pad>", "e'e N foo<unk>bar"]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z", "Cs")), min_size=1, max_size=5)


def words_of(tokenizer):
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def test_order_is_by_count_then_alphabet_behind_the_special_tokens():
    tokenizer = word_tokenizer(SENTENCES)
    assert words_of(tokenizer) == ["<pad>", "<unk>", "</s>", "a", "b", "c", "##d", "N", "e'e", "foo<unk>bar"]
    assert words_of(word_tokenizer(SENTENCES[::-1])) == words_of(tokenizer)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id == 1
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 2


def test_cut_offs():
    assert words_of(word_tokenizer(SENTENCES, max_words=2))[3:] == ["a", "b"]
    assert words_of(word_tokenizer(SENTENCES, min_count=2))[3:] == ["a", "b", "c"]
    assert len(word_tokenizer(SENTENCES, max_words=10**9)) == 10


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 8))
def test_vocabulary_agrees_with_a_counter(lines, size):
    special = {"<pad>", "<unk>", "</s>"}
    counts = Counter(word for line in lines for word in line if word not in special)
    if not counts:
        return
    expected = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    tokenizer = word_tokenizer([" ".join(line) for line in lines], max_words=size)
    assert words_of(tokenizer)[3:] == expected
    ids = tokenizer([" ".join(line) for line in lines], split_special_tokens=True)["input_ids"]
    names = words_of(
        tokenizer
    )  # a special token written as a word is in the vocabulary; mixbits.lm.corpus makes it unknown
    for line, row in zip(lines, ids, strict=True):
        assert row == [names.index(w) if w in names else 1 for w in line]


def test_auto_tokenizer_gives_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = word_tokenizer(SENTENCES, max_length=77)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a  b\tnew <unk>", "", "##d e'e", "A"]
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.model_max_length == 77
        assert (loaded.pad_token, loaded.unk_token, loaded.bos_token, loaded.eos_token) == (
            "<pad>", "<unk>", "</s>", "</s>",
        )  # fmt: skip
        assert loaded.decode(loaded("a ##d N")["input_ids"]) == "a ##d N"


def test_a_literal_unknown_is_the_unknown_token():
    tokenizer = word_tokenizer(SENTENCES)
    assert tokenizer("a <unk> zzz")["input_ids"] == [3, 1, 1]


@pytest.mark.parametrize("ask", [{"max_words": 0}, {"max_words": -3}, {"min_count": 99}])
def test_nothing_left_is_an_error(ask):
    with pytest.raises(DataError, match=r"at least 1 word|no word occurs"):
        word_tokenizer(SENTENCES, **ask)
    with pytest.raises(DataError, match="no word occurs"):
        word_tokenizer(["<unk> </s> <pad>"])


def test_any_tokenizer_directory_loads(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path / "bpe")
    loaded = load_tokenizer(tmp_path / "bpe")
    assert loaded("the cat")["input_ids"] == byte_level("the cat")["input_ids"]
    assert loaded.decode(loaded("a caf\u00e9")["input_ids"]) == "a caf\u00e9"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no tokenizer.json"), ("{", "cannot be loaded"), ("{}", "cannot be loaded"), ("[1]", "cannot be loaded")],
)
def test_broken_directories(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")

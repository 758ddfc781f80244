"""Which tokens make up which white-space word."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixbits.errors import DataError
from mixbits.lm.corpus import encode_lines
from mixbits.lm.tokenizer import word_tokenizer
from mixbits.lm.words import tokens_per_word, vocabulary_words

LINES = ["the cat  sat", "a\tzebra, unheard-of!", "", "the", "naïve 字 the", " the rain "]


def test_word_level():
    tokenizer = word_tokenizer(["b a a c", "<unk> c c"])
    assert vocabulary_words(tokenizer) == ["c", "a", "b"]
    assert [counts.tolist() for counts in tokens_per_word(tokenizer, ["a b zzz", "", "<unk>"])] == [[1, 1, 1], [], [1]]


def test_pieces_add_up_to_words(byte_level):
    assert vocabulary_words(byte_level) is None
    counts = tokens_per_word(byte_level, LINES)
    rows = encode_lines(byte_level, LINES)
    for line, row, count in zip(LINES, rows, counts, strict=True):
        assert len(count) == len(line.split())
        assert count.sum() == len(row)
        ids = iter(row)
        for word, number in zip(line.split(), count, strict=True):
            assert byte_level.decode([next(ids) for _ in range(number)]).strip() == word
    assert max(count.max(initial=0) for count in counts) > 3


def test_tokens_over_several_words_are_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a b": 2, "c": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(", ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(DataError, match="more than one word"):
        tokens_per_word(tokenizer, ["a b, c"])

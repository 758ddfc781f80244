"""Reading text of every kind, token streams and blocks, against plain Python."""

import gzip
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.errors import DataError
from mixbits.lm import corpus
from mixbits.lm.corpus import (
    BlockDataset,
    encode,
    encode_file,
    encode_lines,
    limit_words,
    read_sentences,
    token_batches,
)
from mixbits.lm.tokenizer import word_tokenizer

TEXT = "the cat sat\n\nthe dog <unk> N\r\n   \n a  mat \n"
LINES = ["the cat sat", "the dog <unk> N", "a  mat"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["the cat sat on the mat", "the dog"], max_length=8)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.txt", TEXT.encode()),
        ("bom.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        ("text.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("two-members.gz", gzip.compress(TEXT.encode()[:12], mtime=0) + gzip.compress(TEXT.encode()[12:], mtime=0)),
        ("text.xz", lzma.compress(TEXT.encode())),
        ("no-last-newline", TEXT.strip().encode()),
    ],
)
def test_reads_plain_and_compressed_text(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_sentences(tmp_path / name)) == LINES
    assert list(read_sentences(str(tmp_path / name))) == LINES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "holds no text"),
        ("empty.gz", b"", "holds no text"),
        ("blank", b"\n \r\n\t\n", "holds no text"),
        ("only-bom", b"\xef\xbb\xbf", "holds no text"),
        ("latin1", "good\ncaf\xe9 noir\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("utf16", TEXT.encode("utf-16"), "line 1 is not UTF-8"),
        ("utf16le", TEXT.encode("utf-16-le"), "NUL byte"),
        ("utf16be", TEXT.encode("utf-16-be"), "NUL byte"),
        ("binary", bytes(range(32)), "NUL byte"),
        ("cut.gz", gzip.compress(TEXT.encode() * 500, mtime=0)[:-20], "cut short"),
        ("cut.xz", lzma.compress(TEXT.encode() * 500)[:-20], "cut short"),
        ("head.xz", lzma.compress(TEXT.encode())[:5], "cut short"),
        ("not.gz", TEXT.encode(), "cannot be decompressed"),
        ("not.xz", TEXT.encode(), "cannot be decompressed"),
        ("flipped.gz", None, "cannot be decompressed"),
    ],
)
def test_bad_text_gives_one_clear_error(tmp_path, name, data, message):
    if data is None:
        broken = bytearray(gzip.compress(bytes(np.random.default_rng(0).integers(97, 122, 5000).astype(np.uint8))))
        broken[500] ^= 255
        data = bytes(broken)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_sentences(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(DataError, match="no such text file"):
            list(read_sentences(path))


def test_one_endless_line_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_LINE_CHARACTERS", 1000)
    (tmp_path / "ok").write_bytes(b"a" * 999 + b"\n")
    assert len(next(read_sentences(tmp_path / "ok"))) == 999
    (tmp_path / "long.gz").write_bytes(gzip.compress(b"one\n" + b"a" * 10**7))
    with pytest.raises(DataError, match="line 2 is longer"):
        list(read_sentences(tmp_path / "long.gz"))


def test_stream_layout_and_counts(tokenizer):
    word = tokenizer.get_vocab()
    stream = encode(tokenizer, ["the cat flew", "dog <unk>"])
    eos, unk = word["</s>"], word["<unk>"]
    assert stream.ids.tolist() == [eos, word["the"], word["cat"], unk, eos, word["dog"], unk, eos]
    assert stream.sentence.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (stream.num_tokens, stream.num_words, stream.num_unknown) == (7, 7, 2)
    assert stream.ids.dtype == stream.sentence.dtype == np.int32


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["the", "cat", "zzz", "</s>", "<unk>", "x</s>"]), min_size=1), min_size=1))
def test_stream_agrees_with_plain_python(sentences):
    vocabulary = {"<unk>": 1, "the": 3, "cat": 4}
    tokenizer = word_tokenizer(["the the cat"])
    stream = encode(tokenizer, [" ".join(words) for words in sentences])
    expected = [2]
    for words in sentences:
        expected += [vocabulary.get(word, 1) for word in words] + [2]
    assert stream.ids.tolist() == expected
    assert stream.num_words == stream.num_tokens == sum(len(words) + 1 for words in sentences)
    assert stream.num_unknown == expected.count(1)
    assert np.bincount(stream.sentence).tolist() == [len(words) + 1 for words in sentences]


def test_batches_of_lines_do_not_matter(tokenizer, monkeypatch):
    lines = [f"the cat {i}" for i in range(10)]
    whole = encode(tokenizer, lines)
    monkeypatch.setattr(corpus, "_ENCODE_BATCH", 3)
    parts = encode(tokenizer, iter(lines))
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.sha256 == whole.sha256
    assert encode(tokenizer, lines[::-1]).sha256 != whole.sha256


def test_a_hostile_text_cannot_write_a_sentence_boundary(tokenizer):
    rows = encode_lines(tokenizer, ["the </s> cat", "the<unk>cat", "<pad>", "</s>"])
    assert rows == [[3, 1, 4], [1], [1], [1]]
    assert np.count_nonzero(encode(tokenizer, ["a </s> b </s>"]).ids == 2) == 2  # the start and the one real end


def test_a_byte_level_tokenizer_spells_special_tokens_out(byte_level):
    line = "go <|endoftext|> on"
    (row,) = encode_lines(byte_level, [line])
    assert byte_level.eos_token_id not in row
    assert byte_level.decode(row) == line


def test_special_words_without_an_unknown_token_are_an_error():
    tokenizer = word_tokenizer(["the cat"])
    tokenizer.unk_token = "</s>"  # now unknown words would be boundaries
    with pytest.raises(DataError, match="sentence boundary"):
        encode(tokenizer, ["the </s>"])


def test_no_sentences_and_no_eos(tokenizer):
    with pytest.raises(DataError, match="no sentences"):
        encode(tokenizer, [])
    other = word_tokenizer(["a"])
    other.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        encode(other, ["a"])


def test_words_are_limited_at_a_sentence(tokenizer, tmp_path):
    lines = ["a b c", "d e", "f"]
    assert list(limit_words(lines, None)) == lines
    assert list(limit_words(lines, 3)) == lines[:1]
    assert list(limit_words(lines, 4)) == lines[:2]
    (tmp_path / "t").write_text("\n".join(lines))
    assert encode_file(tokenizer, tmp_path / "t", max_words=4).num_words == 7


def test_blocks_overlap_by_one_token_and_drop_the_tail(tokenizer):
    stream = encode(tokenizer, ["the cat sat on the mat"] * 3)  # 21 predictions
    blocks = BlockDataset(stream, 5)
    assert len(blocks) == 4
    rows = [blocks[i]["input_ids"].tolist() for i in range(4)]
    assert all(len(row) == 6 for row in rows)
    assert [row[-1] for row in rows[:-1]] == [row[0] for row in rows[1:]]
    assert rows[0][:1] + [t for row in rows for t in row[1:]] == stream.ids[:21].tolist()
    assert len(BlockDataset(stream, 21)) == 1
    with pytest.raises(DataError, match="less than one block of 22"):
        BlockDataset(stream, 22)


def test_token_batches_are_deterministic_and_without_replacement(tokenizer):
    stream = encode(tokenizer, [f"the cat {w}" for w in ["a", "the", "dog", "mat", "sat", "on"]] * 20)
    ask = {"context": 4, "num_blocks": 7, "micro_batch": 3}
    first = token_batches(stream, **ask, seed=1)
    assert [tuple(b.shape) for b in first] == [(3, 5), (3, 5), (1, 5)]
    again = token_batches(stream, **ask, seed=1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = token_batches(stream, **ask, seed=2)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    everything = token_batches(stream, context=4, num_blocks=10**6, micro_batch=8, seed=0)
    got = sorted(tuple(row.tolist()) for batch in everything for row in batch)
    blocks = BlockDataset(stream, 4)
    assert got == sorted(tuple(blocks[i]["input_ids"].tolist()) for i in range(len(blocks)))

"""ARPA files: round trips, and every kind of bad file gets one error that names file and line."""

from __future__ import annotations

import gzip
import lzma
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixbits.asr.formats.arpa import read_arpa, write_arpa
from mixbits.asr.ngram import LN10, BackoffModel, NgramTable
from mixbits.errors import DataError, FormatError

DATA = os.environ.get("MIXBITS_DATA")

TINY = """\\data\\
ngram 1=4
ngram 2=3
ngram 3=1

\\1-grams:
-0.5\t</s>
-99\t<s>\t-0.2
-0.7\ta\t-0.1
-0.8\tb\t-0.4

\\2-grams:
-0.25\t<s> a\t-0.05
-0.35\ta b\t-0.15
-0.45\tb </s>

\\3-grams:
-0.125\t<s> a b

\\end\\
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "m.arpa"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def same(one: BackoffModel, other: BackoffModel) -> bool:
    return one.words == other.words and all(
        np.array_equal(a.keys, b.keys)
        and np.allclose(a.log_p, b.log_p, rtol=1e-14, atol=0)
        and (a.log_backoff is None or np.allclose(a.log_backoff, b.log_backoff, rtol=1e-14, atol=0))
        for a, b in zip(one.tables, other.tables, strict=True)
    )


@pytest.mark.parametrize("name", ["x.arpa", "x.arpa.gz", "x.arpa.xz"])
@pytest.mark.parametrize(
    "source",
    ["arpa/kenlm_test.arpa", "arpa/kenlm_test_nounk.arpa", "arpa/kenlm_toy0.arpa", "arpa/kenlm_toy1.arpa",
     "arpa/an4.trigramlm.arpa", "lattices/kaldi_weather/lm.arpa"],
)  # fmt: skip
@pytest.mark.skipif(DATA is None, reason="MIXBITS_DATA is not set: no ARPA files")
def test_real_files_are_written_as_they_were_read(tmp_path: Path, source: str, name: str) -> None:
    model = read_arpa(f"{DATA}/{source}")
    write_arpa(tmp_path / name, model, digits=17)
    assert same(read_arpa(tmp_path / name), model)


def test_spaces_tabs_line_ends_blank_lines_and_a_preface(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path, TINY))
    variants = [
        TINY.replace("\t", " "), TINY.replace("\n", "\r\n"), TINY.replace("\n", "\n\n"), "# a preface\n\n" + TINY,
        TINY.rstrip("\n"), TINY.replace("<s> a b", "<s> a b\t0"), TINY.replace("ngram 1=4", "ngram  1 = 4"),
    ]  # fmt: skip
    for text in variants:
        assert same(read_arpa(write(tmp_path, text)), model)
    for pack in (gzip.compress, lzma.compress):
        assert same(read_arpa(write(tmp_path, pack(TINY.encode()))), model)


def test_cmu_unknown_word_and_empty_sections(tmp_path: Path) -> None:
    text = TINY.replace("\ta\t", "\t<UNK>\t").replace(" a", " <UNK>").replace("\ta b", "\t<UNK> b")
    assert read_arpa(write(tmp_path, text)).has_unknown
    empty = TINY[: TINY.index("-0.125")].replace("ngram 3=1", "ngram 3=0") + "\n\\end\\\n"
    model = read_arpa(write(tmp_path, empty))
    assert [len(table) for table in model.tables] == [4, 3, 0]
    assert model.score([["a", "b"]]).log_p / LN10 == pytest.approx([-0.25, -0.05 - 0.35, -0.15 - 0.45])


BAD = {
    "empty": ("", 0, "no line \\data\\"),
    "no data": (TINY.replace("\\data\\", "data"), 20, "no line \\data\\"),
    "kenlm binary": ("mmap lm http://kheafield.com/code format version 5\n\0\0", 1, "KenLM binary"),
    "no counts": ("\\data\\\n\\1-grams:\n", 2, "has no counts"),
    "count missing": (TINY.replace("ngram 2=3\n", ""), 3, "expected 'ngram 2=COUNT'"),
    "count no number": (TINY.replace("ngram 2=3", "ngram 2=x"), 3, "expected 'ngram 2=COUNT'"),
    "count negative": (TINY.replace("ngram 2=3", "ngram 2=-3"), 3, "expected 'ngram 2=COUNT'"),
    "count huge": (TINY.replace("ngram 2=3", "ngram 2=999999999999999999"), 17, "promises 999999999999999999"),
    "count beyond": (TINY.replace("ngram 2=3", "ngram 2=" + "9" * 400), 3, "expected 'ngram 2=COUNT'"),
    "orders beyond": (
        "\\data\\\n" + "".join(f"ngram {n}=1\n" for n in range(1, 99)), 34, "longer than 32 words",
    ),
    "too few": (TINY.replace("ngram 2=3", "ngram 2=4"), 17, "after 3 2-grams"),
    "too many": (TINY.replace("ngram 2=3", "ngram 2=2"), 15, "after 2 2-grams"),
    "section missing": (TINY.replace("\\2-grams:", ""), 13, "expected \\2-grams: after 4"),
    "cut in a section": (TINY[: TINY.index("-0.45")], 14, "after 2 of 3 2-grams"),
    "cut in a line": (TINY[: TINY.index(" </s>")], 15, "is no 2-gram"),
    "cut before end": (TINY[: TINY.index("\\end")], 19, "ends before \\end\\"),
    "text after end": (TINY + "more\n", 21, "text after \\end\\"),
    "nan": (TINY.replace("-0.35", "nan"), 14, "not finite"),
    "infinite": (TINY.replace("-0.35", "-inf"), 14, "not finite"),
    "overflow": (TINY.replace("-0.35", "-1e999"), 14, "not finite"),
    "nan back-off": (TINY.replace("-0.15", "nan"), 14, "not finite"),
    "no number": (TINY.replace("-0.35", "-0.3x"), 14, "is no 2-gram"),
    "underscore": (TINY.replace("-0.35", "-0_35"), 14, "is no 2-gram"),
    "above 1": (TINY.replace("-0.35", "0.35"), 14, "above 1"),
    "fields missing": (TINY.replace("-0.35\ta b\t-0.15", "-0.35\ta"), 14, "expected a number, 2 words"),
    "fields too many": (TINY.replace("a b\t", "a b b b\t"), 14, "expected a number, 2 words"),
    "unknown word": (TINY.replace("a b\t", "a c\t"), 14, "'c' is not among the 1-grams"),
    "word twice": (TINY.replace("-0.8\tb", "-0.8\ta"), 10, "there already"),
    "n-gram twice": (TINY.replace("\tb </s>", "\ta b"), 15, "in line 14 already"),
    "no history": (TINY.replace("<s> a b", "b a b"), 18, "first 2 words are not among the 2-grams"),
    "longest with back-off": (TINY.replace("<s> a b", "<s> a b\t-0.5"), 18, "expected none"),
    "not utf-8": (TINY.encode().replace(b"\tb\t", b"\tb\xff\t"), 10, "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    text, line, message = BAD[kind]
    path = write(tmp_path, text)
    with pytest.raises(FormatError) as caught:
        read_arpa(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("word", ["<s>", "</s>"])
def test_sentence_boundaries_are_needed(tmp_path: Path, word: str) -> None:
    with pytest.raises(FormatError, match=f"no {word} among"):
        read_arpa(write(tmp_path, TINY.replace(word, "c")))


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_arpa(tmp_path / "none.arpa")
    with pytest.raises(DataError, match="cannot be read"):
        read_arpa(tmp_path)
    for pack in (gzip.compress, lzma.compress):
        packed = pack(TINY.encode())
        for size in (10, len(packed) // 2, len(packed) - 1):
            with pytest.raises(FormatError, match=r"m\.arpa:\d+: the compressed file is truncated or damaged"):
                read_arpa(write(tmp_path, packed[:size]))


@pytest.mark.parametrize("where", ["before", "counts", "section", "after"])
def test_endless_line_is_refused_without_reading_it_whole(tmp_path: Path, where: str) -> None:
    cut = {"before": 0, "counts": TINY.index("ngram 2"), "section": TINY.index("-0.35"), "after": len(TINY)}[where]
    path = tmp_path / "m.arpa.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(TINY[:cut].encode())
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(TINY[cut:].encode())
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=rf"m\.arpa\.gz:{TINY[:cut].count(chr(10)) + 1}: the line is longer than"):
            read_arpa(path)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, TINY)
    model = read_arpa(path)
    spaced = BackoffModel(tuple(f"{word} x" if word == "a" else word for word in model.words), model.tables)
    with pytest.raises(DataError, match="white space"):
        write_arpa(path, spaced)
    assert path.read_text() == TINY
    write_arpa(tmp_path / "y.arpa", model)
    assert (tmp_path / "y.arpa").read_text().replace("-0.5\t</s>\t0", "-0.5\t</s>").replace(
        "</s>\t0\n", "</s>\n"
    ) == TINY
    assert sorted(os.listdir(tmp_path)) == ["m.arpa", "y.arpa"]


def test_probabilities_a_rounding_above_1_are_written_as_1(tmp_path: Path) -> None:
    table = NgramTable(np.arange(2), np.array([1e-12, -1.0]), None)
    write_arpa(tmp_path / "m.arpa", BackoffModel(("</s>", "<s>"), (table,)))
    assert read_arpa(tmp_path / "m.arpa").tables[0].log_p[0] == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(content=st.binary(max_size=60), start=st.integers(0, len(TINY)), drop=st.integers(0, 40))
def test_hostile_bytes_never_crash(tmp_path: Path, content: bytes, start: int, drop: int) -> None:
    data = TINY.encode()
    with suppress(DataError, FormatError):
        assert read_arpa(write(tmp_path, data[:start] + content + data[start + drop :])).order >= 1

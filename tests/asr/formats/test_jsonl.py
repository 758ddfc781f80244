"""mixbits JSONL: what is written is read back, and every kind of bad file gets one clear error."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixbits.asr.formats.jsonl import read_nbest, write_nbest
from mixbits.asr.nbest import Hypothesis, NBest, reference_texts
from mixbits.errors import DataError, FormatError

GOOD = '{"utterance": "u1", "reference": "a b", "hypotheses": [{"text": "a", "acoustic_score": -1.5}]}'
OTHER = '{"utterance": "u2", "hypotheses": [{"text": "", "acoustic_score": 0}]}'


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _line(**changes: Any) -> str:
    record = {"utterance": "u1", "hypotheses": [{"text": "a", "acoustic_score": -1.0}]}
    record.update(changes)
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def _hypothesis_line(raw_fields: str) -> str:
    return '{"utterance": "u1", "hypotheses": [{' + raw_fields + "}]}"


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
extras = st.dictionaries(st.sampled_from(["x", "tokens", "score é"]), st.one_of(finite, texts, st.lists(st.integers())))
hypotheses = st.builds(Hypothesis, texts, finite, st.one_of(st.none(), finite), extras)
optional_texts = st.one_of(st.none(), texts)
nbests = st.builds(
    NBest,
    texts.filter(bool),
    st.lists(hypotheses, min_size=1, max_size=4).map(tuple),
    optional_texts,
    optional_texts,
    optional_texts,
    extras,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(lists=st.lists(nbests, min_size=1, max_size=4, unique_by=lambda entry: entry.utterance))
@pytest.mark.parametrize("name", ["lists.jsonl", "lists.jsonl.gz", "lists.jsonl.xz"])
def test_round_trip(tmp_path: Path, name: str, lists: list[NBest]) -> None:
    write_nbest(tmp_path / name, lists)
    assert list(read_nbest(tmp_path / name)) == lists


def test_awkward_texts_survive(tmp_path: Path) -> None:
    words = [
        "",
        "null",
        "n/a",
        'a "quoted" word',
        "tab\there",
        "back\\slash",
        " spaces  kept ",
        "line\nbreak",
        "é ß 字",
    ]
    entry = NBest("u", tuple(Hypothesis(word, -1.0) for word in words))
    write_nbest(tmp_path / "l.jsonl", [entry])
    assert [hypothesis.text for hypothesis in read_nbest(tmp_path / "l.jsonl")[0].hypotheses] == words


def test_unknown_fields_are_kept_and_written(tmp_path: Path) -> None:
    line = (
        '{"utterance": "u", "lang": "en", "hypotheses": [{"text": "a", "acoustic_score": -1, "tokens": [1, {"b": 2}]}]}'
    )
    lists = read_nbest(_write(tmp_path / "in.jsonl", line))
    assert lists[0].extra == {"lang": "en"}
    write_nbest(tmp_path / "out.jsonl", lists)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == json.loads(line)


def test_compression_goes_by_content_and_hash_by_uncompressed_bytes(tmp_path: Path) -> None:
    plain = _write(tmp_path / "a.jsonl", GOOD, OTHER)
    (tmp_path / "b.data").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.data").write_bytes(lzma.compress(plain.read_bytes()))
    files = [read_nbest(path) for path in (plain, tmp_path / "b.data", tmp_path / "c.data")]
    assert files[0].lists == files[1].lists == files[2].lists
    assert len({file.data_hash for file in files}) == 1


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + OTHER.encode())
    assert [entry.utterance for entry in read_nbest(path)] == ["u1", "u2"]


BAD_LINES = {
    "not json": ("{nope", FormatError, "not JSON"),
    "cut short": (GOOD[:40], FormatError, "not JSON"),
    "array": ("[1]", FormatError, "expected a JSON object"),
    "nan": (_hypothesis_line('"text": "a", "acoustic_score": NaN'), FormatError, "NaN"),
    "infinity": (_hypothesis_line('"text": "a", "acoustic_score": -Infinity'), FormatError, "Infinity"),
    "overflow": (_hypothesis_line('"text": "a", "acoustic_score": 1e999'), FormatError, "not finite"),
    "huge integer": (_hypothesis_line('"text": "a", "acoustic_score": 1' + "0" * 400), FormatError, "not finite"),
    "huger integer": (_hypothesis_line('"text": "a", "acoustic_score": 1' + "0" * 9999), FormatError, "not JSON"),
    "nan lm": (_hypothesis_line('"text": "a", "acoustic_score": 1, "lm_score": NaN'), FormatError, "NaN"),
    "infinite extra": (_hypothesis_line('"text": "a", "acoustic_score": 1, "x": [1e999]'), FormatError, "infinite"),
    "no hypotheses": (_line(hypotheses=[]), FormatError, "no hypotheses"),
    "hypotheses missing": (_line(hypotheses=...), FormatError, "got nothing"),
    "hypotheses not a list": (_line(hypotheses={"a": 1}), FormatError, "must be a list"),
    "hypothesis not an object": (_line(hypotheses=["a"]), FormatError, "hypothesis 1"),
    "no utterance": (_line(utterance=...), FormatError, "'utterance'"),
    "empty utterance": (_line(utterance=""), FormatError, "'utterance'"),
    "utterance number": (_line(utterance=7), FormatError, "must be a string, got int"),
    "reference number": (_line(reference=7), FormatError, "'reference'"),
    "no text": (_hypothesis_line('"acoustic_score": 1'), FormatError, "missing field 'text'"),
    "text null": (_hypothesis_line('"text": null, "acoustic_score": 1'), FormatError, "missing field 'text'"),
    "text number": (_hypothesis_line('"text": 3, "acoustic_score": 1'), FormatError, "must be a string"),
    "no score": (_hypothesis_line('"text": "a"'), FormatError, "missing field 'acoustic_score'"),
    "score string": (_hypothesis_line('"text": "a", "acoustic_score": "-1"'), FormatError, "must be a number"),
    "score true": (_hypothesis_line('"text": "a", "acoustic_score": true'), FormatError, "must be a number"),
    "key twice": (_hypothesis_line('"text": "a", "text": "b", "acoustic_score": 1'), FormatError, "occurs twice"),
    "lone surrogate": (_hypothesis_line('"text": "\\ud800", "acoustic_score": 1'), FormatError, "surrogate"),
    "deep nesting": ('{"x": ' + "[" * 200_000, FormatError, "nested too deeply"),
    "duplicate": (GOOD, DataError, "line 1"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_names_file_and_line_or_is_counted(tmp_path: Path, kind: str) -> None:
    line, error, message = BAD_LINES[kind]
    path = _write(tmp_path / "l.jsonl", GOOD, line, OTHER)
    with pytest.raises(error) as caught:
        read_nbest(path)
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    file = read_nbest(path, on_bad="skip")
    assert [entry.utterance for entry in file] == ["u1", "u2"]
    assert file.num_skipped == 1
    assert message in file.skipped[0]


def test_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(OTHER.encode() + b"\n" + GOOD.replace("a b", "caf\xe9").encode("latin-1"))
    with pytest.raises(DataError, match=r"l\.jsonl:2: not UTF-8 \(byte 0xe9"):
        read_nbest(path)
    path.write_text(GOOD, encoding="utf-16")
    with pytest.raises(DataError, match="not UTF-8"):
        read_nbest(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        read_nbest(tmp_path / "l.jsonl")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_nbest(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_nbest(tmp_path)


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_truncated_compression_is_always_an_error(tmp_path: Path, pack: Any, on_bad: Any) -> None:
    lines = "\n".join(_line(utterance=f"u{i}", note=os.urandom(40).hex()) for i in range(500))
    packed = pack(lines.encode())
    path = tmp_path / "l.gz"
    for size in (10, 13, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:size])
        with pytest.raises(FormatError, match=r"l\.gz:\d+: the compressed file is truncated or damaged"):
            read_nbest(path, on_bad=on_bad)


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="all 2 lines are bad"):
        read_nbest(_write(tmp_path / "l.jsonl", "x", "y"), on_bad="skip")


def test_endless_line_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "l.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD.encode() + b"\n")
        for _ in range(64):
            file.write(b" " * 2**20)
        file.write(b"\n" + OTHER.encode())
    tracemalloc.start()
    try:
        file_read = read_nbest(path, on_bad="skip", max_line_bytes=2**16)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert [entry.utterance for entry in file_read] == ["u1", "u2"]
    with pytest.raises(FormatError, match="longer than 65536 bytes"):
        read_nbest(path, max_line_bytes=2**16)


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path / "l.jsonl", GOOD)
    good = NBest("u", (Hypothesis("a", -1.0),))
    with pytest.raises(DataError, match="'u' occurs twice"):
        write_nbest(path, [good, good])
    with pytest.raises(DataError, match="'v' cannot be written as JSON"):
        write_nbest(path, [good, NBest("v", (Hypothesis("a", -1.0, None, {"x": float("nan")}),))])
    assert path.read_text().strip() == GOOD
    assert os.listdir(tmp_path) == ["l.jsonl"]


def test_same_lists_same_bytes(tmp_path: Path) -> None:
    entry = NBest("u", (Hypothesis("a", -1.0),))
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        write_nbest(tmp_path / name, [entry])
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_types_check_themselves() -> None:
    with pytest.raises(DataError, match="finite"):
        Hypothesis("a", float("nan"))
    with pytest.raises(DataError, match="no hypotheses"):
        NBest("u", ())
    with pytest.raises(DataError, match="fields of their own"):
        Hypothesis("a", -1.0, None, {"text": "b"})
    with pytest.raises(DataError, match="'u' has no reference"):
        reference_texts([NBest("u", (Hypothesis("a", -1.0),))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), position=st.integers(0, 150))
def test_hostile_bytes_never_crash(tmp_path: Path, content: bytes, position: int) -> None:
    line = GOOD.encode() + b"\n"
    (tmp_path / "l.jsonl").write_bytes(line[:position] + content + line[position:])
    with suppress(DataError, FormatError):
        assert len(read_nbest(tmp_path / "l.jsonl")) >= 1

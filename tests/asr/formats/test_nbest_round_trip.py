"""Every n-best format gives back what was written, or refuses it: property tests, awkward texts, the real lists."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixbits.asr.formats import trn
from mixbits.asr.formats.lines import new_digest
from mixbits.asr.formats.registry import (
    HOLDS,
    detect_format,
    drop_fields,
    lost_fields,
    read_any,
    write_any,
)
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.errors import DataError

NAMES = {
    "jsonl": "lists.jsonl",
    "kaldi": "lists",
    "espnet1": "lists.json",
    "espnet2": "lists",
    "nemo": "lists.tsv",
    "mlm-scoring": "lists.json.xz",
}
WHITE = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())
finite = st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(max_size=8)
line_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\t\ufeff\u2581"), max_size=12
) | st.sampled_from(["", "null", "n/a", 'a "b" c', '"', " two  spaces ", "a<eos>", "é ß 字", "-1.5", "NaN", "{", "\\"])
key_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=WHITE + "\0\ufeff"), min_size=1, max_size=6
)
json_values = st.one_of(finite, line_text, st.booleans(), st.none(), st.lists(st.integers(), max_size=2))
extras = st.dictionaries(st.sampled_from(["tokens", "score é", "rank", "token"]), json_values, max_size=2)
optional = st.one_of(st.none(), line_text)


@st.composite
def sound_lists(draw: Any, ragged: bool = True) -> list[NBest]:
    """Lists that every format should take once the fields that it cannot hold are dropped."""
    size, with_lm = draw(st.integers(1, 4)), draw(st.booleans())
    scored = {name: draw(st.booleans()) for name in ("graph_score", "neural_lm_score")}

    def hypothesis() -> Hypothesis:
        extra = draw(extras)
        if "token" in extra:
            extra["token"] = draw(line_text)
        extra |= {name: draw(finite) for name, there in scored.items() if there}
        return Hypothesis(draw(line_text), draw(finite), draw(finite) if with_lm else None, extra)

    keys = draw(st.lists(key_text, min_size=1, max_size=4, unique=True))
    return [
        NBest(
            key,
            tuple(hypothesis() for _ in range(draw(st.integers(1, size)) if ragged else size)),
            draw(optional),
            draw(optional),
            draw(optional),
            draw(extras),
        )
        for key in keys
    ]


any_lists = st.lists(
    st.builds(
        NBest,
        any_text.filter(bool),
        st.lists(st.builds(Hypothesis, any_text, finite, st.none() | finite), min_size=1, max_size=2).map(tuple),
        st.none() | any_text,
        st.none() | any_text,
    ),
    min_size=1,
    max_size=2,
)
many = settings(suppress_health_check=list(HealthCheck), max_examples=60, deadline=None)


def _fresh(folder: Path, format: str) -> Path:
    path = folder / NAMES[format]
    if path.is_dir():
        shutil.rmtree(path)
    return path


@many
@given(data=st.data())
@pytest.mark.parametrize("format", HOLDS)
def test_sound_lists_come_back_equal(tmp_path: Path, format: Any, data: Any) -> None:
    lists = data.draw(sound_lists(ragged=format != "nemo"))
    kept = drop_fields(lists, lost_fields(lists, format))
    path = _fresh(tmp_path, format)
    write_any(path, lists, format=format, drop=["all"])
    assert list(read_any(path, format=format)) == kept
    first = read_any(path, format=format)
    again = _fresh(tmp_path / "again", format)
    write_any(again, first, format=format)
    assert read_any(again, format=format).data_hash == first.data_hash


@many
@given(lists=any_lists)
@pytest.mark.parametrize("format", HOLDS)
def test_any_text_comes_back_equal_or_is_refused(tmp_path: Path, format: Any, lists: list[NBest]) -> None:
    path = _fresh(tmp_path, format)
    if path.exists():
        path.unlink()
    try:
        write_any(path, lists, format=format, drop=["all"])
    except DataError:
        assert not path.exists()
    else:
        assert list(read_any(path, format=format)) == drop_fields(lists, lost_fields(lists, format))


@many
@given(pairs=st.dictionaries(any_text, any_text, min_size=1, max_size=3))
def test_trn_keeps_words_or_refuses(tmp_path: Path, pairs: dict[str, str]) -> None:
    path = tmp_path / "out.trn"
    try:
        trn.write(path, list(pairs.items()))
    except DataError:
        return
    assert trn.read(path, new_digest()) == {key: " ".join(text.split()) for key, text in pairs.items()}


AWKWARD = (
    "",
    "null",
    "n/a",
    'a "quoted',
    "back\\slash",
    "NaN",
    " spaces  kept ",
    "é ß 字",
    "{ a / b }",
    "#x",
    "a<eos>",
)


@pytest.mark.parametrize("format", HOLDS)
def test_awkward_hypotheses_survive(tmp_path: Path, format: Any) -> None:
    lists = [NBest(f"u-{n}", (Hypothesis(text, -1.0 - n), Hypothesis(text, -2.5))) for n, text in enumerate(AWKWARD)]
    path = tmp_path / NAMES[format]
    write_any(path, lists, format=format)
    assert detect_format(path) == format
    assert list(read_any(path)) == lists


@pytest.mark.parametrize(
    ("format", "text"), [("nemo", "a\tb"), ("nemo", "a\nb"), ("kaldi", "a\nb"), ("espnet2", "a\rb"), ("espnet1", "▁a")]
)
def test_what_a_format_cannot_hold_is_refused_by_name(tmp_path: Path, format: Any, text: str) -> None:
    with pytest.raises(DataError, match="hypothesis 1 of utterance 'u' holds the"):
        write_any(tmp_path / "out", [NBest("u", (Hypothesis(text, -1.0),))], format=format)
    assert os.listdir(tmp_path) == []


def test_lost_fields_are_named_and_dropped_on_demand(tmp_path: Path) -> None:
    hypothesis = Hypothesis("a", -1.0, -2.0, {"tokens": [1], "graph_score": -3.0})
    lists = [NBest("u", (hypothesis, hypothesis), "ref", "spk", "talk", {"lang": "en"})]
    with pytest.raises(
        DataError, match=r"kaldi cannot hold lang \(1 times, first in 'u'\), tokens \(2 times.*--drop lang,tokens"
    ):
        write_any(tmp_path / "k", lists, format="kaldi")
    write_any(tmp_path / "k", lists, format="kaldi", drop=["lang", "tokens"])
    kept = Hypothesis("a", -1.0, -2.0, {"graph_score": -3.0})
    assert list(read_any(tmp_path / "k")) == [NBest("u", (kept, kept), "ref", "spk", "talk")]
    assert (tmp_path / "k" / "acwt").read_text() == "u-1 1.0\nu-2 1.0\n"
    assert (tmp_path / "k" / "lmwt.nolm").read_text() == "u-1 3.0\nu-2 3.0\n"
    with pytest.raises(DataError, match="nemo cannot hold lm_score"):
        write_any(tmp_path / "n.tsv", lists, drop=["tokens", "graph_score"])
    with pytest.raises(ValueError, match="cannot drop 'speeker': no list has such a field"):
        write_any(tmp_path / "n.tsv", lists, drop=["speeker"])
    write_any(tmp_path / "n.tsv", lists, drop=["all", "speaker"])
    assert list(read_any(tmp_path / "n.tsv")) == [
        NBest("u", (Hypothesis("a", -1.0),) * 2, "ref", None, "talk", {"lang": "en"})
    ]
    half = [NBest("u", (Hypothesis("a", -1.0, -2.0), Hypothesis("b", -1.0)))]
    with pytest.raises(DataError, match="some hypotheses have no lm_score"):
        write_any(tmp_path / "half", half, format="kaldi")


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    lists = [NBest("u", (Hypothesis("a", -1.0),))]
    (tmp_path / "empty").mkdir()
    write_any(tmp_path / "empty", lists, format="kaldi")
    with pytest.raises(DataError, match="is there already; expected the name of a new or empty folder"):
        write_any(tmp_path / "empty", lists, format="espnet2")
    assert sorted(os.listdir(tmp_path / "empty")) == ["acwt", "words_text"]


def test_a_manifest_of_others_is_never_written_over(tmp_path: Path) -> None:
    lists = [NBest("u", (Hypothesis("a", -1.0),))]
    write_any(tmp_path / "x.tsv", lists)
    write_any(tmp_path / "x.tsv", lists)
    (tmp_path / "x.manifest.json").write_text('{"audio_filepath": "u.wav", "text": "a"}\n')
    with pytest.raises(DataError, match="is not ours to write over"):
        write_any(tmp_path / "x.tsv", lists)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 2**60 + 1, True, "3"])
def test_kaldi_refuses_extra_scores_that_are_no_costs(tmp_path: Path, value: Any) -> None:
    lists = [NBest("u", (Hypothesis("a", -1.0, None, {"graph_score": value}),))]
    with pytest.raises(DataError, match="graph_score is not a finite number everywhere"):
        write_any(tmp_path / "k", lists, format="kaldi")


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: no real lists")
@pytest.mark.parametrize(
    "name", ["librispeech_10best/test_clean.jsonl.gz", "lattices/kaldi_weather/mono.100best.jsonl.gz"]
)
@pytest.mark.parametrize("format", HOLDS)
def test_real_lists_come_back_equal(tmp_path: Path, format: Any, name: str) -> None:
    lists = list(read_any(Path(os.environ["MIXBITS_DATA"]) / name))[:300]
    if format == "nemo":
        top = min(len(entry.hypotheses) for entry in lists)
        lists = [replace(entry, hypotheses=entry.hypotheses[:top]) for entry in lists]
    kept = drop_fields(lists, lost_fields(lists, format))
    lossy = "kaldi_weather" in name and format in ("nemo", "espnet2")
    assert (kept == lists) is not lossy
    write_any(tmp_path / NAMES[format], kept, format=format)
    assert list(read_any(tmp_path / NAMES[format])) == kept

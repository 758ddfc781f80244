"""HTK SLF: both places of words, header scales and bases, quotes, round trips to the last bit, and damage."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.asr.formats.slf import read_slf
from mixbits.asr.formats.slf_write import write_slf
from mixbits.asr.lattice import Lattice, PathWeights
from mixbits.asr.lattice_paths import best_path, nbest_paths
from mixbits.errors import DataError, FormatError

_spec = importlib.util.spec_from_file_location("lattice_cases", Path(__file__).parents[1] / "lattice_cases.py")
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ON_LINKS = """# a comment
VERSION=1.0 U="the one"
lmscale=2 wdpenalty=-1.5
N=3 L=3
I=0 t=0.0
I=1 t=0.5
I=2
J=0 S=0 E=1 W=a a=-3 l=-1 n=-2 i=-1,-2 d=:x,0.1:
S=0 J=1 E=1 W=b v=2 a=-4 l=-1 n=-3 i=-3,-4
J=2 START=1 END=2 WORD=!NULL acoustic=-1 language=-0.5 ngram=0 i=0,0
"""
ON_NODES = "N=4 L=4\nI=0 W=!NULL\nI=1 W=x\nI=2 W=y v=2\nI=5 W=!SENT_END\nJ=0 S=0 E=1 a=-1\nJ=1 S=0 E=2 a=-2\nJ=2 S=1 E=5\nJ=3 S=2 E=5 a=-1\n"


def read(tmp_path: Path, text: str | bytes, **options: object) -> Lattice:
    path = tmp_path / "lat1.slf"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_slf(path, **options)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(cases.lattices(words=("'em", 'q"uo', "back\\slash", "a=b", "#1")), st.booleans())
def test_round_trip(tmp_path_factory, lattice: Lattice, packed: bool) -> None:
    path = tmp_path_factory.mktemp("s") / ("x.slf.gz" if packed else "x.slf")
    write_slf(path, lattice)
    again = read_slf(path)
    assert again.utterance == lattice.utterance
    assert cases.path_table(again) == cases.path_table(lattice)
    write_slf(path, again)
    assert cases.same_arcs(again, read_slf(path))


def test_words_on_links(tmp_path: Path) -> None:
    lattice = read(tmp_path, ON_LINKS)
    assert lattice.utterance == "the one"
    assert lattice.weights == PathWeights(1.0, 2.0, -1.5)
    assert [path.words for path in nbest_paths(lattice, 9)] == [("a",), ("b",)]
    assert best_path(lattice).total_score == -4 + 2 * -1.5 - 1.5
    assert {name: values.tolist() for name, values in lattice.other.items()} == {
        "n": [-2, -3, 0],
        "i.1": [-1, -3, 0],
        "i.2": [-2, -4, 0],
    }
    assert lattice.state_times is not None
    assert lattice.state_times[:2].tolist() == [0, 0.5]
    assert math.isnan(lattice.state_times[2])
    again = tmp_path / "again.slf"
    write_slf(again, lattice)
    back = read_slf(again)
    assert cases.same_arcs(lattice, back)
    assert back.weights == lattice.weights
    assert {name: values.tolist() for name, values in back.other.items()} == {
        n: v.tolist() for n, v in lattice.other.items()
    }
    np.testing.assert_array_equal(lattice.state_times, back.state_times)
    assert cases.same_arcs(lattice, read(tmp_path, ON_LINKS.replace("\n", "\r\n")))


def test_words_on_nodes(tmp_path: Path) -> None:
    lattice = read(tmp_path, ON_NODES)
    assert lattice.utterance == "lat1"
    assert [path.words for path in nbest_paths(lattice, 9)] == [("x",), ("y",)]
    assert lattice.other["v"].tolist() == [1, 2, 1, 1]
    spoken = read(tmp_path, ON_NODES.replace("I=0 W=!NULL", "I=0 W=first"))
    assert best_path(spoken).words == ("first", "x")
    turned = ON_NODES.replace("N=4", "start=2 end=1\nN=4").replace("S=0 E=1", "S=2 E=0").replace("S=0 E=2", "S=0 E=5")
    turned = turned.replace("S=1 E=5", "S=2 E=5").replace("S=2 E=5 a=-1", "S=5 E=1")
    assert best_path(read(tmp_path, turned)).words[-1] == "x"


def test_bases(tmp_path: Path) -> None:
    ten = read(tmp_path, ON_LINKS.replace("lmscale", "base=10 lmscale"))
    assert ten.acoustic_score == pytest.approx(np.array([-3, -4, -1]) * math.log(10))
    assert ten.other["n"] == pytest.approx(np.array([-2, -3, 0]) * math.log(10))
    plain = "base=0.0\nN=2 L=1\nI=0\nI=1\nJ=0 S=0 E=1 W=x a=0.25 l=0.5\n"
    assert read(tmp_path, plain).lm_score == pytest.approx([math.log(0.5)])
    with pytest.raises(FormatError, match=":5: l= is not above 0"):
        read(tmp_path, plain.replace("0.5", "0"))
    for base in ("1", "-2", "nan", "x"):
        with pytest.raises(FormatError, match="base="):
            read(tmp_path, plain.replace("base=0.0", f"base={base}"))


def test_lm_score_may_be_called_n(tmp_path: Path) -> None:
    lattice = read(tmp_path, ON_LINKS.replace(" l=-1", "").replace(" language=-0.5", ""))
    assert lattice.lm_score.tolist() == [-2, -3, 0]
    assert "n" not in lattice.other


def test_quotes_and_escapes(tmp_path: Path) -> None:
    for written, word in (
        (r"W='em", "'em"),
        (r'W="a \"b\""', 'a "b"'),
        (r"W=\303\251t\351", None),
        (r"W=\303\251t", "ét"),
        ("W='x y'", "x y"),
    ):
        text = ON_LINKS.replace("W=a", written).replace("W=b", "W=a")
        if word is None:
            with pytest.raises(FormatError, match="not UTF-8"):
                read(tmp_path, text)
        else:
            assert best_path(read(tmp_path, text)).words == (word,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("J=2 START", "J=1 START", ":10: link 1 occurs twice"),
        ("I=2\n", "I=1\n", ":7: node 1 occurs twice"),
        ("I=2\n", "", ":9: 2 nodes, but N=3 was promised"),
        ("L=3", "L=4", "3 links, but L=4 was promised"),
        ("N=3 L=3", "", "no line with N= and L="),
        ("END=2", "END=7", ":10: E=7 is no node"),
        ("END=2", "END=0", "cycle|no link leads to 0"),
        ("END=2", "", ":10: the link has no E="),
        ("S=0 E=1 W=a", "S=0 E=-1 W=a", ":8: E=b'-1'"),
        ("a=-3", "a=nan", ":8: a=b'nan'; expected a finite number"),
        ("a=-3", "a=-inf", ":8: a=b'-inf'"),
        ("l=-1 n=-2", "l=1_0 n=-2", ":8: l=b'1_0'"),
        ("t=0.5", "t=abc", "t=b'abc'"),
        ("W=a ", "W=a W=c ", ":8: a field occurs twice"),
        ("W=a ", "W ", ":8: got"),
        ("I=2", "I=2 L=sub", ":7: node 2 is a sub-lattice"),
        ("VERSION=1.0", "SUBLAT=x", ":2: sub-lattices"),
        ("lmscale=2", "lmscale=inf", "lmscale=b'inf'"),
        ("lmscale=2", "start=9", "start=9 is no node"),
        ("START=1", "START=0", "no link leaves 2 of the nodes"),
        ("N=3 L=3", "N=4 L=3\nI=9", "no link leads to 2 of the nodes"),
        ("lmscale=2", "lmscale=2 start=0 end=1", "on no path"),
        ("# a", "# " + "a" * (1 << 20), ":1: the line is longer"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ON_LINKS
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path, ON_LINKS.replace(old, new))
    assert str(tmp_path / "lat1.slf") in str(caught.value)


def test_empty_binary_and_missing_files(tmp_path: Path) -> None:
    for data in (b"", b"\x00\x01\x02", b"N=0 L=0\n"):
        with pytest.raises(FormatError):
            read(tmp_path, data)
    with pytest.raises(DataError, match="no such file"):
        read_slf(tmp_path / "none.slf")
    assert read(tmp_path, "N=1 L=0\nI=0\n").num_arcs == 0

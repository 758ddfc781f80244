"""Kaldi lattices: round trips of all kinds to the last bit, hand-made files, and every kind of damage."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.asr.formats.kaldi_lattice import (
    KaldiKind,
    WordSymbols,
    one_id_an_arc,
    read_kaldi_lattices,
    read_word_symbols,
    write_kaldi_lattices,
)
from mixbits.asr.lattice import Lattice, make_lattice
from mixbits.asr.lattice_paths import best_path
from mixbits.errors import DataError, FormatError

_spec = importlib.util.spec_from_file_location("lattice_cases", Path(__file__).parents[1] / "lattice_cases.py")
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

SYMBOLS = WordSymbols({0: "", 7: "a", 8: "bé", 9: "c", 10: "d"}, {"": 0, "a": 7, "bé": 8, "c": 9, "d": 10})
KINDS = [
    KaldiKind(binary=binary, precision=precision) for binary in (True, False) for precision in ("float32", "float64")
]
COMPACT_TEXT = "u1 \n0\t1\ta\t1.5,2,3_4\n0\t2\t<eps>\n1\t2\tb\t-1,0.5,\n2\t0.25,0,9\n\n"
PLAIN_TEXT = "u1 \n0 1 3 a 1.5,2\n0 2 0 <eps>\n1 2 4 b -1,0.5\n2 0.25,0\n\n"


def round_trip(path: Path, lattices: list[Lattice], kind: KaldiKind, symbols: WordSymbols | None) -> list[Lattice]:
    write_kaldi_lattices(path, lattices, kind=kind, symbols=symbols)
    return list(read_kaldi_lattices(path, symbols=symbols))


@settings(max_examples=40)
@given(
    st.lists(cases.lattices(with_ids=True), min_size=1, max_size=3, unique_by=lambda lattice: lattice.utterance),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_compact_round_trip(tmp_path_factory, lattices: list[Lattice], kind: KaldiKind, packed: bool) -> None:
    path = tmp_path_factory.mktemp("k") / ("x.gz" if packed else "x")
    again = round_trip(path, lattices, kind, SYMBOLS)
    assert len(again) == len(lattices)
    assert all(map(cases.same_arcs, lattices, again))
    if not kind.binary:
        assert all(map(cases.same_arcs, lattices, round_trip(path, lattices, kind, None)))


@settings(max_examples=40)
@given(cases.lattices(with_ids=True, max_ids=1), st.sampled_from(KINDS))
def test_plain_round_trip(tmp_path_factory, lattice: Lattice, kind: KaldiKind) -> None:
    kind = KaldiKind(False, kind.binary, kind.precision)
    (again,) = round_trip(tmp_path_factory.mktemp("k") / "x", [lattice], kind, SYMBOLS)
    assert cases.same_arcs(lattice, again)


@settings(max_examples=40)
@given(cases.lattices(with_ids=True))
def test_compact_to_plain_keeps_every_path(tmp_path_factory, lattice: Lattice) -> None:
    chains = one_id_an_arc(lattice)
    assert cases.path_table(chains) == cases.path_table(lattice)
    (again,) = round_trip(tmp_path_factory.mktemp("k") / "x", [lattice], KaldiKind(compact=False), SYMBOLS)
    assert cases.path_table(again) == cases.path_table(lattice)


def read(tmp_path: Path, data: bytes | str, **options: object) -> list[Lattice]:
    path = tmp_path / "lat"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_kaldi_lattices(path, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [COMPACT_TEXT, PLAIN_TEXT, COMPACT_TEXT.replace("\n", "\r\n"), COMPACT_TEXT.rstrip("\n")]
)
def test_text(tmp_path: Path, text: str) -> None:
    (lattice,) = read(tmp_path, text)
    assert (lattice.num_states, lattice.start, lattice.finals.tolist()) == (3, 0, [2])
    assert lattice.lm_score.tolist() == [-1.5, 0, 1]
    assert lattice.acoustic_score.tolist() == [-2, 0, -0.5]
    assert best_path(lattice).words == ()
    ids = lattice.transition_ids
    assert ids is not None
    assert ids.row(0).tolist()[0] == 3
    assert ids.row(3).tolist() == ([9] if "," in text.split()[4][-8:] and "3_4" in text else [])


def test_first_line_is_the_start_and_infinite_finals_are_none(tmp_path: Path) -> None:
    (lattice,) = read(
        tmp_path,
        "u \n2 0 5\n0 1 6 Infinity,Infinity,\n".replace("Infinity,Infinity,", "1,1,") + "1\n0 Infinity,Infinity,\n\n",
    )
    assert lattice.start == 2
    assert lattice.finals.tolist() == [1]
    assert best_path(lattice).words == ("5", "6")


def test_binary_bytes(tmp_path: Path) -> None:
    head = b"u \xd6\xfd\xb2\x7e" + struct.pack(
        "<i6si16siiQqqq", 6, b"vector", 16, b"compactlattice44", 2, 0, 3, 0, 2, 0
    )
    inf = float("inf")
    body = struct.pack("<ffiq", inf, inf, 0, 1) + struct.pack("<iiffiiii", 7, 7, 1.5, 2.0, 2, 40, 41, 1)
    body += struct.pack("<ffiiq", 0.5, 0.25, 1, 9, 0)
    (lattice,) = read(tmp_path, head + body, symbols=SYMBOLS)
    assert (best_path(lattice).words, best_path(lattice).lm_score, best_path(lattice).acoustic_score) == (
        ("a",),
        -2.0,
        -2.25,
    )
    assert lattice.transition_ids is not None
    assert [lattice.transition_ids.row(row).tolist() for row in (0, 1)] == [[40, 41], [9]]
    for end in range(2, len(head + body)):
        with pytest.raises(FormatError, match="byte"):
            read(tmp_path, (head + body)[:end])
    two = read(tmp_path, head + body + (head + body).replace(b"u ", b"v ", 1))
    assert [x.utterance for x in two] == ["u", "v"]
    assert two[0].labels == ("", "7")


HEAD = {
    "magic": b"\xd6\xfd\xb2\x7e",
    "type": b"vector",
    "arc": b"lattice4",
    "version": 2,
    "flags": 0,
    "start": 0,
    "states": 1,
}
STATE = struct.pack("<ffq", 0.0, 0.0, 0)


def header(**changes: object) -> bytes:
    h = HEAD | changes
    names = b"".join(struct.pack("<i", len(h[n])) + h[n] for n in ("type", "arc"))  # type: ignore[arg-type]
    return b"u " + h["magic"] + names + struct.pack("<iiQqqq", h["version"], h["flags"], 0, h["start"], h["states"], 0)  # type: ignore[operator]


def arc(ilabel: int = 1, olabel: int = 1, graph: float = 0.0, acoustic: float = 0.0, target: int = 0) -> bytes:
    return struct.pack("<ffq", 0.0, 0.0, 1) + struct.pack("<iiffi", ilabel, olabel, graph, acoustic, target)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(magic=b"\xd6\xfd\xb2\x7f") + STATE, "no FST magic"),
        (header(type=b"const!") + STATE, "expected a vector FST"),
        (header(type=b"v" * 70) + STATE, "a name of 70 bytes"),
        (header(arc=b"standard") + STATE, "arc type is b'standard'"),
        (header(version=1) + STATE, "version 1"),
        (header(flags=1) + STATE, "symbol tables"),
        (header(start=1) + STATE, "start state is 1"),
        (header(start=-1, states=0), "no states"),
        (header(states=-1) + STATE, "-1 states"),
        (header(states=1 << 60) + STATE, "ends inside state 1"),
        (header() + struct.pack("<ffq", 0, 0, 1 << 60), "ends inside the arcs"),
        (header() + struct.pack("<ffq", 0, 0, -1), "-1 arcs"),
        (header() + arc(), "cycle"),
        (header() + arc(target=1), "target is state 1"),
        (header() + arc(target=-5), "target is state -5"),
        (header() + arc(olabel=-1), "labels 1 and -1"),
        (header() + arc(graph=float("nan")), "byte .* costs are nan"),
        (header() + arc(acoustic=float("-inf")), "costs are 0.0 and -inf"),
        (header() + struct.pack("<ffq", float("inf"), 0, 0), "costs are inf and 0.0"),
        (header() + struct.pack("<ffq", float("inf"), float("inf"), 0), "no final state"),
        (header(states=2) + STATE + STATE, "1 of 2 states are on no path"),
        (header() + STATE + header() + STATE, "occurs twice"),
        (header(arc=b"compactlattice44") + struct.pack("<ffiq", 0, 0, 1 << 30, 0), "transition ids"),
        (header(arc=b"compactlattice44") + struct.pack("<ffiq", 0, 0, -1, 0), "-1 transition ids"),
        (header(arc=b"compactlattice44") + struct.pack("<ffiqiiffii", 0, 0, 0, 1, 1, 2, 0, 0, 0, 0), "words 1 and 2"),
        (b"", "no lattice in it"),
        (b"\n\n", "no lattice in it"),
        (b"x" * 5000, "no utterance id"),
        (b" \n0\n\n", "empty utterance id"),
        (b"\xff\xfe \n0\n\n", "not UTF-8"),
        (b"a\x00b \n0\n\n", "not printable"),
        (b"u \n\n", "no lines"),
        (b"u \n0 1 2 3 4,5 6\n\n", ":2: 6 columns"),
        (b"u \n0 x 2\n\n", ":2: got b'x'; expected a state"),
        (b"u \n0 1 2\n99999999999 1,1,\n\n", ":3: got b'99999999999'"),
        (b"u \n0 1000000 2\n1000000\n\n", "state 1000000 in a lattice of 2 lines"),
        (b"u \n0 1 5 1,x,\n1\n\n", ":2: got the weight b'1,x,'"),
        (b"u \n0 1 5 1_0,1,\n1\n\n", "got the weight"),
        (b"u \n0 1 5 nan,1,\n1\n\n", ":2: the costs are nan"),
        (b"u \n0 1 5 1,1e99,\n1\n\n", "1e\\+99"),
        (b"u \n0 1 5 Infinity,Infinity,\n1\n\n", "costs are inf"),
        (b"u \n0 1 5 1,1,3__4\n1\n\n", "transition ids b'3__4'"),
        (b"u \n0 1 5 1,1,0\n1\n\n", "transition ids"),
        (b"u \n0 1 5 1,1,9999999999\n1\n\n", "transition ids"),
        (b"u \n0 1 5\n0 1 5 5 1,1\n1\n\n", ":3: the line is of a Lattice, those before of a CompactLattice"),
        (b"u \n0 1 5\n1 0 5\n1\n\n", ":1: utterance 'u': the lattice has a cycle"),
        (b"u \n0 1 5\n0 2 5\n1\n\n", "on no path"),
        (b"u \n0 1 5\n\n", "no final state"),
        (b"u \n0 1 \xff\n1\n\n", "not UTF-8"),
        (b"u \n0 1 " + b"5" * (1 << 20) + b"\n1\n\n", ":2: the line is longer"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path, data)
    assert str(tmp_path / "lat") in str(caught.value)
    assert len(str(caught.value)) < 500


def test_damaged_compression_and_missing_files(tmp_path: Path) -> None:
    whole = gzip.compress(COMPACT_TEXT.encode())
    with pytest.raises(FormatError, match="truncated or damaged"):
        read(tmp_path, whole[:-9])
    with pytest.raises(DataError, match="no such file"):
        list(read_kaldi_lattices(tmp_path / "none"))


def test_dead_ends_are_dropped_on_demand_ids_included(tmp_path: Path) -> None:
    text = "u \n0 1 5 1,1,7\n0 2 6 1,1,8\n1 0,0,9\n\n"
    (lattice,) = read(tmp_path, text, dead_ends="drop")
    assert lattice.num_states == 2
    assert lattice.transition_ids is not None
    assert [lattice.transition_ids.row(row).tolist() for row in (0, 1)] == [[7], [9]]


def test_symbols(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("<eps> 0\na 7\nbé 8\n")
    assert read_word_symbols(path).ids["bé"] == 8
    (lattice,) = read(tmp_path, "u \n0 1 7\n1\n\n", symbols=read_word_symbols(path))
    assert best_path(lattice).words == ("a",)
    with pytest.raises(FormatError, match="word number 6 is not in"):
        read(tmp_path, "u \n0 1 6\n1\n\n", symbols=read_word_symbols(path))
    for text, message in (("a 7\na 8\n", ":2.*twice"), ("a\n", ":1: got b'a'"), ("a -1\n", "expected a word")):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            read_word_symbols(path)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    def one(label: str, utterance: str = "u") -> Lattice:
        return make_lattice(
            utterance=utterance, src=[0], dst=[1], word=[1], labels=["", label], lm_score=[0.0], acoustic_score=[1e20],
            num_states=2, start=0, finals=[1],
        )  # fmt: skip

    path = tmp_path / "x"
    for lattice, kind, symbols, message in (
        (one("a"), KaldiKind(), None, "give a words.txt"),
        (one("z"), KaldiKind(), SYMBOLS, "word 'z' is not in"),
        (one("a b"), KaldiKind(binary=False), None, "cannot stand"),
        (one("0"), KaldiKind(binary=False), None, "cannot stand"),
        (one("a", "u 1"), KaldiKind(binary=False), None, "white space"),
    ):
        with pytest.raises(DataError, match=message):
            write_kaldi_lattices(path, [lattice], kind=kind, symbols=symbols)
    assert list(tmp_path.iterdir()) == []
    assert round_trip(path, [one("5")], KaldiKind(), None)[0].acoustic_score.tolist() == [float(np.float32(1e20))]

"""Files as the other toolkits write them, and every kind of bad file: one clear error with file and place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mixbits.asr.formats.jsonobject import members
from mixbits.asr.formats.lines import new_digest, text_lines
from mixbits.asr.formats.references import read_references
from mixbits.asr.formats.registry import ReadOptions, detect_format, read_any, write_any
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.errors import DataError, FormatError, MixbitsError, SpecError

KALDI = {
    "words_text": "utt-a-1 hello world\nutt-a-2 \nb-1 yes\n",
    "acwt": "utt-a-1 100.5\nutt-a-2 101\nb-1 -3e1\n",
    "lmwt.withlm": "utt-a-1 7\nutt-a-2 8\nb-1 2\n",
}
ESPNET2 = {
    "1best_recog/text": "a hello world\nb \n",
    "1best_recog/score": "a -1.5\nb tensor(-0.25)\n",
    "2best_recog/text": "a hello  word",
    "2best_recog/score": "a tensor(-2.0, device='cuda:0')\n",
}
ESPNET1 = {
    "utts": {
        "a": {
            "utt2spk": "s1",
            "output": [
                {"name": "target1[1]", "text": "hello world", "rec_text": "▁hello▁wor ld<eos>", "score": -1.5},
                {"name": "target1[2]", "text": "hello world", "rec_text": "hello<eos>", "score": -2},
            ],
        }
    }
}
MLM = {
    "a": {
        "ref": "hello",
        "hyp_1": {"score": -1.0, "text": "hello"},
        **{f"hyp_{n}": {"score": -float(n), "text": f"t{n}"} for n in (10, 2, 3, 4, 5, 6, 7, 8, 9)},
    }
}
NEMO = "hello world\t-1.0\nhello word\t-2.0\n\t-1.5\nnull\t-1.5\n"
MANIFEST = '{"audio_filepath": "/x/a.wav", "text": "hello world", "duration": 1.5}\n{"audio_filepath": "/x/b.wav", "text": ""}\n'


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_kaldi_folder(tmp_path: Path) -> None:
    expected = [
        NBest("utt-a", (Hypothesis("hello world", -100.5, -7.0), Hypothesis("", -101.0, -8.0))),
        NBest("b", (Hypothesis("yes", 30.0, -2.0),)),
    ]
    folder = put(tmp_path / "k", dict(KALDI))
    assert detect_format(folder) == "kaldi"
    assert list(read_any(folder)) == expected
    packed = {f"{name}.gz": gzip.compress(text.encode()) for name, text in KALDI.items()}
    assert list(read_any(put(tmp_path / "gz", packed))) == expected
    crlf = {name: text.replace("\n", "\r\n") for name, text in KALDI.items()}
    assert list(read_any(put(tmp_path / "crlf", crlf))) == expected
    jobs = {f"archives.1/{name}": "".join(text.splitlines(True)[:2]) for name, text in KALDI.items()}
    jobs |= {f"archives.2/{name}": "".join(text.splitlines(True)[2:]) for name, text in KALDI.items()}
    assert list(read_any(put(tmp_path / "jobs", jobs))) == expected


def test_kaldi_integers_side_files_and_neural_costs(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "words": "u-1 3 4 \nu-2 4\n",
        "acwt": "u-1 1\nu-2 2\n",
        "lmwt.nolm": "u-1 0.5\nu-2 0.25\n",
        "lmwt.nn": "u-1 1.0 2.0 0.5\nu-2 4\n",
        "references": "u b\n",
        "utt2spk": "u s\n",
        "utt2reco": "u r\n",
    }
    folder = put(tmp_path / "k", files)
    with pytest.raises(DataError, match=r"words\.txt: no such file; 'words' holds integers"):
        read_any(folder)
    symbols = put(tmp_path, {"symbols": "<eps> 0\na 3\nb 4\n"}) / "symbols"
    lists = read_any(folder, options=ReadOptions(symbols=symbols))
    one = Hypothesis("a b", -1.0, None, {"graph_score": -0.5, "neural_lm_score": -3.5})
    two = Hypothesis("b", -2.0, None, {"graph_score": -0.25, "neural_lm_score": -4.0})
    assert list(lists) == [NBest("u", (one, two), "b", "s", "r")]
    put(folder, {"words.txt": "a 3\n"})
    with pytest.raises(FormatError, match=r"words:1: '4' is not in the symbol table"):
        read_any(folder)


def test_espnet_folder(tmp_path: Path) -> None:
    expected = [
        NBest("a", (Hypothesis("hello world", -1.5), Hypothesis("hello  word", -2.0))),
        NBest("b", (Hypothesis("", -0.25),)),
    ]
    folder = put(tmp_path / "e", dict(ESPNET2))
    assert detect_format(folder) == "espnet2"
    assert list(read_any(folder)) == expected
    jobs = put(tmp_path / "j", {f"output.1/{name}": text for name, text in ESPNET2.items()})
    assert list(read_any(jobs)) == expected
    put(folder, {"1best_recog/token": "a ▁hello ▁world\n"})
    assert read_any(folder)[0].one_best.extra == {"token": "▁hello ▁world"}


def test_espnet_json(tmp_path: Path) -> None:
    path = put(tmp_path, {"data.json": json.dumps(ESPNET1, indent=1)}) / "data.json"
    assert detect_format(path) == "espnet1"
    one = Hypothesis("hello wor ld", -1.5, None, {"name": "target1[1]"})
    two = Hypothesis("hello", -2.0, None, {"name": "target1[2]"})
    assert list(read_any(path)) == [NBest("a", (one, two), "hello world", "s1")]


def test_mlm_scoring(tmp_path: Path) -> None:
    path = put(tmp_path, {"hyps.json": json.dumps(MLM, indent=2, sort_keys=True)}) / "hyps.json"
    assert detect_format(path) == "mlm-scoring"
    lists = read_any(path)
    assert [hypothesis.text for hypothesis in lists[0].hypotheses] == ["hello", *(f"t{n}" for n in range(2, 11))]
    assert lists[0].reference == "hello"
    write_any(tmp_path / "out.json", lists, format="mlm-scoring")
    assert json.loads((tmp_path / "out.json").read_text()) == MLM


def test_nemo(tmp_path: Path) -> None:
    path = put(tmp_path, {"beams.tsv": NEMO, "beams.manifest.json": MANIFEST}) / "beams.tsv"
    first = NBest(
        "a",
        (Hypothesis("hello world", -1.0), Hypothesis("hello word", -2.0)),
        "hello world",
        extra={"audio_filepath": "/x/a.wav", "duration": 1.5},
    )
    second = NBest("b", (Hypothesis("", -1.5), Hypothesis("null", -1.5)), "", extra={"audio_filepath": "/x/b.wav"})
    assert list(read_any(path)) == [first, second]
    other = put(tmp_path, {"m.json": MANIFEST.replace("b.wav", "a.flac")}) / "m.json"
    ids = [entry.utterance for entry in read_any(path, options=ReadOptions(manifest=other))]
    assert ids == ["/x/a.wav", "/x/a.flac"]
    cut = MANIFEST.replace("b.wav", "a.wav").replace('"text": ""', '"offset": 2.5')
    other = put(tmp_path, {"m.json": cut}) / "m.json"
    ids = [entry.utterance for entry in read_any(path, options=ReadOptions(manifest=other))]
    assert ids == ["/x/a.wav@0", "/x/a.wav@2.5"]


def test_nemo_lists_of_other_lengths_are_noticed(tmp_path: Path) -> None:
    sizes = (4, 2, 3)
    lines = [f"w{u}\t{-float(rank)}\n" for u, size in enumerate(sizes) for rank in range(size)]
    manifest = "".join(json.dumps({"audio_filepath": f"{u}.wav", "text": "x"}) + "\n" for u in range(3))
    path = put(tmp_path, {"b.tsv": "".join(lines), "b.manifest.json": manifest}) / "b.tsv"
    with pytest.raises(FormatError, match=r"line 5: the scores rise here, inside list 2 of 3 lines"):
        read_any(path)
    assert len(read_any(path, options=ReadOptions(beam_size=3))[1].hypotheses) == 3
    with pytest.raises(FormatError, match=r"9 lines for 3 manifest entries.*expected 2 for each, 6 in all"):
        read_any(path, options=ReadOptions(beam_size=2))
    path.write_text("".join(lines[:-1]))
    with pytest.raises(FormatError, match=r"8 lines for 3 manifest entries.*no whole number for each"):
        read_any(path)
    path = tmp_path / "ours.tsv"
    write_any(path, [NBest(str(n), (Hypothesis("a", -3.0), Hypothesis("b", -1.0))) for n in range(5)])
    assert len(read_any(path)) == 5  # unsorted, but the manifest says how many there are


def swap(files: dict[str, Any], name: str, content: str | bytes | None) -> dict[str, Any]:
    changed = {**files, name: content}
    return {key: value for key, value in changed.items() if value is not None}


def e1(change: Any) -> dict[str, str | bytes]:
    record = json.loads(json.dumps(ESPNET1))
    change(record["utts"]["a"])
    return {"d.json": json.dumps(record)}


TSV = {"d.tsv": NEMO, "d.manifest.json": MANIFEST}
BAD: dict[str, tuple[dict[str, Any], str, type[Exception], str]] = {
    "kaldi: binary archive": (swap(KALDI, "acwt", b"utt-a-1 \0B\4abcd"), ".", FormatError, "acwt:1: a binary Kaldi"),
    "kaldi: cost missing": (swap(KALDI, "acwt", "utt-a-1 1\nb-1 2\n"), ".", FormatError, "acwt: no cost of 'utt-a-2'"),
    "kaldi: words missing": (swap(KALDI, "words_text", "b-1 x\n"), ".", FormatError, "has a cost here and no words"),
    "kaldi: rank missing": (
        {"words_text": "a-1 x\na-3 y\n", "acwt": "a-1 1\na-3 2\n"}, ".", FormatError, "'a' has no sound hypothesis 2"),
    "kaldi: nan": (swap(KALDI, "acwt", "utt-a-1 nan\n"), ".", FormatError, "acwt:1: a cost is nan"),
    "kaldi: infinite": (swap(KALDI, "lmwt.withlm", "utt-a-1 inf\n"), ".", FormatError, "withlm:1: a cost is inf"),
    "kaldi: overflow": (swap(KALDI, "acwt", "utt-a-1 1e999\n"), ".", FormatError, "acwt:1: a cost is 1e999"),
    "kaldi: no number": (swap(KALDI, "acwt", "utt-a-1 1_0\n"), ".", FormatError, "acwt:1: expected a cost, a number"),
    "kaldi: far rank": ({"words_text": "a-1 x\na-999999999 y\n", "acwt": "a-1 1\na-999999999 2\n"}, ".", FormatError, "sound hypothesis 2"),
    "kaldi: endless number": (swap(KALDI, "acwt", "utt-a-1 " + "1" * 10**6 + "x\n"), ".", FormatError, "acwt:1: expected a cost"),
    "kaldi: no cost": (swap(KALDI, "acwt", "utt-a-1\n"), ".", FormatError, "acwt:1: expected a cost, a number"),
    "kaldi: key twice": (swap(KALDI, "words_text", "b-1 x\nb-1 y\n"), ".", DataError, "words_text:2: 'b-1' was in"),
    "kaldi: key without rank": (swap(KALDI, "words_text", "utt x\n"), ".", FormatError, "expected a key 'utterance-rank'"),
    "kaldi: key of rank 0": ({"words_text": "a-0 x\n", "acwt": "a-0 1\n"}, ".", FormatError, "expected a key"),
    "kaldi: no key": (swap(KALDI, "words_text", " x\n"), ".", FormatError, "words_text:1: the line starts with white"),
    "kaldi: latin-1": (swap(KALDI, "words_text", b"b-1 caf\xe9\n"), ".", DataError, "words_text:1: not UTF-8 (byte 0xe9"),
    "kaldi: cut gzip": (
        swap(swap(KALDI, "acwt", None), "acwt.gz", gzip.compress(KALDI["acwt"].encode())[:-9]), ".", FormatError, "acwt.gz:4: the compressed"),
    "kaldi: folder missing": (
        {f"archives.{n}/{k}": v for n in (1, 3) for k, v in KALDI.items()}, ".", FormatError, "number 2 is missing"),
    "kaldi: utterance in two folders": (
        {f"archives.{n}/{k}": v for n in (1, 2) for k, v in KALDI.items()}, ".", DataError, "'utt-a' is in another folder"),
    "folder of nothing": ({"x": "y"}, ".", FormatError, "neither a Kaldi n-best folder"),
    "espnet2: score missing": (swap(ESPNET2, "1best_recog/score", "a -1\n"), ".", FormatError, "no score of 'b'"),
    "espnet2: no score file": (swap(ESPNET2, "2best_recog/score", None), ".", FormatError, "2best_recog/score: no such file"),
    "espnet2: text missing": (swap(ESPNET2, "1best_recog/text", "b x\n"), ".", FormatError, "'a' has a score here and no text"),
    "espnet2: better hypothesis missing": (
        swap(ESPNET2, "2best_recog/text", "a x\nc y\n") | {"2best_recog/score": "a -1\nc -2\n"}, ".", FormatError,
        "2best_recog/text:2: 'c' has no sound hypothesis 1"),
    "espnet2: rank missing": (
        {k.replace("2best", "3best"): v for k, v in ESPNET2.items()}, ".", FormatError, "number 2 is missing"),
    "espnet2: nan": (swap(ESPNET2, "1best_recog/score", "a tensor(nan)\nb 1\n"), ".", FormatError, "score:1: a score is nan"),
    "espnet2: utterance twice": (swap(ESPNET2, "1best_recog/text", "a x\na y\nb\n"), ".", DataError, "text:2: 'a' was in"),
    "espnet1: cut short": ({"d.json": json.dumps(ESPNET1)[:-30]}, "d.json", FormatError, "d.json: byte 15: not JSON or cut"),
    "espnet1: one brace short": ({"d.json": json.dumps(ESPNET1)[:-1]}, "d.json", FormatError, "(cut short?)"),
    "espnet1: something behind": ({"d.json": json.dumps(ESPNET1) + "x"}, "d.json", FormatError, "expected the end of the file"),
    "espnet1: nan": (e1(lambda u: u["output"][0].update(score=float("nan"))), "d.json", FormatError, "NaN is not a JSON"),
    "espnet1: no score": (e1(lambda u: u["output"][1].pop("score")), "d.json", FormatError, "output 2: missing field 'score'"),
    "espnet1: no text": (e1(lambda u: u["output"][1].pop("rec_text")), "d.json", FormatError, "missing field 'rec_text'"),
    "espnet1: text a number": (e1(lambda u: u["output"][1].update(rec_text=3)), "d.json", FormatError, "must be a string"),
    "espnet1: no hypotheses": (e1(lambda u: u.update(output=[])), "d.json", FormatError, "'a': no hypotheses in 'output'"),
    "espnet1: other references": (e1(lambda u: u["output"][1].update(text="x")), "d.json", FormatError, "references ('text')"),
    "espnet1: our name": (e1(lambda u: u.update(speaker="x")), "d.json", FormatError, "unknown field 'speaker'"),
    "espnet1: utterance twice": (
        {"d.json": '{"utts": {"a": {"output": [{"rec_text": "", "score": 1}]}, "a": {"output": []}}}'}, "d.json", DataError,
        "byte 64: utterance 'a' occurs twice"),
    "espnet1: nothing": ({"d.json": '{"utts": {}}'}, "d.json", DataError, "no utterances"),
    "mlm: gap": ({"d.json": '{"a": {"hyp_2": {"score": 1, "text": ""}}}'}, "d.json", FormatError, "no 'hyp_1'"),
    "mlm: odd key": ({"d.json": '{"a": {"hyp_x": {"score": 1, "text": ""}}}'}, "d.json", FormatError, "hyp_x: expected a key"),
    "mlm: no hypotheses": ({"d.json": '{"a": {"ref": "x"}}'}, "d.json", FormatError, "no 'hyp_1'"),
    "mlm: no object": ({"d.json": '{"a": {"hyp_1": "x"}}'}, "d.json", FormatError, "got str"),
    "mlm: utterance no object": ({"d.json": '{"a": {"hyp_1": {"score": 1, "text": ""}}, "b": 1}'}, "d.json", FormatError, "byte 48"),
    "mlm: latin-1": ({"d.json": b'{"a": {"ref": "caf\xe9"}}'}, "d.json", DataError, "byte 18: not UTF-8 (0xe9)"),
    "mlm: surrogate": ({"d.json": '{"a": {"ref": "\\ud800"}}'}, "d.json", FormatError, "lone surrogate"),
    "mlm: deep": ({"d.json": '{"a": {"ref": ' + "[" * 99_999}, "d.json", FormatError, "nested too deeply"),
    "mlm: infinite": ({"d.json": '{"a": {"hyp_1": {"score": 1e999, "text": ""}}}'}, "d.json", FormatError, "not finite"),
    "mlm: no id": ({"d.json": '{"": {"hyp_1": {"score": 1, "text": ""}}}'}, "d.json", DataError, "empty utterance id"),
    "mlm: cut gzip": ({"d.json": gzip.compress(json.dumps(MLM).encode())[:-9]}, "d.json", FormatError, "truncated or damaged"),
    "nemo: no manifest": ({"d.tsv": NEMO}, "d.tsv", DataError, "d.manifest.json: no such file; the manifest says"),
    "nemo: three columns": (swap(TSV, "d.tsv", "a\tb\t1\n"), "d.tsv", FormatError, "d.tsv:1: expected 'text<TAB>score'"),
    "nemo: one column": (swap(TSV, "d.tsv", "a 1\n"), "d.tsv", FormatError, "two columns, got 1"),
    "nemo: header": (swap(TSV, "d.tsv", "text\tscore\n"), "d.tsv", FormatError, "expected a score, a number, got 'score'"),
    "nemo: nan": (swap(TSV, "d.tsv", NEMO.replace("-2.0", "nan")), "d.tsv", FormatError, "d.tsv:2: a score is nan"),
    "nemo: line missing": (swap(TSV, "d.tsv", NEMO[: NEMO.index("null")]), "d.tsv", FormatError, "3 lines for 2 manifest entries"),
    "nemo: empty": (swap(TSV, "d.tsv", ""), "d.tsv", FormatError, "0 lines for 2 manifest entries"),
    "nemo: bad manifest": (swap(TSV, "d.manifest.json", "[]\n"), "d.tsv", FormatError, "json:1: expected a JSON object"),
    "nemo: manifest without ids": (swap(TSV, "d.manifest.json", '{"text": ""}\n'), "d.tsv", FormatError, "'audio_filepath'"),
    "nemo: utterance twice": (
        swap(TSV, "d.manifest.json", '{"utterance": "a"}\n{"utterance": "a"}\n'), "d.tsv", DataError, "json:2: utterance 'a' was in"),
    "unknown": ({"d.x": "hello there\n"}, "d.x", FormatError, "not n-best lists of a known format"),
    "trn": ({"d.trn": "hello (a)\n"}, "d.trn", FormatError, "trn holds no scores"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    files, name, error, message = BAD[kind]
    put(tmp_path, files)
    with pytest.raises(error) as caught:
        read_any(tmp_path / name)
    assert isinstance(caught.value, MixbitsError)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "k", dict(KALDI))
    with pytest.raises(SpecError, match="--manifest belongs to the format nemo, and these lists are kaldi"):
        read_any(folder, options=ReadOptions(manifest="x"))


def test_endless_lines_and_objects_take_no_memory(tmp_path: Path) -> None:
    long_line, long_object = tmp_path / "line.gz", tmp_path / "object.gz"
    for path, head in ((long_line, b"key "), (long_object, b'{"a": {"b": "')):
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(head)
            for _ in range(64):
                file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"line\.gz:1: the line is longer than 65536 bytes"):
            list(text_lines(str(long_line), new_digest(), expected="lines", max_line_bytes=2**16))
        with pytest.raises(FormatError, match=r"object\.gz: byte 6: an object is longer than 65536 bytes or broken"):
            list(members(str(long_object), new_digest(), expected="an object", max_item_bytes=2**16))
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def test_a_large_object_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    text = "é" * 1000
    with open(path, "w", encoding="utf-8") as file:
        file.write("\ufeff{")
        file.write(",".join(f'"u{n}": {{"ref": "{text}{n}"}}' for n in range(2000)))
        file.write("}\r\n")
    tracemalloc.start()
    try:
        found = [
            (key, value["ref"] == f"{text}{n}")
            for n, (_, key, value) in enumerate(members(str(path), new_digest(), expected="x"))
        ]
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20 < path.stat().st_size * 2
    finally:
        tracemalloc.stop()
    assert found == [(f"u{n}", True) for n in range(2000)]


REFERENCES = {"r.trn": "hello world (a)\n;; a comment\n\n(b)\n", "text": "a hello world\nb \n", "m.json": MANIFEST}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_are_joined(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, {name: REFERENCES[name]}) / name
    folder = put(tmp_path / "e", dict(ESPNET2))
    plain, lists = read_any(folder), read_any(folder, options=ReadOptions(references=path))
    assert [entry.reference for entry in plain] == [None, None]
    assert [entry.reference for entry in lists] == ["hello world", ""]
    assert plain.data_hash != lists.data_hash
    put(tmp_path, {name: REFERENCES[name].replace("a ", "c ").replace("(a", "(c").replace("a.wav", "c.wav").replace("b ", "d ").replace("(b", "(d").replace("b.wav", "d.wav")})  # fmt: skip
    with pytest.raises(
        DataError, match="no reference for any of the 2 utterances; its ids are like 'c', theirs like 'a'"
    ):
        read_any(folder, options=ReadOptions(references=path))


def test_alternations_are_refused_or_the_first_is_taken(tmp_path: Path) -> None:
    path = put(tmp_path, {"r.trn": "i've { um / { x / y } z / @ } as { @ / q } (uh) far / (a_1)\n"}) / "r.trn"
    with pytest.raises(FormatError, match=r"r\.trn:1: alternatives .*--alternations first"):
        read_references(path)
    assert read_references(path, alternations="first").texts == {"a_1": "i've um as uh far /"}
    for text, message in (
        ("{ a / b (u)", "a '{' without"),
        ("a } (u)", "a '}' without"),
        ("{ " * 60 + "(u)", "nested"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            read_references(path, alternations="first")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("a b c", FormatError, "r.trn:1: expected 'words (utterance)'"),
        ("a ()", FormatError, "r.trn:1: expected 'words (utterance)'"),
        ("a (u)\nb (u)", DataError, "r.trn:2: utterance 'u' was in"),
    ],
)
def test_bad_trn(tmp_path: Path, content: str, error: type[Exception], message: str) -> None:
    path = put(tmp_path, {"r.trn": content}) / "r.trn"
    with pytest.raises(error) as caught:
        read_references(path)
    assert message in str(caught.value)

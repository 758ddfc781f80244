"""The page of a comparison: every number, self-contained, escaped, words of any script, and no claim that the record does not make."""

from __future__ import annotations

import copy
import importlib.util
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mixbits.pipeline.compare import compare_systems
from mixbits.pipeline.compare_inputs import match_systems
from mixbits.report.compare_page import comparison_page, render_comparison, sentences, system_table, test_table
from mixbits.report.compare_plots import plot_bytes, plot_weights, thinned

test_table.__test__ = False  # a function of ours, not a test

_path = Path(__file__).parents[1] / "pipeline" / "compare_example.py"
_spec = importlib.util.spec_from_file_location("compare_example", _path)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

HOSTILE = "<script>alert(1)</script>\"'&$\\frac{x$ [bold]{{7*7}}\x1b[31m\x00\u202e\ud800 </svg>]]>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def made() -> dict:
    return compare_systems(match_systems(example.three_systems()), groups=["speaker", "noise"], margin=0.5)


@pytest.fixture
def record(made: dict) -> dict:
    return copy.deepcopy(made)


def show(record: dict) -> tuple[str, Reader]:
    text = comparison_page(record)
    text.encode("utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    return text, Reader(text)


def test_the_page_holds_every_number(record: dict) -> None:
    text, reader = show(record)
    words = " ".join(reader.words)
    for headers, rows in (system_table(record), test_table(record)):
        for cell in headers + [cell for row in rows for cell in row]:
            assert cell in words, cell
    for sentence in sentences(record):
        assert sentence in words
    for entry in record["systems"].values():
        assert f"{entry['wer']:.2f}" in words
    for rows in record["groups"].values():
        for row in rows:
            for part in row["systems"].values():
                assert f"{part['wer']:.2f}" in words
    for title in (
        "Word errors",
        "Tests",
        "Differences",
        "Oracle by N",
        "WER against the language model's weight",
        "By speaker",
        "By noise",
    ):
        assert f"<h2>{title}</h2>".replace("'", "&#39;") in text
    for found in record["examples"]:
        for kind in ("best", "worst"):
            assert all(entry["utterance"] in words for entry in found[kind])


def test_the_page_loads_nothing_and_follows_the_colour_scheme(record: dict) -> None:
    text, reader = show(record)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert (value or "").startswith("#"), (name, value)
    assert any("default-src 'none'" in (value or "") for _, value in reader.attributes)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]|#000000", svg)


def test_hostile_names_and_words_are_text_everywhere(record: dict) -> None:
    hostile = copy.deepcopy(record)
    name = "both"
    systems = {HOSTILE if key == name else key: value for key, value in hostile["systems"].items()}
    systems[HOSTILE]["source"] = HOSTILE
    hostile["systems"] = systems
    hostile["tests"][0].update(b=HOSTILE, warning=HOSTILE)
    hostile["oracle"] = {HOSTILE if key == name else key: value for key, value in hostile["oracle"].items()}
    hostile["examples"][0]["b"] = HOSTILE
    hostile["examples"][0]["best"][0].update(
        utterance=HOSTILE, speaker=HOSTILE, columns=[[HOSTILE, HOSTILE, None], [None, HOSTILE, "x"]]
    )
    for curve in hostile["weights"]:
        curve["system"] = HOSTILE if curve["system"] == name else curve["system"]
    hostile["groups"] = {HOSTILE: hostile["groups"]["speaker"]}
    for row in hostile["groups"][HOSTILE]:
        row["systems"] = {HOSTILE if key == name else key: value for key, value in row["systems"].items()}
        row["name"] = HOSTILE
    hostile["notes"] = [HOSTILE]
    hostile["versions"] = {HOSTILE: HOSTILE}
    text, reader = show(hostile)
    assert "script" not in reader.tags
    for bad in ("\x1b", "\x00", "\u202e", "\ud800"):
        assert bad not in text
    assert "49" not in "".join(word for word in reader.words if "alert" in word)
    assert "<script>alert(1)</script>" in "".join(reader.words)


def test_words_of_any_script_stay_whole(record: dict) -> None:
    words = ["می\u200cخواهم", "क्\u200dष", "Größe", "日本語", "naïve"]
    record["examples"][0]["best"][0]["columns"] = [[word, word, None] for word in words]
    text, _ = show(record)
    for word in words:
        assert word in text


def test_sentences_claim_what_the_record_says(record: dict) -> None:
    better, worse = sentences(record)
    assert re.fullmatch(
        r"both: [\d.]+ % WER against [\d.]+ % of first, −[\d.]+ points \(95 % interval −[\d.]+ to −[\d.]+\): significantly better "
        r"\(p < 0\.0001 after Holm's correction\)\. It is within the margin of 0\.50 points\.",
        better,
    )
    assert "significantly worse" in worse
    assert "not shown to be within the margin" in worse
    record["tests"] = record["tests"][:1]
    record["tests"][0].update(outcome="no significant difference", p_holm=0.3, within_margin=None, delta_wer_upper=0.2)
    (text,) = sentences(record)
    assert (
        "no significant difference (p = 0.3000), which is no proof of equality: the loss is at most +0.20 points (95 % bound)."
        in text
    )
    assert "Holm" not in text
    record["tests"][0]["delta_wer_upper"] = -0.02
    assert "the 95 % bound of this pair alone, −0.02 points, allows no loss." in sentences(record)[0]
    record["tests"][0].update(outcome="same output", p_holm=None)
    assert sentences(record)[0].endswith("the same output in every utterance.")
    record["tests"][0].update(outcome="same errors")
    assert "the errors of no segment do" in sentences(record)[0]


def test_columns_that_say_nothing_are_left_out(record: dict) -> None:
    headers, _ = system_table(record)
    assert "Model bytes" not in headers
    assert plot_bytes(record) is None
    record["systems"]["both"]["bytes"] = 1_880_000
    record["systems"]["first"]["sclite_differs"] = True
    headers, rows = system_table(record)
    assert "Errors, sclite's alignment" in headers
    assert [row[-1] for row in rows] == ["–", "1,880,000", "–"]
    plot = plot_bytes(record)
    assert plot is not None
    assert "1.88 MB" in plot.svg
    text, _ = show(record)
    assert "WER against model bytes" in text
    bare = {**record, "weights": [], "oracle": {}, "groups": {}, "examples": [], "notes": []}
    text, _ = show(bare)
    assert text.count("<svg") == 2


def test_long_right_runs_are_folded_and_long_utterances_cut(record: dict) -> None:
    run = [["w", "w", "w"]] * 30
    record["examples"][0]["best"][0]["columns"] = [*run, ["x", "y", "x"], *run[:5]]
    text, _ = show(record)
    assert "⋯ 24 words ⋯" in text
    record["examples"][0]["best"][0]["columns"] = [["x", "y", "x"]] * 5000
    text, _ = show(record)
    assert "4,600 more columns" in text


def test_equal_curves_are_drawn_once(record: dict) -> None:
    """The three systems rank the same hypotheses: one curve by weight, named for all."""
    assert len(record["weights"]) == 3
    plot = plot_weights(record)
    assert plot is not None
    assert "first, both, backwards" in plot.svg


def test_thinning_keeps_range_and_extremes() -> None:
    edges = [float(number) for number in range(20_001)]
    values = [(number * 7919) % 1000 for number in range(20_000)]
    values[12_345] = -5
    thin_edges, thin = thinned(edges, values, limit=500)
    assert len(thin) == 500
    assert len(thin_edges) == 501
    assert (thin_edges[0], thin_edges[-1]) == (0.0, 20_000.0)
    assert thin_edges == sorted(thin_edges)
    assert min(thin) == -5
    assert max(thin) == max(values)
    assert thinned(edges[:11], values[:10]) == (edges[:11], values[:10])


def test_the_file_is_written_whole(record: dict, tmp_path: Path) -> None:
    path = render_comparison(record, tmp_path / "new" / "page.html", title="a < b")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<h1>a &lt; b</h1>" in text
    assert len(text) < 400_000

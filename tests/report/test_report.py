"""The page and the table: complete, self-contained, escaped, and working with any subset of fields missing."""

import importlib.util
import io
import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mixbits import report
from mixbits.errors import DataError, FormatError
from mixbits.report.page import page
from mixbits.report.plots import _curve_points
from mixbits.runs import Summary, read_summary, write_summary
from mixbits.summary import SummaryRow

_spec = importlib.util.spec_from_file_location("example", Path(__file__).parent / "example.py")
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

HOSTILE = "<script>alert(1)</script>\"'&$\\frac{x$ [bold]{{7*7}}\x1b[31m\x00\u202e\ud800 </svg>]]>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def show(data):
    text = page([Summary.from_json(data)])
    text.encode("utf-8")
    Reader(text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    return text


def terminal(data, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report.terminal_table(Summary.from_json(data)))
    return console.file.getvalue()


def test_the_page_holds_every_number_of_the_table():
    text = show(example.example_summary())
    words = " ".join(Reader(text).words)
    for expected in (
        "learned-16x",
        "1,418,240",
        "16.15",
        "1.98",
        "137.14 ± 1.10",
        "+9.4 %",
        "+0.0900 ± 0.0030",
        "48.22",
    ):
        assert expected in words
    for title in ("Size against perplexity", "Bits per unit", "Word error rate by system", "Sensitivity per unit"):
        assert f"<h2>{title}</h2>" in text
    for expected in ("mixbits experiment recipes/example.yaml", "9f" * 32, "Every number in this file is invented."):
        assert expected in words
    assert text.count("<svg") == 4


def test_the_page_loads_nothing():
    reader = Reader(show(example.example_summary()))
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert any("default-src 'none'" in (value or "") for _, value in reader.attributes)
    assert "url(http" not in page([Summary.from_json(example.example_summary())])


def test_ids_are_unique_and_references_resolve_over_several_sections():
    summary = Summary.from_json(example.example_summary())
    reader = Reader(page([summary, summary]))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in reader.attributes:
        if name in ("href", "xlink:href"):
            assert value[1:] in ids
        if name == "clip-path":
            assert value.removeprefix("url(#").removesuffix(")") in ids


def test_plots_follow_the_colour_scheme():
    text = show(example.example_summary())
    assert "prefers-color-scheme: dark" in text
    assert "var(--learned)" in text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]|#000000", svg)


def test_hostile_names_are_text_everywhere(tmp_path):
    data = example.example_summary()
    data["title"] = data["command"] = HOSTILE
    data["notes"] = [HOSTILE]
    data["rows"][7]["name"] = data["rows"][7]["method"] = HOSTILE
    data["rows"][8]["name"] = "learned-" + HOSTILE
    data["allocations"] = {"learned-" + HOSTILE: {HOSTILE: HOSTILE, "layers.0." + HOSTILE: "2-half-step-row"}}
    data["unit_weights"] = {HOSTILE: 10**6, "layers.0." + HOSTILE: 10**6}
    data["sensitivity"]["units"] = {HOSTILE: {"sensitivity": {HOSTILE: 1.0}}}
    data["data"] = data["versions"] = {HOSTILE: HOSTILE}
    data["equal_bytes"][0].update(name=HOSTILE, verdict=HOSTILE, neighbours=[HOSTILE])
    data["asr"] = {"lists": {HOSTILE: {"words": 5}}, "weights": {HOSTILE: {HOSTILE: HOSTILE}}, "no_loss_rule": HOSTILE}
    text = show(data)
    reader = Reader(text)
    assert "script" not in reader.tags
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "49" not in " ".join(w for w in reader.words if "7*7" in w)
    shown = terminal(data)
    assert "\x1b" not in shown
    assert "[bold]" in shown.replace("\n", "")
    path = write_summary(tmp_path / "summary.json", data)
    report.render(path, tmp_path / "report.html")


def test_a_summary_of_names_only_still_makes_a_page():
    rows = [{"name": n} for n in ("first-pass", "full", "learned-16x")]
    text = show({"rows": rows})
    assert "<svg" not in text
    assert "learned-16x" in text
    assert "learned-16x" in terminal({"rows": rows})
    assert "results" in show({"rows": []})


@pytest.mark.parametrize("key", sorted(example.example_summary().keys() - {"rows", "format", "format_version"}))
def test_any_top_level_field_may_be_missing_or_null(key):
    data = example.example_summary(num_layers=1)
    data[key] = None
    show(data)
    del data[key]
    terminal(data)


def test_any_row_field_may_be_null():
    for key in example.example_summary()["rows"][7]:
        if key != "name":
            data = example.example_summary(num_layers=1)
            for row in data["rows"]:
                row[key] = None
            terminal(data)
            Summary.from_json(data)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_random_holes_in_rows_never_break_the_page(draw):
    data = example.example_summary(num_layers=1)
    for row in data["rows"]:
        for key in [k for k in row if k != "name"]:
            if draw.draw(st.booleans()):
                row[key] = draw.draw(st.sampled_from([None, 0, 0.0])) if not isinstance(row[key], (str, dict)) else None
    data["sensitivity"] = {}
    show(data)
    terminal(data)


@pytest.mark.parametrize("value", [0, 1e-300, 1e300, 2**62])
def test_extreme_numbers_are_drawn_or_left_out(value):
    data = example.example_summary(num_layers=1)
    for key in ("ppl", "ppl_stderr", "wer", "ratio", "delta_nats"):
        data["rows"][7][key] = value
    data["rows"][7]["bytes"] = int(value) if value < 2**63 else None
    show(data)
    terminal(data)


def test_large_models_are_folded():
    data = example.example_summary(num_layers=1)
    units = {f"model.layers.{i}.self_attn.{k}": 10_000 for i in range(80) for k in ("q_proj", "k_proj")}
    data["unit_weights"] = units
    data["allocations"] = {"learned-16x": dict.fromkeys(units, "2-half-step-row")}
    data["sensitivity"]["units"] = {u: {"sensitivity": {"2-half-step-row": -1e-4 * i}} for i, u in enumerate(units)}
    start = time.perf_counter()
    text = show(data)
    assert "40 most sensitive of 160 units" in text
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_cuts_nothing_off(width):
    text = terminal(example.example_summary(), width)
    assert all(len(line) <= width for line in text.splitlines())
    squeezed = re.sub(r"\s+", " ", text)
    for row in example.example_summary()["rows"]:
        assert row["name"] in squeezed
        if row["bytes"]:
            assert f"{row['bytes']:,}" in squeezed
        assert f"{row['wer']:.2f}" in squeezed
    assert "…" not in text


def test_render_writes_atomically_and_errors_name_the_file(tmp_path):
    out = tmp_path / "report.html"
    write_summary(tmp_path / "a" / "summary.json", example.example_summary())
    assert report.render([tmp_path / "a"], out) == out
    before = out.read_bytes()
    (tmp_path / "b.json").write_text(json.dumps({"rows": [{"name": "x", "ppl": -1}]}))
    with pytest.raises(FormatError, match=r"b\.json.*'ppl' is -1"):
        report.render([tmp_path / "a", tmp_path / "b.json"], out)
    with pytest.raises(DataError, match="no such file"):
        report.render([tmp_path / "c.json"], out)
    with pytest.raises(DataError, match="no summary given"):
        report.render([], out)
    assert out.read_bytes() == before
    assert read_summary(tmp_path / "a").title == "Example of a report (invented numbers)"


def test_the_uniform_curve_is_log_linear_in_bytes():
    from mixbits.report.plots import _equal_bytes_curve

    x, y = _equal_bytes_curve([1.0, 3.0, 4.0], [200.0, 50.0, 40.0], steps=2)
    assert x == pytest.approx([1, 2, 3, 3.5, 4])
    assert y == pytest.approx([200, 100, 50, (50 * 40) ** 0.5, 40])


def test_the_uniform_curve_joins_rows_of_one_method_and_the_first_of_each_size():
    rows = [
        ("uniform-1", 1_000_000, 130.0, "straight-through"),
        ("uniform-2", 2_000_000, 110.0, "straight-through"),
        ("uniform-1-admm", 1_000_000, 140.0, "admm"),
        ("uniform-2-steps", 2_000_000, 105.0, "straight-through"),
    ]
    found = [SummaryRow(name, bytes=size, ppl=ppl, method=method) for name, size, ppl, method in rows]
    other_scales = SummaryRow(
        "uniform-4", bytes=4_000_000, ppl=90.0, method=found[0].method, extra={"scales": "learned"}
    )
    assert _curve_points([*found, other_scales], like=found[0]) == ([1.0, 2.0], [130.0, 110.0])

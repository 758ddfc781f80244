"""The plot of a front: what is drawn, repeatable bytes, odd values; measured losses from three kinds of JSON."""

import pytest

from mixbits.errors import DataError, FormatError
from mixbits.report.front_plot import MeasuredPoint, draw_front, measured_points


def front_of(losses=(0.5, 0.1, 0.02)):
    points = [{"bytes": 1000 * (k + 1), "predicted_loss_increase_nats": v} for k, v in enumerate(losses)]
    uniform = [
        {"spec": "1-papers-row", "bytes": 1100, "predicted_loss_increase_nats": 0.5},
        {"spec": "1-papers-tensor", "bytes": 1090, "predicted_loss_increase_nats": 0.6},
        {"spec": "2-half-step-row", "bytes": 2900, "predicted_loss_increase_nats": 0.2},
    ]
    return {"measure": "hessian $x$", "full_bytes": 16000, "points": points, "uniform": uniform}


def test_an_svg_says_what_is_drawn_and_repeats_byte_for_byte(tmp_path):
    measured = (MeasuredPoint("learned_<b>&$a$", 1500, 0.3), MeasuredPoint("uniform-2", 2900, 0.4))
    first = draw_front(front_of(), tmp_path / "a" / "x.svg", measured=measured).read_text()
    assert first == draw_front(front_of(), tmp_path / "y.svg", measured=measured).read_text()
    for text in ("1-tensor, 1", "2-half-step", "uniform-2", "learned bits, predicted", "measured after training"):
        assert f">{text}</text>" in first
    assert "learned_&lt;b&gt;&amp;$a$" in first
    assert "hessian $x$ sensitivities" in first


@pytest.mark.parametrize("losses", [(0.5, 0.1, 0.0), (0.0,), (1e-9, 1e-12)])
@pytest.mark.parametrize("nats", [-0.3, 0.0, 1e-4])
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_zero_and_negative_losses_and_one_point_are_drawn(tmp_path, losses, nats, ending):
    path = draw_front(front_of(losses), tmp_path / f"x.{ending}", measured=[MeasuredPoint("m", 999, nats)])
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_measured_losses_of_a_summary_a_list_and_a_mapping():
    rows = [
        {"name": "full", "bytes": 16000, "delta_nats": 0.0},
        {"name": "full-continued", "bytes": 16000, "delta_nats": -0.01},
        {"name": "first-pass"},
        {"name": "learned-16x", "bytes": 1000, "delta_nats": 0.03},
    ]
    wanted = (MeasuredPoint("learned-16x", 1000, 0.03),)
    assert measured_points({"format": "mixbits-summary", "format_version": 1, "title": "t", "rows": rows}) == wanted
    assert measured_points([{"name": "learned-16x", "bytes": 1000, "nats": 0.03}]) == wanted
    assert measured_points({"learned-16x": {"bytes": 1000, "nats": 0.03}}) == wanted
    assert measured_points([]) == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected a summary, a list"),
        ([3], "point 0 is 3"),
        ([{"bytes": 5, "nats": None}], "point 0: 'nats' is None"),
        ([{"bytes": 5, "nats": 1.0}, {"bytes": 0, "nats": 1.0}], "point 1: 'bytes' is 0"),
        ({"a": 5}, "point 0: 'bytes' is None"),
        ({"rows": [{"name": ""}]}, "f.json"),
    ],
)
def test_bad_measured_losses(data, message):
    with pytest.raises(FormatError, match=message):
        measured_points(data, where="f.json")


def test_a_name_that_cannot_be_drawn(tmp_path):
    with pytest.raises(DataError, match=r"ending in \.png, \.svg, \.pdf"):
        draw_front(front_of(), tmp_path / "x.jpg")
    assert not list(tmp_path.iterdir())

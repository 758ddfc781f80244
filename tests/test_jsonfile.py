"""JSON files: round trips, not-finite numbers, atomicity, and every broken file a clear error."""

import json
import os

import numpy as np
import pytest

from mixbits.errors import DataError, FormatError
from mixbits.jsonfile import read_json, write_json


def test_round_trip_keeps_order_and_text(tmp_path):
    data = {"z": 1, "a": [1.5, True, None, "naïve ±"], "m": {"k": -0.0}}
    path = write_json(tmp_path / "deep" / "x.json", data)
    assert read_json(path) == data
    assert list(read_json(path)) == ["z", "a", "m"]


def test_not_finite_becomes_null_and_numpy_becomes_plain(tmp_path):
    data = {
        "nan": float("nan"),
        "inf": [float("-inf")],
        "np": np.float32(0.5),
        "bad": np.float64("nan"),
        "v": np.arange(2),
    }
    path = write_json(tmp_path / "x.json", data)
    assert json.loads(path.read_text()) == {"nan": None, "inf": [None], "np": 0.5, "bad": None, "v": [0, 1]}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write_json(tmp_path / "x.json", {"old": 1})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_something_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "x.json", {"x": object()})
    assert not list(tmp_path.iterdir())


def test_lone_surrogates_do_not_stop_a_write(tmp_path):
    assert read_json(write_json(tmp_path / "x.json", {"name": "a\ud800b"}))["name"].startswith("a")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"a": 1', "not JSON at line 1"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 10_000, "not readable"),
    ],
)
def test_broken_files_are_format_errors_that_name_the_file(tmp_path, raw, message):
    path = tmp_path / "broken.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        read_json(path)
    assert "broken.json" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_missing_file_and_folder_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(DataError, match="is a folder"):
        read_json(tmp_path)

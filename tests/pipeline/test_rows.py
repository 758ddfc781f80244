"""Rows: trained once, resumed, never mixed up with those of other settings."""

import contextlib

import pytest

from mixbits.errors import DataError, FormatError
from mixbits.pipeline.rows import fingerprint, finished_row, run_row
from mixbits.runs import read_json


def test_a_row_is_worked_on_once(tmp_path):
    calls = []

    def work(train, model):
        calls.append((train, model))
        train.mkdir()
        model.mkdir()
        return {"valid_nats": 1.5}

    row = run_row(tmp_path / "a", "key", work)
    again = run_row(tmp_path / "a", "key", work)
    assert calls == [(tmp_path / "a" / "train", tmp_path / "a" / "model")]
    assert again.record == row.record == read_json(tmp_path / "a" / "row.json")
    assert row.record["train_seconds"] >= 0
    assert row.model.is_dir()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model", "row.json"]


def test_a_killed_row_finds_its_checkpoints_again(tmp_path):
    def dies(train, model):
        train.mkdir()
        (train / "checkpoint").write_text("half way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_row(tmp_path, "key", dies)
    assert finished_row(tmp_path, "key") is None
    seen = []
    row = run_row(tmp_path, "key", lambda train, model: seen.append((train / "checkpoint").read_text()) or {"x": 1})
    assert seen == ["half way"]
    assert row.record == {"fingerprint": "key", "x": 1, "train_seconds": None}  # unknown: only the last part was timed
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, is_finished):
    def work(train, model):
        train.mkdir()
        (train / "checkpoint").write_text("precious")
        model.mkdir()
        (model / "weights").write_text("precious")
        if not is_finished:
            raise KeyboardInterrupt
        return {}

    with contextlib.suppress(KeyboardInterrupt):
        run_row(tmp_path, "one", work)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="other settings or data; choose another output folder"):
        run_row(tmp_path, "two", lambda train, model: pytest.fail("must not be called"))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "row.json").write_text('{"fingerprint": "ke')
    with pytest.raises(FormatError, match=r"row\.json"):
        run_row(tmp_path, "key", lambda train, model: {})


def test_fingerprints():
    assert fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1})
    assert len({fingerprint("a"), fingerprint("b"), fingerprint("a", None), fingerprint(("a",))}) == 4

"""bfloat16 only where it is fast, and one precision for the whole of a run."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from mixbits.errors import DataError, FormatError
from mixbits.lm import precision as precision_module
from mixbits.lm.precision import RUN_FILE, fast_bfloat16, resolve_precision
from mixbits.lm.train_settings import TrainSettings

_spec = importlib.util.spec_from_file_location("train_job", Path(__file__).parent / "train_job.py")
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine."""

    def pretend(architecture="x86_64", avx512=False, amx=False, arm=False, gpu=False):
        monkeypatch.setattr(precision_module.platform, "machine", lambda: architecture)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm, raising=False)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu
        )

    return pretend


@pytest.mark.parametrize(
    ("device", "facts", "fast"),
    [
        ("cpu", {}, False),
        ("cpu", {"arm": True}, False),  # oneDNN says yes on AVX512 without BF16, where it is emulated
        ("cpu", {"avx512": True}, True),
        ("cpu", {"amx": True, "architecture": "AMD64"}, True),
        ("cpu", {"architecture": "aarch64"}, False),
        ("cpu", {"architecture": "aarch64", "arm": True}, True),
        ("cpu", {"architecture": "arm64", "avx512": True}, False),
        ("cuda", {"avx512": True}, False),  # emulated on that GPU
        ("cuda", {"gpu": True}, True),
    ],
)
def test_auto_asks_the_machine(device, facts, fast, machine):
    machine(**facts)
    assert fast_bfloat16(device) == fast
    assert resolve_precision("auto", device) == ("bfloat16" if fast else "float32")
    assert resolve_precision("bfloat16", device) == "bfloat16"
    assert resolve_precision("float32", device) == "float32"


def test_this_machine_answers_and_auto_is_the_default():
    assert fast_bfloat16("cpu") in (True, False)
    assert TrainSettings().precision == "auto"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A finished run that was started with auto on a machine where that is float32."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_module, "fast_bfloat16", lambda device: False)
        _, _, found = job.run(folder, precision="auto", epochs=0.5)
    assert found["precision"] == "float32"
    return folder


def test_a_run_keeps_its_precision_on_another_machine(started, tmp_path, monkeypatch):
    monkeypatch.setattr(precision_module, "fast_bfloat16", lambda device: True)
    moved = shutil.copytree(started, tmp_path / "moved")
    assert job.run(moved, resume=True, precision="auto", epochs=0.5)[2]["precision"] == "float32"
    assert job.run(moved, resume=True, precision="float32", epochs=0.5)[2]["precision"] == "float32"
    with pytest.raises(
        DataError, match="was started in float32, precision is bfloat16 now; resume with float32 or auto"
    ):
        job.run(moved, resume=True, precision="bfloat16", epochs=0.5)
    assert json.loads((moved / RUN_FILE).read_text()) == {"precision": "float32"}


def test_without_a_checkpoint_a_run_starts_in_this_machines_precision(started, tmp_path, monkeypatch):
    monkeypatch.setattr(precision_module, "fast_bfloat16", lambda device: True)
    (tmp_path / RUN_FILE).write_text((started / RUN_FILE).read_text())
    found = job.run(tmp_path, resume=True, precision="auto", epochs=0.1)[2]
    assert found["precision"] == "bfloat16"
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"precision": "bfloat16"}


@pytest.mark.parametrize("text", ['{"precision": "float16"}', "[]", "{"])
def test_a_damaged_note_is_an_error(text, started, tmp_path):
    moved = shutil.copytree(started, tmp_path / "moved")
    (moved / RUN_FILE).write_text(text)
    with pytest.raises(FormatError, match=RUN_FILE):
        job.run(moved, resume=True, precision="auto", epochs=0.5)
